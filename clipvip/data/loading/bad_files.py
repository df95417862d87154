"""Files that could not be read: told once each, listed, and tolerated up to a share; and files
that are damaged but could be used, told and listed."""

import fcntl
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from clipvip.files import json_line, shown

logger = logging.getLogger(__name__)

_START = b'{"path": "'  # of each line
COUNTED_FROM = 100  # distinct clips tried before their share of bad ones means anything


class LoaderError(RuntimeError):
    """Data cannot be had: too many bad files."""


class BadFile(NamedTuple):
    """A file that could not be read, why, and the annotation line that names it. Of a file that
    is only damaged, the reason says what was lost."""

    path: str
    reason: str
    line: int


class Failure(NamedTuple):
    """A bad file, as found at one place of the data."""

    place: int
    file: BadFile


class BadFiles:
    """Bad files among `count` places of the data.

    `found` lists each file that could not be read once. So does the file at `path`, which lists
    damaged files too, with `"damaged": true`.
    """

    def __init__(self, count: int, max_share: float, path: Path | None = None) -> None:
        self.found: list[BadFile] = []
        self.tried = 0
        self.bad = 0
        self._count = count
        self._max_share = max_share
        self._list = None if path is None else _List(path)
        self._told: set[tuple[str, bool]] = set()  # (path, damaged)
        self._state = np.zeros(count, np.uint8)  # 1 tried, 2 bad; a byte a place, whatever comes

    def note(
        self,
        tried: Iterable[int],
        failures: Iterable[Failure],
        damaged: Iterable[BadFile] = (),
        final: bool = False,
    ) -> None:
        """Count distinct places; LoaderError where too many are bad.

        damaged: files that lost something but were used; they are told and listed, not counted.
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
            if self._is_new(file, damaged=False):
                self.found.append(file)
                logger.warning("left out %s: %s", shown(file.path), shown(file.reason))
        for file in damaged:
            if self._is_new(file, damaged=True):
                logger.warning(
                    "damaged %s: %s; its other frames are used",
                    shown(file.path),
                    shown(file.reason),
                )
        if final or self.tried >= min(COUNTED_FROM, self._count):
            self.check()

    def _is_new(self, file: BadFile, damaged: bool) -> bool:
        """Whether the file was not told before; then it is listed."""
        key = (file.path, damaged)
        if key in self._told:
            return False
        self._told.add(key)
        if self._list is not None:
            self._list.append(file, damaged)
        return True

    def resume(self, tried: Iterable[int], bad: int) -> None:
        """Counts what an earlier run found."""
        for place in tried:
            self._state[place] = 1
            self.tried += 1
        self.bad += bad

    def check(self) -> None:
        if self.bad > self._max_share * self.tried:
            self.stop(f"{self.bad / self.tried:.1%}, allowed {self._max_share:.1%}")

    def stop(self, why: str) -> NoReturn:
        """Raise LoaderError, which says how many files are bad, why that is too many, and names the
        last."""
        last = ""
        if self.found:
            last = f"; the last: {shown(self.found[-1].path)}: {shown(self.found[-1].reason)}"
        raise LoaderError(f"{self.bad} of {self.tried} clips tried could not be read ({why}){last}")


class _List:
    """The file of bad files, to which other ranks may append too and earlier runs did.

    A list that cannot be written (disk full, no permission) is told once and costs nothing else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listed: set[tuple[str, bool]] = set()  # (path, damaged)
        self.read_to = 0  # or the whole file would be read for each line that is added
        self.failed = False

    def append(self, bad: BadFile, damaged: bool) -> None:
        """Add one line, unless there is one of that path already."""
        record = bad._asdict() | ({"damaged": True} if damaged else {})
        try:
            self._append(record, (bad.path, damaged))
        except OSError as error:
            if not self.failed:
                self.failed = True
                logger.warning(
                    "bad files cannot be listed in %s: %s; they are only logged",
                    shown(self.path),
                    error.strerror or error,
                )

    def _append(self, record: dict[str, Any], key: tuple[str, bool]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            with suppress(OSError):  # no such locks here
                fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END) < self.read_to:  # another file by now
                self.read_to, self.listed = 0, set()
            file.seek(self.read_to)
            whole, end, rest = file.read().rpartition(b"\n")
            self.read_to += len(whole + end)
            if rest.startswith(_START) or _START.startswith(rest):
                file.truncate(self.read_to)  # a run killed while writing leaves part of a line
            else:  # another program's last line, without its line feed
                file.write(b"\n")
            for line in whole.splitlines():
                with suppress(ValueError, TypeError, KeyError, RecursionError):
                    known = json.loads(line)  # damaged: at worst named twice
                    self.listed.add((known["path"], bool(known.get("damaged"))))
            if key not in self.listed:
                file.write(json_line(record))
