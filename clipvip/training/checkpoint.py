"""The folder of a run: who may write to it, and its checkpoints, which are whole or absent.

A checkpoint is a folder `step-00000123`. It is written under a temporary name, flushed to disk and
then renamed, so a folder of that name was complete, whatever killed the process or cut the power.
Links are moved in the same way. Damage that happens later is detected by the sizes and
checksums in the checkpoint's manifest.json.
"""

import errno
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import OmegaConf

from clipvip import distributed
from clipvip.files import LOCK, flush_folder, only_run, read_own, sha256_of, shown, write_whole
from clipvip.model.card import README
from clipvip.model.pretrained import failed_writes
from clipvip.training.config import ConfigError, TrainConfig, TrainingError

logger = logging.getLogger(__name__)

Steps = Collection[int | None]

MANIFEST = "manifest.json"
REQUIRED = (  # one file of each group; earlier versions and transformers wrote the later names
    ("state.pt",),
    ("model/config.json",),
    ("model/model.safetensors", "model/model.safetensors.index.json"),
    ("model/tokenizer.json", "model/vocab.json"),
    ("model/tokenizer_config.json",),
    ("model/processor_config.json", "model/reading.json", "model/preprocessor_config.json"),
)
_WRITTEN = "# written by clipvip train\n"  # first line of a run's config.yaml
_OVERWRITTEN = (
    "config.yaml", "metrics.jsonl", "bad_files.jsonl", "trackers.json", "last", "best", "last.new",
    "best.new",
)  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = ".unfinished-"
_DAMAGED = "damaged-"
_LEFTOVER = re.compile(re.escape(_TEMPORARY) + r"(old-)?step-[0-9]{8}")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other runs out of a run's folder, and out of its checkpoints if a link leads to them.

    Raises ConfigError, before anything is written, if another run is there, if a file that no run
    wrote would be overwritten, or if the folder cannot be written to.
    """
    _refuse_foreign(out)
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


def _refuse_foreign(out: Path) -> None:
    """Raise ConfigError if a run would overwrite or delete files that no run wrote.

    A run's folder has a config.yaml with a certain first line, written before all else, and a lock
    beside it, which a copy of that file lacks. Runs of earlier versions lack that line; they are
    recognized by their checkpoints, which find_resumed checks.
    """
    there = [shown(name) for name in _OVERWRITTEN if os.path.lexists(out / name)]
    if not there or checkpoints(out / "checkpoints"):
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
    found = distributed.first_does(lambda: checkpoints(folder))
    if config.resume == "never" and found:
        raise ConfigError(
            f"{config.out} already holds a run (step {checkpoint_step(found[-1])}): "
            "resume=latest resumes it; for a new run give another out"
        )
    newest = distributed.first_does(lambda: newest_good(folder))
    same = appears(newest) if newest else not checkpoints(folder)
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


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def save(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill an empty folder, then make it the checkpoint of that step.

    On failure, the folder is removed and other checkpoints stay. Raises OSError if it cannot be
    written, for instance because the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(_TEMPORARY + "*"):  # by a killed process; other files stay
        if _LEFTOVER.fullmatch(leftover.name):
            _remove(leftover)
    final = checkpoint_path(folder, step)
    temporary = folder / (_TEMPORARY + final.name)
    try:
        temporary.mkdir()
        with failed_writes():
            write(temporary)
        manifest = _hash_and_flush(temporary)
        if absent := _absent(manifest):
            raise OSError(f"{absent} is missing; another program deletes files in {shown(folder)}")
        write_whole(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for parent, _, _ in os.walk(temporary, topdown=False):
            flush_folder(Path(parent))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(final)
    flush_folder(folder)
    return final


def save_with_room(
    folder: Path, step: int, write: Callable[[Path], None], keep: int, protect: Steps = ()
) -> None:
    """Save a checkpoint like `save`. If the disk is full, delete those that `prune` would delete
    next, and retry once."""
    try:
        save(folder, step, write)
    except OSError as error:
        deleted = make_room(folder, error, keep, protect)
        if not deleted:
            raise
        logger.warning(
            "step %d: the disk is full; deleted %s, which was next to be deleted; retrying",
            *(step, ", ".join(path.name for path in deleted)),
        )
        save(folder, step, write)


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def newest_good(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint; None if there are no checkpoints.

    Newer ones that are damaged are logged and renamed to damaged-step-*, since the resumed run
    writes those steps again. Raises TrainingError if all are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            for worse, reason in damaged.items():
                aside = worse.with_name(_DAMAGED + worse.name)
                _remove(aside)
                worse.rename(aside)
                logger.warning("%s: %s; set aside, resuming from %s", worse, reason, path.name)
            return path
        damaged[path] = problem
    if not damaged:
        return None
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
    raise TrainingError(
        f"all checkpoints in {folder} are damaged ({reasons}); restore one from a copy, or give "
        "another out to start a new run"
    )


def appears(path: Path, within: float = 60.0) -> bool:
    """Return whether a checkpoint that another machine wrote is visible here within some seconds. A
    network file system may show an old state of a folder for a while."""
    until = time.monotonic() + within
    while not (path / MANIFEST).exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def damage(path: Path) -> str | None:
    """Compare a checkpoint with its manifest; return what is wrong with it, or None."""
    try:
        manifest = _read_manifest(path)
        if absent := _absent(manifest):
            return f"{MANIFEST} does not name {absent}"
        for name, entry in manifest.items():
            status = (path / name).stat()
            if not stat.S_ISREG(status.st_mode):  # reading a device or a pipe may never end
                return f"{shown(name)} is not a file"
            if status.st_size != entry["bytes"]:
                return f"{shown(name)} has {status.st_size} bytes of {entry['bytes']}"
        found = _in_threads(sha256_of, [path / name for name in manifest])
        for (name, entry), checksum in zip(manifest.items(), found, strict=True):
            if checksum != entry["sha256"]:
                return f"{shown(name)} is not what was written (its checksum differs)"
        for name in manifest:
            if name.endswith(".index.json"):
                weights = json.loads((path / name).read_text(encoding="utf-8"))["weight_map"]
                if lost := {f"model/{file}" for file in weights.values()} - set(manifest):
                    return f"{MANIFEST} does not name {shown(min(lost))}"
    except OSError as error:
        missing = Path(error.filename).name if error.filename else "a file"
        return f"{shown(missing)}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    return None


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Read the size and checksum of each file, by its path in the checkpoint.

    Raises ValueError for anything else, such as a path that leads out of the checkpoint.
    """
    file = path / MANIFEST
    if not file.is_file() and file.exists():
        raise ValueError("not a file")
    manifest = json.loads(file.read_text(encoding="utf-8"))
    for name, entry in manifest.items():
        there = PurePosixPath(name)
        inside = name == str(there) and not there.is_absolute() and ".." not in there.parts
        hashed = re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        if not (inside and hashed and type(entry["bytes"]) is int):
            raise ValueError(name)
    return manifest


def _absent(manifest: Collection[str]) -> str | None:
    """Return the first of REQUIRED that a manifest does not name, or None."""
    return next((names[0] for names in REQUIRED if not set(names) & set(manifest)), None)


def _hash_and_flush(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush all files of a folder to disk; return the size and checksum of each, except for model
    cards, which users edit."""

    def flush(path: Path) -> str:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return sha256_of(path)

    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, _in_threads(flush, paths), strict=True)
        if path.name != README
    }


def _in_threads(checksum: Callable[[Path], str], paths: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor() as threads:  # reading and hashing release Python's lock
        return list(threads.map(checksum, paths))


def _remove(path: Path) -> None:
    """Remove a folder, or a link without its target; what cannot be removed stays."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int, protect: Steps = ()) -> None:
    """Delete all checkpoints except for the last `keep` and those of the protected steps."""
    for path in checkpoints(folder)[:-keep]:
        if checkpoint_step(path) not in protect:
            _delete(path)


def make_room(folder: Path, error: OSError, keep: int, protect: Steps = ()) -> list[Path]:
    """After a save that failed on a full disk, delete the checkpoints that `prune` would delete
    after it, and return them. The newest undamaged checkpoint stays; if there is none, all stay."""
    if error.errno not in _NO_ROOM:
        return []
    found = checkpoints(folder)
    whole = next((path for path in reversed(found) if damage(path) is None), None)
    if whole is None:
        return []
    kept = {whole, *found[max(0, len(found) - keep + 1) :]}
    doomed = [path for path in found if path not in kept and checkpoint_step(path) not in protect]
    for path in doomed:
        _delete(path)
    return doomed


def _delete(path: Path) -> None:
    # Rename it first: a kill halfway must not leave half a checkpoint.
    try:
        _remove(path.rename(path.with_name(_TEMPORARY + "old-" + path.name)))
    except OSError as error:  # the next save tries again
        logger.warning("%s could not be deleted: %s", shown(path), error.strerror)


def truncate_jsonl(path: Path, step: int) -> None:
    """Remove the rows of later steps, which a resumed run writes again, and lines that are not
    rows, such as a half-written last one."""
    if not path.exists():
        return

    def stays(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, TypeError, LookupError, RecursionError):
            return False

    write_whole(path, list(filter(stays, path.read_bytes().splitlines(keepends=True))))


def move_links(out: Path, step: int, best_step: int | None) -> None:
    """Point OUT/last and OUT/best to the models of these steps; without a best step, OUT/best is
    removed. If a link cannot be moved, a warning is logged: the checkpoints do not need it."""
    for link, target in ((out / "last", step), (out / "best", best_step)):
        new = link.with_name(link.name + ".new")
        try:
            for path in (link, new):
                if os.path.lexists(path) and not path.is_symlink():  # no run created it
                    said = f"{path.name} is not a link; move it away"
                    raise FileExistsError(errno.EEXIST, said, str(path))
            new.unlink(missing_ok=True)
            if target is None:
                link.unlink(missing_ok=True)
            else:
                model = checkpoint_path(out / "checkpoints", target) / "model"
                new.symlink_to(os.path.relpath(model, out), target_is_directory=True)
                new.replace(link)
        except OSError as error:
            logger.warning(
                "%s could not be moved to step %s: %s", shown(link), target, error.strerror
            )
