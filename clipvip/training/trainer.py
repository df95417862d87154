"""Training: post-pretraining on several sources and fine-tuning for retrieval, in one loop."""

import functools
import itertools
import logging
import math
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from clipvip import distributed
from clipvip.data.annotations import Clip
from clipvip.data.loading import ClipLoader, counted
from clipvip.files import only_run, shown
from clipvip.losses import contrastive_loss, omnisource_loss
from clipvip.model import CLIPViPModel
from clipvip.model.pretrained import holds_code
from clipvip.model.processing import CLIPViPProcessor, normalize_frames
from clipvip.retrieval import TABLES
from clipvip.training import caching, checkpoint, parallel, watch
from clipvip.training.build import (
    build_model,
    find_resumed,
    load_clips,
    make_accelerator,
    refuse_foreign,
    settled,
    start_trackers,
    training_loader,
)
from clipvip.training.config import (
    ConfigError,
    Preempted,
    TrainConfig,
    TrainingError,
    changes,
    check,
    course,
)
from clipvip.training.evaluate import evaluate
from clipvip.training.optimization import adamw, run_steps, schedule
from clipvip.training.plan import TERA, peak_tera, plan
from clipvip.training.preemption import Preemption
from clipvip.training.reporting import Reporter
from clipvip.transfer import send

logger = logging.getLogger(__name__)

MAX_LOGIT_SCALE = math.log(200)
MAX_SKIPPED_IN_A_ROW = 10


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a configuration to its end, alone or as one of torchrun's processes.

    Writes to config.out: config.yaml; metrics.jsonl, a row each `log_every` steps and each
    evaluation; tensorboard/; bad_files.jsonl; checkpoints/step-*/; and the links `last` and,
    with validation clips, `best`, which CLIPViPModel.from_pretrained loads. Other files there are
    left alone.

    Returns {"step", "loss", "best_step", "best_metric"} of the finished run.

    Raises:
        ConfigError: the configuration cannot be run, another run is in config.out, or files of
            these names are there that no run wrote.
        TrainingError: the loss or its gradient is not finite; names the clips. Or the last
            checkpoint cannot be written, or none that is there is whole.
        Preempted: SIGTERM came to any rank; the step it came in is saved. A validation that it
            came in is left, and made up for by the run that goes on.
    """
    check(config)
    accelerator = make_accelerator(config)
    with (
        Preemption() as preemption,
        watch.Watch(config.lost_after),
        distributed.first_enters(alone_in(Path(config.out))),
    ):
        return _train(config, accelerator, preemption)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, and of its checkpoints where a link leads to them.
    A folder with somebody's own files in the way is refused before anything is written to it."""
    refuse_foreign(out)
    with ExitStack() as locks:
        try:
            for folder in (out, out / "checkpoints"):
                locks.enter_context(only_run(folder, "trains", ConfigError))
        except OSError as error:
            raise ConfigError(
                f"out is {shown(out)}, where no run can be written ({error.strerror}: "
                f"{shown(error.filename)}); give a folder that can be made and written to"
            ) from None
        yield


def _train(config: TrainConfig, accelerator: Accelerator, preemption: Preemption) -> dict[str, Any]:
    out, optim = Path(config.out), config.optimizer
    resumed = find_resumed(config)
    set_seed(config.seed)
    clips, validation = load_clips(config)
    model, processor = build_model(config, resumed)
    config = settled(config, processor)
    loader = training_loader(config, clips, model, processor)
    epoch_steps, total = run_steps(config, len(loader))
    step_tera = plan(model, config, accelerator.num_processes).step_flops / TERA
    peak = peak_tera(accelerator.device)
    towers = parallel.distribute(
        Towers(model, config, processor), model, config.parallel, accelerator
    )
    optimizer = adamw(model, optim)
    average = parallel.Average(model, config.ema) if config.ema else None
    set_seed(config.seed, device_specific=True)
    state: dict[str, Any] = {"step": 0, "clips": 0}
    if resumed:
        state = load_state(resumed, config, model, optimizer, accelerator)
    start_trackers(accelerator, config, state["step"])
    batches = endless(loader, state["clips"] // (config.batch_size // config.accumulation))
    backward = functools.partial(
        caching.backward,
        parallel.embedder(towers, accelerator),
        micro_batch=config.micro_batch,
        prepare=lambda batch: to_device(batch, accelerator.device),
        run_backward=accelerator.backward,
        without_sync=lambda: parallel.without_sync(towers, model, accelerator),
    )

    reporter = Reporter(accelerator, out, state["step"], total)
    measure = functools.partial(
        validate, config, model, processor, average, validation, state, reporter, preemption
    )
    with reporter:
        reporter.say(describe(config, model, len(clips), accelerator, state["step"], total))
        if validation and state.get("unmeasured"):  # SIGTERM came before that step's figures
            measure()
            best = state.get("best_step")
            distributed.first_does(lambda: checkpoint.move_links(out, state["step"], best))
        if distributed.on_any(torch.tensor([preemption.asked], device=accelerator.device))[0]:
            raise preempted(state["step"], total)
        for step in range(state["step"] + 1, total + 1):
            started, waited, losses, seen = time.perf_counter(), 0.0, [], []
            rate = optim.lr * schedule(step - 1, total, optim.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            for _ in range(config.accumulation):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                with accelerator.accumulate(towers):
                    losses.append(backward(batch, loss_of=loss_of(batch, config)))
                seen.append(batch["clip_index"])
            norm = parallel.clip_gradients(model, optim.max_grad_norm)
            figures = torch.stack([torch.stack(losses).mean(), norm])
            wrong = ~figures.isfinite().all()
            flags = torch.stack([wrong, torch.full_like(wrong, preemption.asked)])
            flags = distributed.on_any(flags).float()
            # Where found_inf is 1, AdamW changes nothing; the host need not wait for it to know.
            optimizer.found_inf = flags[0]  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
                scale = model.logit_scale.exp()[None]
            if average:
                average.follow(step)

            # The only place where the host waits for a GPU: the whole step is queued there by now.
            mean_loss, grad_norm, scale, broken, stop = torch.cat([figures, scale, flags]).tolist()
            preemption.asked |= bool(stop)  # of one rank, of all
            if broken:
                skip_or_stop(config, step, mean_loss, grad_norm, loader, seen, state, reporter)
            else:
                state["skipped_in_a_row"] = 0
            took = time.perf_counter() - started
            row = {
                "loss": mean_loss,
                "lr": rate,
                "logit_scale": scale,
                "grad_norm": grad_norm,
                "epoch": step / epoch_steps,
                "clips_per_second": config.batch_size / took,
                "data_wait": waited / took,
                "tera_flops": step_tera / took / accelerator.num_processes,
                "skipped_steps": state.get("skipped_steps", 0),
            }
            if peak:  # model FLOP/s utilisation
                row["mfu"] = row["tera_flops"] / peak
            if due(step, config.log_every, total):
                reporter.write(step, row)
            reporter.advance(step, row)
            state.update(step=step, loss=mean_loss, clips=state["clips"] + config.batch_size)
            improved = False
            if validation and due(step, config.eval_every or epoch_steps, total):
                improved = measure()
            stop = stop or state.get("unmeasured", False)
            if improved or stop or due(step, config.save_every or epoch_steps, total):
                save_state(config, model, processor, optimizer, average, state, accelerator, total)
            if stop and (step < total or state.get("unmeasured")):
                raise preempted(step, total)
        if set(loader.decoded) - {"PyAV"}:
            reporter.say(f"clips decoded by: {counted(loader.decoded)}")
        if loader.bad_files:
            reporter.say(f"{len(loader.bad_files)} unreadable files: {out / 'bad_files.jsonl'}")
    return {key: state.get(key) for key in ("step", "loss", "best_step", "best_metric")}


class Towers(nn.Module):
    """A batch to the unit features that its task compares: what data parallelism wraps."""

    def __init__(
        self, model: CLIPViPModel, config: TrainConfig, processor: CLIPViPProcessor
    ) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = processor.image_mean, processor.image_std
        self.texts = ["text"]
        self.frames = False
        if config.task == "omnisource":
            self.texts = ["subtitle"] + ["caption"] * (config.variant != "vs")
            self.frames = config.variant.endswith("fc")

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"video", the task's texts, "frame" if used: [n, P]; "scale": 0-d}."""
        pixels, offsets = batch["pixel_values"], batch["frame_offsets"]
        count = len(offsets) - 1
        if self.frames:  # images are videos of one frame, in the same packed batch
            pixels = torch.cat([pixels, batch["image"]])
            images = torch.arange(1, count + 1, device=offsets.device, dtype=offsets.dtype)
            offsets = torch.cat([offsets, offsets[-1] + images])
        pixels = normalize_frames(pixels, self.mean, self.std)
        visual = F.normalize(self.model.get_video_features(pixels, offsets).float(), dim=-1)
        features = {"video": visual[:count], "scale": self.model.logit_scale.exp()}
        if self.frames:
            features["frame"] = visual[count:]
        for name in self.texts:
            mask = batch.get(f"{name}_mask")
            if mask is not None and self.model.text_model.config._attn_implementation == "sdpa":
                mask = causal_mask(mask)
            text = self.model.get_text_features(batch[f"{name}_ids"], mask)
            features[name] = F.normalize(text.float(), dim=-1)
        return features | presence(batch)


def causal_mask(mask: Tensor) -> Tensor:
    """bool [n, 1, length, length], True where a token attends to another: to an earlier one or
    itself, and never to padding.

    mask: [n, length], 0 for padding. transformers builds the same mask, but first asks whether
    there is any padding at all, for which the host waits for the GPU.
    """
    length = mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return earlier & mask.bool()[:, None, None]


def presence(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which clips have which of the sources that may be absent: bool [n] each."""
    return {key: value for key, value in batch.items() if key.endswith("_present")}


def loss_of(batch: dict[str, Tensor], config: TrainConfig) -> Callable[[dict[str, Tensor]], Tensor]:
    """The function that computes the loss of a loader's batch from its features.

    Presence masks stay on the host: they decide the logits' shapes, which the host must know.
    """
    return lambda features: compute_loss(features | presence(batch), config)


def compute_loss(features: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """The task's loss over the clips of all ranks, the same on every rank."""
    scale, video = features["scale"], features["video"]
    if config.task == "retrieval":
        return contrastive_loss(
            video, features["text"], scale, sharded=True, backend=config.backend
        )
    return omnisource_loss(
        video,
        features["subtitle"],
        features.get("frame"),
        features.get("caption"),
        scale,
        config.variant,
        subtitle_present=features["subtitle_present"],
        caption_present=features["caption_present"],
        sharded=True,
        backend=config.backend,
    )


def endless(loader: Any, done: int) -> Iterator[dict[str, Tensor]]:
    """Batches over all epochs, from after the first `done`. Leaves torch's random state as it
    was, so that the batches drawn ahead or again never change the run."""
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


def validate(
    config: TrainConfig,
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
    average: parallel.Average | None,
    clips: list[Clip],
    state: dict[str, Any],
    reporter: Reporter,
    preemption: Preemption,
) -> bool:
    """Evaluate and log; True, and noted in state, where the model is the best so far. Where a rank
    is asked to stop meanwhile, that there are no figures is noted instead."""
    averaged = average.in_place() if average else nullcontext()
    try:
        with averaged, torch.random.fork_rng(devices=[]), parallel.whole_on_each_rank(model):
            result = evaluate(
                model,
                clips,
                processor,
                batch_size=config.eval_batch_size,
                num_workers=config.data.num_workers,
                max_bad_share=config.data.max_bad_share,
                decoder=config.data.decoder,
                dtype=torch.bfloat16 if config.mixed_precision == "bf16" else None,
                asked_to_stop=lambda: preemption.asked,
            )
    except Preempted:
        state["unmeasured"] = True
        return False
    state["unmeasured"] = False
    row = {f"{name}/{key}": value for name in TABLES for key, value in result[name].items()}
    reporter.write(state["step"], {f"validation/{key}": value for key, value in row.items()})
    value = row[config.best_metric]
    best = state.get("best_metric")
    better = best is None or (value < best if "rank" in config.best_metric else value > best)
    if better:
        state["best_before"] = {key: state.get(key) for key in ("best_step", "best_metric")}
        state.update(best_step=state["step"], best_metric=value)
    reporter.say(
        f"step {state['step']} · {config.best_metric} {value:.2f}"
        + (" (best)" if better else f" (best {best:.2f} at step {state['best_step']})")
    )
    return better


def save_state(
    config: TrainConfig,
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
    optimizer: torch.optim.Optimizer,
    average: parallel.Average | None,
    state: dict[str, Any],
    accelerator: Accelerator,
    total: int,
) -> None:
    """Write one checkpoint, all of it or nothing, and move OUT/last and OUT/best.

    Its model is the one that is validated: the average, where there is one. Where it cannot be
    written, that is told and the run goes on, since the next may be; it is TrainingError, on
    all ranks, where there is no next.
    """
    random_states = distributed.all_gather_objects(checkpoint.random_state())
    moments = parallel.whole_moments(model, optimizer)
    weights = parallel.whole_weights(model)
    live = {}
    if average:
        live = {"weights": weights}
        with average.in_place():
            weights = parallel.whole_weights(model)

    def write(folder: Path) -> None:
        # A copy, as transformers empties it and the write may be retried.
        model.save_pretrained(folder / "model", state_dict=dict(weights))
        processor.save_pretrained(folder / "model")
        whole = {
            **state,
            **live,
            "optimizer": moments,
            "random": random_states,
            "course": course(config, accelerator.num_processes),
        }
        with (folder / "state.pt").open("wb") as file:  # its errors say why; torch's do not
            torch.save(whole, file)

    def save() -> str | None:
        out, step, best_step = Path(config.out), state["step"], state.get("best_step")
        folder, keep = out / "checkpoints", config.keep_checkpoints
        protected = {best_step}
        if best_step == step:  # the one before it stays, should this one be damaged
            protected.add(state["best_before"]["best_step"])
        try:
            try:
                checkpoint.save(folder, step, write)
            except OSError as error:
                doomed = checkpoint.make_room(folder, error, keep, protected)
                if not doomed:
                    raise
                names = ", ".join(path.name for path in doomed)
                told = "step %d: the disk is full; deleted %s, which was next to go, and retries"
                logger.warning(told, step, names)
                checkpoint.save(folder, step, write)
        except OSError as error:
            return " ".join(str(error).split())
        checkpoint.move_links(out, step, best_step)
        checkpoint.prune(folder, keep, protected)
        return None

    problem = distributed.first_does(save)
    if problem is None:
        return
    told = f"step {state['step']}: the checkpoint could not be written: {problem}"
    if state["step"] == total:
        raise TrainingError(f"{told}; it was the last: make room, and resume=latest writes it")
    if state.get("best_step") == state["step"]:
        state.update(state["best_before"])  # whose checkpoint is there
    if accelerator.is_main_process:
        logger.warning("%s; the run goes on, and the next is tried", told)


def load_state(
    resumed: Path,
    config: TrainConfig,
    model: CLIPViPModel,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Restore optimiser and random states; the model was already built from `resumed`, and is
    the average where the checkpoint holds other weights beside it."""
    try:
        state = torch.load(resumed / "state.pt", map_location="cpu", weights_only=True)
        parallel.load_moments(model, optimizer, state.pop("optimizer"))
        if "weights" in state:
            parallel.load_weights(model, state.pop("weights"))
        random_states, then = state.pop("random"), state.pop("course")
        if len(random_states) == accelerator.num_processes:
            checkpoint.set_random_state(random_states[accelerator.process_index])
        state["step"], state["clips"], then = int(state["step"]), int(state["clips"]), dict(then)
    except torch.OutOfMemoryError:  # a RuntimeError too, but no fault of the checkpoint
        raise
    except (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError,
            ValueError, pickle.UnpicklingError) as error:  # fmt: skip
        if holds_code(error):
            reason = "it holds more than tensors and numbers: code, or a pickle that could run it"
        elif isinstance(error, pickle.UnpicklingError):  # torch's advice is to run what it holds
            reason = "it is damaged, or not a file of torch.save"
        else:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise TrainingError(
            f"{shown(resumed / 'state.pt')} does not hold the state of a run of this model "
            f"({reason}); give another out to start anew"
        ) from error
    best = distributed.first_does(
        lambda: checkpoint.whole_or_none(Path(config.out) / "checkpoints", state.get("best_step"))
    )
    if best is None:
        state.update(best_step=None, best_metric=None)
    if accelerator.is_main_process:
        checkpoint.move_links(Path(config.out), state["step"], best)
        for change in changes(then, config, accelerator.num_processes):
            print(change, flush=True)
    return state


def preempted(step: int, total: int) -> Preempted:
    return Preempted(f"SIGTERM: ends after step {step} of {total}; resume=latest goes on")


def due(step: int, every: int, total: int) -> bool:
    return step % every == 0 or step == total


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The part of a loader's batch that the towers read, without masks that mask nothing."""
    return {
        key: send(value, device)
        for key, value in batch.items()
        if not key.endswith(("_present", "_mask")) or (key.endswith("_mask") and not value.all())
    }


def describe(
    config: TrainConfig,
    model: nn.Module,
    clips: int,
    accelerator: Accelerator,
    step: int,
    total: int,
) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"{config.task} · {millions:.1f} M parameters · {clips} clips · steps {step + 1} to "
        f"{total} of {config.batch_size} clips on {accelerator.num_processes} × "
        f"{accelerator.device.type}"
    )


def skip_or_stop(
    config: TrainConfig,
    step: int,
    loss: float,
    norm: float,
    loader: ClipLoader,
    seen: list[Tensor],
    state: dict[str, Any],
    reporter: Reporter,
) -> None:
    """Name what all ranks saw in this step, and count it; TrainingError where that is enough."""
    indices = itertools.chain(*distributed.all_gather_objects(torch.cat(seen).tolist()))
    names = ", ".join(sorted({shown(loader.name(index)) for index in indices}))
    told = f"step {step}: loss {loss}, gradient norm {norm}: not finite"
    state["skipped_steps"] = state.get("skipped_steps", 0) + 1
    state["skipped_in_a_row"] = state.get("skipped_in_a_row", 0) + 1
    if config.on_nonfinite == "stop":
        raise TrainingError(
            f"{told}; the last checkpoint is from before; on_nonfinite=skip leaves such steps out; "
            f"clips of this step: {names}"
        )
    if state["skipped_in_a_row"] == MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"{told}, the {MAX_SKIPPED_IN_A_ROW}th step in a row; clips of this step: {names}"
        )
    reporter.say(f"{told}; skipped; its clips: {names}")
