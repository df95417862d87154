"""Turn an index of the earlier format, with one vector per clip in plain files, into tables.

Format 2 of an index is a folder:

    index.json                 model, its fingerprint, sources, the two data files in use, and
                               `spare`: data files no longer or not yet in use
    embeddings-*.safetensors   "embeddings": float32 [n, P], unit vectors
    clips-*.jsonl              line i: path, start and end (seconds) of clip i, its file's state
    bad_files.jsonl            files that could not be decoded, and why

The tables are written in a hidden folder beside these files and moved to their places when they are
whole; the one that makes a folder an index comes last. Then the old files are deleted. A process
that is killed in between leaves either index in use, and the next one does the rest.

An index may come from a stranger. So every value in its files is checked before use, data files
have names as above and lie in the folder itself, and links are not followed. Only files that
index.json names are deleted.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clipvip.files import LIST_BYTES, only_run, read_own, shown
from clipvip.index.rows import About, FileState
from clipvip.index.store import Store
from clipvip.index.tables import PATHS_AT_ONCE, TABLES, Span, encoded, is_index

FORMAT = 2

_HEAD, _BAD_FILES = "index.json", "bad_files.jsonl"
_EMBEDDINGS = re.compile(r"embeddings-[0-9a-f]{16}\.safetensors")
_CLIPS = re.compile(r"clips-[0-9a-f]{16}\.jsonl")
_UNFINISHED = ".migrating"


def is_old_index(folder: Path) -> bool:
    """Whether a folder holds an index of format 2. Raises ValueError for a damaged one."""
    return _read_head(folder) is not None


def migrate(where: str | Path) -> bool:
    """Replace an index of format 2 in a folder by tables; return whether there was one.

    Each clip becomes a moment. Its file gets the plan "whole", content "", duration 0 and the date
    of its last change: an unchanged file is found again, and embedded again only under another
    plan, which is what a build with windows asks for.

    Raises ValueError if the index is damaged or cannot be replaced where it is.
    """
    folder = Path(where)
    if "://" in os.fspath(where) or not os.path.lexists(folder / _HEAD):
        return False
    if not is_old_index(folder):
        return False
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"the index in {shown(folder)} is of an earlier version and cannot be brought up to "
            "date there, as the folder cannot be written to; copy it elsewhere and name the copy"
        )
    with only_run(folder, "embeds"):
        head = _read_head(folder)
        if head is None:  # another process has done it
            return True
        if not is_index(folder) and head["embeddings"]:
            _write_tables(folder, head)
        names = [head["embeddings"], head["clips"], *head["spare"]]
        for name in filter(None, [*names, _BAD_FILES, _HEAD]):  # index.json last: it names the rest
            with suppress(FileNotFoundError):
                os.unlink(folder / name)
    return True


def _write_tables(folder: Path, head: dict[str, Any]) -> None:
    clips, vectors = _read_data(folder, head)
    bad_files = _read_bad_files(folder)
    unfinished = folder / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    about = About(head["model"], head["fingerprint"], vectors.shape[1], tuple(head["sources"]))
    store = Store.create(unfinished, about)
    by_file: dict[str, list[int]] = {}
    for row, (state, _) in enumerate(clips):
        by_file.setdefault(state.path, []).append(row)
    files = [
        (clips[rows[0]][0], [clips[row][1] for row in rows], vectors[rows])
        for rows in by_file.values()
    ]
    for at in range(0, len(files), PATHS_AT_ONCE):
        store.put(files[at : at + PATHS_AT_ONCE])
    store.put_bad_files([], bad_files)
    store.tidy()
    for table in TABLES:
        target = folder / f"{table}.lance"
        shutil.rmtree(target, ignore_errors=True)  # of a process that was killed here
        os.rename(unfinished / target.name, target)
    shutil.rmtree(unfinished, ignore_errors=True)


def _read_head(folder: Path) -> dict[str, Any] | None:
    """Read index.json; None if there is none. Raises ValueError if it is not that of an index."""
    file = folder / _HEAD
    another = "give the folder of an index, or another --out"
    try:
        head = json.loads(read_own(file, LIST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{shown(file)}: {error.strerror}; {another}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{shown(file)} is damaged or not from clipvip embed ({error}); {another}"
        ) from None
    number = head.get("format") if isinstance(head, dict) else None
    if type(number) is int and number != FORMAT:
        raise ValueError(
            f"{shown(folder)} has index format {number}; this version reads {FORMAT} and later: "
            "make the index again with clipvip embed and another --out, or delete it"
        )
    if number != FORMAT or not _is_sound(head):
        raise ValueError(f"{shown(file)} is damaged or not from clipvip embed; {another}")
    return {"embeddings": None, "clips": None, "spare": [], **head}


def _is_sound(head: dict[str, Any]) -> bool:
    """Whether values of index.json have the right types, and it names only files of an index."""
    sources, spare = head.get("sources"), head.get("spare", [])
    data = head.get("embeddings"), head.get("clips")
    return (
        isinstance(sources, list)
        and isinstance(spare, list)
        and all(isinstance(x, str) for x in (head.get("model"), head.get("fingerprint"), *sources))
        and all(_is_name(name, _EMBEDDINGS) or _is_name(name, _CLIPS) for name in spare)
        and (data == (None, None) or (_is_name(data[0], _EMBEDDINGS) and _is_name(data[1], _CLIPS)))
    )


def _is_name(value: object, names: re.Pattern[str]) -> bool:
    return isinstance(value, str) and names.fullmatch(value) is not None


def _read_data(
    folder: Path, head: dict[str, Any]
) -> tuple[list[tuple[FileState, Span]], np.ndarray]:
    """Read file and span of each clip, and their vectors, float32 [n, P]. Raises ValueError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    def damaged(name: str, why: object) -> ValueError:
        return ValueError(
            f"{shown(folder / name)} is damaged ({shown(why)}); delete the folder and run clipvip "
            "embed again"
        )

    def content(name: str) -> bytes:
        try:
            return read_own(folder / name)
        except OSError as error:
            raise damaged(name, error.strerror) from None
        except MemoryError:
            raise damaged(name, "larger than memory") from None

    embeddings, lines = head["embeddings"], head["clips"]
    try:
        vectors = load(content(embeddings))["embeddings"]
    except (SafetensorError, LookupError, TypeError, RuntimeError) as error:
        raise damaged(embeddings, error) from None
    clips: list[tuple[FileState, Span]] = []
    for number, line in enumerate(content(lines).splitlines(), start=1):
        try:
            clips.append(_parse_clip(line))
        except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError):
            raise damaged(lines, f"line {number} is no clip") from None
    if vectors.dtype != np.float32 or vectors.ndim != 2:
        raise damaged(embeddings, f"{vectors.dtype} {list(vectors.shape)}")
    if len(clips) != len(vectors) or not clips:
        raise damaged(lines, f"{len(clips)} clips but {len(vectors)} embeddings")
    return clips, vectors


def _parse_clip(line: bytes) -> tuple[FileState, Span]:
    clip = json.loads(line)
    path, start, end = clip["path"], clip["start"], clip["end"]
    size, mtime_ns = clip["size"], clip["mtime_ns"]
    times = [time for time in (start, end) if time is not None]
    if not (
        isinstance(path, str)
        and encoded(path)
        and type(size) is type(mtime_ns) is int
        and all(type(time) in (int, float) and math.isfinite(time) for time in times)
    ):
        raise ValueError("wrong types")
    return FileState(path, size, mtime_ns, "", "whole", 0.0, mtime_ns / 1e9), (start, end)


def _read_bad_files(folder: Path) -> Sequence[dict[str, str]]:
    """Read bad_files.jsonl, if it is there and ours. Raises ValueError for a stranger's."""
    own = {"path", "reason"}
    try:
        lines = read_own(folder / _BAD_FILES, LIST_BYTES).splitlines()
        files = [json.loads(line) for line in lines]
        for file in files:
            if file.keys() != own or not all(encoded(text) for text in file.values()):
                raise ValueError
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{shown(folder / _BAD_FILES)} is not from clipvip embed; move that file away"
        ) from None
    return files
