"""What a run says of itself: metrics.jsonl, trackers, and a bar or plain lines."""

import json
import logging
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator

from clipvip.files import shown
from clipvip.training.checkpoint import truncate_jsonl

logger = logging.getLogger(__name__)


class Reporter:
    """Writes each row of metrics to OUT/metrics.jsonl and to the accelerator's trackers, and
    shows progress: a bar with rate and remaining time on a terminal, else a line at most
    every `seconds_between_lines`. Silent on all ranks but the first.
    """

    seconds_between_lines = 10.0

    def __init__(self, accelerator: Accelerator, out: Path, step: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.active = accelerator.is_main_process
        self.accelerator = accelerator
        self.started, self.first, self.total = time.monotonic(), step, total
        self.last_line = -math.inf
        self.pending, self.failing = b"", False
        self.console = Console(quiet=not self.active, soft_wrap=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f} · {task.fields[rate]:.1f} clips/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as failed:  # must not hide how the run ended
                logger.warning("%s: %s", tracker.name, shown(failed))
        if self.active:
            self.file.close()

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Log one row of numbers; it has reached the file when this returns (NaN as null).

        A full disk does not stop a run, nor does a tracker's service that is not reached: the
        file's rows follow once there is room.
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
                logger.warning(
                    "step %d: a row of metrics could not be written: %s", step, shown(error)
                )
            self.failing = True
        else:
            self.failing = False

    def advance(self, step: int, row: dict[str, Any]) -> None:
        """Show where the run is."""
        rate, loss = row["clips_per_second"], row["loss"]
        self.bar.update(self.task, completed=step, loss=loss, rate=rate)
        now = time.monotonic()
        due = now - self.last_line >= self.seconds_between_lines or step == self.total
        if self.bar.disable and due:
            self.last_line = now
            left = (now - self.started) / (step - self.first) * (self.total - step)
            self.say(
                f"step {step}/{self.total} · loss {loss:.4f} · lr {row['lr']:.2e} · "
                f"{rate:.1f} clips/s · waiting for data {row['data_wait']:.0%} · "
                f"{_duration(left)} left"
            )

    def say(self, text: str) -> None:
        self.console.print(shown(text), markup=False)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
