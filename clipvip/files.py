"""Files, names and texts: written whole or not at all, found through links, decoded, shown safely;
and folders that one run at a time writes to.

A file name is bytes. Python holds bytes that are not UTF-8 as lone surrogates (PEP 383); JSON
written by `json_line` holds those as escapes, so a name read back names the same file.
"""

import codecs
import fcntl
import json
import logging
import os
import socket
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # change reading order

MARKS = {  # byte-order marks; that of UTF-16 starts that of UTF-32
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

LOCK = ".lock"
# Seconds to wait for a run that holds a folder: its process may be killed and not quite gone. A
# server of files keeps the locks of a machine that is gone for as long as its lease, 90 s in NFS.
HERE_WAIT, ELSEWHERE_WAIT = 10.0, 100.0


class OtherRunError(ValueError):
    """Another process writes to a folder; one line that says which and what to do."""


def json_line(record: Any) -> bytes:
    """One line of JSON Lines. Names that are not UTF-8 come back as they were by json.loads."""
    # The replacement of a lone surrogate by this handler is its escape in JSON too.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_whole(path: Path, data: str | bytes | Iterable[bytes]) -> None:
    """Write a file whole or not at all, on disk before it has its name.

    data: text becomes UTF-8; an iterable is written piece by piece.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if isinstance(data, str):
        data = data.encode()
    try:
        with partial.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def files_in(folder: Path, keep: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """Every file below a folder, sorted; links are followed, but no folder is entered twice.

    A folder that can be reached with and without links is listed without. macOS's shadows of
    files (`._name`) are left out, and folders that cannot be read, with a warning.

    keep: says by a file's name whether it is wanted.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    folders = [os.fspath(folder)]
    links: list[str] = []  # they wait until all real folders are entered
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            logger.warning("left out %s: %s", shown(here), error.strerror)
            continue
        for entry in entries:
            if entry.is_symlink() and os.path.isdir(entry.path):
                links.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.name.startswith("._") or not keep(entry.name):
                continue
            elif entry.is_symlink() or entry.is_file():
                found.append(Path(entry.path))  # a link to nowhere too: told when it is opened
    return sorted(found)


def decode_text(data: bytes) -> tuple[str, bool]:
    """A text of unknown encoding, and whether that was guessed for a part of it.

    The encoding is what the byte-order mark says, else UTF-8, else UTF-8 in the lines that are
    and Windows-1252 or Latin-1 in the others. Raises ValueError where it is no text.
    """
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    guessed = False
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding:
            raise ValueError(f"not {encoding}, as its byte-order mark says") from error
        text, guessed = "".join(map(_decode_line, data.splitlines(keepends=True))), True
    if "\0" in text:
        raise ValueError("not a text: holds NUL characters")
    return text, guessed


def _decode_line(line: bytes) -> str:
    for encoding in ("utf-8", "cp1252"):
        with suppress(UnicodeDecodeError):
            return line.decode(encoding)
    return line.decode("latin-1")


def shown(name: object) -> str:
    """A name or text from elsewhere, made safe to print: control characters, bytes that are not
    UTF-8 and marks that turn the reading order become escapes."""
    return "".join(map(_shown, str(name)))


def _shown(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if letter in BIDI or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
        return letter.encode("unicode_escape", "surrogatepass").decode()
    return letter


@contextmanager
def only_run(folder: Path, what: str, error: type[ValueError] = OtherRunError) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if absent, until this one ends, however it
    ends: the lock dies with its process.

    A file system without locks keeps nobody out. what: the work, such as "trains"; it stands in
    the message after "another run".

    Raises:
        error: another process of any machine, or another caller in this one, holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    _locks.add(lock)
    try:
        holder = _take(lock)
        if holder is not None:
            who = f" ({holder})" if holder else ""
            raise error(
                f"{shown(folder)}: another run {what} there{who}; wait for it or give another out"
            )
        yield
    finally:
        _locks.discard(lock)
        os.close(lock)


_locks: set[int] = set()  # descriptors of this process


def _leave_locks() -> None:
    """Let the parent alone hold its locks: a worker may outlive it by a moment."""
    for lock in _locks:
        os.close(lock)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks)


def _take(lock: int) -> str | None:
    """Lock a file and note in it who did; the note of the one who keeps it locked, else None."""
    here = f"host {socket.gethostname()}, "
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(lock, 1000, 0).decode(errors="replace").strip()
            elsewhere = holder and not holder.startswith(here)
            if time.monotonic() - began > (ELSEWHERE_WAIT if elsewhere else HERE_WAIT):
                return shown(holder)
            time.sleep(0.05)
        except OSError:  # no such locks here
            return None
    note = f"{here}process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M')}\n"
    with suppress(OSError):  # the disk may be full
        os.ftruncate(lock, 0)
        os.pwrite(lock, note.encode(), 0)
        os.fsync(lock)  # for readers on other machines
    return None
