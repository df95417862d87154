"""Unreadable files: each is logged and listed once, and a share of them is tolerated. Damaged
files, which are used, are logged and listed too."""

import fcntl
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from clipvip.files import json_line, shown

logger = logging.getLogger(__name__)

_START = b'{"path": "'  # of each line
COUNTED_FROM = 100  # distinct clips to try before the share of bad ones counts


class LoaderError(RuntimeError):
    """Too many files cannot be read."""


class BadFile(NamedTuple):
    """A file that could not be read, or one that is damaged but used.

    reason: why it could not be read, or what was lost. line: annotation line that names it.
    """

    path: str
    reason: str
    line: int


class Failure(NamedTuple):
    """A bad file, with the place of its clip among the data."""

    place: int
    file: BadFile


class BadFiles:
    """Count bad files among `count` places of the data, and stop if their share is too large.

    max_share: share of the places tried at which a file may be unreadable.
    path: file to append unreadable files to, and damaged ones with `"damaged": true`.

    found: each file that could not be read, once. tried, bad: numbers of distinct places.
    """

    def __init__(self, count: int, max_share: float, path: Path | None = None) -> None:
        self.found: list[BadFile] = []
        self.tried = 0
        self.bad = 0
        self._count = count
        self._max_share = max_share
        self._list = None if path is None else _List(path)
        self._logged: set[tuple[str, bool]] = set()  # (path, damaged)
        self._state = np.zeros(count, np.uint8)  # 0: not tried, 1: tried, 2: bad

    def note(
        self,
        tried: Iterable[int],
        failures: Iterable[Failure],
        damaged: Iterable[BadFile] = (),
        final: bool = False,
    ) -> None:
        """Count distinct places. Raises LoaderError if too many of them are bad.

        damaged: files that were used without some of their frames; logged and listed, not counted.
        final: check the share even if few places were tried, since no more will be.
        """
        for place in tried:
            if not self._state[place]:
                self._state[place] = 1
                self.tried += 1
        for place, file in failures:
            if self._state[place] < 2:
                self._state[place] = 2
                self.bad += 1
            if self._list_new(file, damaged=False):
                self.found.append(file)
                logger.warning("left out %s: %s", shown(file.path), shown(file.reason))
        for file in damaged:
            if self._list_new(file, damaged=True):
                note = "damaged %s: %s; its other frames are used"
                logger.warning(note, shown(file.path), shown(file.reason))
        enough = final or self.tried >= min(COUNTED_FROM, self._count)
        if enough and self.bad > self._max_share * self.tried:
            self.stop(f"{self.bad / self.tried:.1%}, allowed {self._max_share:.1%}")

    def _list_new(self, file: BadFile, damaged: bool) -> bool:
        """List a file that was not logged before. Return whether it is such a file."""
        key = (file.path, damaged)
        if key in self._logged:
            return False
        self._logged.add(key)
        if self._list is not None:
            self._list.append(file, damaged)
        return True

    def resume(self, tried: NDArray[np.int64], bad: int) -> None:
        """Count the places that an earlier run tried, `bad` of which were bad."""
        self._state[tried] = 1
        self.tried += len(tried)
        self.bad += bad

    def stop(self, why: str) -> NoReturn:
        """Raise LoaderError with the number of bad files, why it is too many, and the last one."""
        last = ""
        if self.found:
            last = f"; the last: {shown(self.found[-1].path)}: {shown(self.found[-1].reason)}"
        raise LoaderError(f"{self.bad} of {self.tried} clips tried could not be read ({why}){last}")


class _List:
    """The file that lists bad files. Other ranks append to it too, and earlier runs did.

    If it cannot be written (disk full, no permission), that is logged once, and the run continues.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: set[tuple[str, bool]] = set()  # (path, damaged)
        self.read_to = 0  # offset of the first byte not read yet
        self.failed = False

    def append(self, bad: BadFile, damaged: bool) -> None:
        """Add a line, unless the file has one with that path already."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                with suppress(OSError):  # this file system has no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                self._read_further(file)
                if (bad.path, damaged) not in self.listed:
                    file.write(json_line(bad._asdict() | ({"damaged": True} if damaged else {})))
        except OSError as error:
            if not self.failed:
                self.failed = True
                logger.warning(
                    "bad files cannot be listed in %s: %s; they are only logged",
                    shown(self.path),
                    error.strerror or error,
                )

    def _read_further(self, file: BinaryIO) -> None:
        """Read the lines that were added, and end the last one."""
        if file.seek(0, os.SEEK_END) < self.read_to:  # the file was replaced
            self.read_to, self.listed = 0, set()
        file.seek(self.read_to)
        whole, end, rest = file.read().rpartition(b"\n")
        self.read_to += len(whole + end)
        if rest.startswith(_START) or _START.startswith(rest):
            file.truncate(self.read_to)  # part of a line, from a run killed while writing
        else:  # the last line of another program, without a line feed
            file.write(b"\n")
        for line in whole.splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                known = json.loads(line)  # if it is damaged, its file may be listed twice
                self.listed.add((known["path"], bool(known.get("damaged"))))
