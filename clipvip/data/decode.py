"""Exactly the frames asked for, out of a video or an image, by PyAV.

The first pass finds the times of all frames, from an MP4's tables or else by reading packets
without decoding them: in the order of showing, they say which frames a sampling means,
whatever the frame rate does. The second pass decodes only what those frames need: it jumps
forward where a keyframe lies between the decoder and the next wanted frame, feeds nothing after
the last frame wanted before the jump, and lets the decoder drop frames that no other frame
refers to. Only wanted frames are converted, in one pass from the decoder's planes to RGB at the
target size (clipvip.ops.resize_crop); swscale takes formats that are no planar YUV. Sizes are
those of stored pixels (the pixel aspect ratio is not applied); rotation and mirroring flags are.

Times are seconds from the video's first frame.
"""

import functools
import io
import itertools
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data.mp4 import composition_offsets
from clipvip.data.sampling import check_sampling, choose_frames, middle_frame
from clipvip.ops.resize_crop import Colours, check_compiled, resize_crop, resized

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("3gp", "avi", "flv", "m2ts", "m4v", "mkv", "mov", "mp4"),
        *("mpeg", "mpg", "mts", "ogv", "ts", "webm", "wmv"),
    )
)
MP4, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"  # PyAV's names of formats
SEEKABLE = frozenset({MP4, MATROSKA})
CENTRED_CHROMA = frozenset(  # codecs that put chroma between the columns that share it
    {"flv", "h261", "h263", "h263p", "mjpeg", "mpeg1video", "theora", "vp3", "vp4"}
)
KEYFRAME = 1  # the flag of an entry of libav's index
MOST_KNOWN = 1 << 26  # bytes of files' indices that a process keeps: some 7,000 of ten seconds
MISSING_END = (1.0, 0.05)  # seconds and share of a video that may lack before it counts as cut off


class DecodeError(RuntimeError):
    """A file whose frames cannot be had: `path` and `reason`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Blob:
    """An encoded video or image in memory; `name`, with its suffix, stands for a path."""

    name: str
    data: bytes


Source = str | Path | Blob


class VideoInfo(NamedTuple):
    """What `probe` says; width and height as shown, with the rotation flag applied."""

    width: int
    height: int
    num_frames: int
    duration: float
    fps: float
    codec: str


def read_frames(
    path: Source,
    num_frames: int,
    *,
    size: int,
    start: float | None = None,
    end: float | None = None,
    sampling: str = "uniform",
    generator: np.random.Generator | None = None,
    with_middle: bool = False,
    threads: int = 1,
) -> Tensor:
    """Frames of a clip, the shortest side resized to `size`, the centre cut out.

    start, end: seconds; the clip is what is shown in [start, end). sampling: see
    clipvip.data.sampling; a generator means training. with_middle: the clip's middle frame
    follows as one more. threads: for the decoder, 0 for one a core.
    Returns uint8 [N, 3, size, size] with N = num_frames (fewer only with "fps:R"; frames of
    a shorter clip repeat). An image is one frame, N = 1, whatever was asked.
    Raises DecodeError for files that are missing, empty, cut off, damaged or no video.
    """
    file = _file(path)
    check_sampling(sampling)
    if num_frames < 1 or size < 1:
        raise ValueError(f"num_frames is {num_frames}, size {size}; expected both at least 1")
    if is_image(path):
        with _as_decode_errors(file):
            image = _read_image(file, size)
            return image.expand(2, -1, -1, -1) if with_middle else image
    with open_clip(
        path,
        num_frames,
        start=start,
        end=end,
        sampling=sampling,
        generator=generator,
        with_middle=with_middle,
    ) as clip:
        return clip.decode(size, threads)


def is_image(source: Source) -> bool:
    """Whether its name says so."""
    return _file(source).path.suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True, slots=True)
class OpenClip:
    """An opened video and what is wanted of it: `chosen` are positions among all frames that
    `index` lists in the order of showing."""

    source: Source
    container: InputContainer
    stream: VideoStream
    index: "_Index"
    chosen: NDArray[np.int64]
    choose: Callable[["_Index"], NDArray[np.int64]]

    @property
    def path(self) -> Path:
        return _file(self.source).path

    def decode(self, size: int, threads: int = 1) -> Tensor:
        """uint8 [len(chosen), 3, size, size]; once, and within `open_clip` only."""
        file = _file(self.source)
        try:
            return _decode(
                self.container, self.stream, self.index, self.chosen, size, file, threads
            )
        except _TablesWrong:
            with _open(file) as container:
                stream = _video_stream(container, file.path)
                index = _known_index(container, stream, file, trust_tables=False)
                return _decode(container, stream, index, self.choose(index), size, file, threads)


@contextmanager
def open_clip(
    source: Source,
    num_frames: int,
    *,
    start: float | None = None,
    end: float | None = None,
    sampling: str = "uniform",
    generator: np.random.Generator | None = None,
    with_middle: bool = False,
) -> Iterator[OpenClip]:
    """The frames of a video that read_frames would decode; what goes wrong within is a
    DecodeError."""
    file = _file(source)
    check_compiled()  # or every file would seem to be bad
    state = {} if generator is None else generator.bit_generator.state

    def choose(index: _Index) -> NDArray[np.int64]:
        if generator is not None:
            generator.bit_generator.state = state
        window = _window(index.times, start, end, file.path)
        times = index.times[window]
        chosen = choose_frames(times, num_frames, sampling, generator)
        if with_middle:
            chosen = np.append(chosen, middle_frame(times))
        return chosen + window.start

    with _as_decode_errors(file), _open(file) as container:
        stream = _video_stream(container, file.path)
        index = _known_index(container, stream, file, start, end)
        yield OpenClip(source, container, stream, index, choose(index), choose)


@contextmanager
def open_video(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """An opened file and its video; what goes wrong within is a DecodeError."""
    file = _file(source)
    with _as_decode_errors(file), _open(file) as container:
        yield container, _video_stream(container, file.path)


def decode_clip(
    source: Source, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, VideoFrame]]:
    """Every frame shown in [start, end), in order, with its seconds from the first of them."""
    file = _file(source)
    with open_video(source) as (container, stream):
        index = _index(container, stream, file.path, start, end)
        window = _window(index.times, start, end, file.path)
        times, wanted = index.times[window] - index.times[window.start], index.shown[window]
        given = 0
        try:
            if index.by_count:
                raise _SeekFailed
            for position, frame in _seek_and_decode(container, stream, index, wanted.tolist()):
                if position != given:
                    raise _SeekFailed
                yield float(times[position]), frame
                given += 1
        except (_SeekFailed, av.FFmpegError):
            with _open(file) as again:
                same = again.streams[stream.index]
                assert isinstance(same, VideoStream)
                for position, frame in _decode_all(again, same, index, wanted.tolist(), file.path):
                    if position >= given:
                        yield float(times[position]), frame


def probe(path: Source) -> VideoInfo:
    """Size, frames and times of a video or image; decodes one frame. Raises DecodeError."""
    file = _file(path)
    path = file.path
    with _as_decode_errors(file):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            from PIL import Image, ImageOps

            with Image.open(file.readable()) as image:
                codec = str(image.format).lower()
                width, height = ImageOps.exif_transpose(image).size
            return VideoInfo(width, height, 1, 0.0, 0.0, codec)
        with _open(file) as container:
            stream = _video_stream(container, path)
            index = _index(container, stream, path)
        with _open(file) as container:
            stream = _video_stream(container, path)
            frame = next(_frames(container, stream), None)
            if frame is None:
                raise DecodeError(path, "no frame could be decoded")
            width, height = frame.width, frame.height
            if orientation(frame)[0]:
                width, height = height, width
            count = len(index.times)
            rate = count / index.duration if index.duration else float(stream.average_rate or 0)
            return VideoInfo(width, height, count, index.duration, rate, stream.codec_context.name)


_PYAV = int(av.__version__.split(".")[0])
# Titles need not be UTF-8. From 19 on PyAV takes them as they are and has no such option.
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if _PYAV < 19 else {}

# From 17 on PyAV starts a thread a core for every converter where it is not told how many.
ONE_THREAD: dict[str, Any] = {"threads": 1} if _PYAV >= 17 else {}

# Or a stream for copies would need an encoder of the decoder's name; AV1's decoder is none.
_AS_IT_IS: dict[str, Any] = {"opaque": True} if _PYAV >= 15 else {}


def add_copy(out: OutputContainer, stream: VideoStream) -> VideoStream:
    """A stream for the packets of another, unchanged."""
    return out.add_stream_from_template(stream, **_AS_IT_IS)


class _File(NamedTuple):
    """Where bytes come from: a path, or memory that has a path for a name."""

    path: Path
    data: bytes | None = None

    def binary(self) -> BinaryIO:
        return open(self.path, "rb") if self.data is None else io.BytesIO(self.data)

    def readable(self) -> Path | io.BytesIO:
        return self.path if self.data is None else io.BytesIO(self.data)


def _file(source: Source) -> _File:
    if isinstance(source, Blob):
        return _File(Path(source.name), source.data)
    return _File(Path(source))


def _open(file: _File) -> InputContainer:
    # "file:" keeps a colon in a name from being read as a protocol.
    source = f"file:{file.path}" if file.data is None else file.readable()
    return av.open(source, mode="r", **_LENIENT)


@contextmanager
def _as_decode_errors(file: _File) -> Iterator[None]:
    path = file.path
    try:
        if file.data is None and not path.exists():
            raise DecodeError(path, "no such file")
        if file.data is None and path.is_dir():
            raise DecodeError(path, "a folder, not a video")
        if (os.path.getsize(path) if file.data is None else len(file.data)) == 0:
            raise DecodeError(path, "empty file (0 bytes)")
        yield
    except DecodeError:
        raise
    except av.InvalidDataError as error:
        raise DecodeError(path, f"not a video, cut off or damaged ({error.strerror})") from error
    except (OSError, av.FFmpegError) as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    except Exception as error:  # damaged files break libraries in ways those do not name
        raise DecodeError(path, f"{type(error).__name__}: {error}") from error


# --- the first pass -------------------------------------------------------------------------


NO_TIME = np.iinfo(np.int64).min


class _Packets(NamedTuple):
    """What is kept of packets, in decoding order: not their data. NO_TIME where one has none."""

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    duration: NDArray[np.int64]
    keyframe: NDArray[np.bool_]
    discard: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Index:
    """The packets of a video.

    In decoding order: pts and dts in ticks, keyframe. In the order of showing: `shown`, the
    ticks, and `times`, the same in seconds from the first. Where a container keeps no
    time of showing (AVI, raw streams), `by_count`: frames come out of the decoder in that order
    and are counted, `shown` being 0, 1, 2, … `by_tables`: no packet has been read yet.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    keyframe: NDArray[np.bool_]
    shown: NDArray[np.int64]
    times: NDArray[np.float64]
    duration: float
    by_count: bool
    by_tables: bool = False

    @property
    def bytes(self) -> int:
        arrays = (self.pts, self.dts, self.keyframe, self.shown, self.times)
        return 1024 + sum(array.nbytes for array in arrays)  # and the objects themselves

    def keyframes_for(self, wanted: list[int]) -> list[int]:
        """For each pts, the position of the last-shown keyframe from which its frame decodes."""
        keys = np.flatnonzero(self.keyframe)
        keys = keys[np.argsort(self.pts[keys])]
        found = np.searchsorted(self.pts[keys], wanted, side="right") - 1
        return [int(keys[position]) if position >= 0 else 0 for position in found]


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    for stream in container.streams.video:
        # Cover art of a sound file counts as video in a container; text is drawn as "ansi".
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise DecodeError(path, "no decoder for its video")
        if stream.codec_context.name != "ansi":
            return stream
    kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
    raise DecodeError(path, f"no video in it (only {', '.join(kinds)})" if kinds else "not a video")


def _index(
    container: InputContainer,
    stream: VideoStream,
    path: Path,
    start: float | None = None,
    end: float | None = None,
) -> _Index:
    """The packets needed for what is shown in [start, end) seconds, or all of them."""
    packets, whole = _packets(container, stream, path, start, end)
    index = _in_order(container, stream, packets, path)
    if whole:
        _check_whole(container, stream, index.duration, path)
    return index


class _Known:
    """This process's indices of files: MOST_KNOWN bytes of them, the last used at the end."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Any, ...], _Index] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple[Any, ...]) -> "_Index | None":
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def keep(self, key: tuple[Any, ...], index: "_Index") -> None:
        with self.lock:
            if key in self.kept:
                self.bytes -= self.kept.pop(key).bytes
            self.kept[key] = index
            self.bytes += index.bytes
            while self.bytes > MOST_KNOWN:
                self.bytes -= self.kept.popitem(last=False)[1].bytes


_known = _Known()
# A forked worker is alone in its copy, which another thread may have been holding.
os.register_at_fork(after_in_child=lambda: setattr(_known, "lock", threading.Lock()))


def _known_index(
    container: InputContainer,
    stream: VideoStream,
    file: _File,
    start: float | None = None,
    end: float | None = None,
    *,
    trust_tables: bool = True,
) -> _Index:
    """What is shown in [start, end): by an MP4's tables, or else as _index finds it. Neither is
    read in every epoch of a file that stays as it is."""

    def read() -> _Index:
        if trust_tables and start is None and end is None:  # of a part, that part is read
            index = _index_of_tables(container, stream, file)
            if index is not None:
                return index
        return _index(container, stream, file.path, start, end)

    # To seek well, other formats have to have been read through.
    if file.data is not None or container.format.name not in SEEKABLE:
        return read()
    status = os.stat(file.path)
    identity = (str(file.path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    key = (*identity, start, end)
    index = _known.get(key)
    if index is None or (index.by_tables and not trust_tables):
        index = read()
        _known.keep(key, index)
    return index


def _index_of_tables(container: InputContainer, stream: VideoStream, file: _File) -> _Index | None:
    """All packets of an MP4 file, without reading them; None where its tables leave a doubt.

    What they say of a packet is compared when that packet is decoded.
    """
    entries = getattr(stream, "index_entries", None)  # PyAV 17 and newer
    if not entries or container.format.name != MP4 or stream.start_time is None:
        return None
    with file.binary() as source:
        offsets = composition_offsets(source, stream.id)
        length = source.seek(0, os.SEEK_END)
    if offsets is None or len(offsets) not in (0, len(entries)):
        return None
    found = [(e.timestamp, e.flags, e.size, e.pos + e.size) for e in entries]
    dts, flags, size, stop = np.array(found, np.int64).T
    if (flags & ~KEYFRAME).any() or not size.all() or (stop > length).any():
        return None
    pts = dts + offsets if len(offsets) else dts
    pts = pts - pts.min() + stream.start_time
    duration = np.diff(dts, append=2 * dts[-1] - dts[max(len(dts) - 2, 0)])
    packets = _Packets(pts, dts, duration, flags != 0, np.zeros(len(dts), np.bool_))
    index = _in_order(container, stream, packets, file.path)
    _check_whole(container, stream, index.duration, file.path)
    return replace(index, by_tables=True)


def _in_order(
    container: InputContainer, stream: VideoStream, packets: _Packets, path: Path
) -> _Index:
    if stream.time_base is None:
        raise DecodeError(path, "no time base in it")
    visible = packets.pts[~packets.discard]
    if not len(visible):
        raise DecodeError(path, "no frames in it")
    pts = np.where(packets.pts == NO_TIME, 0, packets.pts)
    by_count = container.format.name == "avi" or bool((visible == NO_TIME).any())
    if by_count:
        shown = np.arange(len(visible), dtype=np.int64)
        frame_time = float(1 / stream.average_rate) if stream.average_rate else 0.04
        times = shown * frame_time
        duration = len(visible) * frame_time
    else:
        tick = float(stream.time_base)
        shown = np.unique(visible)
        # Frames that refer to what came before the first keyframe cannot be decoded.
        if packets.keyframe.any():
            shown = shown[shown >= pts[packets.keyframe.argmax()]]
        zero = shown[0] if stream.start_time is None else stream.start_time
        times = (shown - zero) * tick
        last = packets.duration[~packets.discard][visible.argmax()]
        duration = float(times[-1] + last * tick)
    return _Index(
        pts=pts,
        dts=np.where(packets.dts == NO_TIME, pts, packets.dts),
        keyframe=packets.keyframe,
        shown=shown,
        times=times.astype(np.float64),
        duration=duration,
        by_count=by_count,
    )


def _packets(
    container: InputContainer,
    stream: VideoStream,
    path: Path,
    start: float | None,
    end: float | None,
) -> tuple[_Packets, bool]:
    """Packets in decoding order, and whether they reach to the end of the file.

    Of a part of a long video only that part is read, where the format is good at seeking.
    """
    last = math.inf
    if container.format.name in SEEKABLE and stream.start_time is not None and stream.time_base:
        last = math.inf if end is None else stream.start_time + end / float(stream.time_base)
    whole, found = True, []
    for packet in packets_from(container, stream, start):
        pts, dts = packet.pts, packet.dts
        if packet.size:
            if packet.is_corrupt:
                raise DecodeError(path, "cut off or damaged: a packet of its video is not whole")
            found.append(
                (
                    NO_TIME if pts is None else pts,
                    NO_TIME if dts is None else dts,
                    packet.duration or 0,
                    packet.is_keyframe,
                    packet.is_discard,
                )
            )
        if dts is not None and dts > last:
            whole = False
            break
    pts, dts, duration, keyframe, discard = np.array(found, np.int64).reshape(-1, 5).T
    return _Packets(pts, dts, duration, keyframe != 0, discard != 0), whole


def packets_from(
    container: InputContainer, stream: VideoStream, start: float | None
) -> Iterator[Packet]:
    """Packets from the keyframe at or before `start` seconds where the format is good at
    seeking, else from the first."""
    source = _demux(container, stream)
    known = stream.start_time is not None and stream.time_base
    if not (start and known and container.format.name in SEEKABLE):
        return source
    assert stream.start_time is not None and stream.time_base is not None
    first = stream.start_time + int(start / float(stream.time_base))
    for offset in (first, stream.start_time):
        container.seek(offset, stream=stream)
        source = _demux(container, stream)
        head = next(source)
        source = itertools.chain([head], source)
        if head.is_keyframe and head.pts is not None and head.pts <= first:
            break
    return source


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    # PyAV's own generator leaks a packet where it is left early and not closed. This one closes it
    # when nobody holds it any more.
    yield from container.demux(stream)


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    for packet in _demux(container, stream):
        yield from packet.decode()  # type: ignore[misc]


def _check_whole(
    container: InputContainer, stream: VideoStream, duration: float, path: Path
) -> None:
    """DecodeError where the packets end well before the length that the header claims."""
    claimed = 0.0
    if stream.duration is not None and stream.time_base is not None:
        claimed = float(stream.duration * stream.time_base)
    elif tag := re.match(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
        claimed = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
        claimed -= (stream.start_time or 0) * float(stream.time_base or 0)
    elif container.duration is not None and len(container.streams) == 1:
        claimed = container.duration / av.time_base
    seconds_allowed, share_allowed = MISSING_END
    if duration < claimed - max(seconds_allowed, share_allowed * claimed):
        raise DecodeError(path, f"cut off: frames end at {duration:.1f} s of {claimed:.1f} s")


def _window(
    times: NDArray[np.float64], start: float | None, end: float | None, path: Path
) -> slice:
    """The frames shown during [start, end)."""
    first = 0 if start is None else int(np.searchsorted(times, start + 1e-6, side="right")) - 1
    first = max(first, 0)
    if start is not None and len(times) > 1 and start > 2 * times[-1] - times[-2]:
        raise DecodeError(path, f"start {start:g} s lies after its end ({times[-1]:.2f} s)")
    stop = len(times) if end is None else int(np.searchsorted(times, end - 1e-6, side="left"))
    return slice(first, max(stop, first + 1))


# --- the second pass ------------------------------------------------------------------------


class _SeekFailed(Exception):
    """The quick way through a file did not give every frame."""


class _TablesWrong(Exception):
    """A file's tables are not enough to find every frame by."""


def _decode(
    container: InputContainer,
    stream: VideoStream,
    index: _Index,
    chosen: NDArray[np.int64],
    size: int,
    file: _File,
    threads: int,
) -> Tensor:
    """The chosen frames (positions in index.shown), converted: uint8 [len(chosen), 3, s, s]."""
    wanted, places = np.unique(index.shown[chosen], return_inverse=True)
    frames = torch.empty(len(wanted), 3, size, size, dtype=torch.uint8)
    pixels = frames.numpy()
    converter = _Converter(size, stream.codec_context.name)
    try:
        if index.by_count:
            raise _SeekFailed
        _set_threads(stream, threads)
        found = _seek_and_decode(container, stream, index, wanted.tolist())
        for position, frame in found:
            converter.convert(frame, pixels[position])
    except (_SeekFailed, av.FFmpegError):
        if index.by_tables:
            raise _TablesWrong from None
        with _open(file) as again:
            stream = again.streams[stream.index]  # type: ignore[assignment]
            _set_threads(stream, threads)
            frames_shown = _decode_all(again, stream, index, wanted.tolist(), file.path)
            for position, frame in frames_shown:
                converter.convert(frame, pixels[position])
    if np.array_equal(places, np.arange(len(wanted))):
        return frames
    return frames[torch.from_numpy(places)]


def _set_threads(stream: VideoStream, threads: int) -> None:
    stream.codec_context.thread_count = threads
    stream.codec_context.thread_type = "NONE" if threads == 1 else "AUTO"


def _seek_and_decode(
    container: InputContainer, stream: VideoStream, index: _Index, wanted: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """(position in wanted, frame), in the order in which they are decoded.

    wanted: pts, increasing. Raises _SeekFailed where the file cannot be sought in, or where a
    frame does not come out or is damaged.
    """
    unfed: dict[int | None, int] = {pts: position for position, pts in enumerate(wanted)}
    inside: dict[int | None, int] = {}
    context = stream.codec_context
    keys = index.keyframes_for(wanted)
    known = index.pts.tolist() if index.by_tables else []
    while unfed:
        key = keys[next(iter(unfed.values()))]
        # A seek may land before its keyframe; only a later keyframe is worth another.
        fed, packets = _seek(container, stream, index, key)
        ahead = max(fed, key)
        context.skip_frame, skipping = "NONREF", True
        for packet in packets:
            pts = packet.pts
            if index.by_tables and not (fed < len(known) and pts == known[fed]):
                raise _SeekFailed
            skip = pts not in unfed
            if not skip:
                inside[pts] = unfed.pop(pts)
                key = keys[next(iter(unfed.values()))] if unfed else 0
            if skip != skipping:  # setting it costs more than passing over a packet does
                context.skip_frame, skipping = "NONREF" if skip else "DEFAULT", skip
            fed += 1
            ahead = max(fed, ahead)
            leave = not unfed or key > ahead
            frames = packet.decode()
            if leave:
                # What waits in the decoder comes out without more packets being decoded.
                frames += context.decode(None)
            for frame in frames:
                if frame.pts in inside:
                    if frame.is_corrupt:
                        raise _SeekFailed
                    yield inside.pop(frame.pts), frame
            if leave:
                break
        if inside or not leave:
            raise _SeekFailed


def _seek(
    container: InputContainer, stream: VideoStream, index: _Index, key: int
) -> tuple[int, Iterator[Packet]]:
    """Moves to keyframe `key` or before it: the position reached, and the packets from there."""
    for offset in (index.pts[key], index.dts[key]):
        container.seek(int(offset), stream=stream)
        packets = _demux(container, stream)
        first = next(packets, None)
        if first is None or first.pts is None:
            continue
        reached = np.flatnonzero((index.pts == first.pts) & index.keyframe)
        if len(reached) == 1 and reached[0] <= key:
            return int(reached[0]), itertools.chain([first], packets)
    raise _SeekFailed


def _decode_all(
    container: InputContainer, stream: VideoStream, index: _Index, wanted: list[int], path: Path
) -> Iterator[tuple[int, VideoFrame]]:
    """As _seek_and_decode, but decoding every frame from the file's start.

    A frame that the decoder leaves out is replaced by the one shown at its time.
    """
    position = 0
    previous: VideoFrame | None = None
    for count, frame in enumerate(_frames(container, stream)):
        now = count if index.by_count else frame.pts
        if now is None:
            continue
        while position < len(wanted) and wanted[position] < now:
            yield position, previous or frame
            position += 1
        if position == len(wanted):
            return
        if frame.is_corrupt and wanted[position] == now:
            raise DecodeError(path, f"damaged at {float(frame.time or 0):.2f} s")
        previous = frame
    if previous is None:
        raise DecodeError(path, "no frame could be decoded")
    for rest in range(position, len(wanted)):
        yield rest, previous


# --- pixels ---------------------------------------------------------------------------------


class _Converter:
    """Frames of one video to RGB squares; keeps swscale's tables between frames."""

    def __init__(self, size: int, codec: str) -> None:
        self.size = size
        self.chroma_left = codec not in CENTRED_CHROMA
        self.reformatter = VideoReformatter()

    def convert(self, frame: VideoFrame, out: NDArray[np.uint8]) -> None:
        """Writes the frame as it is to be shown into out [3, size, size]."""
        swapped, mirrored_x, mirrored_y = orientation(frame)
        turned = swapped or mirrored_x or mirrored_y
        yuv = _yuv(frame, self.chroma_left)
        if yuv is None:
            square = self._by_swscale(frame)
        else:
            planes, colours = yuv
            square = resize_crop(planes, self.size, colours, None if turned else out)
            if not turned:
                return
        if swapped:
            square = square.transpose(0, 2, 1)
        out[:] = square[:, :: -1 if mirrored_y else 1, :: -1 if mirrored_x else 1]

    def _by_swscale(self, frame: VideoFrame) -> NDArray[np.uint8]:
        height, width = resized(frame.height, frame.width, self.size)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        # To packed RGB swscale gives two columns one chroma; but where nothing is to be resized, it
        # leaves last columns of planar RGB unwritten.
        packed = (height, width) == (frame.height, frame.width)
        whole = self.reformatter.reformat(
            frame,
            width,
            height,
            "rgb24" if packed else "gbrp",
            interpolation=Interpolation.BICUBIC,
            **ONE_THREAD,
        )
        rows = [_rows(plane, np.uint8)[top : top + self.size] for plane in whole.planes]
        if packed:
            return np.stack([rows[0][:, 3 * left + c :: 3][:, : self.size] for c in range(3)])
        green, blue, red = (plane[:, left : left + self.size] for plane in rows)
        return np.stack([red, green, blue])


_PLANAR_YUV = re.compile(r"yuv(j?)4(?:20|22|44)p(?:(9|10|12|14|16)le)?")
# By their numbers in H.273, table 4. BT.601 where a file does not say; of BT.2020's two forms the
# one of constant luminance is treated as the other.
MATRIX_NAMES = dict.fromkeys((0, 2, 3, 5, 6), "bt601")
MATRIX_NAMES |= {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}


@functools.lru_cache(maxsize=64)
def _colours(name: str, matrix: int, full_range: bool, chroma_left: bool) -> Colours | None:
    form = _PLANAR_YUV.fullmatch(name)
    if form is None or matrix not in MATRIX_NAMES:
        return None
    full_range = full_range or form[1] == "j"
    return Colours(MATRIX_NAMES[matrix], full_range, int(form[2] or 8), chroma_left)


def _yuv(frame: VideoFrame, chroma_left: bool) -> tuple[list[NDArray[Any]], Colours] | None:
    """The frame's planes and what they mean; None where resize_crop does not take its format."""
    full_range = frame.color_range == ColorRange.JPEG
    colours = _colours(frame.format.name, int(frame.colorspace), full_range, chroma_left)
    planes = frame.planes
    if colours is None or any(plane.line_size < 0 for plane in planes):  # rows from the last on
        return None
    dtype = np.uint8 if colours.bits == 8 else np.uint16
    return [_rows(plane, dtype)[:, : plane.width] for plane in planes], colours


def _rows(plane: VideoPlane, dtype: type) -> NDArray[Any]:
    """With what pads them."""
    return np.frombuffer(memoryview(plane), dtype).reshape(plane.height, -1)


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """(axes swapped, then mirrored left-right, then mirrored top-bottom), of the display matrix."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(data, SideData):
        return False, False, False
    # Shown x = a·x + c·y and y = b·x + d·y, in 16.16 fixed point, in rows of three.
    a, b, _, c, d = np.frombuffer(memoryview(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def _read_image(file: _File, size: int) -> Tensor:
    """uint8 [1, 3, size, size]."""
    from PIL import Image, ImageOps

    with Image.open(file.readable()) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    height, width = resized(upright.height, upright.width, size)
    top, left = (height - size) // 2, (width - size) // 2
    whole = upright.resize((width, height), Image.Resampling.BICUBIC)
    square = np.asarray(whole.crop((left, top, left + size, top + size)))
    return torch.from_numpy(square.transpose(2, 0, 1).copy())[None]
