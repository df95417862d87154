"""Training: post-pretraining on several sources and fine-tuning, in one loop."""

import itertools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration

from clipvip import distributed
from clipvip.data.loading import ClipLoader, counted
from clipvip.files import shown
from clipvip.training import checkpoint, parallel, watch
from clipvip.training.config import (
    ConfigError,
    Preempted,
    TrainConfig,
    TrainingError,
    check,
    check_batch,
)
from clipvip.training.plan import TERA
from clipvip.training.preemption import Preemption
from clipvip.training.reporting import known_trackers
from clipvip.training.state import Run, save_state
from clipvip.training.step import StepResult, sent_batches, train_step
from clipvip.training.task import Batch

MAX_SKIPPED_IN_A_ROW = 10
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when it starts


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a configuration to its end, in one process or as one of torchrun's.

    Writes to config.out: config.yaml; metrics.jsonl, with a row every `log_every` steps and per
    evaluation; tensorboard/; bad_files.jsonl; checkpoints/step-*/; and the links `last` and, with
    validation clips, `best`, which CLIPViPModel.from_pretrained loads. Other files there stay.

    Returns {"step", "loss", "best_step", "best_metric"} of the finished run.

    Raises:
        ConfigError: the configuration cannot be run, config.out holds another run, or it holds
            files of these names that no run wrote.
        TrainingError: the loss or its gradient is not finite (the message names the clips), the
            final checkpoint cannot be written, or all existing checkpoints are damaged.
        Preempted: any rank received SIGTERM; the step it was in is saved. A validation that it
            interrupted is repeated by the run that resumes.
    """
    check(config)
    accelerator = make_accelerator(config)
    with (
        Preemption() as preemption,
        watch.Watch(config.lost_after),
        distributed.first_enters(checkpoint.alone_in(Path(config.out))),
    ):
        run = Run(config, accelerator, preemption)
        with run.reporter:
            run_loop(run)
    state = run.state
    return {key: getattr(state, key) for key in ("step", "loss", "best_step", "best_metric")}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Meet the other ranks, and set up this one's device, precision and trackers."""
    transformers.utils.logging.disable_progress_bar()  # it would break ours when a model is saved
    AcceleratorState._reset_state()  # an earlier run of this process may have set another precision
    if config.deterministic:
        if torch.cuda.is_initialized() and CUBLAS not in os.environ:
            raise ConfigError(
                "deterministic=true needs CUBLAS_WORKSPACE_CONFIG in the environment before a "
                "process first uses its GPU, and this one has used it: start Python again with "
                "CUBLAS_WORKSPACE_CONFIG=:4096:8"
            )
        os.environ.setdefault(CUBLAS, ":4096:8")  # without it PyTorch raises
        torch.use_deterministic_algorithms(True)
    distributed.start(config.timeout)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        log_with=known_trackers(config),
        project_config=ProjectConfiguration(config.out, f"{config.out}/tensorboard"),
    )
    check_batch(config, accelerator.num_processes)
    return accelerator


def run_loop(run: Run) -> None:
    """Take all remaining steps, with their reports, validations and checkpoints."""
    config, state, total = run.config, run.state, run.total_steps
    ranks, device = run.accelerator.num_processes, run.accelerator.device
    parts = [config.task, f"{run.cost.parameters / 1e6:.1f} M parameters", f"{run.clips} clips"]
    parts += [", ".join(run.sources)] if run.sources else []
    steps = f"steps {state.step + 1} to {total} of {config.batch_size} clips"
    run.reporter.say(" · ".join([*parts, f"{steps} on {ranks} × {device.type}"]))
    if run.validation and state.unmeasured:
        validate(run)
        distributed.first_does(lambda: checkpoint.move_links(run.out, state.step, state.best_step))
    if distributed.on_any(torch.tensor([run.preemption.asked], device=device))[0]:
        raise preempted(run)

    done = state.clips // (config.batch_size // config.accumulation)
    left = (total - state.step) * config.accumulation
    batches = sent_batches(run, itertools.islice(endless(run.loader, done), left))
    for step in range(state.step + 1, total + 1):
        result = train_step(run, batches, step)
        run.preemption.asked |= result.stop
        if result.finite:
            state.skipped_in_a_row = 0
        else:
            skip_or_stop(run, step, result)
        report(run, step, result)
        state.step, state.loss = step, result.loss
        state.clips += config.batch_size

        improved = False
        if run.validation and due(step, config.eval_every or run.epoch_steps, total):
            improved = validate(run)
        stop = result.stop or state.unmeasured
        if improved or stop or due(step, config.save_every or run.epoch_steps, total):
            save_state(run)
        if stop and (step < total or state.unmeasured):
            raise preempted(run)

    if set(run.loader.decoded) - {"PyAV"}:
        run.reporter.say(f"clips decoded by: {counted(run.loader.decoded)}")
    if run.loader.bad_files:
        listed = run.out / "bad_files.jsonl"
        run.reporter.say(f"{len(run.loader.bad_files)} unreadable files: {listed}")


def endless(loader: ClipLoader, done: int) -> Iterator[Batch]:
    """Yield the batches of all epochs after the first `done` ones.

    Torch's random state is left unchanged, so the run does not depend on how many batches are
    drawn ahead or drawn again.
    """
    first, skipped = divmod(done, len(loader))
    for epoch in itertools.count(first):
        loader.set_epoch(epoch)
        loader.skip(skipped if epoch == first else 0)
        with torch.random.fork_rng(devices=[]):
            batches = iter(loader)
        while True:
            with torch.random.fork_rng(devices=[]):
                batch = next(batches, None)
            if batch is None:
                break
            yield batch


def validate(run: Run) -> bool:
    """Evaluate and report; return whether the model is the best so far, and note it in the state.

    If a rank is asked to stop meanwhile, state.unmeasured is set instead.
    """
    config, state = run.config, run.state
    averaged = run.average.in_place() if run.average else nullcontext()
    try:
        with averaged, torch.random.fork_rng(devices=[]), parallel.whole_on_each_rank(run.model):
            result = run.task.evaluate(
                run.model,
                run.validation,
                run.processor,
                batch_size=config.eval_batch_size,
                num_workers=config.data.num_workers,
                max_bad_share=config.data.max_bad_share,
                decoder=config.data.decoder,
                mixed_precision=config.mixed_precision,
                asked_to_stop=lambda: run.preemption.asked,
            )
    except Preempted:
        state.unmeasured = True
        return False
    state.unmeasured = False
    row = {
        f"{name}/{key}": value for name in run.task.tables for key, value in result[name].items()
    }
    run.reporter.write(state.step, {f"validation/{key}": value for key, value in row.items()})
    run.measured = state.step, row
    metric, best = str(config.best_metric), state.best_metric
    value = row[metric]
    better = best is None or (value < best if "rank" in metric else value > best)
    if better:
        state.set_best(value)
    run.reporter.say(
        f"step {state.step} · {metric} {value:.2f}"
        + (" (best)" if better else f" (best {best:.2f} at step {state.best_step})")
    )
    return better


def skip_or_stop(run: Run, step: int, result: StepResult) -> None:
    """Count a step whose loss or gradient is not finite, and name the clips of all ranks in it.

    Raises TrainingError if such a step must stop the run.
    """
    indices = itertools.chain(*distributed.all_gather_objects(result.clips.tolist()))
    names = ", ".join(sorted({shown(run.loader.name(index)) for index in indices}))
    said = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite"
    run.state.skipped_steps += 1
    run.state.skipped_in_a_row += 1
    if run.config.on_nonfinite == "stop":
        raise TrainingError(
            f"{said}; the last checkpoint is from before this step; set on_nonfinite=skip to skip "
            f"such steps; clips of this step: {names}"
        )
    if run.state.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"{said}, the {MAX_SKIPPED_IN_A_ROW}th step in a row; clips of this step: {names}"
        )
    run.reporter.say(f"{said}; skipped; its clips: {names}")


def report(run: Run, step: int, result: StepResult) -> None:
    """Log the metrics of a step and show progress."""
    row = {
        "loss": result.loss,
        "lr": result.rate,
        "logit_scale": result.logit_scale,
        "grad_norm": result.grad_norm,
        "epoch": step / run.epoch_steps,
        "clips_per_second": run.config.batch_size / result.seconds,
        "data_wait": result.waited / result.seconds,
        "tera_flops": run.cost.step_flops / TERA / result.seconds / run.accelerator.num_processes,
        "skipped_steps": run.state.skipped_steps,
    }
    if run.peak_tera:  # model FLOP/s utilization
        row["mfu"] = row["tera_flops"] / run.peak_tera
    if due(step, run.config.log_every, run.total_steps):
        run.reporter.write(step, row)
    run.reporter.advance(step, row)


def due(step: int, every: int, total: int) -> bool:
    return step % every == 0 or step == total


def preempted(run: Run) -> Preempted:
    return Preempted(
        f"SIGTERM: ends after step {run.state.step} of {run.total_steps}; resume=latest continues"
    )
