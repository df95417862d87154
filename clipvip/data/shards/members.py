"""A clip as members of a tar: what is stored of it, and how it is read back.

A clip is `000001234.mp4` (its place in the annotations; or another container, or an image) and
`000001234.json`: text (a list), subtitle, caption; start and end within the stored video, if the
clip is a part of it; source, the annotation it was made from. An annotated image is
`000001234.image.jpg`.

Tars of other tools are read too. The `.txt` beside a video or image counts as its text and as its
caption. A fault in one clip of a tar, whatever its writer put there, costs that clip alone.
"""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from clipvip.data.annotations import REPAIRED, Clip, kind_of, parse_record
from clipvip.data.shards.tars import MEDIA, Packed
from clipvip.data.video import Blob, Cut, DecodeError, check_decodes, whole
from clipvip.files import decode_text, json_line, shown

logger = logging.getLogger(__name__)


def members_of(clip: Clip, stored: Cut) -> dict[str, bytes]:
    """Return a clip's members by their suffixes. Raises DecodeError if they cannot be read back.

    stored: the bytes to store of its video.
    """
    record = {
        "text": list(clip.text) or None,
        "subtitle": clip.subtitle,
        "caption": clip.caption,
        "start": stored.start,
        "end": stored.end,
        "source": {
            "video": os.path.abspath(clip.video),
            "start": clip.start,
            "end": clip.end,
            "image": clip.image and os.path.abspath(clip.image),
            "line": clip.line,
        },
    }
    members = {
        "json": json_line(_without_none(record)),
        _suffix(stored.blob.name, ".mp4"): stored.blob.data,
    }
    image: Blob | None = None
    if clip.image is not None:
        image = Blob(str(clip.image), whole(clip.image).blob.data)
        members[f"image.{_suffix(image.name, '.jpg')}"] = image.data
    unchecked = None if stored.compared else stored.blob
    check_decodes(unchecked, image, stored.start, stored.end)
    return members


def _suffix(name: str, otherwise: str) -> str:
    """Return the suffix of a member, without its dot. Readers recognise media by it alone."""
    suffix = Path(name).suffix.lower()
    return (suffix if suffix in MEDIA else otherwise)[1:]


def _without_none(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in record.items()
        if value is not None
    }


class Stored(NamedTuple):
    """A clip of a shard. annotation: the one it was made from, if that is known."""

    clip: Clip
    video: Blob
    image: Blob | None
    annotation: Clip | None


def unpack(sample: Packed, url: str) -> Stored:
    """Return a sample's clip. Raises DecodeError if it holds none."""
    name, members = f"{url}/{sample.key}", sample.members
    if sample.fault is not None:
        raise DecodeError(name, sample.fault)
    try:
        record = json.loads(members.get("json", b"{}"))
        if not isinstance(record, dict):
            raise ValueError(f"expected an object in braces, got {kind_of(record)}")
        keys = ("text", "subtitle", "caption", "start", "end")
        known = {key: record[key] for key in keys if record.get(key) not in (None, "", [])}
        text, guessed = decode_text(members.get("txt", b""))
        text = text.strip()
        if text:
            known = {"text": text, "caption": text} | known
        texts = {key: known[key] for key in keys[:3] if key in known}
        origin = _origin(record.get("source"), texts)
        line = 0 if origin is None else origin.line
        # A tar may give its members names that no file can have.
        clip = replace(parse_record({**known, "video": "in a tar"}, Path(), line), video=Path(name))
    except Exception as error:  # another tool may have written anything
        reason = str(error) or type(error).__name__
        raise DecodeError(name, f"its text or JSON: {reason}") from error
    if clip.repaired:
        _warn_first(name, REPAIRED)
    if guessed:
        _warn_first(name, "its text is not UTF-8; read as Windows-1252")
    media = [key for key in members if f".{key.rpartition('.')[2]}" in MEDIA]
    videos = [key for key in media if "." not in key]
    images = [key for key in media if "." in key]
    if len(videos) != 1:
        raise DecodeError(name, f"expected one video or image, got {', '.join(videos) or 'none'}")
    blobs = [Blob(f"{name}.{key}", members[key]) for key in videos + images[:1]]
    return Stored(clip, blobs[0], blobs[1] if images else None, origin)


def _origin(source: Any, texts: dict[str, Any]) -> Clip | None:
    """Return the annotation that a clip was made from; None if another tool wrote 'source'.

    texts: the clip's own, which override those of the annotation.
    """
    if not isinstance(source, dict):
        return None
    line = source.get("line", 0)
    if type(line) is not int or not 0 <= line < 1 << 63:
        return None
    try:
        given = {key: value for key, value in source.items() if key != "line"}
        return parse_record(given | texts, Path(), line)
    except ValueError:
        return None


_warned: set[str] = set()


def _warn_first(name: str, fault: str) -> None:
    """Log the first clip with this fault in this process; there may be millions."""
    if fault not in _warned:
        _warned.add(fault)
        logger.warning("%s: %s; further clips with this fault are not logged", shown(name), fault)
