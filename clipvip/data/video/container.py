"""Opening files: sources, their errors, containers, packets."""

import io
import itertools
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from clipvip.data.video.limits import MAX_PIXELS, too_large
from clipvip.data.video.mp4 import Impossible, check_claims
from clipvip.files import NOT_A_FILE


class DecodeError(RuntimeError):
    """A file whose frames cannot be read: `path` says which, `reason` why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Unseekable(DecodeError):
    """A file that can be read from its start only."""


@dataclass(frozen=True, slots=True)
class Blob:
    """An encoded video or image in memory; `name`, with its suffix, stands for a path."""

    name: str
    data: bytes


Media = str | Path | Blob


IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in ("avif", "bmp", "jfif", "jpe", "jpeg", "jpg", "png", "tif", "tiff", "webp")
)
# Without ogg and mod, which are mostly names of sound files.
VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("264", "265", "3g2", "3gp", "amv", "asf", "avi", "divx", "dv", "f4v", "flv", "gif"),
        *("h264", "h265", "hevc", "ivf", "m1v", "m2p", "m2t", "m2ts", "m2v", "m4v", "mjpeg"),
        *("mjpg", "mk3d", "mkv", "mov", "mp4", "mpe", "mpeg", "mpg", "mpv", "mts", "mxf", "ogm"),
        *("ogv", "qt", "rm", "rmvb", "tod", "tp", "trp", "ts", "vob", "webm", "wmv", "wtv"),
        *("xvid", "y4m"),
    )
)


# libav's formats that hold video, all of it in the one file. It knows others by a file's content,
# whatever its name: playlists (hls, dash, concat, imf), numbered images and films in parts (mlv),
# which read other files, session descriptions (sdp), which listen to the network, and devices. Its
# readers of images are left out too: Pillow's bound what a text in an image may grow to.
FORMATS = ",".join(
    (
        *("3dostr", "4xm", "apv", "asf", "asf_o", "av1", "avi", "avs", "avs2", "avs3"),
        *("bethsoftvid", "bfi", "bink", "bmv", "c93", "cavsvideo", "cdxl", "cine", "dfa", "dhav"),
        *("dirac", "dnxhd", "dv", "dxa", "ea", "evc", "film_cpk", "flic", "flv", "gdv", "gif"),
        *("gxf", "h261", "h263", "h264", "hevc", "hxvs", "idcin", "iff", "ipu", "ivf", "ivr", "jv"),
        *("kux", "live_flv", "lmlm4", "lxf", "m4v", "matroska", "mjpeg", "mjpeg_2000", "mm"),
        *("moflex", "mov", "mpeg", "mpegts", "mpegtsraw", "mpegvideo", "mpjpeg", "mtv", "mv"),
        *("mvi", "mxf", "mxg", "nsv", "nut", "nuv", "obu", "ogg", "pmp", "pva", "rl2", "rm", "roq"),
        *("rpl", "ser", "sga", "siff", "smjpeg", "smk", "smush", "swf", "thp", "tmv", "ty", "usm"),
        *("vc1", "vc1test", "vividas", "vivo", "vmd", "vvc", "wc3movie", "webm", "wsvqa", "wtv"),
        *("xmv", "yop", "yuv4mpegpipe"),
    )
)


MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"  # PyAV's names of formats


SEEKABLE = frozenset({MP4, MATROSKA})


PYAV = int(av.__version__.split(".")[0])


# Titles need not be UTF-8. PyAV 19 and newer accepts any and has no such option.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if PYAV < 19 else {}


# Otherwise PyAV looks for an encoder with the decoder's name, and libdav1d is only a decoder.
_AS_IT_IS: dict[str, Any] = {"opaque": True} if PYAV >= 15 else {}


def add_copy(out: OutputContainer, stream: VideoStream) -> VideoStream:
    """Add a stream for the packets of another, unchanged."""
    return out.add_stream_from_template(stream, **_AS_IT_IS)


BOUNDS = {"max_pixels": str(MAX_PIXELS)}


class File(NamedTuple):
    """Where bytes come from: a path, or memory that has a path for a name."""

    path: Path
    data: bytes | None = None

    def binary(self) -> BinaryIO:
        return open(self.path, "rb") if self.data is None else io.BytesIO(self.data)

    def readable(self) -> Path | io.BytesIO:
        return self.path if self.data is None else io.BytesIO(self.data)


def file_of(source: Media) -> File:
    if isinstance(source, Blob):
        return File(Path(source.name), source.data)
    return File(Path(source))


def open_container(file: File) -> InputContainer:
    """Open a video so that libav reads nothing else, and allocates no more than it may hold."""
    with file.binary() as source:
        check_claims(source)
    # "file:" keeps a colon in a name from being read as a protocol.
    given = f"file:{file.path}" if file.data is None else file.readable()
    protocols = "file" if file.data is None else "none"
    options = {"format_whitelist": FORMATS, "protocol_whitelist": protocols, **BOUNDS}
    try:
        return av.open(given, mode="r", options=options, **_LENIENT)
    except av.ArgumentError:
        reason = "not a video: an image, sound, text, a playlist or another format that holds none"
        raise DecodeError(file.path, reason) from None


@contextmanager
def as_decode_errors(file: File) -> Iterator[None]:
    """Turn what goes wrong while the file is read into a DecodeError."""
    path = file.path
    try:
        if (_size_of(path) if file.data is None else len(file.data)) == 0:
            raise DecodeError(path, "empty file (0 bytes)")
        yield
    except DecodeError:
        raise
    except Impossible as error:
        raise DecodeError(path, f"damaged: {error}") from error
    except av.InvalidDataError as error:
        raise DecodeError(path, f"not a video, cut off or damaged ({error.strerror})") from error
    except (OSError, av.FFmpegError) as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    except Exception as error:  # damaged files break libraries in ways those do not name
        raise DecodeError(path, f"{type(error).__name__}: {error}") from error


def _size_of(path: Path) -> int:
    """Return the size of a file in bytes. Raises DecodeError where it cannot be read, or is a pipe
    or device, which could block or never end."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise DecodeError(path, "no such file") from None
    except ValueError:  # NUL, or half a character
        raise DecodeError(path, "a name that no file can have") from None
    if stat.S_ISDIR(status.st_mode):
        raise DecodeError(path, "a folder, not a video")
    if not stat.S_ISREG(status.st_mode):
        raise DecodeError(path, NOT_A_FILE)
    return status.st_size


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    for stream in container.streams.video:
        # Cover art of a sound file counts as video in a container; text is drawn as "ansi".
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise DecodeError(path, "no decoder for its video")
        if stream.codec_context.name != "ansi":
            # PyAV's default is a thread per core: what comes of a damaged file then varies.
            stream.codec_context.thread_count = 1
            stream.codec_context.thread_type = "NONE"
            stream.codec_context.options = BOUNDS
            reason = too_large(stream.codec_context.width, stream.codec_context.height)
            if reason is not None:
                raise DecodeError(path, reason)
            return stream
    kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
    raise DecodeError(path, f"no video in it (only {', '.join(kinds)})" if kinds else "not a video")


@contextmanager
def open_video(source: Media) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and find its video; what goes wrong within is a DecodeError."""
    file = file_of(source)
    with as_decode_errors(file), open_container(file) as container:
        yield container, video_stream(container, file.path)


def is_image(source: Media) -> bool:
    """Return whether the name is that of an image."""
    return file_of(source).path.suffix.lower() in IMAGE_SUFFIXES


_LATEST = 1 << 62  # ticks that libav still counts


def packets_from(
    container: InputContainer, stream: VideoStream, start: float | None
) -> Iterator[Packet]:
    """Packets from the keyframe at or before `start` seconds where the format is good at
    seeking, else from the first. Raises Unseekable where seeking fails: to read them all, open the
    file anew."""
    source = demux(container, stream)
    known = stream.start_time is not None and stream.time_base
    if not (start and known and container.format.name in SEEKABLE):
        return source
    assert stream.start_time is not None and stream.time_base is not None
    first = min(stream.start_time + int(start / float(stream.time_base)), _LATEST)
    for offset in (first, stream.start_time):
        try:
            container.seek(offset, stream=stream)
        except av.FFmpegError:
            raise Unseekable(container.name, "it cannot be sought in") from None
        source = demux(container, stream)
        head = next(source, None)
        if head is None:
            raise Unseekable(container.name, "seeking in it leads to its end")
        if head.is_keyframe and head.pts is not None and head.pts <= first:
            return itertools.chain([head], source)
    raise Unseekable(container.name, "seeking in it leads to no keyframe before")


def demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    # PyAV's own generator leaks a packet where it is left early and not closed. This one closes it
    # when nobody holds it any more.
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:  # by PyAV, once for a stream that begins in the middle of a file
            continue


# NAL units (H.264, 7.3.1; HEVC, 7.3.1.2): shift and mask of the type in their first byte, and where
# the codec's extradata has the size of their lengths.
NAL = {"h264": (0, 31, 4), "hevc": (1, 63, 21)}
# Types that are no part of a picture: settings, messages, ends, filler. Others may hold one.
SILENT = {"h264": range(6, 14), "hevc": range(32, 41)}


def nal_units(packet: Packet, stream: VideoStream) -> Iterator[tuple[int, memoryview]]:
    """Types and bytes of the NAL units in a packet of H.264 or HEVC; none where they cannot be
    told apart."""
    context = stream.codec_context
    shift, mask, at = NAL[context.codec.canonical_name]
    head, data = context.extradata or b"", memoryview(bytes(packet))
    # In files (ISO/IEC 14496-15) each follows its length, in streams the bytes 0 0 1.
    size = (head[at] & 3) + 1 if len(head) > at and head[0] == 1 else 0
    if size:
        spans, start = [], 0
        while start + size < len(data):
            end = start + size + int.from_bytes(data[start : start + size], "big")
            spans.append((start + size, end))
            start = end
    else:
        starts = [found.end() for found in re.finditer(rb"\x00\x00\x01(?=.)", data, re.DOTALL)]
        spans = list(zip(starts, [*(start - 3 for start in starts[1:]), len(data)], strict=False))
    for start, end in spans:
        yield data[start] >> shift & mask, data[start:end]


def holds_picture(packet: Packet, stream: VideoStream) -> bool:
    """Return False for a packet of H.264 or HEVC that has settings, messages or filler alone, for
    which decoders report an error."""
    codec = stream.codec_context.codec.canonical_name
    if codec not in NAL:
        return True
    types = [kind for kind, _ in nal_units(packet, stream)]
    return not types or any(kind not in SILENT[codec] for kind in types)
