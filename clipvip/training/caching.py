"""Gradient caching: a batch's exact gradient in the memory of a part (arXiv 2101.06983).

A contrastive loss needs the features of the whole batch, but not their graphs at the same time.
So each part is embedded without a graph, and the loss gives the gradient of every feature. Then
each part is embedded again, from the same random state, to pass the gradients of its features on
to the weights. The memory no longer grows with the batch; the price is one more forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from clipvip.training.task import Batch, Features

SHARED = "scale"  # the one output that is not a row per clip


def forward_backward(
    embed: Callable[[Batch], Features],
    loss_of: Callable[[Features], Tensor],
    batch: Batch,
    part_size: int,
    *,
    backward: Callable[[Tensor], Any],
    without_sync: Callable[[], AbstractContextManager],
) -> Tensor:
    """Add the gradients of a batch's loss to those of the towers' parameters; return the loss, 0-d.

    Args:
        embed: towers, with autocast; moves a part to their device.
        loss_of: loss of the features of the whole batch.
        batch: a batch of a ClipLoader.
        part_size: number of clips to embed at a time.
        backward: computes gradients from a loss, which it may scale.
        without_sync: context for all parts but the last: ranks do not exchange gradients in it.
    """
    parts = split(batch, part_size)
    states, found = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            found.append(embed(part))
    features = {
        key: found[0][key] if key == SHARED else torch.cat([each[key] for each in found])
        for key in found[0]
    }
    for feature in features.values():
        feature.requires_grad_()
    loss = loss_of(features)
    backward(loss)

    first = 0
    for part, state in zip(parts, states, strict=True):
        after = first + len(part["frame_offsets"]) - 1
        last = part is parts[-1]
        with _from_random_state(state), nullcontext() if last else without_sync():
            again = embed(part)
            pairs = []
            for key, feature in features.items():
                if again[key].requires_grad and feature.grad is not None:
                    gradient = feature.grad if key == SHARED else feature.grad[first:after]
                    # Every part outputs the shared one; its gradient must count once.
                    pairs.append((again[key], gradient * (key != SHARED or last)))
            outputs, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, gradients)
        first = after
    return loss.detach()


def split(batch: Batch, clips: int) -> list[Batch]:
    """Split a training batch into parts of `clips` clips; the last may be smaller."""
    offsets = batch["frame_offsets"]
    count = len(offsets) - 1
    parts = []
    for first in range(0, count, clips):
        after = min(first + clips, count)
        frames = slice(int(offsets[first]), int(offsets[after]))
        part = {key: value[first:after] for key, value in batch.items()}
        part["pixel_values"] = batch["pixel_values"][frames]
        part["frame_offsets"] = offsets[first : after + 1] - offsets[first]
        parts.append(part)
    return parts


def _random_state() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


@contextmanager
def _from_random_state(state: list[Tensor]) -> Iterator[None]:
    """Draw random numbers from `state` inside, and continue with the former ones afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(state[0])
        for cuda in state[1:]:
            torch.cuda.set_rng_state(cuda)
        yield
