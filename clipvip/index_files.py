"""Read and write the files of an index, and check everything that is read.

An index is a folder:

    index.json                 model, its fingerprint, sources, the two data files in use, and
                               `spare`: data files no longer or not yet in use
    embeddings-*.safetensors   "embeddings": float32 [n, P], unit vectors
    clips-*.jsonl              line i: path, start and end (seconds) of clip i, its file's state
    bad_files.jsonl            files that could not be decoded, and why

A save replaces index.json twice, each time atomically: first to list the new data files as spare,
and after writing them to put them in use. So a reader never sees half a save, a killed build
resumes from its last save, and only data files that index.json names are ever deleted. A reader
whose data files are replaced while it reads starts again.

An index may come from a stranger. So every value in its files is checked before use, data files
have names as above and lie in the folder itself, and links are not followed. `clipvip.index`
decides when to load the model that index.json names.
"""

import json
import math
import os
import re
import secrets
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipvip.collection import MOST_NAMED, IndexedClip
from clipvip.data.annotations import parse_json
from clipvip.files import (
    LIST_BYTES,
    check_folder,
    json_line,
    read_own,
    shown,
    write_new,
    write_whole,
)

FORMAT = 2
READS = 100  # attempts to read an index that is replaced during each of them

_HEAD, _BAD_FILES = "index.json", "bad_files.jsonl"
_EMBEDDINGS = re.compile(r"embeddings-[0-9a-f]{16}\.safetensors")
_CLIPS = re.compile(r"clips-[0-9a-f]{16}\.jsonl")


class DamagedIndexError(ValueError):
    """A data file of an index is missing or damaged. damage: which file, and why."""

    def __init__(self, damage: str, remedy: str) -> None:
        super().__init__(f"{damage}; {remedy}")
        self.damage = damage


@dataclass
class StoredIndex:
    """Contents of an index folder. Row i of the embeddings belongs to clip i.

    model, fingerprint: absolute path or hub name of the model, and its hash.
    sources: files, folders, patterns and lists that the clips were found in.
    embeddings: float32 [n, P], unit vectors.
    bad_files: {"path", "reason"} of every file that the last build could not decode.
    """

    model: str
    fingerprint: str
    sources: list[str]
    embeddings: Tensor
    clips: list[IndexedClip]
    bad_files: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Head:
    """Contents of index.json: names of the data files in use (None before the first save), and
    those not in use, which the next build deletes."""

    model: str
    fingerprint: str
    sources: list[str]
    embeddings: str | None = None
    clips: str | None = None
    spare: list[str] = field(default_factory=list)

    @property
    def data(self) -> tuple[str, str] | None:
        return (self.embeddings, self.clips) if self.embeddings and self.clips else None


def read_index(folder: Path) -> StoredIndex:
    """Read an index. Raises ValueError if there is none, DamagedIndexError if it is damaged."""
    before = None
    for attempt in range(READS):
        head = read_head(folder)
        if head is None:
            raise ValueError(
                f"no index in {shown(folder)}; make one: "
                f"clipvip embed MODEL VIDEOS --out {shown(shlex.quote(str(folder)))}"
            )
        if head.data is None:
            raise ValueError(
                f"{shown(folder)} holds no clips yet: its first build is running, or stopped "
                "before it saved any; wait, or run the same clipvip embed again"
            )
        try:
            return _read_data(folder, head, *head.data)
        except DamagedIndexError:  # or its files were replaced meanwhile
            if head == before or attempt == READS - 1:
                raise
            before = head
    raise AssertionError


def read_head(folder: Path) -> Head | None:
    """Read index.json; None if there is none. Raises ValueError if it is not that of an index."""
    file = folder / _HEAD
    another = "give another --out, or the folder of an index"
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
            f"{shown(folder)} has index format {number}; this version reads {FORMAT}: make "
            "the index again with clipvip embed and another --out, or delete it"
        )
    if number != FORMAT or not _is_sound(head):
        raise ValueError(f"{shown(file)} is damaged or not from clipvip embed; {another}")
    return Head(**{part.name: head[part.name] for part in fields(Head) if part.name in head})


def _is_sound(head: dict[str, Any]) -> bool:
    """Whether values of index.json have the right types, and it names only files of an index."""
    sources, spare = head.get("sources"), head.get("spare", [])
    data = head.get("embeddings"), head.get("clips")
    return (
        isinstance(sources, list)
        and isinstance(spare, list)
        and all(isinstance(x, str) for x in (head.get("model"), head.get("fingerprint"), *sources))
        and all(_is_name(name, _EMBEDDINGS) or _is_name(name, _CLIPS) for name in spare)
        and not any(name in spare for name in data)
        and (data == (None, None) or (_is_name(data[0], _EMBEDDINGS) and _is_name(data[1], _CLIPS)))
    )


def _is_name(value: object, names: re.Pattern[str]) -> bool:
    return isinstance(value, str) and names.fullmatch(value) is not None


def _read_data(folder: Path, head: Head, embeddings_name: str, clips_name: str) -> StoredIndex:
    """Read the data files. Raises DamagedIndexError if one is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    def damaged(name: str, why: object) -> DamagedIndexError:
        again = f"to embed its clips again: {embed_command(head.model, head.sources, folder)}"
        return DamagedIndexError(f"{shown(folder / name)} is damaged ({why})", again)

    def content(name: str) -> bytes:
        try:
            return read_own(folder / name)
        except OSError as error:
            raise damaged(name, error.strerror) from None
        except MemoryError:
            raise damaged(name, "larger than memory") from None

    data = content(embeddings_name)  # load_file accepts only paths in UTF-8
    try:
        embeddings = load(data)["embeddings"]
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise damaged(embeddings_name, error) from None
    clips = []
    for number, line in enumerate(content(clips_name).splitlines(), start=1):
        try:
            clips.append(_parse_clip(line))
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            raise damaged(clips_name, f"line {number} is no clip") from None
    if embeddings.dtype != torch.float32 or embeddings.ndim != 2:
        raise damaged(embeddings_name, f"{embeddings.dtype} {list(embeddings.shape)}")
    if len(clips) != len(embeddings) or not clips:
        raise damaged(clips_name, f"{len(clips)} clips but {len(embeddings)} embeddings")
    if not is_unit(embeddings).all():
        raise damaged(embeddings_name, "not all rows are unit vectors")
    bad_files: list[dict[str, str]] = []
    with suppress(OSError, ValueError):  # search does not need them; check_out tells a build
        bad_files = _read_bad_files(folder)
    return StoredIndex(head.model, head.fingerprint, head.sources, embeddings, clips, bad_files)


def _parse_clip(line: bytes) -> IndexedClip:
    clip = IndexedClip(**json.loads(line))
    times = [time for time in (clip.start, clip.end) if time is not None]
    if not (
        isinstance(clip.path, str)
        and type(clip.size) is type(clip.mtime_ns) is int
        and all(type(time) in (int, float) and math.isfinite(time) for time in times)
    ):
        raise ValueError("wrong types")
    return clip


def _read_bad_files(folder: Path) -> list[dict[str, str]]:
    """Read bad_files.jsonl, if any. Raises OSError, and ValueError if another command wrote it."""
    try:
        lines = read_own(folder / _BAD_FILES, LIST_BYTES).splitlines()
    except FileNotFoundError:
        return []
    files = [parse_json(line.decode()) for line in lines]
    if not all(
        isinstance(file, dict)
        and file.keys() == {"path", "reason"}
        and all(isinstance(text, str) for text in file.values())
        for file in files
    ):
        raise ValueError("not from clipvip embed")
    return files


def is_unit(rows: Tensor) -> Tensor:
    """Return whether vectors [..., P] are finite and have length 1, bool [...]."""
    return (torch.linalg.vector_norm(rows, dim=-1) - 1).abs() <= 1e-3


def embed_command(model: str, sources: Sequence[str], out: object) -> str:
    """Return the shell command that embeds these sources, with VIDEOS in place of many."""
    videos = shlex.join(sources) if len(sources) <= MOST_NAMED else "VIDEOS"
    return shown(f"clipvip embed {shlex.quote(model)} {videos} --out {shlex.quote(str(out))}")


def check_out(out: Path) -> None:
    """Raise ValueError if an index written to this folder would harm what is in it."""
    own = check_folder(out, "an index", lambda: read_head(out) is not None)
    try:
        if out.exists():
            _read_bad_files(out)
    except (OSError, ValueError):
        raise ValueError(
            f"{shown(out / _BAD_FILES)} is not from clipvip embed; {own}, or move that file away"
        ) from None


def write_index(index: StoredIndex, out: Path) -> None:
    """Write new data files, put them in use, and delete the old ones.

    On an error the previous index stays in use.
    """
    from safetensors.torch import save

    token = secrets.token_hex(8)
    data = f"embeddings-{token}.safetensors", f"clips-{token}.jsonl"
    head = Head(index.model, index.fingerprint, index.sources)
    old = delete_spare(out) or head
    spare = [name for name in old.spare if os.path.lexists(out / name)]
    _write_head(replace(old, spare=[*spare, *data]), out)
    try:
        # save_file would ignore the umask and make a file that only its owner can read.
        write_new(out / data[0], save({"embeddings": index.embeddings.contiguous()}))
        keys = IndexedClip.__slots__
        clips = (json_line({key: getattr(clip, key) for key in keys}) for clip in index.clips)
        write_new(out / data[1], clips)
        write_whole(out / _BAD_FILES, map(json_line, index.bad_files))
    except BaseException:
        _delete(out, data)
        raise
    spare += old.data or ()
    _write_head(replace(head, embeddings=data[0], clips=data[1], spare=spare), out)
    _delete(out, spare)


def delete_spare(out: Path) -> Head | None:
    """Delete data files that are not in use. Return the contents of index.json, or None."""
    if head := read_head(out):
        _delete(out, head.spare)
    return head


def _write_head(head: Head, out: Path) -> None:
    write_whole(out / _HEAD, json.dumps({"format": FORMAT, **asdict(head)}, indent=1) + "\n")


def _delete(out: Path, names: Iterable[str]) -> None:
    """Delete data files that index.json names; the next build retries those that remain."""
    for name in names:
        with suppress(OSError):
            os.unlink(out / name)
