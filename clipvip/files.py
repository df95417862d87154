"""Safe handling of files, names and texts.

Write files whole or not at all, find files through links, decode texts, print names safely, and
let one run at a time write to a folder.

A file name is a sequence of bytes. Python stores bytes that are not UTF-8 as lone surrogates
(PEP 383). `json_line` writes those as escapes, so a name read back from JSON names the same file.
"""

import codecs
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import socket
import stat
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, BinaryIO

logger = logging.getLogger(__name__)

BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # change reading order

MARKS = {  # byte-order marks, UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

LOCK = ".lock"
# Seconds to wait for a run that holds a folder: a killed process may take a moment to end. A file
# server keeps the locks of a lost machine until their lease ends, after 90 s in NFS.
HERE_WAIT, ELSEWHERE_WAIT = 10.0, 100.0
_NOTE = re.compile(r"(host \S+, process \d+, since .*\s*)?")  # whole content of our lock files

LIST_BYTES = 1 << 28  # limit for a list of files that this package wrote, far more than it needs
TEXT_BYTES = 16 << 20  # limit for one text, in a tar or beside a video
NOT_A_FILE = "a pipe, socket or device, not a file"


class OtherRunError(ValueError):
    """Another process is writing to a folder; one line says which, and what to do."""


def json_line(record: Any) -> bytes:
    """Return a line of JSON Lines, from which json.loads restores names that are not UTF-8."""
    # This handler replaces a lone surrogate by what is also its escape in JSON.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


@contextmanager
def renamed_when_whole(destination: Path) -> Iterator[Path]:
    """Yield a path beside `destination` for a new file or folder, and rename it when it is written.

    After an error, nothing is left of it. The folder around `destination` is made if it is missing.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(
        prefix=f".{destination.name}.", dir=destination.parent, ignore_cleanup_errors=True
    ) as folder:
        unfinished = Path(folder, destination.name)
        yield unfinished
        os.rename(unfinished, destination)


def write_whole(path: Path, data: str | bytes | Iterable[bytes]) -> None:
    """Write a file whole or not at all.

    Data and then name are flushed to disk. If several processes write the same file, the last one
    wins. What a killed process leaves behind is deleted when the same file is next written.

    path: a link is followed. data: text is encoded as UTF-8; an iterable is written piece by piece.
    Raises OSError, which names `path`.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # such as /dev/null, which root could replace
        raise OSError(errno.EINVAL, NOT_A_FILE, str(path))
    _write(path, data, _open_partial)


def write_new(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write and flush a file that does not exist yet; on an error, delete it.

    Raises FileExistsError if it exists, else OSError, which names `path`.
    """
    _write(path, data, lambda path: path.open("xb"))


def _write(
    path: Path, data: str | bytes | Iterable[bytes], create: Callable[[Path], BinaryIO]
) -> None:
    """Write and flush the file that `create` opens, and rename it to `path` if it has another name;
    on an error, delete it."""
    if isinstance(data, str):
        data = data.encode()
    try:
        with create(path) as file:
            try:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)  # while locked, or another process might delete it
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:  # names no file, or the partial one
        if error.errno is None or not str(error.filename or ".partial").endswith(".partial"):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    with suppress(OSError):
        flush_folder(path.parent)


def read_own(path: Path, most: int = sys.maxsize) -> bytes:
    """Read a regular file of at most `most` bytes; a sparse file may claim any size.

    A link may lead anywhere, and a pipe or device may never end.
    Raises OSError, whose strerror says what the path is instead, or that the file is too large.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFLNK: "a link, not a file", stat.S_IFDIR: "a folder, not a file"}
        what = kinds.get(stat.S_IFMT(status.st_mode), NOT_A_FILE)
        raise OSError(errno.EINVAL, what, str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes; expected at most {most}", str(path))
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        return file.read()


def _open_partial(path: Path) -> BinaryIO:
    """Create and lock a partial file, to be renamed to `path` once it is whole.

    An existing partial file that is not locked was left behind by a killed process.
    """
    # The hash keeps the name short, and distinct from those of other files.
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    for number in itertools.count():
        partial = path.with_name(f".{name}-{number}.partial")
        _delete_unlocked(partial)
        with suppress(FileExistsError):
            file = partial.open("xb")
            if _keeps(file, partial):
                return file
            file.close()
    raise AssertionError


def _keeps(file: BinaryIO, path: Path) -> bool:
    """Lock a new file unless another process deletes it first. Return whether it worked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks, for any process
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _delete_unlocked(path: Path) -> None:
    """Delete a file if no process has locked it."""
    with suppress(OSError):  # it does not exist, is locked, or cannot be locked here
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                os.unlink(path)
        finally:
            os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush the names of new files to disk. Raises OSError if the file system cannot do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_is_file(path: str | Path) -> None:
    """Raise OSError for a folder, pipe or device: opening or reading those may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"a folder, {NOT_A_FILE.removeprefix('a ')}")


def _warn_left_out(path: str, reason: str) -> None:
    logger.warning("left out %s: %s", shown(path), shown(reason))


def files_in(
    folder: Path,
    keep: Callable[[str], bool] = lambda name: True,
    left_out: Callable[[str, str], None] = _warn_left_out,
) -> list[Path]:
    """List every file below a folder, sorted. Links are followed, but no folder is entered twice.

    A folder that can be reached with and without links is listed by its path without links.
    The `._name` files that macOS adds are left out.

    keep: whether a file with this name is wanted.
    left_out: called with the path and the reason for each folder that cannot be read, and for each
        pipe, socket or device with a wanted name.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    folders = [os.fspath(folder)]
    links: list[str] = []  # entered after all real folders
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(here)
            if (identity := (status.st_dev, status.st_ino)) in entered:
                continue
            entered.add(identity)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            left_out(here, error.strerror or str(error))
            continue
        for entry in entries:
            if entry.is_symlink() and os.path.isdir(entry.path):
                links.append(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.name.startswith("._") or not keep(entry.name):
                continue
            elif _may_be_file(entry):
                found.append(Path(entry.path))
            else:
                left_out(entry.path, NOT_A_FILE)
    return sorted(found)


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():  # a broken link counts: opening it will raise the error
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


def decode_text(data: bytes) -> tuple[str, bool]:
    """Decode a text by its byte-order mark, else as UTF-8. Return it, and whether that was a guess.

    Guessed are lines that are not UTF-8: they are decoded as Windows-1252, else Latin-1.
    Raises ValueError if the data are no text.
    """

    def guess(line: bytes) -> str:
        for encoding in ("utf-8", "cp1252"):
            with suppress(UnicodeDecodeError):
                return line.decode(encoding)
        return line.decode("latin-1")

    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    guessed = False
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding:
            raise ValueError(f"not {encoding}, as its byte-order mark says") from error
        text, guessed = "".join(map(guess, data.splitlines(keepends=True))), True
    if "\0" in text:
        raise ValueError("not a text: holds NUL characters")
    return text, guessed


def shown(name: object) -> str:
    """Escape what is not safe to print in a name or text from elsewhere: control characters, bytes
    that are not UTF-8, and marks that change the reading order."""

    def escape(letter: str) -> str:
        if "\udc80" <= letter <= "\udcff":
            return f"\\x{ord(letter) - 0xDC00:02x}"
        if letter in BIDI or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
            return letter.encode("unicode_escape", "surrogatepass").decode()
        return letter

    return "".join(map(escape, str(name)))


def check_folder(out: Path, what: str, is_ours: Callable[[], bool]) -> str:
    """Raise ValueError unless `out` may hold what a command writes; return where else to write.

    what: "an index" or "tokens", for messages. is_ours: whether the folder holds that already.
    """
    # An empty --out also means the current folder, perhaps by mistake.
    name = "the current folder" if out == Path() else shown(out)
    noun = what.removeprefix("an ")
    own = f"give a new or empty folder, such as {shown(out / noun)}"
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{name} is a link to nowhere; give another --out, or delete it")
    if not out.exists():
        return own
    if not out.is_dir():
        raise ValueError(f"{name} is a file; expected the folder of {what}: give another --out")
    if not os.access(out, os.W_OK | os.X_OK):
        raise ValueError(f"{name} cannot be written to; give another --out")
    if not is_ours():
        # Here bad_files.jsonl is not ours: it is written after what tells that a folder is.
        ours = re.compile(r"\..*|.*\.partial", re.DOTALL)
        others = sorted(entry for entry in os.listdir(out) if not ours.fullmatch(entry))
        if others and not is_ours():  # another process may have made it one
            raise ValueError(f"{name} holds {shown(others[0])!r} and no {noun}; {own}")
    return own


@contextmanager
def only_run(folder: Path, what: str, error: type[ValueError] = OtherRunError) -> Iterator[None]:
    """Keep other runs out of a folder, which is created if needed, until this block ends.

    The lock also ends with its process, however that ends. A file system without locks keeps nobody
    out. A file `.lock` whose content is not one of our notes is locked, but not written to.

    what: the work, such as "trains"; it follows "another run" in the message.
    Raises `error` if another process of any machine, or another caller in this one, holds the
    folder, or if its `.lock` is a link, a pipe or a device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise error(f"{shown(path)} is not a file, so not a lock; delete it or give another out")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    _locks.add(lock)
    try:
        if (holder := _take(lock)) is not None:
            other = f"another run {what} there" + (f" ({holder})" if holder else "")
            raise error(f"{shown(folder)}: {other}; wait for it or give another out")
        yield
    finally:
        _locks.discard(lock)
        os.close(lock)


_locks: set[int] = set()  # descriptors of this process


def _leave_locks() -> None:
    """Leave the locks to the parent process: a worker may outlive it by a moment."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks)


def _take(lock: int) -> str | None:
    """Lock a file and note this process in it. Return None, or another holder's note."""
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
        except OSError:  # this file system has no locks
            return None
    note = f"{here}process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M')}\n"
    with suppress(OSError):  # the disk may be full
        if _NOTE.fullmatch(os.pread(lock, 1000, 0).decode(errors="replace")):
            os.ftruncate(lock, 0)
            os.pwrite(lock, note.encode(), 0)
            os.fsync(lock)  # for readers on other machines
    return None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


class Hashed:
    """A file whose reads and writes also go into a SHA-256 and a count of bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> int:
        self._take(data)
        return self.file.write(data)

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self._take(data)
        return data

    def _take(self, data: Any) -> None:
        self.digest.update(data)
        self.bytes += len(data)
