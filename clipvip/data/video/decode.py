"""Exactly the frames asked for, out of a video or an image, by PyAV.

The first pass (frame_index.py) finds the times of all frames, from an MP4's tables or
else by reading packets without decoding them: in the order of showing, they say which frames a
sampling means, whatever the frame rate does. The second pass decodes only what those frames need:
it jumps forward where a keyframe lies between the decoder and the next wanted frame, feeds nothing
after the last frame wanted before the jump, and lets the decoder drop frames that no other frame
refers to. What comes out is compared with what the first pass found; where they differ, frames are
chosen anew among those that come out when everything is decoded in order.

Only wanted frames are converted, in one pass from the decoder's planes to RGB at the target size
(pixels.py). Sizes are those of stored pixels (the pixel aspect ratio is not applied);
rotation and mirroring flags are.

Times are seconds from the video's first frame.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data.video.container import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Blob,
    DecodeError,
    File,
    Media,
    as_decode_errors,
    demux,
    file_of,
    is_image,
    open_container,
    open_video,
    video_stream,
)
from clipvip.data.video.frame_index import Index, IndexWrong, Trust, known_index, window_of
from clipvip.data.video.in_order import NO_TIME, InOrder
from clipvip.data.video.pixels import Converter, open_image, orientation, read_image
from clipvip.data.video.sampling import Choice, check_sampling, choose_frames, middle_frame
from clipvip.ops.resize_crop import check_compiled, check_resize

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Blob",
    "DecodeError",
    "Frames",
    "Media",
    "OpenClip",
    "VideoInfo",
    "decode_clip",
    "is_image",
    "open_clip",
    "probe",
    "read_frames",
]


class VideoInfo(NamedTuple):
    """Facts about a video, by `probe`; width and height as shown, after the rotation flag."""

    width: int
    height: int
    num_frames: int
    duration: float
    fps: float
    codec: str


class Frames(NamedTuple):
    """Decoded frames of a clip as squares.

    frames: uint8 [N, 3, size, size]. middle: uint8 [3, size, size], the clip's middle frame; None
    unless asked for.
    """

    frames: Tensor
    middle: Tensor | None = None


def read_frames(
    path: Media,
    num_frames: int,
    *,
    size: int,
    resize: str = "crop",
    start: float | None = None,
    end: float | None = None,
    sampling: str = "uniform",
    generator: np.random.Generator | None = None,
    threads: int = 1,
) -> Tensor:
    """Frames of a clip as squares of `size`.

    resize: how a frame becomes a square, see clipvip.ops.resize_crop.
    start, end: seconds; the clip is what is shown in [start, end). sampling: see
    clipvip.data.video.sampling; a generator means training. threads: for the decoder, 0 for one
    per core.
    Returns uint8 [N, 3, size, size] with N = num_frames (fewer only with "fps:R"; frames of
    a shorter clip repeat). An image is one frame, N = 1, whatever was asked.
    Raises DecodeError for files that are missing, empty, cut off, damaged or no video.
    """
    file = file_of(path)
    check_sampling(sampling)
    check_resize(resize)
    if num_frames < 1 or size < 1:
        raise ValueError(f"num_frames is {num_frames}, size {size}; expected both at least 1")
    if is_image(path):
        with as_decode_errors(file):
            return read_image(file, size, resize)
    with open_clip(
        path, num_frames, start=start, end=end, sampling=sampling, generator=generator
    ) as clip:
        return clip.decode(size, threads, resize).frames


@dataclass(slots=True)
class OpenClip:
    """An opened video and the frames wanted: `chosen` holds positions among all frames that `index`
    lists in the order of showing. Decoding replaces the index by a more reliable one where the
    decoder's frames differ from it."""

    source: Media
    container: InputContainer
    stream: VideoStream
    index: Index
    chosen: Choice
    find: Callable[[InputContainer, VideoStream, Trust], Index]
    choose: Callable[[Index], Choice]

    @property
    def path(self) -> Path:
        return file_of(self.source).path

    @property
    def damage(self) -> str | None:
        """Describe what is known to be lost of the video; None where nothing is."""
        if not self.index.lost:
            return None
        stretches = ", ".join(f"{first:.1f}–{last:.1f} s" for first, last in self.index.lost[:5])
        return f"damaged at {stretches}" + ", …" * (len(self.index.lost) > 5)

    def decode(self, size: int, threads: int = 1, resize: str = "crop") -> Frames:
        """Decode the chosen frames; once, and within `open_clip` only."""
        file = file_of(self.source)
        with suppress(IndexWrong):
            return _decode(
                self.container, self.stream, self.index, self.chosen, size, file, threads, resize
            )
        for trust in (Trust.PACKETS, Trust.DECODER):
            if trust <= self.index.trust:
                continue
            with open_container(file) as container, suppress(IndexWrong):
                stream = video_stream(container, file.path)
                self.index = self.find(container, stream, trust)
                self.chosen = self.choose(self.index)
                return _decode(
                    container, stream, self.index, self.chosen, size, file, threads, resize
                )
        raise DecodeError(file.path, "it gives other frames each time that it is decoded")


@contextmanager
def open_clip(
    source: Media,
    num_frames: int,
    *,
    start: float | None = None,
    end: float | None = None,
    sampling: str = "uniform",
    generator: np.random.Generator | None = None,
    with_middle: bool = False,
) -> Iterator[OpenClip]:
    """Open a video and choose the frames that read_frames would decode, and with `with_middle` the
    clip's middle frame; what goes wrong within is a DecodeError."""
    file = file_of(source)
    check_compiled()  # or every file would seem to be bad
    state = {} if generator is None else generator.bit_generator.state

    def choose(index: Index) -> Choice:
        if generator is not None:
            generator.bit_generator.state = state
        window = window_of(index.times, start, end, file.path)
        times = index.times[window]
        frames = choose_frames(times, num_frames, sampling, generator) + window.start
        middle = middle_frame(times, sampling) + window.start if with_middle else None
        return Choice(frames, middle)

    def find(container: InputContainer, stream: VideoStream, trust: Trust) -> Index:
        return known_index(container, stream, file, start, end, trust=trust)

    with as_decode_errors(file), open_container(file) as container:
        stream = video_stream(container, file.path)
        index = find(container, stream, Trust.TABLES)
        yield OpenClip(source, container, stream, index, choose(index), find, choose)


def decode_clip(
    source: Media, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, VideoFrame]]:
    """Every frame shown in [start, end), in order, with its seconds from the first of them."""
    file = file_of(source)
    zero, last = None, -1.0
    for trust in (Trust.PACKETS, Trust.DECODER):
        with open_video(source) as (container, stream), suppress(IndexWrong):
            index = known_index(container, stream, file, start, end, trust=trust)
            if index.by_count and index.trust < Trust.DECODER:
                continue  # times that are wrong would be noticed after the last frame only
            window = window_of(index.times, start, end, file.path)
            wanted = np.arange(window.start, window.stop)
            for position, frame in _every(container, stream, index, wanted, file):
                seconds = float(index.times[wanted[position]])
                if zero is None:
                    zero = seconds
                if seconds > last:  # not given before the index was found to be wrong
                    yield seconds - zero, frame
                    last = seconds
            return
    raise DecodeError(file.path, "it gives other frames each time that it is decoded")


def _every(
    container: InputContainer,
    stream: VideoStream,
    index: Index,
    wanted: NDArray[np.int64],
    file: File,
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames of successive positions in index.shown, in order; where seeking fails, from the first
    on again."""
    try:
        for due, (position, frame) in enumerate(_quickly(container, stream, index, wanted, file)):
            if position != due:
                raise _SeekFailed
            yield position, frame
    except (_SeekFailed, av.FFmpegError):
        with open_container(file) as again:
            same = video_stream(again, file.path)
            yield from _decode_in_order(again, same, index, wanted, file.path)


def probe(path: Media) -> VideoInfo:
    """Size, frames and times of a video or image; decodes one frame. Raises DecodeError."""
    file = file_of(path)
    path = file.path
    with as_decode_errors(file):
        if is_image(file.path):
            from PIL import ImageOps

            with open_image(file) as image:
                codec = str(image.format).lower()
                width, height = ImageOps.exif_transpose(image).size
            return VideoInfo(width, height, 1, 0.0, 0.0, codec)
        with open_container(file) as container:
            stream = video_stream(container, path)
            index = known_index(container, stream, file, trust=Trust.PACKETS)
            if index.by_count:
                index = known_index(container, stream, file, trust=Trust.DECODER)
        with open_container(file) as container:
            stream = video_stream(container, path)
            frame = next((frame for _, frame in InOrder(container, stream)), None)
            if frame is None:
                raise DecodeError(path, "no frame could be decoded")
            width, height = frame.width, frame.height
            if orientation(frame)[0]:
                width, height = height, width
            count = len(index.times)
            rate = count / index.duration if index.duration else float(stream.average_rate or 0)
            return VideoInfo(width, height, count, index.duration, rate, stream.codec_context.name)


# --- the second pass ------------------------------------------------------------------------


class _SeekFailed(Exception):
    """The quick way through a file did not give every frame."""


def _decode(
    container: InputContainer,
    stream: VideoStream,
    index: Index,
    chosen: Choice,
    size: int,
    file: File,
    threads: int,
    resize: str,
) -> Frames:
    """Decode and convert the chosen frames (positions in index.shown)."""
    wanted, places = np.unique(chosen.positions, return_inverse=True)
    frames = torch.empty(len(wanted), 3, size, size, dtype=torch.uint8)
    pixels = frames.numpy()
    converter = Converter(size, stream.codec_context.name, resize)
    try:
        _set_threads(stream, threads)
        for position, frame in _quickly(container, stream, index, wanted, file):
            converter.convert(frame, pixels[position])
    except (_SeekFailed, av.FFmpegError):
        if index.trust is Trust.TABLES:
            raise IndexWrong from None
        with open_container(file) as again:
            stream = video_stream(again, file.path)
            _set_threads(stream, threads)
            for position, frame in _decode_in_order(again, stream, index, wanted, file.path):
                converter.convert(frame, pixels[position])
    if not np.array_equal(places, np.arange(len(wanted))):
        frames = frames[torch.from_numpy(places)]
    return Frames(*chosen.split(frames))


def _set_threads(stream: VideoStream, threads: int) -> None:
    stream.codec_context.thread_count = threads
    stream.codec_context.thread_type = "NONE" if threads == 1 else "AUTO"


def _quickly(
    container: InputContainer,
    stream: VideoStream,
    index: Index,
    wanted: NDArray[np.int64],
    file: File,
) -> Iterator[tuple[int, VideoFrame]]:
    """As _seek_and_decode, with positions in index.shown; raises _SeekFailed where the file can
    only be decoded in order."""
    if index.by_count or _goes_in_order_only(stream, file):
        raise _SeekFailed
    yield from _seek_and_decode(container, stream, index, index.shown[wanted].tolist())


def _goes_in_order_only(stream: VideoStream, file: File) -> bool:
    """Before 2018 x264 coded 4:4:4 in a way of its own, and only a file's first packet says so."""
    if stream.codec_context.name != "h264" or "444" not in (stream.codec_context.pix_fmt or ""):
        return False
    with open_container(file) as container:
        head = next(demux(container, video_stream(container, file.path)))
    coder = re.search(rb"x264 - core (\d+)", bytes(head))
    return coder is not None and int(coder[1]) < 151


def _seek_and_decode(
    container: InputContainer, stream: VideoStream, index: Index, wanted: list[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """(position in wanted, frame), in the order in which they are decoded.

    wanted: pts, increasing. Raises _SeekFailed where the file cannot be sought in, or where a
    frame does not come out, comes out of order or is damaged.
    """
    unfed: dict[int | None, int] = {pts: position for position, pts in enumerate(wanted)}
    inside: dict[int | None, int] = {}
    context = stream.codec_context
    # In VP8, frames that none refers to can still change the segments of later ones.
    unwanted: Literal["DEFAULT", "NONREF"] = "DEFAULT" if context.name == "vp8" else "NONREF"
    keys = index.keyframes_for(wanted)
    known = index.pts
    while unfed:
        key = keys[next(iter(unfed.values()))]
        fed, packets = key, _seek(container, stream, index, key)
        context.skip_frame, skipping = unwanted, True
        last, first = NO_TIME, known[fed]
        for packet in packets:
            pts = packet.pts
            if fed == len(known) or pts != known[fed]:
                raise _SeekFailed
            skip = pts not in unfed
            if not skip:
                inside[pts] = unfed.pop(pts)
                key = keys[next(iter(unfed.values()))] if unfed else 0
            if skip != skipping:  # setting it costs more than skipping a packet
                context.skip_frame, skipping = unwanted if skip else "DEFAULT", skip
            fed += 1
            leave = not unfed or key > fed  # only a later keyframe is worth another seek
            if packet.is_corrupt:
                raise _SeekFailed
            frames = packet.decode()
            if leave:
                # What waits in the decoder comes out without more packets being decoded.
                frames += context.decode(None)
            for frame in frames:
                if frame.pts is None or frame.pts <= last:
                    raise _SeekFailed
                if frame.pts >= first:  # what is shown before it may refer to what was not read
                    # What its container calls a keyframe need not be one.
                    key = frame.pts == first and frame.key_frame
                    if frame.is_corrupt or (last < first and not key):
                        raise _SeekFailed
                last = frame.pts
                if frame.pts in inside:
                    yield inside.pop(frame.pts), frame
            if leave:
                break
        if inside or not leave:
            raise _SeekFailed


def _seek(
    container: InputContainer, stream: VideoStream, index: Index, key: int
) -> Iterator[Packet]:
    """Packets from keyframe `key` on.

    A seek may land before it, and where depends on what the container has read so far. The packets
    in between are not decoded, as the pictures of a damaged file would depend on them.
    """
    for offset in (index.pts[key], index.dts[key]):
        container.seek(int(offset), stream=stream)
        packets = demux(container, stream)
        first = next(packets, None)
        if first is None or first.pts is None:
            continue
        reached = np.flatnonzero((index.pts == first.pts) & index.keyframe)
        if len(reached) == 1 and reached[0] <= key:
            packets = itertools.chain([first], packets)
            for passed in itertools.islice(packets, int(key - reached[0])):
                if passed.pts != index.pts[reached[0]]:
                    raise _SeekFailed
                reached[0] += 1
            return packets
    raise _SeekFailed


def _decode_in_order(
    container: InputContainer,
    stream: VideoStream,
    index: Index,
    wanted: NDArray[np.int64],
    path: Path,
) -> Iterator[tuple[int, VideoFrame]]:
    """As _seek_and_decode, but decoding every frame from the file's start, and comparing each with
    the index. wanted: positions in index.shown, increasing. Raises IndexWrong."""
    reader = InOrder(container, stream)
    position, due, given = -1, 0, 0
    for number, frame in reader:
        this = given if index.by_count else reader.pts(number)
        given += 1
        if position + 1 == len(index.shown) or this != index.shown[position + 1]:
            # An index made by decoding lists fewer frames than decoding gives.
            if index.trust is Trust.DECODER or (position < 0 and this < index.shown[0]):
                continue
            raise IndexWrong
        position += 1
        if due < len(wanted) and position == wanted[due]:
            # Without it nobody knows which frames refer to damaged ones.
            if index.damaged is None and (reader.lost or reader.doubtful):
                raise IndexWrong
            if index.damaged is not None and index.damaged[position]:
                raise DecodeError(path, f"damaged at {index.times[position]:.2f} s")
            yield due, frame
            due += 1
            if due == len(wanted):
                reader.stop()
                if not index.by_count or index.trust is Trust.DECODER:
                    return
    counted = index.by_count and index.trust is not Trust.DECODER
    if due < len(wanted) or (counted and given != (~reader.packets.hidden).sum()):
        raise IndexWrong


def check_decodes(
    video: Media | None,
    image: Media | None = None,
    start: float | None = None,
    end: float | None = None,
) -> None:
    """Decode the first, middle and last frame, and the image. Raises DecodeError."""
    if video is not None:
        read_frames(video, 3, size=16, start=start, end=end)
    if image is not None:
        read_frames(image, 1, size=16)
