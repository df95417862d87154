"""The folder of a run: who may write to it, which checkpoint to resume from, config.yaml."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from clipvip import distributed
from clipvip.files import LOCK, only_run, read_own, shown, write_whole
from clipvip.training import checkpoint
from clipvip.training.config import ConfigError, TrainConfig

_WRITTEN = "# written by clipvip train\n"  # first line of a run's config.yaml
_OVERWRITTEN = (
    "config.yaml", "metrics.jsonl", "bad_files.jsonl", "trackers.json", "last", "best", "last.new",
    "best.new",
)  # fmt: skip


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, and out of its checkpoints if a link leads to them.

    Raises ConfigError, before anything is written, if another run is there, if a file that no run
    wrote would be overwritten, or if the folder cannot be written to.
    """
    refuse_foreign(out)
    with ExitStack() as locks:
        try:
            for folder in (out, out / "checkpoints"):
                locks.enter_context(only_run(folder, "trains", ConfigError))
        except OSError as error:
            raise ConfigError(
                f"out is {shown(out)}, where no run can be written ({error.strerror}: "
                f"{shown(error.filename)}); give a folder that can be created and written to"
            ) from None
        yield


def refuse_foreign(out: Path) -> None:
    """Raise ConfigError if a run would overwrite or delete files that no run wrote.

    A run's folder has a config.yaml with a certain first line, written before all else, and a lock
    beside it, which a copy of that file lacks. Runs of earlier versions lack that line; they are
    recognized by their checkpoints, which find_resumed checks.
    """
    there = [shown(name) for name in _OVERWRITTEN if os.path.lexists(out / name)]
    if not there or checkpoint.checkpoints(out / "checkpoints"):
        return
    try:
        marked = read_own(out / "config.yaml", most=1 << 24).startswith(_WRITTEN.encode())
        ours = marked and (out / LOCK).exists()
    except OSError:
        ours = False
    if not ours:
        raise ConfigError(
            f"out is {shown(out)}, which holds {', '.join(there)} but no run of clipvip train; a "
            f"run would overwrite or delete that; give another out, such as {shown(out / 'run')}"
        )


def find_resumed(config: TrainConfig) -> Path | None:
    """Return the checkpoint to resume from, or None for a new run.

    Raises ConfigError if the folder holds a run that must not be resumed, or if ranks see different
    folders; TrainingError if all checkpoints are damaged.
    """
    folder = Path(config.out) / "checkpoints"
    found = distributed.first_does(lambda: checkpoint.checkpoints(folder))
    if config.resume == "never" and found:
        raise ConfigError(
            f"{config.out} already holds a run (step {checkpoint.checkpoint_step(found[-1])}): "
            "resume=latest resumes it; for a new run give another out"
        )
    newest = distributed.first_does(lambda: checkpoint.newest_good(folder))
    same = checkpoint.appears(newest) if newest else not checkpoint.checkpoints(folder)
    if not all(distributed.all_gather_objects(same)):
        raise ConfigError(f"{config.out} is not the same folder for all ranks; use shared storage")
    return newest


def write_settings(config: TrainConfig) -> None:
    """Write OUT/config.yaml, before any other file, as it marks a run's folder.

    Raises ConfigError if it cannot be written.
    """
    path = Path(config.out) / "config.yaml"
    try:
        write_whole(path, _WRITTEN + OmegaConf.to_yaml(OmegaConf.structured(config)))
    except OSError as error:
        raise ConfigError(
            f"{shown(path)} cannot be written: {error.strerror}; free some space there or give "
            "another out"
        ) from error
