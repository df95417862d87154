"""What has changed since files were put into an index: which are new, have moved or are gone.

A file with equal size, modification time and plan is unchanged, and is not even opened. Any other
file is compared by its content with all files of the index, so that a file which was renamed,
copied or only touched is not embedded again.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from clipvip.collection import IndexedClip, identities
from clipvip.data.video import IMAGE_SUFFIXES
from clipvip.index.rows import FileState
from clipvip.index.tables import Span

BLOCK, BLOCKS = 1 << 16, 8  # bytes and number of the parts of a file that are hashed
READERS = 8  # threads: on a network disk, opening a file mostly means waiting


def content_of(path: str) -> str:
    """Hash the size of a file and BLOCKS of its content: head, tail, and some between.

    Containers of video keep their tables at the head or tail. But the middle counts too: it may be
    edited in place, or may differ alone, as in two recordings of fixed length by one camera.
    Raises OSError, and ValueError for an impossible name.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe may never end
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size};".encode())
        if size <= BLOCK * BLOCKS:
            digest.update(file.read(BLOCK * BLOCKS))
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file to be in the index.

    parts: what it is divided into: its windows or scenes (None), spans of its own, or both.
    plan: see FileState.
    captions: span of a clip in annotations, and its caption, empty for a clip without one.
    """

    path: str
    size: int
    mtime_ns: int
    parts: tuple[Sequence[Span] | None, ...]
    plan: str
    captions: tuple[tuple[Span, str], ...] = ()


def named_files(clips: Iterable[IndexedClip], plan: str) -> list[NamedFile]:
    """Group clips by file. A clip with neither start nor end is divided by `plan`."""
    grouped: dict[str, list[IndexedClip]] = {}
    for clip in clips:
        grouped.setdefault(clip.path, []).append(clip)
    files = []
    for path, own in grouped.items():
        spans = sorted(
            {(clip.start, clip.end) for clip in own} - {(None, None)},
            key=lambda span: [-1.0 if time is None else time for time in span],
        )
        whole = any(clip.start is clip.end is None for clip in own)
        parts: list[Sequence[Span] | None] = [None] * whole + [spans] * bool(spans)
        plans = [plan] * whole
        if spans:
            plans.append("spans " + hashlib.sha256(json.dumps(spans).encode()).hexdigest()[:16])
        size, mtime_ns = own[0].size, own[0].mtime_ns
        captions = tuple(
            ((clip.start, clip.end), clip.caption) for clip in own if clip.caption is not None
        )
        files.append(NamedFile(path, size, mtime_ns, tuple(parts), "; ".join(plans), captions))
    return files


def plan_of(window: float, stride: float, scenes: bool) -> str:
    """Return the plan of files that are divided into windows or scenes; see FileState."""
    lengths = (repr(float(seconds)).removesuffix(".0") for seconds in (window, stride))
    return " ".join(("scenes" if scenes else "windows", *lengths))


class New(NamedTuple):
    """A file to embed. states: its own, then those of files with the same content; their
    duration and date are not known yet."""

    file: NamedFile
    states: list[FileState]


@dataclass
class Changes:
    """What makes an index hold the named files as they are.

    new: files to embed. kept: paths of files that the index holds already.
    moved: path in the index → the file's new state. copied: path in the index of a file whose
    content another file has, and the state of that one. gone: paths that no longer exist.
    captions: path in the index → captions of its clips in annotations, as in NamedFile.
    """

    new: list[New] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    moved: dict[str, FileState] = field(default_factory=dict)
    copied: list[tuple[str, FileState]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    captions: dict[str, tuple[tuple[Span, str], ...]] = field(default_factory=dict)


def changes(
    files: Sequence[NamedFile], places: Iterable[str], held: Mapping[str, FileState]
) -> Changes:
    """Compare the named files with those that the index holds.

    places: absolute folders and files of which all that no longer exists is gone. Of a file whose
    folder is missing this is not known: its disk may not be mounted.
    """
    found = Changes()
    under = Places([*places, *(file.path for file in files)])
    gone = {path for path in held if path in under and _is_gone(path)}
    files = _by_held_names(files, held)
    found.captions = {file.path: file.captions for file in files if file.captions}
    rest = []
    for file in files:
        if is_held(file, held.get(file.path)):
            found.kept.add(file.path)
        else:
            rest.append(file)
    by_content: dict[str, list[FileState]] = {}
    for state in held.values():
        if state.content:
            by_content.setdefault(state.content, []).append(state)
    new: dict[tuple[str, str], New] = {}
    exists = cache(os.path.lexists)
    for file, content in zip(rest, _contents(rest), strict=True):
        own = FileState(file.path, file.size, file.mtime_ns, content, file.plan, 0.0, 0.0)
        alike = [x for x in by_content.get(content, []) if has_same_moments(x, file.plan)]
        alike.sort(key=lambda state: state.path != file.path)  # a touched file first
        if alike:
            # A file that is nowhere any more has moved, even with its folder, and even if that is
            # not named. If it was on a disk that is not mounted, its content will be known there.
            lost = (x for x in alike if not exists(x.path))
            free = next((x for x in lost if x.path not in found.moved), None)
            if alike[0].path == file.path:
                found.moved[file.path] = _renewed(alike[0], own)
            elif free is not None and file.path not in held:
                found.moved[free.path] = _renewed(free, own)
            else:
                found.copied.append((alike[0].path, _renewed(alike[0], own)))
        elif content and (content, file.plan) in new:
            new[content, file.plan].states.append(own)
        else:
            new[content or file.path, file.plan] = New(file, [own])
    found.new = list(new.values())
    found.gone = sorted(gone - found.moved.keys())
    return found


def has_same_moments(state: FileState, plan: str) -> bool:
    """Whether the moments of a file are those that another plan would give."""
    return state.plan == plan or (_is_whole(state, state.plan) and _is_whole(state, plan))


def is_held(file: NamedFile, state: FileState | None) -> bool:
    """Whether an index holds a file as it was listed."""
    if state is None or (file.size, file.mtime_ns) != (state.size, state.mtime_ns):
        return False
    return has_same_moments(state, file.plan)


def dealt(new: Sequence[New], ranks: int) -> list[list[int]]:
    """Deal files out to ranks, so that each gets as many bytes: places in `new`, in order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(new)), key=lambda place: (-new[place].file.size, place)):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += new[place].file.size + 1
    return [sorted(share) for share in shares]


def _is_whole(state: FileState, plan: str) -> bool:
    """Whether a plan gives a file one moment, from its start to its end."""
    if plan == "whole":
        return True
    window = re.fullmatch(r"windows ([0-9.e+-]{1,30}) \S*", plan)
    if window is None or (state.duration <= 0 and not _is_image(state.path)):
        return False
    try:
        return state.duration <= float(window[1])
    except ValueError:
        return False


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def _renewed(old: FileState, new: FileState) -> FileState:
    """Return the new state of a file whose content is that of an old one."""
    of_container = old.date != old.mtime_ns / 1e9
    date = old.date if of_container else new.mtime_ns / 1e9
    return replace(new, duration=old.duration, date=date)


def _by_held_names(files: Iterable[NamedFile], held: Mapping[str, FileState]) -> list[NamedFile]:
    """Give each file the path by which the index knows it, perhaps through a link."""
    identity = identities()
    known = {identity(path): path for path in held}
    return [
        replace(file, path=known.get(identity(file.path), file.path))
        if file.path not in held
        else file
        for file in files
    ]


def _contents(files: Sequence[NamedFile]) -> list[str]:
    """Return the hash of each file, empty for one that cannot be read."""

    def content(file: NamedFile) -> str:
        try:
            return content_of(file.path)
        except (OSError, ValueError):
            return ""

    with ThreadPoolExecutor(READERS) as threads:
        return list(threads.map(content, files))


class Places:
    """Absolute folders and files, which contain all that lies below them."""

    def __init__(self, places: Iterable[str]) -> None:
        self._places = frozenset(place.rstrip(os.sep) for place in places)

    def __contains__(self, path: str) -> bool:
        return any(
            path[:end] in self._places
            for end in (*(at for at, letter in enumerate(path) if letter == os.sep), len(path))
        )


def _is_gone(path: str) -> bool:
    return not os.path.lexists(path) and os.path.isdir(os.path.dirname(path))
