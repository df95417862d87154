"""The state of a run: the parts it trains with, its counters, and how a checkpoint keeps them."""

import logging
import pickle
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from clipvip import distributed
from clipvip.data.annotations import Clip
from clipvip.data.loading import ClipLoader
from clipvip.files import shown
from clipvip.model import CLIPViPModel
from clipvip.model.pretrained import holds_code
from clipvip.model.processing import CLIPViPProcessor
from clipvip.training import checkpoint, parallel
from clipvip.training.config import TrainConfig, TrainingError, changes, course
from clipvip.training.preemption import Preemption
from clipvip.training.reporting import Reporter
from clipvip.training.task import Task

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """Counters of a run. A checkpoint's state.pt holds them under these names."""

    step: int = 0
    """Last step that was taken."""
    clips: int = 0
    """Clips drawn so far, over all ranks."""
    loss: float | None = None
    """Loss of the last step; NaN or infinite if that step was skipped."""
    best_step: int | None = None
    best_metric: float | None = None
    """Best validation so far, by config.best_metric."""
    best_before: dict[str, Any] | None = None
    """best_step and best_metric before the last improvement."""
    unmeasured: bool = False
    """Whether SIGTERM ended the validation of the last step."""
    skipped_steps: int = 0
    """Steps skipped because their loss or gradient was not finite."""
    skipped_in_a_row: int = 0

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RunState":
        """Read what state.pt holds, of which earlier versions lack some.

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
            self.best_step = self.best_before["best_step"]
            self.best_metric = self.best_before["best_metric"]


@dataclass
class Run:
    """The parts that a run trains with.

    config: the configuration, with what the model's processor decides filled in.
    towers: the task's towers around `model`, spread over ranks.
    average: the average of the weights; None if config.ema is.
    preemption: says whether SIGTERM asked this rank to stop.
    clips: number of clips to train on.
    validation: clips to validate on; empty for none.
    epoch_steps, total_steps: optimizer steps per epoch and of the whole run.
    step_tera: 10¹² operations per step, over all ranks.
    peak_tera: 10¹² operations per second that a rank's device can do; None if not known.
    """

    config: TrainConfig
    accelerator: Accelerator
    preemption: Preemption
    task: Task
    model: CLIPViPModel
    processor: CLIPViPProcessor
    towers: nn.Module
    optimizer: torch.optim.Optimizer
    average: parallel.Average | None
    loader: ClipLoader
    clips: int
    validation: list[Clip]
    state: RunState
    reporter: Reporter
    epoch_steps: int
    total_steps: int
    step_tera: float
    peak_tera: float | None

    @property
    def out(self) -> Path:
        return Path(self.config.out)


def save_state(run: Run) -> None:
    """Write a checkpoint, whole or not at all, and move the links OUT/last and OUT/best to it.

    Its model is the one that is validated: the average, if there is one. If the checkpoint cannot
    be written, a warning is logged and the run continues, since the next one may succeed. All ranks
    must call.

    Raises:
        TrainingError: the final checkpoint cannot be written; on all ranks.
    """
    state, average = run.state, run.average
    random_states = distributed.all_gather_objects(checkpoint.random_state())
    moments = parallel.whole_moments(run.model, run.optimizer)
    weights = parallel.whole_weights(run.model)
    live = {}
    if average:
        live = {"weights": weights}
        with average.in_place():
            weights = parallel.whole_weights(run.model)

    def write(folder: Path) -> None:
        # A copy, as transformers empties it and the write may be retried.
        run.model.save_pretrained(folder / "model", state_dict=dict(weights))
        run.processor.save_pretrained(folder / "model")
        whole = {
            **asdict(state),
            **live,
            "optimizer": moments,
            "random": random_states,
            "course": course(run.config, run.accelerator.num_processes),
        }
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


def load_state(
    resumed: Path,
    config: TrainConfig,
    model: CLIPViPModel,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> RunState:
    """Restore the optimizer and random generators from a checkpoint, and return its counters.

    `model` was built from the checkpoint already. It is the average if the checkpoint holds other
    weights too; then those are loaded into it. Prints what has changed in the configuration.

    Raises:
        TrainingError: state.pt does not hold the state of a run of this model.
    """
    try:
        saved = torch.load(resumed / "state.pt", map_location="cpu", weights_only=True)
        parallel.load_moments(model, optimizer, saved["optimizer"])
        if "weights" in saved:
            parallel.load_weights(model, saved["weights"])
        random_states = saved["random"]
        if len(random_states) == accelerator.num_processes:
            checkpoint.set_random_state(random_states[accelerator.process_index])
        state, then = RunState.from_dict(saved), dict(saved["course"])
    except torch.OutOfMemoryError:  # a RuntimeError too, but no fault of the checkpoint
        raise
    except (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError,
            ValueError, pickle.UnpicklingError) as error:  # fmt: skip
        raise TrainingError(
            f"{shown(resumed / 'state.pt')} does not hold the state of a run of this model "
            f"({_reason(error)}); give another out to start a new run"
        ) from error
    best = distributed.first_does(
        lambda: checkpoint.whole_or_none(Path(config.out) / "checkpoints", state.best_step)
    )
    if best is None:
        state.best_step = state.best_metric = None
    if accelerator.is_main_process:
        checkpoint.move_links(Path(config.out), state.step, best)
        for change in changes(then, config, accelerator.num_processes):
            print(change, flush=True)
    return state


def _reason(error: Exception) -> str:
    if holds_code(error):
        return "it holds more than tensors and numbers: code, or a pickle that could run it"
    if isinstance(error, pickle.UnpicklingError):  # torch's advice is to run what it holds
        return "it is damaged, or was not written by torch.save"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
