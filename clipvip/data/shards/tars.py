"""Clips in WebDataset tars: how a clip is stored, and how tars are read, without trusting them.

A clip is `000001234.mp4` (its place in the annotations; or another container, or an image) and
`000001234.json`: text (a list), subtitle, caption; start and end within the stored video, if the
clip is a part of it; source, the annotation it was made from. An annotated image is
`000001234.image.jpg`.

Tars of other tools are read too: adjacent members with the same name before the dot make a sample,
and the `.txt` beside a video or image counts as its text and as its caption. A fault in one clip of
a tar, whatever its writer put there, costs that clip alone.

A tar is read in sequence, and nothing in it is expanded: compressed tars are refused, and sparse
members make their sample unusable. So memory never holds more than the file does. Names in a tar
are never used as paths.

Python's tarfile parses single headers here but does not walk through the tar: it takes a damaged
header for the end of the tar, and some headers make releases still in use loop for hours or forever
(CVE-2025-8194, CVE-2024-6232).
"""

import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

from clipvip.data.annotations import REPAIRED, Clip, kind_of, parse_record
from clipvip.data.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Blob,
    Cut,
    DecodeError,
    check_decodes,
    whole,
)
from clipvip.files import TEXT_BYTES, check_is_file, decode_text, json_line, shown

logger = logging.getLogger(__name__)

MEDIA = IMAGE_SUFFIXES | VIDEO_SUFFIXES
TEXTS = ("json", "txt")
HEADER_BYTES = 1 << 20  # limit for a long name, or for pax records
BLOCK, PIECE = 512, 1 << 24
ANY_BYTES = 1 << 62
DIGITS = 20  # limit for the digits of a size in pax records
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}
PAX = frozenset({tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE})
ABOUT_NEXT = PAX | {tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
# Pax records that are used. A tar may hold any number of others.
SPARSE = frozenset({b"GNU.sparse.name", b"GNU.sparse.realsize", b"GNU.sparse.size"})
USED = SPARSE | {b"path", b"size"}
META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset reserves


@dataclass(slots=True)
class Packed:
    """A sample of a tar.

    members: media and texts by their suffixes in lower case. fault: why the tar makes the sample
    unusable; None if it does not.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    fault: str | None = None


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def open_url(url: str) -> AbstractContextManager[IO[bytes]]:
    """Open a path or any fsspec URL to read bytes. Raises OSError for a path that is no file, and
    any error of fsspec."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    system, path = url_to_fs(url)
    if isinstance(system, LocalFileSystem):
        check_is_file(path)
    return cast(AbstractContextManager[IO[bytes]], system.open(path, "rb"))


def reason_of(error: Exception) -> str:
    """Return the reason why a tar cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, DecodeError):
        return error.reason
    if isinstance(error, OSError) and (error.strerror or str(error)):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


def read_samples(file: Readable, url: str, everything: bool = False) -> Iterator[Packed]:
    """Yield the samples of an open tar, in order. Raises DecodeError if the rest of the tar cannot
    be parsed, and errors of the file itself.

    everything: also hold members that are neither media nor texts; of several with one suffix, the
        last one.
    """
    tar = _Bytes(file, url)
    for key, members in groupby(_members(tar, everything), lambda member: member.key):
        sample = Packed(key)
        for member in members:
            fault, held = member.fault, _most_bytes(member.suffix) > 0
            if held and member.suffix in sample.members:
                fault = f"two members have the suffix .{member.suffix}"
            sample.fault = sample.fault or fault
            if everything or held:
                sample.members[member.suffix] = member.data
        yield sample


def _split(name: str) -> tuple[str, str]:
    """Split a name into key and suffix, at the first dot after the folders. The key is empty for a
    member that belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or stem == base or META.match(name):
        return "", ""
    return f"{folder}{slash}{stem}", suffix.lower()


def _most_bytes(suffix: str) -> int:
    """Return the limit for the bytes of a member; 0 for one that is not held."""
    if suffix in TEXTS:
        return TEXT_BYTES
    kind, _, last = suffix.rpartition(".")
    return ANY_BYTES if f".{last}" in MEDIA and kind in ("", "image") else 0


# --- a clip as members ---------------------------------------------------------------------


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


# --- the format -----------------------------------------------------------------------------


class _Bytes:
    """Bytes of a tar, in order. at: number of bytes read so far."""

    def __init__(self, file: Readable, url: str) -> None:
        self.file = file
        self.url = url
        self.at = 0

    def take(self, count: int) -> bytes:
        data = self.up_to(count)
        if len(data) < count:
            raise DecodeError(self.url, f"cut off at byte {self.at}, within a member")
        return data

    def up_to(self, count: int) -> bytes:
        """Read `count` bytes, fewer where the tar ends; in pieces, since a header may claim more
        than there is memory."""
        pieces = []
        while count and (piece := self.file.read(min(count, PIECE))):
            pieces.append(piece)
            self.at += len(piece)
            count -= len(piece)
        return b"".join(pieces)

    def skip(self, count: int) -> None:
        for left in range(count, 0, -PIECE):
            self.take(min(left, PIECE))


class _Member(NamedTuple):
    """A regular file in a tar. data: empty if it is not held. fault: see Packed."""

    key: str
    suffix: str
    data: bytes
    fault: str | None


def _members(tar: _Bytes, everything: bool) -> Iterator[_Member]:
    """Yield the regular files of samples in a tar (POSIX.1-2001 and GNU formats), in order; skip
    others."""
    while True:
        records: dict[bytes, bytes] | None = {}  # pax records of the member; None if damaged
        info = _header(tar)
        while info is not None and info.type in ABOUT_NEXT:
            found = _about_next(tar, info)
            records = None if records is None or found is None else records | found
            info = _header(tar)
        if info is None:
            return
        known = records or {}
        size = int(known.get(b"size", info.size))
        name = known.get(b"GNU.sparse.name", known.get(b"path"))
        named = info.name if name is None else name.decode("utf-8", "surrogateescape")
        if size < 0:
            raise DecodeError(tar.url, f"damaged at byte {tar.at}: a member of {size} bytes")
        if not info.isreg():
            # A known type, such as a link, has no data; data of an unknown type is skipped.
            tar.skip(0 if info.type in tarfile.SUPPORTED_TYPES else size + -size % BLOCK)
            continue
        key, suffix = _split(named)
        fault, most = None, _most_bytes(suffix) or (ANY_BYTES if everything else 0)
        if records is None:
            fault = "its pax header is damaged"
        elif info.type == tarfile.GNUTYPE_SPARSE or known.keys() & SPARSE:
            fault = "a sparse file, which is not expanded; pack it without --sparse"
        elif size > most > 0:
            fault = f"{size} bytes of .{suffix}; expected at most {most}"
        data = tar.take(size) if fault is None and most else b""
        tar.skip(size - len(data))
        if key:
            yield _Member(key, suffix, data, fault)
        tar.up_to(-size % BLOCK)


def _header(tar: _Bytes) -> tarfile.TarInfo | None:
    """Read the next member's header; None at the end, with or without its block of zeros."""
    head = tar.up_to(BLOCK)
    if not head and not tar.at:
        raise DecodeError(tar.url, "empty file (0 bytes)")
    if not any(head):
        return None
    try:
        info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        kind = next((COMPRESSED[mark] for mark in COMPRESSED if head.startswith(mark)), None)
        if tar.at > len(head):
            reason = f"damaged or cut off at byte {tar.at - len(head)} ({error})"
        elif kind is not None:
            reason = f"compressed ({kind}); only plain tars are read, so decompress it"
        else:
            reason = "not a tar"
        raise DecodeError(tar.url, reason) from None
    more = info.type == tarfile.GNUTYPE_SPARSE and head[482]
    while more:  # blocks that map the holes of a sparse file
        more = tar.take(BLOCK)[504]
    return info


def _about_next(tar: _Bytes, info: tarfile.TarInfo) -> dict[bytes, bytes] | None:
    """Read a header that describes the next member; None if it is damaged."""
    if not 0 <= info.size <= HEADER_BYTES:
        raise DecodeError(tar.url, f"damaged at byte {tar.at}: a header of {info.size} bytes")
    text = tar.take(info.size + -info.size % BLOCK)[: info.size]
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {b"path": text.partition(b"\0")[0]}
    return _records(text) if info.type in PAX else {}


def _records(text: bytes) -> dict[bytes, bytes] | None:
    """Parse pax records, "LENGTH KEY=VALUE\\n" each, and return those in USED; None if one of them
    is damaged."""
    found, at = {}, 0
    while at < len(text) and text[at]:
        digits = text[at : at + DIGITS].partition(b" ")[0]
        if not digits.isdigit():
            return None
        end = at + int(digits)
        key, equals, value = text[at + len(digits) + 1 : end].partition(b"=")
        if not equals or not value.endswith(b"\n") or end > len(text):
            return None
        if key in USED:
            found[key] = value[:-1]
        at = end
    size = found.get(b"size", b"0")
    return found if size.isdigit() and len(size) < DIGITS else None
