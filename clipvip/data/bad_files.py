"""Files that could not be read: told once each, listed, and tolerated up to a share."""

import fcntl
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

COUNTED_FROM = 100  # distinct clips tried before their share of bad ones means anything


class LoaderError(RuntimeError):
    """Data cannot be had: too many bad files."""


class BadFile(NamedTuple):
    """A file that could not be read, why, and the annotation line that names it."""

    path: str
    reason: str
    line: int


class Failure(NamedTuple):
    """A bad file, as found at one place of the data."""

    place: int
    file: BadFile


class BadFiles:
    """Of `count` places; `found` lists each file once, as does the file at `path`."""

    def __init__(self, count: int, max_share: float, path: Path | None = None) -> None:
        self.found: list[BadFile] = []
        self.tried = 0
        self.bad = 0
        self._count = count
        self._max_share = max_share
        self._list = None if path is None else _List(path)
        self._names: set[str] = set()
        self._state = np.zeros(count, np.uint8)  # 1 tried, 2 bad; a byte a place, whatever comes

    def note(self, tried: Iterable[int], failures: Iterable[Failure], final: bool = False) -> None:
        """Counts distinct places; LoaderError where too many are bad.

        final: no more will be tried, however few these were.
        """
        for place in tried:
            if not self._state[place]:
                self._state[place] = 1
                self.tried += 1
        for place, file in failures:
            if self._state[place] < 2:
                self._state[place] = 2
                self.bad += 1
            if file.path not in self._names:
                self._names.add(file.path)
                self.found.append(file)
                logger.warning("left out %s: %s", file.path, file.reason)
                if self._list is not None:
                    self._list.append(file)
        if final or self.tried >= min(COUNTED_FROM, self._count):
            self.check()

    def resume(self, tried: Iterable[int], bad: int) -> None:
        """Counts what an earlier run found."""
        for place in tried:
            self._state[place] = 1
            self.tried += 1
        self.bad += bad

    def check(self) -> None:
        if self.bad > self._max_share * self.tried:
            self.stop()

    def stop(self) -> None:
        last = f"; the last: {self.found[-1].path}: {self.found[-1].reason}" if self.found else ""
        raise LoaderError(
            f"{self.bad} of {self.tried} clips tried could not be read "
            f"({self.bad / self.tried:.1%}, allowed {self._max_share:.1%}){last}"
        )


class _List:
    """The file of bad files, to which other ranks may append too and earlier runs did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()
        self.read_to = 0  # or the whole file would be read for each line that is added

    def append(self, bad: BadFile) -> None:
        """One line, unless one names that path already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END) < self.read_to:  # another file by now
                self.read_to, self.names = 0, set()
            file.seek(self.read_to)
            whole, end, _ = file.read().rpartition(b"\n")
            self.read_to += len(whole + end)
            file.truncate(self.read_to)  # a run killed while writing leaves part of a line
            for line in whole.splitlines():
                with suppress(ValueError, TypeError, KeyError):  # damaged: at worst named twice
                    self.names.add(json.loads(line)["path"])
            if bad.path not in self.names:
                file.write(json.dumps(bad._asdict(), ensure_ascii=False).encode() + b"\n")
