"""Reports of a run: metrics.jsonl, trackers, and a progress bar or plain lines."""

import json
import logging
import math
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from clipvip.files import shown, write_whole
from clipvip.training.checkpoint import truncate_jsonl
from clipvip.training.config import ConfigError, TrainConfig, flat

logger = logging.getLogger(__name__)


class Reporter:
    """Writer of metrics to OUT/metrics.jsonl and to the accelerator's trackers, and of progress: on
    a terminal a bar with rate and remaining time, otherwise at most one line per
    `seconds_between_lines`. It is silent on all ranks except for the first."""

    seconds_between_lines = 10.0

    def __init__(self, accelerator: Accelerator, out: Path, step: int, total: int) -> None:
        from rich import progress as rich
        from rich.console import Console

        self.active = accelerator.is_main_process
        self.accelerator = accelerator
        self.started, self.first, self.total = time.monotonic(), step, total
        self.last_line = -math.inf
        self.pending, self.failing = b"", False
        self.console = Console(quiet=not self.active, soft_wrap=True, highlight=False)
        self.bar = rich.Progress(
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("loss {task.fields[loss]:.4f} · {task.fields[rate]:.1f} clips/s"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
            console=self.console,
            disable=not (self.active and self.console.is_terminal),
        )
        name = shown(out.name)
        self.task = self.bar.add_task(name, total=total, completed=step, loss=math.nan, rate=0)
        path = out / "metrics.jsonl"
        if self.active:
            truncate_jsonl(path, step)
            self.file = path.open("ab", buffering=0)

    def __enter__(self) -> "Reporter":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as failed:  # must not hide an error of the run
                logger.warning("%s: %s", tracker.name, shown(failed))
        if self.active:
            self.file.close()

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Log one row of numbers; it is in the file when this returns (NaN as null).

        Neither a full disk nor an unreachable tracker stops a run. Rows that could not be written
        to the file are written once there is space.
        """
        if self.active:
            numbers = {key: value if math.isfinite(value) else None for key, value in row.items()}
            self.pending += (json.dumps({"step": step, **numbers}) + "\n").encode()
        try:
            while self.pending:
                self.pending = self.pending[self.file.write(self.pending) :]
            self.accelerator.log(row, step=step)
        except Exception as error:  # trackers raise errors of their own
            if not self.failing:
                said = "step %d: a row of metrics could not be written: %s"
                logger.warning(said, step, shown(error))
            self.failing = True
        else:
            self.failing = False

    def advance(self, step: int, row: dict[str, Any]) -> None:
        """Show the progress after a step."""
        rate, loss = row["clips_per_second"], row["loss"]
        self.bar.update(self.task, completed=step, loss=loss, rate=rate)
        now = time.monotonic()
        due = now - self.last_line >= self.seconds_between_lines or step == self.total
        if self.bar.disable and due:
            self.last_line = now
            left = (now - self.started) / (step - self.first) * (self.total - step)
            self.say(
                f"step {step}/{self.total} · loss {loss:.4f} · lr {row['lr']:.2e} · {rate:.1f} "
                f"clips/s · waiting for data {row['data_wait']:.0%} · "
                f"{timedelta(seconds=round(left))} left"
            )

    def say(self, text: str) -> None:
        self.console.print(shown(text), markup=False)


def known_trackers(config: TrainConfig) -> list[str | LoggerType]:
    """Return the configured trackers; raise ConfigError if one is not known or not installed."""
    known = sorted(set(LoggerType.list()) - {"all"})
    for name in config.trackers:
        if name not in known:
            raise ConfigError(f"trackers: {name!r} is not one of {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            raise ConfigError(f"trackers: {name} is not installed: pip install {name}")
    return [LoggerType(name) for name in config.trackers]


def start_trackers(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Start the trackers, after `step` steps of a run.

    TensorBoard drops the events of later steps. wandb and MLflow continue the runs that
    OUT/trackers.json remembers. Raises ConfigError if a tracker does not start.
    """
    out = Path(config.out)
    remembered = out / "trackers.json"
    ids: dict[str, str] = {}
    if step and remembered.exists():
        try:
            ids = dict(json.loads(remembered.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): trackers start new runs", remembered, error)
    wandb_id = ids.get("wandb", uuid.uuid4().hex)
    named = {"name": out.name, "group": out.name, "dir": config.out}
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {**named, "id": wandb_id, "resume": "allow"},
        "mlflow": {"run_name": out.name, "run_id": ids.get("mlflow")},
    }
    try:
        accelerator.init_trackers("clipvip", init_kwargs=options)
        for tracker in accelerator.trackers:
            # TensorBoard would make a configuration a run of its own; MLflow accepts one once.
            if tracker.name != "tensorboard" and tracker.name not in ids:
                tracker.store_init_configuration(flat(config))
                mlflow = tracker.name == "mlflow"
                ids[tracker.name] = tracker.tracker.info.run_id if mlflow else wandb_id
    except Exception as error:  # such as of a service that is not reached, or needs a login
        raise ConfigError(f"trackers: {' '.join(str(error).split())}") from error
    if ids:
        write_whole(remembered, json.dumps(ids) + "\n")
