"""Find and read the files of published data sets, and note what is wrong in them.

A line, entry or file that cannot be used is skipped and noted in `Prepared`.
"""

import csv
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clipvip.data.annotations import kind_of, parse_json
from clipvip.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from clipvip.files import MARKS, TEXT_BYTES, check_is_file, decode_text, files_in, shown

LIST_BYTES = 1 << 32  # limit for a file that describes a data set
PROBE = 1 << 20  # number of first bytes that show whether a file is a text
LIST_SUFFIXES = (".json", ".jsonl", ".csv", ".txt", ".pkl", ".mdb")


class PrepareError(ValueError):
    """A source that cannot be converted; one line says what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class Item(NamedTuple):
    """An entry of a data set: one clip.

    key: name of its video in the data set. video: its path; None to search for it by the key.
    """

    key: str
    texts: Sequence[str] = ()
    subtitle: str | None = None
    caption: str | None = None
    start: float | None = None
    end: float | None = None
    video: Path | None = None


@dataclass
class Prepared:
    """Number of clips that were written from a source, and what was noticed in it."""

    clips: int = 0
    missing: list[str] = field(default_factory=list)  # videos that were not found
    mute: list[str] = field(default_factory=list)  # clips without any text
    bad: list[str] = field(default_factory=list)  # what could not be used, each with the reason
    guessed: list[str] = field(default_factory=list)  # files read as Windows-1252, not UTF-8
    repaired: list[str] = field(default_factory=list)  # clips with half a character in a text
    notes: list[str] = field(default_factory=list)  # files that were read, and warnings about them

    @contextmanager
    def tolerate(self, where: object) -> Iterator[None]:
        """Note an error inside the block as bad."""
        try:
            yield
        except Exception as error:  # a stranger's file may hold anything
            self.bad.append(f"{where}: {reason_of(error)}")

    def entries(
        self, records: Any, where: str, parse: Callable[[Any], tuple[str, Any] | None]
    ) -> Iterator[tuple[str, Any]]:
        """Yield each record as `parse` returns it, except for None; note by number those that fail.

        Raises ValueError if `records` is no list.
        """
        for number, record in enumerate(as_kind(records, list), 1):
            with self.tolerate(f"{where}{number}"):
                parsed = parse(record)
                if parsed is not None:
                    yield parsed

    def read_text(self, path: Path, most: int = LIST_BYTES) -> str:
        with open_file(path, most) as file:
            if b"\0" in (head := file.read(PROBE)) and not head.startswith(tuple(MARKS)):
                raise ValueError("not a text: holds NUL characters")
            text, guessed = decode_text(head + file.read())
        if guessed:
            self.guessed.append(str(path))
        return text

    def load_json(self, path: Path, kind: type) -> Any:
        with needed(path):
            return as_kind(parse_json(self.read_text(path)), kind)

    def captioned(self, path: Path) -> dict[str, list[str]]:
        """Read texts by video from a JSON list or JSON Lines."""

        def parse(record: Any) -> tuple[str, list[str]]:
            return value_of(record, ("clip_id", "video"), str), texts_of(record, "text", "caption")

        def parse_line(line: str) -> tuple[str, list[str]] | None:
            return parse(parse_json(line)) if line.strip() else None

        text = self.read_text(path)
        if text.lstrip().startswith("["):
            return merge(self.entries(parse_json(text), f"{path}: entry ", parse))
        return merge(self.entries(lines_of(text), f"{path}:", parse_line))


@dataclass(frozen=True)
class Request:
    """A data set to prepare.

    videos: their folder.
    out: file to write; it may be in the source's folder from an earlier run, and is never read.
    """

    source: Path
    split: str
    videos: Path
    out: Path
    done: Prepared

    @cached_property
    def _lists(self) -> list[Path]:
        """Files that may describe a set, those in upper folders first."""
        folder = self.source if self.source.is_dir() else self.source.parent
        found = self.all_in(folder, lambda name: name.lower().endswith(LIST_SUFFIXES))
        return sorted(found, key=lambda path: len(path.parts))

    def all_in(self, folder: Path, keep: Callable[[str], bool]) -> list[Path]:
        out = self.out.absolute()
        return [path for path in files_in(folder, keep) if path.absolute() != out]

    @cached_property
    def _videos(self) -> dict[str, Path]:
        """Videos by their names with and without suffix; there may be a hundred million."""
        names: dict[str, Path] = {}
        for path in files_in(self.videos, is_video):
            for name in (path.name, path.stem):
                names.setdefault(name, path)
        return names

    def video(self, key: str) -> Path | None:
        """Find a video by the name that the data set gives it."""
        if is_media(key) and os.path.isfile(self.videos / key):
            return self.videos / key
        name, bare = key.rpartition("/")[2], bare_name(key)
        found = (self._videos.get(name) for name in (name, bare, bare.removeprefix("v_")))
        return next((path for path in found if path is not None), None)

    def find(self, *patterns: str) -> list[Path]:
        """Find files by patterns, in order of preference; if the source is a file, it is first."""
        found = [p for pattern in patterns for p in self._lists if fnmatch(p.name, pattern)]
        return sorted(found, key=lambda path: path != self.source)

    def file(self, name: str) -> Path:
        """Find a required file by its name: the source itself, or one in its folder."""
        found = self.find(name) if self.source.is_dir() else [self.source]
        if not found or found[0].name != name:
            raise PrepareError(f"{self.source}: no {name} there")
        self.done.notes.append(f"{self.split}: {found[0]}")
        return found[0]


def is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def is_media(name: str) -> bool:
    return is_video(name) or os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def bare_name(key: str) -> str:
    """Return a video's name without folders and without a video suffix."""
    name = key.rpartition("/")[2]
    return os.path.splitext(name)[0] if is_video(name) else name


def reason_of(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error) if isinstance(error, ValueError | csv.Error) else repr(error)


@contextmanager
def needed(path: Path) -> Iterator[None]:
    """Turn an error in reading a required file into PrepareError."""
    try:
        yield
    except Exception as error:
        raise PrepareError(f"{path}: {reason_of(error)}") from error


def open_file(path: Path, most: int = sys.maxsize) -> BinaryIO:
    """Open a file. Raises ValueError if it has more than `most` bytes, OSError if it is no file."""
    check_is_file(path)
    size = os.path.getsize(path)
    if size > most:
        raise ValueError(f"{size} bytes; expected at most {most} for a file of this kind")
    return path.open("rb")


def lines_in(file: BinaryIO, most: int = TEXT_BYTES) -> Iterator[bytes]:
    """Yield the lines, each cut to `most` + 1 bytes."""
    while line := file.readline(most + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(most + 1)


def lines_of(text: str) -> list[str]:
    """Split a text at line ends alone; str.splitlines splits at other characters too."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def as_kind(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        words: dict[type, str] = {str: "a string", list: "a list", dict: "an object in braces"}
        expected = " or ".join(words[kind] for kind in kinds)
        raise ValueError(f"expected {expected}, got {kind_of(value)}")
    return value


def value_of(record: Any, keys: str | tuple[str, ...], *kinds: type) -> Any:
    """Return the value of the first of these keys that a record has."""
    keys = (keys,) if isinstance(keys, str) else keys
    given = [key for key in keys if as_kind(record, dict).get(key) is not None]
    if not given:
        raise ValueError(f"no {' or '.join(map(repr, keys))}")
    try:
        return as_kind(record[given[0]], *kinds)
    except ValueError as error:
        raise ValueError(f"{given[0]!r}: {error}") from error


def texts_of(record: Any, *keys: str) -> list[str]:
    value = value_of(record, keys, str, list)
    return [value] if isinstance(value, str) else [as_kind(text, str) for text in value]


def merge(pairs: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """Join the texts of each video; videos stay in the order of their first entries."""
    texts: dict[str, list[str]] = {}
    for video, said in pairs:
        texts.setdefault(video, []).extend(said)
    return texts
