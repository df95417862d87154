"""Gradient caching: a batch's exact gradient in the memory of a part (arXiv 2101.06983).

A contrastive loss needs the features of the whole batch, but not their graphs at once. So
each part is embedded without a graph, the loss gives the gradient of every feature, and each
part is embedded again, from the same random state, to carry its features' gradients on to the
weights. One more forward pass buys memory that does not grow with the batch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
SHARED = "scale"  # the one output that is not a row for each clip


def backward(
    towers: Callable[[Batch], Batch],
    batch: Batch,
    micro_batch: int | None,
    loss_of: Callable[[Batch], Tensor],
    *,
    prepare: Callable[[Batch], Batch],
    run_backward: Callable[[Tensor], Any],
    without_sync: Callable[[], AbstractContextManager],
) -> Tensor:
    """The loss of a batch, its gradients added to those of the towers' parameters.

    Args:
        batch: of a ClipLoader.
        micro_batch: clips embedded at a time; None for all at once, without caching.
        prepare: moves a part to where the towers are.
        run_backward: of the loss; may scale it.
        without_sync: for all but the last of the parts that are embedded again: no exchange of
            gradients between ranks.
    """
    clips = len(batch["frame_offsets"]) - 1
    if micro_batch is None or micro_batch >= clips:
        loss = loss_of(towers(prepare(batch)))
        run_backward(loss)
        return loss.detach()

    parts = split(batch, micro_batch)
    states, found = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            found.append(towers(prepare(part)))
    features = {
        key: found[0][key] if key == SHARED else torch.cat([each[key] for each in found])
        for key in found[0]
    }
    for feature in features.values():
        feature.requires_grad_(feature.is_floating_point())
    loss = loss_of(features)
    run_backward(loss)

    first = 0
    for part, state in zip(parts, states, strict=True):
        after = first + len(part["frame_offsets"]) - 1
        last = after == clips
        with _from_random_state(state), nullcontext() if last else without_sync():
            again = towers(prepare(part))
            pairs = []
            for key, feature in features.items():
                if again[key].requires_grad and feature.grad is not None:
                    gradient = feature.grad if key == SHARED else feature.grad[first:after]
                    # Every part gives what all share; its gradient counts once.
                    pairs.append((again[key], gradient * (key != SHARED or last)))
            outputs, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, gradients)
        first = after
    return loss.detach()


def split(batch: Batch, clips: int) -> list[Batch]:
    """A training batch in parts of so many clips, and a rest."""
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
    """Within, random numbers from `state` on; after it, those that would have come."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(state[0])
        for cuda in state[1:]:
            torch.cuda.set_rng_state(cuda)
        yield
