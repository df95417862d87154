"""Annotations: JSON Lines, one clip per line.

    {"video": "clips/0001.mp4", "text": "a red circle moves left"}
    {"video": "talk.mp4", "start": 12.5, "end": 20, "text": ["a man speaks", "he points"]}
    {"video": "clips/0002.mp4", "subtitle": "so now we fry it", "caption": "a pan with an egg"}
    {"video": "photos/egg.jpg", "text": "a fried egg"}

| key | type | meaning |
|---|---|---|
| `video` | string, required | video or image (jpg, png, webp), relative to this file's folder |
| `start`, `end` | seconds | the part of the video that is the clip; if absent, the whole video |
| `text` | string or list | texts of the whole clip, for retrieval; a list holds alternatives |
| `subtitle` | string | speech heard in the clip (post-pretraining) |
| `caption` | string | a sentence about `image` or the clip's middle frame (post-pretraining) |
| `image` | string | picture that `caption` is about, relative; if absent, the middle frame |

A key that is null counts as absent; blank lines are skipped. A file name that is not UTF-8 is
written as json.dumps writes the result of os.fsdecode: each invalid byte as an escape from \\udc80
to \\udcff. An impossible file name, with NUL or another half of a character (a lone surrogate),
gives a clip that cannot be read. In a text, half a character becomes U+FFFD, with one warning per
file.
"""

import difflib
import json
import logging
import math
import os
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipvip.files import json_line, shown, write_whole

logger = logging.getLogger(__name__)

KEYS = ("video", "start", "end", "text", "subtitle", "caption", "image")
MAX_REPORTED = 5
LeftOut = Callable[[str, str], None]  # called with a place that is left out, and the reason
REPAIRED = "a text holds half a character (a lone surrogate), replaced by U+FFFD"


class AnnotationError(ValueError):
    """An annotation file that cannot be used; one line with file, line numbers and reasons."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One annotated clip. start and end are seconds from the video's first frame.

    repaired: whether a text held half a character, now replaced by U+FFFD.
    """

    video: Path
    start: float | None = None
    end: float | None = None
    text: tuple[str, ...] = ()
    subtitle: str | None = None
    caption: str | None = None
    image: Path | None = None
    line: int = 0
    repaired: bool = field(default=False, compare=False, repr=False)


def load_annotations(path: str | Path, left_out: LeftOut | None = None) -> list[Clip]:
    """Read every clip of a JSON Lines file, in order.

    left_out: called with place and reason of each bad line, which is skipped.
    Raises AnnotationError if the file is missing or has no clip and, without `left_out`, if it has
    bad lines; the error names the first five.
    """
    return [clip for _, clip in _scan(Path(path), left_out)]


class Annotations:
    """The clips of a JSON Lines file as a sequence that parses each clip on access.

    It takes eight bytes of memory per clip, so a hundred million fit. Raises AnnotationError like
    load_annotations, and if the file changes meanwhile.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offsets = array("q")
        self._blanks = array("q")  # for each blank line, the place of the clip after it
        line = 0
        for offset, clip in _scan(self.path):
            self._blanks.extend([len(self._offsets)] * (clip.line - line - 1))
            self._offsets.append(offset)
            line = clip.line

    def __getstate__(self) -> dict[str, Any]:
        # NumPy's arrays, since Ray keeps those once for all workers of a machine.
        tables = {"_offsets": self._offsets, "_blanks": self._blanks}
        return {"path": self.path} | {key: np.asarray(table) for key, table in tables.items()}

    def __len__(self) -> int:
        return len(self._offsets)

    def __iter__(self) -> Iterator[Clip]:
        """Yield all clips in order, reading the file once."""
        place = 0
        try:
            with self.path.open("rb") as file:
                for number, (offset, line) in enumerate(_lines(file), 1):
                    if line.strip():
                        if place == len(self) or offset != self._offsets[place]:
                            raise ValueError("its lines have moved")
                        yield parse_line(line, self.path.parent, number)
                        place += 1
            if place < len(self):
                raise ValueError("it has become shorter")
        except (OSError, ValueError) as error:
            raise AnnotationError(
                f"{shown(self.path)}: changed while in use ({shown(error)}); start again"
            ) from error

    def __getitem__(self, place: int) -> Clip:
        offset = self._offsets[place]
        number = place + 1 + bisect_right(self._blanks, place)
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return parse_line(file.readline().splitlines()[0], self.path.parent, number)
        except (OSError, ValueError, IndexError) as error:
            raise AnnotationError(
                f"{shown(self.path)}:{number}: changed while in use ({shown(error)}); start again"
            ) from error


def _scan(path: Path, left_out: LeftOut | None = None) -> Iterator[tuple[int, Clip]]:
    """Yield every clip, and the offset of its line, with one line in memory at a time."""
    problems: list[tuple[str, str]] = []
    number = clips = bad = repaired = first_repaired = 0
    name = shown(path)
    try:
        with path.open("rb") as file:
            for number, (offset, line) in enumerate(_lines(file), 1):
                if not line.strip():
                    continue
                try:
                    clip = parse_line(line, path.parent, number)
                except ValueError as error:
                    bad += 1
                    if left_out or bad <= MAX_REPORTED:
                        problems.append((f"{path}:{number}", str(error)))
                    continue
                clips += 1
                if clip.repaired:
                    repaired += 1
                    first_repaired = first_repaired or number
                yield offset, clip
    except OSError as error:
        raise AnnotationError(f"{name}: {error.strerror}; expected a JSON Lines file") from error
    if left_out and clips:
        for place, reason in problems:
            left_out(place, reason)
    elif problems:
        first = "; ".join(shown(": ".join(problem)) for problem in problems[:MAX_REPORTED])
        tail = f"; and {bad - MAX_REPORTED} more bad lines" if bad > MAX_REPORTED else ""
        tail += "" if clips else "; expected JSON Lines, one object per clip and line"
        raise AnnotationError(first + tail)
    if not clips:
        raise AnnotationError(f"{name}: holds no clips; expected one JSON object per line")
    if repaired:
        more = f"; so do {repaired - 1} more lines" if repaired > 1 else ""
        logger.warning("%s:%d: %s%s", name, first_repaired, REPAIRED, more)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield each line and its offset. Like bytes.splitlines, ends lines at LF, CR or CR LF."""
    offset = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    file.seek(offset)
    for lines in file:
        for line in lines.splitlines(keepends=True):
            yield offset, line.rstrip(b"\r\n")
            offset += len(line)


def parse_line(line: bytes, folder: Path, number: int = 0) -> Clip:
    """Return the clip of one line; its paths are relative to `folder`. Raises ValueError."""
    try:
        # From bytes, json.loads would also accept encoded halves of characters, as if in names.
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    return parse_record(parse_json(text), folder, number)


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError, which says where it is damaged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text else ""
        raise ValueError(f"not JSON ({error.msg} at {line}column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deeply)") from error


def parse_record(record: Any, folder: Path, number: int = 0) -> Clip:
    """Return the clip of one record: a line, parsed. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object in braces, got {kind_of(record)}")
    for key in record:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(KEYS)}"
            raise ValueError(f"unknown key '{key}' ({hint})")
    video, image = _string(record, "video"), _string(record, "image")
    if video is None:
        raise ValueError("no 'video'")
    start, end = _seconds(record, "start"), _seconds(record, "end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"'end' {end:g} is not after 'start' {start or 0.0:g}")
    given = [*_texts(record), _string(record, "subtitle") or "", _string(record, "caption") or ""]
    *texts, subtitle, caption = said = [mended(text) for text in given]
    return Clip(
        video=folder / video,
        start=start,
        end=end,
        text=tuple(texts),
        subtitle=subtitle or None,
        caption=caption or None,
        image=None if image is None else folder / image,
        line=number,
        repaired=said != given,
    )


def mended(text: str) -> str:
    """Join pairs of surrogates, and replace lone ones, which no tokenizer accepts, by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def write_annotations(path: str | Path, clips: Iterable[Clip]) -> None:
    """Write clips as JSON Lines, whole or not at all.

    Paths in the file's folder become relative to it, others absolute.
    """
    path = Path(path)
    folder = os.path.abspath(path.parent) + os.sep
    write_whole(path, (json_line(_record(clip, folder)) for clip in clips))


def _record(clip: Clip, folder: str) -> dict[str, Any]:
    record = {
        "video": os.path.abspath(clip.video).removeprefix(folder),
        "start": clip.start,
        "end": clip.end,
        "text": clip.text[0] if len(clip.text) == 1 else list(clip.text) or None,
        "subtitle": clip.subtitle,
        "caption": clip.caption,
        "image": clip.image and os.path.abspath(clip.image).removeprefix(folder),
    }
    return {key: value for key, value in record.items() if value is not None}


def kind_of(value: Any) -> str:
    """Return the JSON type of a value in words, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else f"the number {value}")


def _string(record: dict[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be a string, got {kind_of(value)}")
    if not value.strip():
        raise ValueError(f"'{key}' is empty; leave the key out instead")
    return value


def _seconds(record: dict[str, Any], key: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"'{key}' must be a number of seconds, got {kind_of(value)}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"'{key}' must be finite and not negative, got {value}")
    return seconds


def _texts(record: dict[str, Any]) -> tuple[str, ...]:
    value = record.get("text")
    if not isinstance(value, list):
        text = _string(record, "text")
        return () if text is None else (text,)
    if not value:
        raise ValueError("'text' is an empty list; leave the key out instead")
    for position, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            given = "an empty string" if isinstance(text, str) else kind_of(text)
            raise ValueError(f"'text'[{position}] must be a sentence, got {given}")
    return tuple(value)
