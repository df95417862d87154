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

A key that is null counts as absent; blank lines are skipped. A file name that is not UTF-8 stands
as json.dumps writes what os.fsdecode makes of it: each such byte as an escape from \\udc80 to
\\udcff. A name that no file can have, with NUL or any other half of a character (a lone surrogate),
makes a clip that cannot be read; in a text U+FFFD takes a half's place, with one warning per file.
"""

import difflib
import json
import logging
import math
import os
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from clipvip.files import json_line, shown, write_whole

logger = logging.getLogger(__name__)

KEYS = ("video", "start", "end", "text", "subtitle", "caption", "image")
MAX_REPORTED = 5
REPAIRED = "a text holds half a character (a lone surrogate); U+FFFD takes its place"


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
    repaired: bool = field(default=False, compare=False, repr=False)
    """Whether a text held half a character, which U+FFFD now replaces."""


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
                f"{shown(self.path)}:{number}: changed while in use ({shown(error)}); start again"
            ) from error


def _scan(path: Path) -> Iterator[tuple[int, Clip]]:
    """Every clip and where its line starts, a line in memory at a time."""
    problems: list[str] = []
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
                    problems += [f"{name}:{number}: {shown(error)}"] * (bad <= MAX_REPORTED)
                    continue
                clips += 1
                if clip.repaired:
                    repaired += 1
                    first_repaired = first_repaired or number
                yield offset, clip
    except OSError as error:
        raise AnnotationError(f"{name}: {error.strerror}; expected a JSON Lines file") from error
    if problems:
        tail = f"; and {bad - MAX_REPORTED} more bad lines" if bad > MAX_REPORTED else ""
        tail += "" if clips else "; expected JSON Lines, a clip's object a line"
        raise AnnotationError("; ".join(problems) + tail)
    if not clips:
        raise AnnotationError(f"{name}: holds no clips; expected one JSON object a line")
    if repaired:
        more = f"; so do {repaired - 1} more lines" if repaired > 1 else ""
        logger.warning("%s:%d: %s%s", name, first_repaired, REPAIRED, more)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each line and where it starts; ended by LF, CR or both, as bytes.splitlines has it."""
    offset = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
    file.seek(offset)
    for lines in file:
        for line in lines.splitlines(keepends=True):
            yield offset, line.rstrip(b"\r\n")
            offset += len(line)


def parse_line(line: bytes, folder: Path, number: int = 0) -> Clip:
    """One line's clip, its paths taken relative to `folder`. ValueError gives the reason."""
    try:
        # json.loads would read halves of characters in bytes too, as if they were names.
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deeply)") from error
    return parse_record(record, folder, number)


def parse_record(record: Any, folder: Path, number: int = 0) -> Clip:
    """As parse_line, of what stands in the line."""
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
    """The text with each pair of surrogates joined and U+FFFD for each lone one, which neither
    UTF-8 nor a tokenizer can take."""
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
    """The JSON type of a value, in words for a message."""
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
