"""One training step: rates, forward and backward of each micro-batch, clipping, the optimizer."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clipvip import distributed
from clipvip.inputs import send
from clipvip.training import caching, parallel
from clipvip.training.optimization import schedule
from clipvip.training.state import Run
from clipvip.training.task import Batch, Features

MAX_LOGIT_SCALE = math.log(200)


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


def train_step(run: Run, batches: Iterator[Batch], step: int) -> StepResult:
    """Take one optimizer step, over config.accumulation micro-batches of all ranks."""
    started, waited, losses, seen = time.perf_counter(), 0.0, [], []
    rate = set_rates(run, step)
    for _ in range(run.config.accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        with run.accelerator.accumulate(run.towers):
            losses.append(forward_backward(run, batch))
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


def forward_backward(run: Run, batch: Batch) -> Tensor:
    """Add the gradients of one micro-batch to those of the weights; return its loss, 0-d.

    batch: batch of a ClipLoader; config.micro_batch clips of it are embedded at a time, if given.
    """

    def embed(part: Batch) -> Features:
        part = to_device(part, run.accelerator.device)
        with run.accelerator.autocast():
            return run.towers(part)

    loss_of = partial(run.task.loss, batch=batch)
    part_size = run.config.micro_batch
    if part_size is not None and part_size < len(batch["frame_offsets"]) - 1:
        return caching.forward_backward(
            *(embed, loss_of, batch, part_size),
            backward=run.accelerator.backward,
            without_sync=lambda: parallel.without_sync(run.towers, run.model, run.accelerator),
        )
    loss = loss_of(embed(batch))
    run.accelerator.backward(loss)
    return loss.detach()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors that the towers read, except for masks that mask nothing."""
    return {
        key: send(value, device)
        for key, value in batch.items()
        if not key.endswith(("_present", "_mask")) or (key.endswith("_mask") and not value.all())
    }
