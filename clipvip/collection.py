"""Find the clips of a video collection.

`clips_of` takes sources. A source is one of

    a video, or an image, which counts as a video of one frame
    a folder, searched recursively for videos (not images) by VIDEO_SUFFIXES
    annotations (.jsonl): one clip per line, with its caption
    a list (.txt): the path of one video or image per line, relative to the list
    a pattern such as "clips/**/*.mkv" that matches any of these

A name that exists is taken literally, even if it looks like a pattern. Files with other suffixes
are skipped and counted on standard error. Broken and missing videos are listed too; reading them
fails later.
"""

import glob
import logging
import os
import re
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from clipvip.data.annotations import AnnotationError, Clip, LeftOut, load_annotations
from clipvip.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from clipvip.files import NOT_A_FILE, files_in, shown

logger = logging.getLogger(__name__)

MOST_NAMED = 3  # sources or suffixes in a message
_MAGIC = re.compile(r"[*?[]")  # what begins a pattern


@dataclass(frozen=True, slots=True)
class IndexedClip:
    """A clip, and the state of its file when it was listed, to notice later changes.

    path: absolute. start, end: seconds, None for the start or end of the file.
    size, mtime_ns: bytes and modification time of the file; 0 if they cannot be read.
    caption: of annotations, their `caption`, else the first `text`, else ""; None if no annotations
        name the clip. If several lines do, that of the first line that has one.
    """

    path: str
    start: float | None
    end: float | None
    size: int
    mtime_ns: int
    caption: str | None = None


def clips_of(sources: Sequence[str]) -> tuple[list[IndexedClip], list[dict[str, str]]]:
    """List every distinct clip of the sources, in a stable order, and what was left out.

    A file that two sources name, or that is also reached through a linked folder, is listed once,
    and all its clips have the path by which it was first found.
    Pipes, unreadable folders and lists, and bad lines of annotations are left out and returned as
    {"path", "reason"} each. Raises ValueError if a source matches nothing or is a folder without
    videos, or if no source has a clip.
    """
    if not sources:
        raise ValueError("no videos were named; expected files, folders, patterns or lists of them")
    skipped: Counter[str] = Counter()  # by suffix
    left: list[tuple[str, str]] = []
    clips: dict[tuple[str, float | None, float | None], IndexedClip] = {}
    files: dict[tuple[str, str], tuple[str, int, int]] = {}  # by identity: path, size, time
    identity = identities()

    def left_out(path: str, reason: str) -> None:
        left.append((path, reason))

    for source in sources:
        before = len(left)
        found = list(_clips_of_one(source, skipped, left_out))
        if not found and len(left) == before and not os.path.isfile(source):
            raise ValueError(_no_videos(source, skipped))
        for clip in found:
            path = os.path.abspath(clip.video)
            file = identity(path)
            if file not in files:
                files[file] = path, *_state(path)
            path, size, mtime_ns = files[file]
            key = path, clip.start, clip.end
            known = clips.get(key)
            if known is None or (clip.line and not known.caption):
                caption = (clip.caption or next(iter(clip.text), "")) if clip.line else None
                clips[key] = IndexedClip(*key, size, mtime_ns, caption)
    if not clips and left:
        raise ValueError(": ".join(map(shown, left[0])))
    if not clips:
        raise ValueError(_no_videos(listed(sources), skipped))
    if skipped:
        print(shown(_counted(skipped)), file=sys.stderr)
    reasons = dict(left)
    bad_files = []
    for path, reason in reasons.items():
        logger.warning("left out %s: %s", shown(path), shown(reason))
        bad_files.append({"path": os.path.abspath(path), "reason": reason})
    return list(clips.values()), bad_files


def identities() -> Callable[[str], tuple[str, str]]:
    """Return a function from an absolute path to what it shares with other paths of the file: its
    folder without links, and its name. The function remembers the folders that it was asked for."""

    @cache
    def real(folder: str) -> str:
        try:
            return os.path.realpath(folder)
        except (OSError, ValueError):  # not a valid name
            return folder

    def identity(path: str) -> tuple[str, str]:
        folder, name = os.path.split(path)
        return real(folder), name

    return identity


def place_of(source: str) -> str:
    """Return the folder or file, absolute, in which all files lie that a folder, file or pattern
    names, whether they still exist or not."""
    if os.path.lexists(source) or not glob.has_magic(source):
        return os.path.abspath(source)
    literal = source[: _MAGIC.search(source).start()]  # type: ignore[union-attr]
    return os.path.abspath(os.path.dirname(literal) or ".")


def listed(names: Sequence[str]) -> str:
    """Join the first names for a message, and add how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def list_left_out(reasons: Mapping[str, str], sources: Sequence[str], undone: str | None) -> None:
    """List files that were left out of a command's work, path → reason, on standard error.

    sources: what the command was given. undone: what happened to no clip, such as "classified";
        None if it happened to some. Raises ValueError, with the first reason, if it is given.
    """
    if undone is not None:
        path, reason = next(iter(reasons.items()))
        raise ValueError(
            f"none of the clips in {shown(listed(sources))} could be {undone}; the first: "
            f"{shown(path)}: {shown(reason)}"
        )
    if reasons:
        files = "file" if len(reasons) == 1 else "files"
        print(f"{len(reasons)} {files} could not be used:", file=sys.stderr)
    for path, reason in reasons.items():
        print(f"  {shown(path)}: {shown(reason)}", file=sys.stderr)


def _state(path: str) -> tuple[int, int]:
    """Return size and modification time of a file; zeros on an error, which reading will report."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return state.st_size, state.st_mtime_ns


def _clips_of_one(source: str, skipped: Counter[str], left_out: LeftOut) -> Iterator[Clip]:
    """Yield the clips of one source. Raises ValueError if it matches nothing."""
    path = Path(source)
    suffix = path.suffix.lower()

    def keep(name: str) -> bool:
        wanted = (suffix := Path(name).suffix.lower()) in VIDEO_SUFFIXES
        if not wanted:
            skipped[suffix] += 1
        return wanted

    if not os.path.lexists(source):
        matches = _matches(source)
        if not matches:
            expected = "videos, images, folders, annotations (.jsonl) or lists of paths (.txt)"
            what = "matches nothing" if glob.has_magic(source) else "does not exist"
            raise ValueError(f"{source!r} {what}; expected {expected}")
        for match in matches:
            yield from _clips_of_one(match, skipped, left_out)
    elif path.is_dir():
        yield from map(Clip, files_in(path, keep, left_out))
    elif path.exists() and not path.is_file():
        left_out(source, NOT_A_FILE)
    elif suffix == ".jsonl":
        try:
            yield from load_annotations(path, left_out)
        except AnnotationError as error:
            left_out(str(path), str(error).removeprefix(f"{shown(path)}: "))
    elif suffix == ".txt":
        yield from map(Clip, _in_list(path, left_out))
    elif suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        yield Clip(path)
    else:
        skipped[suffix] += 1


def _matches(pattern: str) -> list[str]:
    """Return the paths that a pattern matches, sorted, each once even with `**/`."""
    root, below, name = (pattern + "/*" * pattern.endswith("/**")).partition("**/")
    if not below:
        return sorted(glob.glob(pattern))
    # glob's own recursion would follow links that form a circle again and again.
    folders = [root] if os.path.isdir(root or ".") else sorted(glob.glob(root))
    files = [file for folder in folders for file in files_in(Path(folder))]
    return [os.fspath(file) for file in files if file.match(name or "*")]


def _in_list(path: Path, left_out: LeftOut) -> list[Path]:
    """Read the files that a list names, one path per line. If none exists, leave the list out."""
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
    except OSError as error:
        left_out(str(path), error.strerror or str(error))
        return []
    files = [path.parent / os.fsdecode(line) for line in lines if line.strip()]
    if any(map(os.path.lexists, files)):
        return files
    first = f", not {files[0].name[:100]!r}" if files else ""
    left_out(str(path), f"names no file; expected the path of one video per line{first}")
    return []


def _no_videos(where: str, skipped: Counter[str]) -> str:
    others = f"; {_counted(skipped)}" if skipped else ""
    return f"no videos in {shown(where)}; looked for {' '.join(sorted(VIDEO_SUFFIXES))}{others}"


def _counted(skipped: Counter[str]) -> str:
    kinds = [f"{number} {suffix or 'without suffix'}" for suffix, number in skipped.most_common()]
    files = "file" if skipped.total() == 1 else "files"
    return f"{skipped.total()} other {files} skipped: {listed(kinds)}"
