"""The files of an index as the server sends them: opened by a moment, in whole or in part."""

import os
import re
import stat
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from clipvip.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from clipvip.index import FileState, Moment
from clipvip.serve.errors import ApiError

PIECE = 1 << 18  # bytes read at a time
GONE = "the file cannot be read; was it moved, or is its disk missing?"
CHANGED = "the file has changed since it was embedded; run clipvip embed again"
# What a browser may play or show. It gets all other files as bytes that it does not interpret.
TYPES = {
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jfif": "image/jpeg",
    ".jpe": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".m4v": "video/mp4",
    ".mkv": "video/x-matroska",
    ".mov": "video/mp4",  # a browser plays it by this name if it can play its streams
    ".mp4": "video/mp4",
    ".ogv": "video/ogg",
    ".png": "image/png",
    ".webm": "video/webm",
    ".webp": "image/webp",
}
# How a film is cut out of a video for a player that cannot play the file.
BEFORE, AFTER, LONGEST = 3.0, 5.0, 60.0  # seconds


def is_image(file: FileState) -> bool:
    return os.path.splitext(file.path)[1].lower() in IMAGE_SUFFIXES


def film_span(moment: Moment) -> tuple[float, float]:
    """Return start and end in seconds of the film that is shown for a moment."""
    start = max((moment.start or 0.0) - BEFORE, 0.0)
    end = moment.file.duration if moment.end is None else moment.end + AFTER
    return start, min(max(end, start + 1.0), start + LONGEST)


def open_file(file: FileState) -> int:
    """Open a file of an index, and return its descriptor.

    An index may come from a stranger and name any file. So only regular files with the name of a
    video or image, and of the size that the index knows, are opened. Raises ApiError.
    """
    if os.path.splitext(file.path)[1].lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        raise ApiError(404, "not a video or image by its name")
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        raise ApiError(
            404, "the file cannot be read; was it moved, or is its disk missing?"
        ) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
        os.close(descriptor)
        raise ApiError(404, CHANGED)
    return descriptor


def check_file(file: FileState) -> None:
    """Raise ApiError if a file must not be opened."""
    os.close(open_file(file))


class Part(NamedTuple):
    """Bytes start to stop of `size`, of which all or a range was asked for."""

    start: int
    stop: int
    size: int
    whole: bool


def part_of(request: Request, size: int, tag: str) -> Part:
    """Return the part of a resource that a request asks for, by RFC 9110, section 14.

    Several ranges, another unit and a range of an older version mean the whole. Raises ApiError
    416 for a range that lies past the end.
    """
    whole = Part(0, size, size, True)
    given = request.headers.get("range", "")
    found = re.fullmatch(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*", given, re.ASCII)
    if found is None or request.headers.get("if-range", tag) != tag:
        return whole
    first, last = found.groups()
    if not first and not last:
        return whole
    if not first:
        length = min(int(last), size)
        start, stop = size - length, size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return whole
    if start >= size or start >= stop:
        raise ApiError(416, f"the range {given!r} lies outside of {size} bytes")
    return Part(start, stop, size, False)


def headers_of(part: Part, tag: str) -> dict[str, str]:
    headers = {
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",
        "content-length": str(part.stop - part.start),
        "etag": tag,
    }
    if not part.whole:
        headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{part.size}"
    return headers


def tag_of(moment: Moment, what: str) -> str:
    """Return an entity tag, which changes with the file."""
    file = moment.file
    return f'"{moment.id}-{file.size:x}-{file.mtime_ns & (1 << 64) - 1:x}-{what}"'


def unchanged(request: Request, tag: str) -> bool:
    """Return whether the client holds this version already."""
    held = request.headers.get("if-none-match", "")
    return tag in (given.strip().removeprefix("W/") for given in held.split(","))


def send_bytes(request: Request, data: bytes, kind: str, tag: str) -> Response:
    """Answer with bytes in memory, or with the part of them that was asked for."""
    part = part_of(request, len(data), tag)
    headers = headers_of(part, tag)
    status = 200 if part.whole else 206
    return Response(data[part.start : part.stop], status, headers, media_type=kind)


def send_file(request: Request, moment: Moment) -> Response:
    """Answer with a moment's file as it is, or with the part of it that was asked for."""
    tag = tag_of(moment, "file")
    descriptor = open_file(moment.file)
    try:
        part = part_of(request, moment.file.size, tag)
    except ApiError:
        os.close(descriptor)
        raise
    suffix = os.path.splitext(moment.file.path)[1].lower()
    kind = TYPES.get(suffix, "application/octet-stream")
    # Opened by itself, a file must not act as a page of this server.
    headers = headers_of(part, tag) | {"content-security-policy": "sandbox; default-src 'none'"}
    status = 200 if part.whole else 206
    if request.method == "HEAD":
        os.close(descriptor)
        return Response(None, status, headers, media_type=kind)
    return _FileResponse(_File(descriptor, part), status, headers, media_type=kind)


class _File:
    """The bytes of a part of an open file, in pieces."""

    def __init__(self, descriptor: int, part: Part) -> None:
        self.descriptor, self.part = descriptor, part

    async def __aiter__(self) -> AsyncIterator[bytes]:
        at, stop = self.part.start, self.part.stop
        while at < stop:
            length = min(PIECE, stop - at)
            piece = await to_thread.run_sync(os.pread, self.descriptor, length, at)
            if not piece:
                raise OSError("a file became shorter while it was sent")
            at += len(piece)
            yield piece


class _FileResponse(StreamingResponse):
    """An answer that closes its file, however it ends."""

    def __init__(self, file: _File, *given: Any, **named: Any) -> None:
        super().__init__(file, *given, **named)
        self.file = file

    async def __call__(self, *given: Any) -> None:
        try:
            await super().__call__(*given)
        finally:
            os.close(self.file.descriptor)
