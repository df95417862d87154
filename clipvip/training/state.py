"""The state of a run: the parts it trains with, its counters, and how a checkpoint keeps them."""

import logging
import pickle
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from clipvip import distributed
from clipvip.files import shown
from clipvip.model.card import write_card
from clipvip.model.pretrained import holds_code
from clipvip.training import checkpoint, lora, parallel
from clipvip.training.build import build_model, load_clips, settled, training_loader
from clipvip.training.card import run_card
from clipvip.training.config import TrainConfig, TrainingError, flat
from clipvip.training.optimization import adamw, run_steps
from clipvip.training.plan import peak_tera, plan
from clipvip.training.preemption import Preemption
from clipvip.training.reporting import Reporter, start_trackers
from clipvip.training.sources import describe_sources, image_share
from clipvip.training.task import task_of

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """Counters of a run. A checkpoint's state.pt holds them under these names."""

    step: int = 0  # last step that was taken
    clips: int = 0  # clips drawn so far, over all ranks
    loss: float | None = None  # of the last step; NaN or infinite if that step was skipped
    best_step: int | None = None
    best_metric: float | None = None  # best validation so far, by config.best_metric
    best_before: dict[str, Any] | None = None  # best_step and best_metric before that
    unmeasured: bool = False  # whether SIGTERM ended the validation of the last step
    skipped_steps: int = 0  # because their loss or gradient was not finite
    skipped_in_a_row: int = 0

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RunState":
        """Read the counters in state.pt, of which earlier versions wrote only some.

        Raises LookupError, TypeError or ValueError if it is not the state of a run.
        """
        known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
        return cls(**{**known, "step": int(saved["step"]), "clips": int(saved["clips"])})

    def set_best(self, metric: float) -> None:
        """Make this step the best."""
        self.best_before = {"best_step": self.best_step, "best_metric": self.best_metric}
        self.best_step, self.best_metric = self.step, metric

    def unset_best(self) -> None:
        """Return to the best before this step, if this step was made the best."""
        if self.best_step == self.step and self.best_before is not None:
            vars(self).update(self.best_before)


class Run:
    """The parts that a run trains with, built from its newest checkpoint if it resumes."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, preemption: Preemption
    ) -> None:
        self.out = Path(config.out)
        self.accelerator = accelerator
        self.preemption = preemption  # says whether SIGTERM asked this rank to stop
        resumed = checkpoint.find_resumed(config)
        set_seed(config.seed)
        clips, self.validation = load_clips(config)  # validation: empty for none
        self.clips = len(clips)
        self.sources = describe_sources(clips)  # empty if there is one alone
        self.model, self.processor = build_model(config, resumed)
        # From here on with the settings that it left to the processor.
        self.config = config = settled(config, self.processor)
        self.loader = training_loader(config, clips, self.processor)
        self.epoch_steps, self.total_steps = run_steps(config, len(self.loader))  # optimizer steps
        processes = accelerator.num_processes
        self.cost = plan(self.model, config, processes, image_share(clips))
        self.peak_tera = peak_tera(accelerator.device)
        self.task = task_of(config)
        self.towers = parallel.distribute(  # the task's towers around the model
            self.task.towers(self.model, self.processor), self.model, config.parallel, accelerator
        )
        self.optimizer = adamw(self.model, config.optimizer)
        self.average = parallel.Average(self.model, config.ema) if config.ema else None
        set_seed(config.seed, device_specific=True)
        self.measured: tuple[int, dict[str, float]] = 0, {}  # last validated step, and its metrics
        self.state = load_state(self, resumed) if resumed else RunState()
        distributed.first_does(lambda: checkpoint.write_settings(config))
        distributed.first_does(lambda: start_trackers(accelerator, config, self.state.step))
        self.reporter = Reporter(accelerator, self.out, self.state.step, self.total_steps)


def save_state(run: Run) -> None:
    """Write a checkpoint, whole or not at all, and move the links OUT/last and OUT/best to it.

    Its model is the one that is validated: the average, if there is one, and with LoRA's changes
    merged. If the checkpoint cannot be written, a warning is logged and the run continues, since
    the next one may succeed; if it is the final one, raises TrainingError on all ranks. All ranks
    must call.
    """
    state = run.state
    weights = own = parallel.whole_weights(run.model)
    if run.average:
        with run.average.in_place():
            weights = parallel.whole_weights(run.model)
    plain = lora.merged(run.model, weights)
    not_in_model = {name: weight for name, weight in own.items() if plain.get(name) is not weight}
    whole = {
        **asdict(state),
        **({"weights": not_in_model} if not_in_model else {}),
        "optimizer": parallel.whole_moments(run.model, run.optimizer),
        "random": distributed.all_gather_objects(random_state()),
        "course": course(run.config, run.accelerator.num_processes),
    }
    measured_at, metrics = run.measured
    card = run_card(
        run.config,
        run.model.config,
        step=state.step,
        steps=run.total_steps,
        clips=run.clips,
        metrics=metrics if measured_at == state.step else {},
    )

    def write(folder: Path) -> None:
        # A copy, as transformers empties it and the write may be retried.
        run.model.save_pretrained(folder / "model", state_dict=dict(plain))
        run.processor.save_pretrained(folder / "model")
        write_card(folder / "model", card)
        if lora.has_lora(run.model):
            lora.save_adapter(run.model, weights, folder / "adapter")
        with (folder / "state.pt").open("wb") as file:  # its errors say why; torch's do not
            torch.save(whole, file)

    def save() -> str | None:
        folder, keep = run.out / "checkpoints", run.config.keep_checkpoints
        protected = {state.best_step}
        if state.best_step == state.step and state.best_before:
            protected.add(state.best_before["best_step"])  # in case this one gets damaged
        try:
            checkpoint.save_with_room(folder, state.step, write, keep, protected)
        except OSError as error:
            return " ".join(str(error).split())
        checkpoint.move_links(run.out, state.step, state.best_step)
        checkpoint.prune(folder, keep, protected)
        return None

    problem = distributed.first_does(save)
    if problem is None:
        return
    said = f"step {state.step}: the checkpoint could not be written: {problem}"
    if state.step == run.total_steps:
        raise TrainingError(
            f"{said}; this was the final checkpoint: free some space and rerun with resume=latest, "
            "which writes it"
        )
    state.unset_best()
    if run.accelerator.is_main_process:
        logger.warning("%s; the run continues, and the next save tries again", said)


def load_state(run: Run, resumed: Path) -> RunState:
    """Restore the optimizer and random generators from a checkpoint, and return its counters.

    The model was built from the checkpoint already. If its state.pt holds weights too, the model
    is an average or has LoRA's changes merged; then those weights replace the model's. Prints what
    has changed in the configuration.

    Raises TrainingError if state.pt does not hold the state of a run of this model.
    """
    config, accelerator = run.config, run.accelerator
    try:
        saved = torch.load(resumed / "state.pt", map_location="cpu", weights_only=True)
        parallel.load_moments(run.model, run.optimizer, saved["optimizer"])
        if "weights" in saved:
            parallel.load_weights(run.model, saved["weights"])
        random_states = saved["random"]
        if len(random_states) == accelerator.num_processes:
            set_random_state(random_states[accelerator.process_index])
        state, then = RunState.from_dict(saved), dict(saved["course"])
    except torch.OutOfMemoryError:  # a RuntimeError too, but no fault of the checkpoint
        raise
    except (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError,
            ValueError, pickle.UnpicklingError) as error:  # fmt: skip
        raise TrainingError(
            f"{shown(resumed / 'state.pt')} does not hold the state of a run of this model "
            f"({_reason(error)}); give another out to start a new run"
        ) from error
    if state.best_step is not None:
        path = checkpoint.checkpoint_path(run.out / "checkpoints", state.best_step)
        if problem := distributed.first_does(lambda: checkpoint.damage(path)):
            if accelerator.is_main_process:
                said = "%s was the best, but %s; the next to be validated becomes it"
                logger.warning(said, path, problem)
            state.best_step = state.best_metric = None
    if accelerator.is_main_process:
        checkpoint.move_links(run.out, state.step, state.best_step)
        for change in changes(then, config, accelerator.num_processes):
            print(change, flush=True)
    return state


def _reason(error: Exception) -> str:
    if holds_code(error):
        return "it holds more than tensors and numbers: code, or a pickle that could run it"
    if isinstance(error, pickle.UnpicklingError):  # torch's advice is to run what it holds
        return "it is damaged, or was not written by torch.save"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def random_state() -> dict[str, Any]:
    """Return this process's random state, in types that torch.load reads without pickle."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.as_tensor(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what random_state returned; the CUDA generator only if there is a GPU."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# Settings that do not change a run's losses.
_NOT_THE_COURSE = (
    "out", "resume", "log_every", "save_every", "keep_checkpoints", "eval_batch_size",
    "data.num_workers", "data.validation", "best_metric", "eval_every", "lost_after", "timeout",
    "on_nonfinite", "trackers",
)  # fmt: skip


def course(config: TrainConfig, processes: int) -> dict[str, Any]:
    """Return the settings that decide a run's losses: resumed with others, it is another run."""
    settings = {"processes": processes, **flat(config)}
    settings["data.sources"] = [  # as in checkpoints from before a source had more settings
        {key: value for key, value in source.items() if value is not None}
        for source in settings["data.sources"]
    ]
    if config.task != "captioning":  # nor is it in older checkpoints
        del settings["label_smoothing"]
    return {key: value for key, value in settings.items() if key not in _NOT_THE_COURSE}


def changes(then: dict[str, Any], config: TrainConfig, processes: int) -> Iterator[str]:
    """Yield a line per setting that differs from the course saved in a checkpoint."""
    for key, value in course(config, processes).items():
        before = then.get(key)
        if before == value:
            continue
        if key in ("model.name", "model.config", "model.tokenizer", "model.decoder"):
            yield f"{key} was {before} and is now {value}; the checkpoint's model is kept"
        elif key != "processes":
            yield f"resuming with another {key}: was {before}, is now {value}"
        elif config.data.reads_shards:
            yield (
                f"resuming with {value} processes after {before}: the rest of this epoch is drawn "
                "again from the shards, so some of its clips come twice and some not at all"
            )
        else:
            yield (
                f"resuming with {value} processes after {before}: the batches are unchanged, and "
                "losses match up to rounding and dropout"
            )
