"""One training step: rates, forward and backward of each micro-batch, clipping, the optimizer."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipvip import distributed
from clipvip.inputs import send, sent_ahead
from clipvip.model import CLIPViPModel
from clipvip.training import parallel
from clipvip.training.optimization import schedule
from clipvip.training.state import Run
from clipvip.training.task import Batch, Features, Task

MAX_LOGIT_SCALE = math.log(200)
SHARED = "scale"  # the one feature that is not a row per clip


@dataclass(frozen=True)
class StepResult:
    """Outcome of a step; all but the last three fields are the same on all ranks."""

    loss: float  # mean over micro-batches, each over the clips of all ranks
    grad_norm: float  # norm of all gradients before clipping
    logit_scale: float
    finite: bool  # whether loss and norm are finite; otherwise the weights were not changed
    stop: bool  # whether any rank was asked to stop
    rate: float  # learning rate of the step
    seconds: float  # duration of the step
    waited: float  # seconds of it spent waiting for data
    clips: Tensor  # indices of this rank's clips, int64 [n], on the CPU


def sent_batches(run: Run, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch]]:
    """Yield each batch of a ClipLoader with what the towers read of it, on their device. Of a batch
    that is embedded in parts nothing is sent yet, as the device need not hold more than two parts.
    """

    def send_whole(batch: Batch) -> Batch:
        return {} if part_size_of(run, batch) else to_device(batch, run.model, run.task)

    return sent_ahead(batches, send_whole, run.model.device)


def train_step(run: Run, batches: Iterator[tuple[Batch, Batch]], step: int) -> StepResult:
    """Take one optimizer step, over config.accumulation micro-batches of all ranks.

    batches: result of sent_batches.
    """
    started, waited, losses, seen = time.perf_counter(), 0.0, [], []
    rate = set_rates(run, step)
    for _ in range(run.config.accumulation):
        asked = time.perf_counter()
        batch, sent = next(batches)
        waited += time.perf_counter() - asked
        with run.accelerator.accumulate(run.towers):
            losses.append(forward_backward(run, batch, sent))
        seen.append(batch["clip_index"])
    norm = parallel.clip_gradients(run.model, run.config.optimizer.max_grad_norm)
    figures = torch.stack([torch.stack(losses).mean(), norm])

    broken = ~figures.isfinite().all()
    stop = torch.full_like(broken, run.preemption.asked)
    flags = distributed.on_any(torch.stack([broken, stop])).float()
    # Where found_inf is 1, AdamW changes nothing; the host need not wait for it to know.
    run.optimizer.found_inf = flags[0]  # type: ignore[attr-defined]
    run.optimizer.step()
    run.optimizer.zero_grad()
    with torch.no_grad():
        run.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        scale = run.model.logit_scale.exp()[None]
    if run.average:
        run.average.update(step)

    # The only place where the host waits for a GPU: the whole step is queued there by now.
    loss, grad_norm, logit_scale, *raised = torch.cat([figures, scale, flags]).tolist()
    seconds = time.perf_counter() - started
    return StepResult(
        *(loss, grad_norm, logit_scale, not raised[0], bool(raised[1])),
        *(rate, seconds, waited, torch.cat(seen)),
    )


def set_rates(run: Run, step: int) -> float:
    """Set each parameter group's learning rate for a step; return the run's."""
    optim = run.config.optimizer
    rate = optim.lr * schedule(step - 1, run.total_steps, optim.warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["share"]
    return rate


def forward_backward(run: Run, batch: Batch, sent: Batch) -> Tensor:
    """Add the gradients of one micro-batch to those of the weights; return its loss, 0-d.

    batch, sent: an item of sent_batches; config.micro_batch clips are embedded at a time, if given.
    """

    def embed(inputs: Batch) -> Features:
        with run.accelerator.autocast():
            return run.towers(inputs)

    def send_part(part: Batch) -> Batch:
        return to_device(part, run.model, run.task)

    def loss_of(features: Features) -> Tensor:
        return run.task.loss(features, batch)

    part_size = part_size_of(run, batch)
    if part_size is not None:
        return forward_backward_in_parts(
            *(embed, loss_of, batch, part_size),
            send_parts=lambda parts: sent_ahead(parts, send_part, run.model.device),
            backward=run.accelerator.backward,
            without_sync=lambda: parallel.without_sync(run.towers, run.model, run.accelerator),
        )
    loss = loss_of(embed(sent))
    run.accelerator.backward(loss)
    return loss.detach()


def part_size_of(run: Run, batch: Batch) -> int | None:
    """Return how many clips of a batch are embedded at a time; None for all."""
    size = run.config.micro_batch
    return size if size is not None and size < len(batch["frame_offsets"]) - 1 else None


def to_device(batch: Batch, model: CLIPViPModel, task: Task) -> Batch:
    """Send what a model's towers read of a batch to its device, except for masks that change no
    feature. The clips that have a video are sent as indices, "videos", if not all have one."""
    sent = {}
    present = batch.get("video_present")
    if present is not None and not present.all():
        sent["videos"] = send(present.nonzero().squeeze(1), model.device)
    for key, value in batch.items():
        name, _, kind = key.rpartition("_")
        needed: Tensor | None = value
        if kind == "mask":
            needed = task.mask(model, batch[f"{name}_ids"], value)
        if kind != "present" and needed is not None:
            sent[key] = send(needed, model.device)
    return sent


def forward_backward_in_parts(
    embed: Callable[[Batch], Features],
    loss_of: Callable[[Features], Tensor],
    batch: Batch,
    part_size: int,
    *,
    send_parts: Callable[[list[Batch]], Iterator[tuple[Batch, Batch]]],
    backward: Callable[[Tensor], Any],
    without_sync: Callable[[], AbstractContextManager],
) -> Tensor:
    """Add the exact gradients of a batch's loss in the memory of a part; return the loss, 0-d.

    This is gradient caching (arXiv 2101.06983). A contrastive loss needs the features of the whole
    batch, but not their graphs at the same time. So each part is embedded without a graph, and the
    loss gives the gradient of every feature. Then each part is embedded again, from the same random
    state, to pass the gradients of its features on to the weights. The price is one more forward
    pass.

    embed: towers, with autocast, of a part on their device.
    loss_of: loss of the features of the whole batch.
    part_size: clips per part.
    send_parts: yields each of some parts, and the part on the towers' device.
    backward: computes gradients from a loss, which it may scale.
    without_sync: context for all parts but the last, in which ranks do not exchange gradients.
    """
    parts = split(batch, part_size)
    sent = send_parts([*parts, *parts])
    with torch.no_grad():
        states, found = zip(*((_random_state(), embed(next(sent)[1])) for _ in parts), strict=True)
    features = {
        key: found[0][key] if key == SHARED else torch.cat([each[key] for each in found])
        for key in found[0]
    }
    for feature in features.values():
        feature.requires_grad_()
    loss = loss_of(features)
    backward(loss)

    first = 0
    for state, (part, inputs) in zip(states, sent, strict=True):
        after = first + len(part["frame_offsets"]) - 1
        last = part is parts[-1]
        with _from_random_state(state), nullcontext() if last else without_sync():
            again = embed(inputs)
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
    parts = []
    for first in range(0, len(batch["frame_offsets"]) - 1, clips):
        part = {key: value[first : first + clips] for key, value in batch.items()}
        offsets = batch["frame_offsets"][first : first + clips + 1]
        part["pixel_values"] = batch["pixel_values"][offsets[0] : offsets[-1]]
        part["frame_offsets"] = offsets - offsets[0]
        parts.append(part)
    return parts


def _random_state() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


@contextmanager
def _from_random_state(state: list[Tensor]) -> Iterator[None]:
    """Draw random numbers from `state` inside, and continue with the former ones afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(state[0])
        for cuda in state[1:]:
            torch.cuda.set_rng_state(cuda)
        yield
