"""Checkpoints that are whole or absent, and logs that agree with them.

A checkpoint is a folder `step-00000123`. It is written under a temporary name, flushed to
disk, and renamed, so that whatever carries that name was complete then, at any kill and any
power cut. `point` moves a link the same way. What disks and people do to it later is found by
the sizes and checksums in its manifest.json.
"""

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from clipvip.files import flush_folder, shown, write_whole
from clipvip.model.pretrained import failed_writes
from clipvip.training.config import TrainingError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
REQUIRED = (  # one of each; the later names are those that earlier versions and transformers wrote
    ("state.pt",),
    ("model/config.json",),
    ("model/model.safetensors", "model/model.safetensors.index.json"),
    ("model/tokenizer.json", "model/vocab.json"),
    ("model/tokenizer_config.json",),
    ("model/processor_config.json", "model/reading.json", "model/preprocessor_config.json"),
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = ".unfinished-"
_DAMAGED = "damaged-"
_LEFTOVER = re.compile(re.escape(_TEMPORARY) + r"(old-)?step-[0-9]{8}")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def save(folder: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill an empty folder, then make it the checkpoint of that step.

    Where that fails, nothing is left of it and other checkpoints stay.

    Raises:
        OSError: it cannot be written, because the disk is full for instance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    final = checkpoint_path(folder, step)
    temporary = folder / (_TEMPORARY + final.name)
    try:
        temporary.mkdir()
        with failed_writes():
            write(temporary)
        manifest = _hash_and_flush(temporary)
        if absent := _absent(manifest):
            raise OSError(f"{absent} is gone; something else removes files of {shown(folder)}")
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
    folder: Path,
    step: int,
    write: Callable[[Path], None],
    keep: int,
    protect: Collection[int | None] = (),
) -> None:
    """Save a checkpoint. If the disk is full, delete those that `prune` would delete next, and
    retry once. Arguments and errors are those of `save` and `prune`."""
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
    """The complete checkpoints, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None where there is none at all.

    Newer ones that are damaged are told of and set aside as damaged-step-*, since a run that
    goes on from before them writes those steps again.

    Raises:
        TrainingError: all are damaged.
    """
    damaged: dict[Path, str] = {}
    found = checkpoints(folder)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            for worse, reason in damaged.items():
                aside = worse.with_name(_DAMAGED + worse.name)
                _remove(aside)
                worse.rename(aside)
                logger.warning("%s: %s; set aside, going on from %s", worse, reason, path.name)
            return path
        damaged[path] = problem
    if found:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise TrainingError(
            f"{folder} holds no checkpoint that is whole ({reasons}); restore one from a copy, or "
            "give another out to start anew"
        )
    return None


def appears(path: Path, within: float = 60.0) -> bool:
    """Whether a checkpoint of another machine is to be seen here, at once or in some seconds: a
    network file system may show a folder as it was before."""
    until = time.monotonic() + within
    while not (path / MANIFEST).exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest; None where nothing is."""
    try:
        manifest = _read_manifest(path)
        if absent := _absent(manifest):
            return f"{MANIFEST} does not name {absent}"
        for name, entry in manifest.items():
            status = (path / name).stat()
            if not stat.S_ISREG(status.st_mode):  # reading a device or a pipe may never end
                return f"{shown(name)} is no file"
            if status.st_size != entry["bytes"]:
                return f"{shown(name)} has {status.st_size} bytes of {entry['bytes']}"
        found = _checksums(path / name for name in manifest)
        for (name, entry), checksum in zip(manifest.items(), found, strict=True):
            if checksum != entry["sha256"]:
                return f"{shown(name)} is not what was written (its checksum is another)"
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
    """Size and checksum of each file by its path in the checkpoint. Raises ValueError for anything
    else, such as a path that leads out of it."""
    file = path / MANIFEST
    if not file.is_file() and file.exists():
        raise ValueError("no file")
    manifest = json.loads(file.read_text(encoding="utf-8"))
    for name, entry in manifest.items():
        inside = PurePosixPath(name)
        fits = (
            name == str(inside)
            and not inside.is_absolute()
            and ".." not in inside.parts
            and type(entry["bytes"]) is int
            and re.fullmatch("[0-9a-f]{64}", entry["sha256"])
        )
        if not fits:
            raise ValueError(name)
    return manifest


def _absent(manifest: Collection[str]) -> str | None:
    """The first of REQUIRED that a manifest does not name."""
    return next((names[0] for names in REQUIRED if not set(names) & set(manifest)), None)


def whole_or_none(folder: Path, step: int | None) -> int | None:
    """The step, where its checkpoint is there as it was written; else None, and that is told."""
    if step is None:
        return None
    path = checkpoint_path(folder, step)
    problem = damage(path)
    if problem is None:
        return step
    logger.warning("%s was the best, but %s; the next to be measured is the best", path, problem)
    return None


def _hash_and_flush(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file in a folder, all of them on disk afterwards."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, _checksums(paths, flush=True), strict=True)
    }


def _checksums(paths: Iterable[Path], flush: bool = False) -> list[str]:
    def checksum(path: Path) -> str:
        result = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                result.update(chunk)
            if flush:
                os.fsync(file.fileno())
        return result.hexdigest()

    with ThreadPoolExecutor() as threads:  # neither reading nor hashing holds Python's lock
        return list(threads.map(checksum, paths))


def _clear(folder: Path) -> None:
    """Remove what a killed writer left, and nothing of another name."""
    for leftover in folder.glob(_TEMPORARY + "*"):
        if _LEFTOVER.fullmatch(leftover.name):
            _remove(leftover)


def _remove(path: Path) -> None:
    """Remove a folder, or a link but not its target; what cannot be removed stays."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep: int, protect: Collection[int | None] = ()) -> None:
    """Delete all but the last `keep` checkpoints and the protected steps'."""
    for path in checkpoints(folder)[:-keep]:
        if checkpoint_step(path) not in protect:
            _delete(path)


def make_room(
    folder: Path, error: OSError, keep: int, protect: Collection[int | None] = ()
) -> list[Path]:
    """After a save that failed for lack of room, delete what prune would have deleted next, and
    return that. The newest whole checkpoint stays; where none is whole, all stay."""
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
    # Under another name first: a kill halfway must not leave half a checkpoint.
    try:
        _remove(path.rename(path.with_name(_TEMPORARY + "old-" + path.name)))
    except OSError as error:  # the next save tries again
        logger.warning("%s is not deleted: %s", shown(path), error.strerror)


def point(link: Path, target: Path) -> None:
    """Make the symbolic link show target, by a path relative to it, in one step.

    Raises:
        OSError: it cannot be made, or a file or folder of its name is there, which stays.
    """
    temporary = link.with_name(link.name + ".new")
    _check_link(link)
    _unlink(temporary)
    temporary.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    temporary.replace(link)


def _check_link(path: Path) -> None:
    """Raise FileExistsError where there is something else than a link: it is not a run's."""
    if os.path.lexists(path) and not path.is_symlink():
        raise FileExistsError(errno.EEXIST, f"{path.name} is not a link; move it away", str(path))


def _unlink(link: Path) -> None:
    _check_link(link)
    link.unlink(missing_ok=True)


def truncate_jsonl(path: Path, step: int) -> None:
    """Drop the rows of later steps, which a resumed run writes again, and what is no row, such as
    a half-written last one."""
    if not path.exists():
        return

    def stays(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, TypeError, LookupError, RecursionError):
            return False

    write_whole(path, list(filter(stays, path.read_bytes().splitlines(keepends=True))))


def move_links(out: Path, step: int, best_step: int | None) -> None:
    """Make OUT/last, and OUT/best where there is one, show those steps' models. A link that cannot
    be moved is no more than a warning: the checkpoints do not need it."""
    for link, target in ((out / "last", step), (out / "best", best_step)):
        try:
            if target is not None:
                point(link, checkpoint_path(out / "checkpoints", target) / "model")
            else:
                _unlink(link)
        except OSError as error:
            logger.warning("%s is not moved to step %s: %s", shown(link), target, error.strerror)


def random_state() -> dict[str, Any]:
    """This process's random generators, as values that torch.load reads without pickle."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.as_tensor(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
