"""Chosen frames of a clip as whole pictures, in the shape in which a player shows them.

Models that are not ours, such as captioners, cut and scale pictures in ways of their own.
"""

from contextlib import suppress
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from clipvip.data.video.container import (
    DecodeError,
    Media,
    Video,
    as_decode_errors,
    file_of,
    is_image,
    open_video,
)
from clipvip.data.video.decode import UNSTABLE, OpenClip
from clipvip.data.video.frame_index import Index, window_of
from clipvip.data.video.known_index import known_index
from clipvip.data.video.pixels import ONE_THREAD, open_image, orientation, rgb_of, turned
from clipvip.data.video.sampling import Choice, choose_frames, middle_frame
from clipvip.data.video.strategies import Mismatch


class Pictures(NamedTuple):
    """Pictures in the order of showing, each uint8 [H, W, 3]. damage: see OpenClip.damage."""

    frames: list[NDArray[np.uint8]]
    damage: str | None = None


def read_pictures(
    media: Media,
    num_frames: int = 1,
    *,
    start: float | None = None,
    end: float | None = None,
    side: int,
) -> Pictures:
    """Read frames of a clip as pictures.

    Exactly the chosen frames are decoded, as by read_frames. A picture is upright, its pixels are
    square, and if it is wider or higher than `side` pixels it is shrunk.

    num_frames: 1 for the clip's middle frame, the one that the loader of post-pretraining takes
        with the sampling "authors": number int(n / 2) of n. More are spread evenly from the first
        frame to the last; a clip of fewer frames gives each once. An image is one frame.
    start, end: seconds; the clip is what is shown in [start, end).

    Raises DecodeError.
    """
    if is_image(media):
        return Pictures([_read_image(media, side)])
    path = file_of(media).path

    def choose(index: Index) -> Choice:
        window = window_of(index.times, start, end, path)
        times = index.times[window]
        if num_frames == 1:
            return Choice(np.array([middle_frame(times, "authors")]) + window.start)
        return Choice(np.unique(choose_frames(times, num_frames, "authors")) + window.start)

    with open_video(media) as video:
        index = known_index(video, start, end)
        clip = OpenClip(video, start, end, index, choose(index), choose)
        for decoded in clip.attempts():
            with suppress(Mismatch):
                frames = [upright_rgb(video, frame, side) for _, frame in decoded]
                return Pictures(frames, clip.damage)
        raise DecodeError(path, UNSTABLE)


def _read_image(media: Media, side: int) -> NDArray[np.uint8]:
    from PIL import Image

    with as_decode_errors(media), open_image(file_of(media)) as opened:
        opened.draft("RGB", (side, side))  # decodes a large JPEG at a fraction of its size
        image = Image.fromarray(rgb_of(opened))
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def upright_rgb(video: Video, frame: VideoFrame, side: int) -> NDArray[np.uint8]:
    """Return the frame upright, uint8 [H, W, 3], with sides of at most `side` pixels."""
    width, height = fit(video, frame, side, side)
    small = VideoReformatter().reformat(
        frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC, **ONE_THREAD
    )
    pixels = torch.from_numpy(small.to_ndarray()).permute(2, 0, 1)
    return turned(pixels, orientation(frame)).permute(1, 2, 0).contiguous().numpy()


def fit(video: Video, frame: VideoFrame, width: int, height: int) -> tuple[int, int]:
    """Return width and height, in pixels that are square, of a frame that is shrunk to fit."""
    aspect = video.stream.sample_aspect_ratio or Fraction(1)
    # A few bytes can claim pixels of any shape.
    wide = frame.width * float(aspect) if Fraction(1, 4) <= aspect <= 4 else float(frame.width)
    scale = min(width / wide, height / frame.height, 1.0)
    return max(round(wide * scale), 1), max(round(frame.height * scale), 1)
