"""Captions so far, on disk: a run that is killed at any moment resumes at the clip.

A journal is a folder beside the file that will hold the captions:

    head.json                    what the captions depend on
    00000.jsonl, 00001.jsonl, …  one line per clip, appended; each process of a run has its own file

A line that a killed process did not finish is dropped, and its clip is captioned again. A clip has
one final line. A clip that could not be read may have several lines, since it is tried again by the
next run.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from clipvip.captions.work import UNREADABLE, Record
from clipvip.data.loading import BadFile
from clipvip.files import LOCK, json_line, only_run, shown, write_whole

HEAD = "head.json"
OFFSET_BITS = 44  # of a place in the journal; the others are the number of its file
_OURS = re.compile(r"\d{5}\.jsonl")


class JournalError(ValueError):
    """A journal that cannot be continued; one line that says why and what to do."""


class Journal:
    """The journal of a file of captions.

    out: that file. count: number of clips in the data.
    """

    def __init__(self, out: Path, count: int) -> None:
        self.out = out
        self.folder = out.with_name(f"{out.name}.journal")
        self.count = count
        self._files: list[Path] = []
        self._open: dict[int, BinaryIO] = {}
        self._where: NDArray[np.int64] = np.full(0, -1)

    @contextmanager
    def only_run(self, head: dict[str, Any]) -> Iterator[None]:
        """Keep other runs out; raise JournalError if the captions so far depend on something else.

        head: all that captions depend on, in the order in which differences are named.
        """
        with only_run(self.folder, "captions", JournalError):
            if not (self.folder / LOCK).exists():  # deleted while this run waited for the lock
                raise JournalError(f"another run has just written {shown(self.out)}")
            path = self.folder / HEAD
            old = _read_json(path)
            files = [name for name in os.listdir(self.folder) if _OURS.fullmatch(name)]
            if old is None and files:
                raise JournalError(
                    f"{shown(self.folder)} holds {min(files)} and no usable {HEAD}; delete this "
                    "folder to start again"
                )
            if old is not None and files and (differing := difference(old, head)):
                raise JournalError(
                    f"{shown(self.folder)} holds captions made with {differing}; to resume them, "
                    "give the same command; to start again, delete this folder or give another OUT"
                )
            if old is None or not files:  # of a run that ended before its first caption
                write_whole(path, json.dumps(head, indent=1) + "\n")
            yield

    def read(self) -> None:
        """Read which clips have a line, whoever wrote it."""
        self._where = np.full(self.count, -1, np.int64)
        self._files = sorted(p for p in self.folder.iterdir() if _OURS.fullmatch(p.name))
        self._open.clear()
        unread = np.zeros(self.count, bool)
        for number, path in enumerate(self._files):
            with path.open("rb") as file:
                offset = 0
                for line in file:
                    with suppress(ValueError, TypeError, KeyError, RecursionError):
                        known = json.loads(line) if line.endswith(b"\n") else {}
                        place, failed = known["place"], known.get("left_out") == UNREADABLE
                        if 0 <= place < self.count and (self._where[place] < 0 or unread[place]):
                            # The next run may have read a clip that an earlier one could not.
                            self._where[place] = number << OFFSET_BITS | offset
                            unread[place] = failed
                    offset += len(line)
        self._unread = unread

    def finished(self) -> NDArray[np.bool_]:
        """Which clips need not be captioned any more, bool [count]."""
        return (self._where >= 0) & ~self._unread

    def __getitem__(self, place: int) -> Record | None:
        """Return the record of a clip; None if there is none."""
        where = int(self._where[place])
        if where < 0:
            return None
        number, offset = where >> OFFSET_BITS, where & ((1 << OFFSET_BITS) - 1)
        if number not in self._open:
            self._open[number] = self._files[number].open("rb")
        self._open[number].seek(offset)
        known = json.loads(self._open[number].readline())
        known["file"] = None if known.get("file") is None else BadFile(*known["file"])
        return Record(**known)

    def writer(self, process: int) -> "Writer":
        """Return where one process of a run appends. process: its number."""
        return Writer(self.folder / f"{process:05d}.jsonl", self.finished())

    def remove(self) -> None:
        """Delete the journal, when the captions are in their file."""
        for file in self._open.values():
            file.close()
        # Renamed first: a run killed while it deletes half of the journal must not be resumed.
        gone = self.folder.with_name(f".{self.folder.name}.done")
        shutil.rmtree(gone, ignore_errors=True)
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


class Writer:
    """Append records, in any order. written: clips that have their final line, bool [count]."""

    def __init__(self, path: Path, written: NDArray[np.bool_]) -> None:
        self.path = path
        self._written = written
        self._end_last_line()

    def _end_last_line(self) -> None:
        """Cut off what a killed process did not finish."""
        with suppress(FileNotFoundError), self.path.open("r+b") as file:
            at = file.seek(0, os.SEEK_END)
            while at:
                step = min(at, 1 << 16)
                file.seek(at - step)
                kept = file.read(step).rfind(b"\n") + 1
                if kept:
                    file.truncate(at - step + kept)
                    return
                at -= step
            file.truncate(0)

    def add(self, found: Iterable[Record]) -> None:
        """Write records; a second record of a clip is dropped."""
        new = {record.place: record for record in found if not self._written[record.place]}
        if not new:
            return
        lines = b"".join(json_line(_without_defaults(record)) for record in new.values())
        try:
            with self.path.open("ab") as file:
                file.write(lines)
        except OSError as error:
            reason = f"{error.strerror or error}; what is captioned is kept: fix this and run again"
            raise OSError(error.errno, reason, os.fspath(self.path)) from error
        self._written[list(new)] = True


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Describe the first setting in which what is there differs; None if nothing does."""
    whole = {"annotations": "other annotations", "model": "another model", "format": "a new format"}
    for key, value in new.items():
        if old.get(key) != value:
            return whole.get(key, f"{key} {shown(old.get(key))} instead of {shown(value)}")
    return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return known if isinstance(known, dict) else None


def _without_defaults(record: Record) -> dict[str, Any]:
    defaults = Record._field_defaults
    return {
        key: value
        for key, value in record._asdict().items()
        if key not in defaults or value != defaults[key]
    }
