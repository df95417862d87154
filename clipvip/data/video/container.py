"""Media to open videos: a file or its bytes, its container and stream, its packets, its errors."""

import io
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
from av.bitstream import BitStreamFilterContext
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

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
# libav's formats that hold video in one file. libav also recognises others, by a file's content and
# whatever its name. Left out are those that read other files (playlists: hls, dash, concat, imf;
# numbered images; films in parts: mlv) or listen to the network (session descriptions: sdp), and
# devices. Images are left to Pillow, which limits how much a text in an image may expand.
FORMATS = (
    "3dostr,4xm,apv,asf,asf_o,av1,avi,avs,avs2,avs3,bethsoftvid,bfi,bink,bmv,c93,cavsvideo,cdxl,"
    "cine,dfa,dhav,dirac,dnxhd,dv,dxa,ea,evc,film_cpk,flic,flv,gdv,gif,gxf,h261,h263,h264,hevc,"
    "hxvs,idcin,iff,ipu,ivf,ivr,jv,kux,live_flv,lmlm4,lxf,m4v,matroska,mjpeg,mjpeg_2000,mm,moflex,"
    "mov,mpeg,mpegts,mpegtsraw,mpegvideo,mpjpeg,mtv,mv,mvi,mxf,mxg,nsv,nut,nuv,obu,ogg,pmp,pva,rl2,"
    "rm,roq,rpl,ser,sga,siff,smjpeg,smk,smush,swf,thp,tmv,ty,usm,vc1,vc1test,vividas,vivo,vmd,vvc,"
    "wc3movie,webm,wsvqa,wtv,xmv,yop,yuv4mpegpipe"
)
MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"  # PyAV's names of formats
# Earlier dates, such as 1904 and 1970, are those of clocks that were not set.
FIRST_RECORDED = datetime(1990, 1, 1, tzinfo=timezone.utc).timestamp()
A_DAY = 86400.0  # seconds; a clock may be in another time zone than it says
_LATEST = 1 << 62  # the most ticks that libav counts to

PYAV = int(av.__version__.split(".")[0])
# Titles need not be UTF-8. PyAV 19 and newer accepts any title and has no such option.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if PYAV < 19 else {}
# Otherwise PyAV looks for an encoder with the decoder's name, and libdav1d is only a decoder.
_AS_IT_IS: dict[str, Any] = {"opaque": True} if PYAV >= 15 else {}
PLAIN = {"fflags": "+bitexact"}  # for writing: no random identifiers

VARIABLE = "CLIPVIP_MAX_MEGAPIXELS"


def _megapixels() -> float:
    given = os.environ.get(VARIABLE, "67.2")  # 8192 × 8192
    try:
        megapixels = float(given)
    except ValueError:
        megapixels = 0.0
    if not 0 < megapixels <= 500:
        raise ValueError(f"{VARIABLE} is {given!r}; expected a number from 0 to 500, such as 67.2")
    return megapixels


# A few bytes can claim a picture of a billion pixels. Larger ones than this are refused before
# memory is allocated. Pillow refuses 179 million pixels and more in any case.
MAX_PIXELS = int(_megapixels() * 1e6)  # a decoder holds up to 17 frames
BOUNDS = {"max_pixels": str(MAX_PIXELS)}


def too_large(width: int, height: int) -> str | None:
    """Return the reason why a picture of this size is refused; None where it is not."""
    if width * height <= MAX_PIXELS:
        return None
    return (
        f"{width} × {height} pixels, more than the {MAX_PIXELS / 1e6:g} million allowed; "
        f"{VARIABLE} changes that"
    )


# --- opening a file -------------------------------------------------------------------------


class File(NamedTuple):
    """An encoded video or image: a file, or bytes in memory whose name is given as a path."""

    path: Path
    data: bytes | None = None

    def binary(self) -> BinaryIO:
        return open(self.path, "rb") if self.data is None else io.BytesIO(self.data)

    def readable(self) -> Path | io.BytesIO:
        return self.path if self.data is None else io.BytesIO(self.data)


def file_of(media: Media) -> File:
    if isinstance(media, Blob):
        return File(Path(media.name), media.data)
    return File(Path(media))


@dataclass(frozen=True, slots=True)
class Video:
    """An opened video: its file, container and video stream."""

    file: File
    container: InputContainer
    stream: VideoStream

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def format(self) -> str:
        """PyAV's name of the container's format."""
        return self.container.format.name

    @property
    def tick(self) -> float:
        """Seconds per tick of the stream's stamps. Raises DecodeError."""
        if self.stream.time_base is None:
            raise DecodeError(self.path, "no time base in it")
        return float(self.stream.time_base)

    @property
    def frame_time(self) -> float:
        """Seconds per frame that the header states, else 1/25."""
        return float(1 / self.stream.average_rate) if self.stream.average_rate else 0.04

    @property
    def recorded(self) -> float | None:
        """When it was recorded, by its container, in seconds since 1970; None where that is not
        stated, or a clock was not set."""
        for metadata in (self.container.metadata, self.stream.metadata):
            stated = metadata.get("creation_time", "").replace("Z", "+00:00")
            with suppress(ValueError, OverflowError):
                date = datetime.fromisoformat(stated)
                seconds = date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()
                if FIRST_RECORDED < seconds < time.time() + A_DAY:
                    return seconds
        return None

    @property
    def seekable(self) -> bool:
        """Whether seeking in the container leads where its stamps say."""
        return self.format in (MP4, MATROSKA)

    def reopened(self) -> AbstractContextManager["Video"]:
        return open_file(self.file)

    def packets(self) -> Iterator[Packet]:
        """Yield the stream's packets from where the container stands."""
        # PyAV's own generator leaks a packet if it is left early and never closed. This one closes
        # it when the last reference to it is gone.
        while True:
            try:
                yield from self.container.demux(self.stream)
                return
            except IndexError:  # by PyAV, once for a stream that begins in the middle of a file
                continue

    def packets_from(self, start: float | None) -> Iterator[Packet]:
        """Yield packets from the keyframe at or before `start` seconds, or from the first packet
        where the video is not seekable. Raises Unseekable where seeking fails; to read all packets
        then, open the file again."""
        zero = self.stream.start_time
        if not start or zero is None or not self.seekable:
            return self.packets()
        first = min(zero + int(start / self.tick), _LATEST)
        for offset in (first, zero):
            try:
                self.container.seek(offset, stream=self.stream)
            except av.FFmpegError:
                raise Unseekable(self.path, "it does not support seeking") from None
            packets = self.packets()
            head = next(packets, None)
            if head is None:
                raise Unseekable(self.path, "seeking leads to its end")
            if head.is_keyframe and head.pts is not None and head.pts <= first:
                return itertools.chain([head], packets)
        raise Unseekable(self.path, "seeking leads to no earlier keyframe")


@contextmanager
def open_file(file: File) -> Iterator[Video]:
    """Open a file and find its video, by one decoding thread. libav reads no other file, allocates
    no more than the file's bytes can hold, and its errors pass unchanged."""
    with file.binary() as opened:
        check_claims(opened)
    # "file:" keeps a colon in a name from being read as a protocol.
    given = f"file:{file.path}" if file.data is None else file.readable()
    protocols = "file" if file.data is None else "none"
    options = {"format_whitelist": FORMATS, "protocol_whitelist": protocols, **BOUNDS}
    try:
        container = av.open(given, mode="r", options=options, **_LENIENT)
    except av.ArgumentError:
        reason = "not a video: an image, sound, text, a playlist or another format that holds none"
        raise DecodeError(file.path, reason) from None
    with container:
        yield Video(file, container, _video_stream(container, file.path))


@contextmanager
def open_video(media: Media) -> Iterator[Video]:
    """Open a file and find its video; any error within is raised as a DecodeError."""
    with as_decode_errors(media), open_file(file_of(media)) as video:
        yield video


@contextmanager
def as_decode_errors(media: Media) -> Iterator[None]:
    """Raise any error within, while the file is read, as a DecodeError."""
    path, data = file_of(media)
    try:
        if (_size_of(path) if data is None else len(data)) == 0:
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
    except Exception as error:  # on damaged files libraries also fail in undocumented ways
        raise DecodeError(path, f"{type(error).__name__}: {error}") from error


def _size_of(path: Path) -> int:
    """Return the size of a file in bytes. Raises DecodeError where there is none, or where it is a
    pipe or device, which could block or never end."""
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


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    for stream in container.streams.video:
        # Cover art of a sound file counts as video in a container; text is drawn as "ansi".
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise DecodeError(path, "no decoder for its video")
        if stream.codec_context.name != "ansi":
            # PyAV's default is a thread per core; the frames of a damaged file would then vary.
            stream.codec_context.thread_count = 1
            stream.codec_context.thread_type = "NONE"
            stream.codec_context.options = BOUNDS
            reason = too_large(stream.codec_context.width, stream.codec_context.height)
            if reason is not None:
                raise DecodeError(path, reason)
            return stream
    kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
    raise DecodeError(path, f"no video in it (only {', '.join(kinds)})" if kinds else "not a video")


def is_image(media: Media) -> bool:
    """Return whether the name has an image's suffix."""
    return file_of(media).path.suffix.lower() in IMAGE_SUFFIXES


class Stamps(NamedTuple):
    """When a packet is shown and decoded, and how long it lasts, in ticks."""

    pts: int
    dts: int
    duration: int | None


def remux(
    stream: VideoStream,
    packets: list[Packet],
    stamps: list[Stamps],
    tick: Fraction,
    kind: str,
    whole: tuple[int, int] | None = None,
) -> memoryview:
    """Return a file of format `kind` that holds packets of a stream, with new stamps in units of
    `tick` seconds. The muxer may refuse stamps, sizes or codecs in any way.

    whole: width and height of the coded pictures of H.264 or HEVC, to show them without cutting off
        their right and lower edges. Uses the packets up.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind, options=PLAIN) as out:
        copy = out.add_stream_from_template(stream, **_AS_IT_IS)
        if whole is not None:
            codec = stream.codec_context.codec.canonical_name
            edit = BitStreamFilterContext(
                f"{codec}_metadata=crop_right=0:crop_bottom=0", stream, copy
            )
            copy.codec_context.codec_tag = "\0\0\0\0"  # the stream's may be its container's own
            copy.width, copy.height = whole
            packets = [edited for packet in packets for edited in edit.filter(packet)]
        copy.time_base = tick
        for packet, stamp in zip(packets, stamps, strict=True):
            packet.pts, packet.dts, packet.duration = stamp
            packet.time_base, packet.stream = tick, copy
            out.mux(packet)
    return buffer.getbuffer()


# NAL units (H.264, 7.3.1; HEVC, 7.3.1.2): shift and mask of the type in their first byte, and the
# byte of the codec's extradata that holds the size of their length fields.
NAL = {"h264": (0, 31, 4), "hevc": (1, 63, 21)}
# Types that are no part of a picture: settings, messages, ends, filler.
SILENT = {"h264": range(6, 14), "hevc": range(32, 41)}


def nal_units(packet: Packet, stream: VideoStream) -> Iterator[tuple[int, memoryview]]:
    """Yield type and bytes of each NAL unit in a packet of H.264 or HEVC; none where they cannot be
    told apart."""
    context = stream.codec_context
    shift, mask, at = NAL[context.codec.canonical_name]
    head, data = context.extradata or b"", memoryview(bytes(packet))
    # In files (ISO/IEC 14496-15) each unit follows its length, in streams the bytes 0 0 1.
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
    """Return False for a packet of H.264 or HEVC that holds only settings, messages or filler.
    Decoders report an error for such packets."""
    codec = stream.codec_context.codec.canonical_name
    if codec not in NAL:
        return True
    types = [kind for kind, _ in nal_units(packet, stream)]
    return not types or any(kind not in SILENT[codec] for kind in types)
