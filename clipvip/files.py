"""Files and their names: written whole or not at all, found through links, shown safely.

A file name is bytes. Python holds bytes that are not UTF-8 as lone surrogates (PEP 383); JSON
written by `json_line` holds those as escapes, so a name read back names the same file.
"""

import json
import logging
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # change reading order


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


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; links are followed, but no folder is entered twice.

    A folder that can be reached with and without links is listed without. macOS's shadows of
    files (`._name`) are left out, and folders that cannot be read, with a warning.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    folders, links = [os.fspath(folder)], []  # links wait until all real folders are entered
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
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif (entry.is_file() or entry.is_symlink()) and not entry.name.startswith("._"):
                found.append(Path(entry.path))  # a link to nowhere too: told when it is opened
    return sorted(found)


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
