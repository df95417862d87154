"""Exactly the frames asked for, out of a video or an image, by PyAV.

The first pass finds the times of all frames: from an MP4's tables, or else by reading packets
without decoding them (known_index.py). In the order of showing, they say which frames a sampling
means, even if the frame rate varies. The second pass decodes those frames, and compares what the
decoder gives with what the first pass found (strategies.py). Where the two differ, a more reliable
first pass is made and frames are chosen again.

Only wanted frames are converted to RGB (pixels.py). Rotation and mirroring flags are applied, the
pixel aspect ratio is not. Times are seconds from the video's first frame.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data.video.container import (
    DecodeError,
    Media,
    Video,
    as_decode_errors,
    file_of,
    is_image,
    open_video,
)
from clipvip.data.video.frame_index import Index, Trust, window_of
from clipvip.data.video.known_index import known_index
from clipvip.data.video.pixels import ONE_THREAD, Converter, read_image
from clipvip.data.video.sampling import Choice, check_sampling, choose_frames, middle_frame
from clipvip.data.video.strategies import WAYS, Decoded, Mismatch, in_order
from clipvip.ops.resize_crop import check_compiled, check_resize

UNSTABLE = "it gives other frames each time that it is decoded"


class Frames(NamedTuple):
    """Decoded frames of a clip as squares.

    frames: uint8 [N, 3, size, size]. middle: uint8 [3, size, size], the clip's middle frame; None
    unless asked for.
    """

    frames: Tensor
    middle: Tensor | None = None


def read_frames(
    media: Media,
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
    """Read frames of a clip as squares of `size`.

    resize: how a frame becomes a square, see clipvip.ops.resize_crop. start, end: seconds; the clip
    is what is shown in [start, end). sampling: see clipvip.data.video.sampling; with a generator,
    frames are drawn as in training. threads: number of decoder threads, 0 for one per core.
    Returns uint8 [N, 3, size, size] with N = num_frames (fewer only with "fps:R"; frames of a
    shorter clip repeat). An image is one frame, N = 1, whatever was asked for.
    Raises DecodeError for files that are missing, empty, cut off, damaged or no video.
    """
    check_sampling(sampling)
    check_resize(resize)
    if num_frames < 1 or size < 1:
        raise ValueError(f"num_frames is {num_frames}, size {size}; expected both at least 1")
    if is_image(media):
        with as_decode_errors(media):
            return read_image(file_of(media), size, resize)
    with open_clip(
        media, num_frames, start=start, end=end, sampling=sampling, generator=generator
    ) as clip:
        return clip.decode(size, threads, resize).frames


@dataclass(slots=True)
class OpenClip:
    """An opened video and the frames wanted in [start, end). Decoding replaces `index` and `chosen`
    where the decoder gives other frames than the index lists."""

    video: Video
    start: float | None
    end: float | None
    index: Index
    chosen: Choice  # positions of the wanted frames in index.shown
    choose: Callable[[Index], Choice]
    goes_in_order: bool = False  # the last attempt decoded every frame from the start

    @property
    def path(self) -> Path:
        return self.video.path

    @property
    def damage(self) -> str | None:
        """Describe the stretches of the video that are lost; None where there are none."""
        return self.index.damage

    def decode(self, size: int, threads: int = 1, resize: str = "crop") -> Frames:
        """Decode the chosen frames as squares; once, and within `open_clip` only."""
        for frames in self.attempts(threads):
            with suppress(Mismatch):
                return self._converted(frames, size, resize)
        raise DecodeError(self.path, UNSTABLE)

    def attempts(self, threads: int = 1) -> Iterator[Decoded]:
        """Yield ways to decode the chosen frames, the fastest first, to try until one gives all.

        Each gives (position in index.shown, frame) with positions increasing, and raises Mismatch
        where the decoder's frames differ from the index.
        """
        with ExitStack() as opened:
            video = self.video
            for trust, way in WAYS:
                if trust < self.index.trust:
                    continue
                # Where a seek leads depends on what its container has read.
                if trust > self.index.trust or way is in_order:
                    video = opened.enter_context(self.video.reopened())
                if trust > self.index.trust:
                    self.index = known_index(video, self.start, self.end, trust=trust)
                    self.chosen = self.choose(self.index)
                if trust == self.index.trust:
                    context = video.stream.codec_context
                    context.thread_count = threads
                    context.thread_type = "NONE" if threads == 1 else "AUTO"
                    self.goes_in_order = way is in_order
                    yield way(video, self.index, np.unique(self.chosen.positions))

    def _converted(self, decoded: Decoded, size: int, resize: str) -> Frames:
        wanted, places = np.unique(self.chosen.positions, return_inverse=True)
        row_of = {position: row for row, position in enumerate(wanted.tolist())}
        frames = torch.empty(len(wanted), 3, size, size, dtype=torch.uint8)
        pixels = frames.numpy()
        converter = Converter(size, self.video.stream.codec_context.name, resize)
        for position, frame in decoded:
            converter.convert(frame, pixels[row_of[position]])
        if not np.array_equal(places, np.arange(len(wanted))):
            frames = frames[torch.from_numpy(places)]
        return Frames(*self.chosen.split(frames))


@contextmanager
def open_clip(
    media: Media,
    num_frames: int,
    *,
    start: float | None = None,
    end: float | None = None,
    sampling: str = "uniform",
    generator: np.random.Generator | None = None,
    with_middle: bool = False,
) -> Iterator[OpenClip]:
    """Open a video and choose the frames that read_frames would decode, and with `with_middle` the
    clip's middle frame. Any error within is raised as a DecodeError."""
    check_compiled()  # or every file would seem to be bad
    path, before = file_of(media).path, deepcopy(generator)

    def choose(index: Index, generator: np.random.Generator | None) -> Choice:
        window = window_of(index.times, start, end, path)
        times = index.times[window]
        frames = choose_frames(times, num_frames, sampling, generator) + window.start
        middle = middle_frame(times, sampling) + window.start if with_middle else None
        return Choice(frames, middle)

    with open_video(media) as video:
        index = known_index(video, start, end)
        chosen = choose(index, generator)
        # Later choices draw the same numbers as the first.
        yield OpenClip(
            video, start, end, index, chosen, lambda index: choose(index, deepcopy(before))
        )


Span = tuple[float | None, float | None]  # start and end in seconds, as of a clip


@dataclass(slots=True)
class OpenVideo:
    """An opened video and the index of all its frames, to read many spans of it together.

    in_parts: whether reading a later part costs no more than an earlier one. It does where every
    frame is decoded from the start, or where all packets are read before the first seek.
    """

    video: Video
    index: Index
    in_parts: bool

    @property
    def path(self) -> Path:
        return self.video.path

    def read(
        self, spans: Sequence[Span], num_frames: int, *, size: int, resize: str, sampling: str
    ) -> tuple[Tensor, list[int | str]]:
        """Decode the frames of all spans, each frame once; once, and within `open_whole` only.

        Other arguments are those of read_frames. Returns the frames that read_frames gives for each
        span, packed, uint8 [F, 3, size, size]; and, for each span, the number of its frames, or the
        reason why it cannot be read. Raises DecodeError where none can.
        """

        def each(index: Index) -> list[NDArray[np.int64] | str]:
            return [_chosen(index, span, num_frames, sampling, self.path) for span in spans]

        def choose(index: Index) -> Choice:
            found = [frames for frames in each(index) if not isinstance(frames, str)]
            return Choice(np.concatenate([np.empty(0, np.int64), *found]))

        clip = OpenClip(self.video, None, None, self.index, choose(self.index), choose)
        try:
            pixels = clip.decode(size, resize=resize).frames
        finally:
            self.index = clip.index
            self.in_parts &= not clip.goes_in_order
        return pixels, [
            frames if isinstance(frames, str) else len(frames) for frames in each(self.index)
        ]


def _chosen(
    index: Index, span: Span, num_frames: int, sampling: str, path: Path
) -> NDArray[np.int64] | str:
    """Return the positions of a span's frames in index.shown, or why they cannot be decoded."""
    try:
        window = window_of(index.times, *span, path)
    except DecodeError as error:
        return error.reason
    frames = choose_frames(index.times[window], num_frames, sampling) + window.start
    if index.damaged is not None and (damaged := index.damaged[frames]).any():
        return f"damaged at {index.times[frames[damaged][0]]:.2f} s"
    return frames


@contextmanager
def open_whole(media: Media) -> Iterator[OpenVideo]:
    """Open a video and list all its frames. Any error within is raised as a DecodeError."""
    check_compiled()  # or every file would seem to be bad
    with open_video(media) as video:
        yield OpenVideo(video, known_index(video), video.seekable)


def decode_clip(
    media: Media, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, VideoFrame]]:
    """Yield every frame shown in [start, end), in order, with its seconds from the first of them.
    Raises DecodeError."""
    path = file_of(media).path

    def choose(index: Index) -> Choice:
        window = window_of(index.times, start, end, path)
        return Choice(np.arange(window.start, window.stop))

    with open_video(media) as video:
        index = known_index(video, start, end, trust=Trust.PACKETS)
        clip = OpenClip(video, start, end, index, choose(index), choose)
        zero, last = None, -1.0
        for frames in clip.attempts():
            if clip.index.by_count and clip.index.trust < Trust.DECODER:
                continue  # that its times are wrong would be noticed after the last frame only
            with suppress(Mismatch):
                for expected, (position, frame) in zip(clip.chosen.frames, frames, strict=True):
                    if position != expected:
                        raise Mismatch
                    seconds = float(clip.index.times[position])
                    zero = seconds if zero is None else zero
                    if seconds > last:  # earlier ones were given by the attempt before
                        yield seconds - zero, frame
                        last = seconds
                return
        raise DecodeError(path, UNSTABLE)


def decode_small(media: Media, width: int, height: int) -> Iterator[tuple[float, NDArray[Any]]]:
    """Yield every frame in order with its seconds from the first, squeezed to uint8
    [height, width, 3] of blue, green and red. Raises DecodeError."""
    reformatter = VideoReformatter()
    with as_decode_errors(media):
        for seconds, frame in decode_clip(media):
            small = reformatter.reformat(
                frame, width, height, "bgr24", interpolation=Interpolation.BILINEAR, **ONE_THREAD
            )
            yield seconds, small.to_ndarray()


def check_decodes(
    video: Media | None,
    image: Media | None = None,
    start: float | None = None,
    end: float | None = None,
) -> None:
    """Decode the first, middle and last frame of a video, and the image. Raises DecodeError."""
    if video is not None:
        read_frames(video, 3, size=16, start=start, end=end)
    if image is not None:
        read_frames(image, 1, size=16)
