"""Annotations: JSON Lines, one clip a line.

    {"video": "clips/0001.mp4", "text": "a red circle moves left"}
    {"video": "talk.mp4", "start": 12.5, "end": 20, "text": ["a man speaks", "he points"]}
    {"video": "clips/0002.mp4", "subtitle": "so now we fry it", "caption": "a pan with an egg"}
    {"video": "photos/egg.jpg", "text": "a fried egg"}

| key | type | meaning |
|---|---|---|
| `video` | string, required | video or image (jpg, png, webp), relative to this file's folder |
| `start`, `end` | seconds | the part of the video that is the clip; the whole of it if absent |
| `text` | string or list | what retrieval trains and measures on; a list holds alternatives |
| `subtitle` | string | speech heard in the clip (post-pretraining) |
| `caption` | string | a sentence on `image`, or on the clip's middle frame (post-pretraining) |
| `image` | string | picture that `caption` is about, relative; the middle frame if absent |

A key that is null counts as absent; blank lines are skipped.
"""

import difflib
import json
import math
import os
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

KEYS = ("video", "start", "end", "text", "subtitle", "caption", "image")
MAX_REPORTED = 5


class AnnotationError(ValueError):
    """An annotation file that cannot be used; one line naming file, line numbers, reasons."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One annotated clip. Times in seconds from the video's first frame."""

    video: Path
    start: float | None = None
    end: float | None = None
    text: tuple[str, ...] = ()
    subtitle: str | None = None
    caption: str | None = None
    image: Path | None = None
    line: int = 0


def load_annotations(path: str | Path) -> list[Clip]:
    """Every clip of a JSON Lines file, in order.

    Raises AnnotationError where the file is missing or holds no clip, or where lines are
    bad: then the first five are reported together.
    """
    return [clip for _, clip in _scan(Path(path))]


class Annotations:
    """The same clips by their places, each parsed when it is asked for: eight bytes a clip, so
    that a hundred million fit into memory. The file must stay as it is."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offsets = array("q")
        self._blanks = array("q")  # of each blank line, the place of the clip after it
        line = 0
        for offset, clip in _scan(self.path):
            self._blanks.extend([len(self._offsets)] * (clip.line - line - 1))
            self._offsets.append(offset)
            line = clip.line

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, place: int) -> Clip:
        offset = self._offsets[place]
        number = place + 1 + bisect_right(self._blanks, place)
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return parse_line(file.readline().splitlines()[0], self.path.parent, number)
        except (OSError, ValueError, IndexError) as error:
            raise AnnotationError(
                f"{self.path}:{number}: changed while in use ({error}); start again"
            ) from error


def _scan(path: Path) -> Iterator[tuple[int, Clip]]:
    """Every clip and where its line starts, a line in memory at a time."""
    problems: list[str] = []
    number = clips = bad = 0
    try:
        with path.open("rb") as file:
            for number, (offset, line) in enumerate(_lines(file), 1):
                if not line.strip():
                    continue
                try:
                    clip = parse_line(line, path.parent, number)
                except ValueError as error:
                    bad += 1
                    problems += [f"{path}:{number}: {error}"] * (bad <= MAX_REPORTED)
                    continue
                clips += 1
                yield offset, clip
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}; expected a JSON Lines file") from error
    if problems:
        tail = f"; and {bad - MAX_REPORTED} more bad lines" if bad > MAX_REPORTED else ""
        raise AnnotationError("; ".join(problems) + tail)
    if not clips:
        raise AnnotationError(f"{path}: holds no clips; expected one JSON object a line")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each line and where it starts; ended by LF, CR or both, as bytes.splitlines has it."""
    offset = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    file.seek(offset)
    for lines in file:
        for line in lines.splitlines(keepends=True):
            yield offset, line.rstrip(b"\r\n")
            offset += len(line)


def parse_line(line: str | bytes, folder: Path, number: int = 0) -> Clip:
    """One line's clip, its paths taken relative to `folder`. ValueError gives the reason."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    return parse_record(record, folder, number)


def parse_record(record: Any, folder: Path, number: int = 0) -> Clip:
    """As parse_line, of what stands in the line."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object in braces, got {_kind(record)}")
    for key in record:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(KEYS)}"
            raise ValueError(f"unknown key '{key}' ({hint})")
    video = _string(record, "video")
    if video is None:
        raise ValueError("no 'video'")
    start, end = _seconds(record, "start"), _seconds(record, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"'end' {end:g} is not after 'start' {start or 0.0:g}")
    image = _string(record, "image")
    return Clip(
        video=folder / video,
        start=start,
        end=end,
        text=_texts(record),
        subtitle=_string(record, "subtitle"),
        caption=_string(record, "caption"),
        image=None if image is None else folder / image,
        line=number,
    )


def write_annotations(path: str | Path, clips: Iterable[Clip]) -> None:
    """Write clips as JSON Lines, whole or not at all.

    Paths in the file's folder become relative to it, others absolute.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    folder = os.path.abspath(path.parent) + os.sep
    try:
        with partial.open("w", encoding="utf-8") as file:
            for clip in clips:
                record = {
                    "video": os.path.abspath(clip.video).removeprefix(folder),
                    "start": clip.start,
                    "end": clip.end,
                    "text": clip.text[0] if len(clip.text) == 1 else list(clip.text) or None,
                    "subtitle": clip.subtitle,
                    "caption": clip.caption,
                    "image": clip.image and os.path.abspath(clip.image).removeprefix(folder),
                }
                given = {key: value for key, value in record.items() if value is not None}
                file.write(json.dumps(given, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else f"the number {value}")


def _string(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be a string, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"'{key}' is empty; leave the key out instead")
    return value


def _seconds(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"'{key}' must be a number of seconds, got {_kind(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"'{key}' must be finite and not negative, got {value}")
    return float(value)


def _texts(record: dict[str, Any]) -> tuple[str, ...]:
    value = record.get("text")
    if not isinstance(value, list):
        text = _string(record, "text")
        return () if text is None else (text,)
    if not value:
        raise ValueError("'text' is an empty list; leave the key out instead")
    for position, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            shown = "an empty string" if isinstance(text, str) else _kind(text)
            raise ValueError(f"'text'[{position}] must be a sentence, got {shown}")
    return tuple(value)
