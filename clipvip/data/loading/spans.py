"""Divide a video into moments: windows of equal length, or scenes."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipvip.data.video import DecodeError, Span, decode_small

Seconds = NDArray[np.float64]

SHORTEST = 0.1  # seconds that a window or a stride may be
SHORTEST_SCENE = 1.0  # seconds
MOST = 100_000  # windows of one file: a few bytes can claim years
SCENE_SIZE = (256, 144)  # pixels, of any shape of frame: enough to tell where scenes begin
TOLD = 64  # frames between two calls of `alive`


def check_windows(window: float, stride: float, scenes: bool) -> None:
    """Raise ValueError for lengths that no video can be divided by, and where scenes are asked for
    but PySceneDetect cannot be loaded."""
    for name, value in (("window", window), ("stride", stride)):
        if not SHORTEST <= value < math.inf:
            raise ValueError(f"{name} is {value:g}; expected seconds, at least {SHORTEST:g}")
    if stride > window:
        raise ValueError(
            f"stride is {stride:g} s, longer than the window ({window:g} s), which would leave out "
            "parts of each video; give a shorter stride or a longer window"
        )
    if scenes:
        try:
            import scenedetect.detectors  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"scenes are found by PySceneDetect, which cannot be loaded ({error}): "
                'pip install "clipvip[search]"'
            ) from error


def windows(
    times: Seconds, duration: float, window: float, stride: float, path: Path
) -> list[Span]:
    """Return the windows of a video; (None, None), the whole of it, where there would be one.

    A window starts every `stride` seconds. They cover all of the video, and none is shorter than
    `window`: less than half a stride at the end is added to the last window, and more is covered by
    a window that overlaps the last one more than usual. Windows that show the same single frame are
    joined.

    times: seconds at which frames are shown, increasing. duration: seconds to the end of the last.
    Raises DecodeError where there would be more than MOST windows.
    """
    if duration <= window:
        return [(None, None)]
    spans = _joined(_divided(0.0, round(duration, 3), window, stride, path), times)
    return spans if len(spans) > 1 else [(None, None)]


def scenes(
    cuts: Sequence[float],
    times: Seconds,
    duration: float,
    window: float,
    stride: float,
    path: Path,
) -> list[Span]:
    """Return the scenes of a video; those longer than two windows are divided into windows.

    A scene shorter than SHORTEST_SCENE is joined to the next one, the last to the one before.

    cuts: seconds at which scenes begin, increasing. Other arguments are those of `windows`.
    """
    bounds = [0.0]
    for cut in cuts:
        if min(cut - bounds[-1], duration - cut) >= SHORTEST_SCENE:
            bounds.append(cut)
    found: list[Span] = []
    # A millisecond could be too coarse: the first frame after a cut belongs to one scene only.
    exact = [round(bound, 6) for bound in [*bounds, duration]]
    for first, last in itertools.pairwise(exact):
        if last - first > 2 * window:
            found += _joined(_divided(first, last, window, stride, path), times)
        else:
            found.append((first, last))
    return found if len(found) > 1 else [(None, None)]


def _divided(first: float, last: float, window: float, stride: float, path: Path) -> list[Span]:
    """Divide what is shown from `first` to `last`, which is longer than a window."""
    beyond = last - first - window
    if beyond / stride > MOST:
        raise DecodeError(
            path, f"its {last - first:.0f} s make more than {MOST} windows; give a longer stride"
        )
    steps = math.floor(beyond / stride + 1e-9)
    starts = [first, *(round(first + step * stride, 3) for step in range(1, steps + 1))]
    spans: list[Span] = [(start, round(start + window, 3)) for start in starts]
    if beyond - steps * stride < stride / 2:
        spans[-1] = (starts[-1], last)
    else:
        spans.append((round(last - window, 3), last))
    return spans


def _joined(spans: list[Span], times: Seconds) -> list[Span]:
    """Join spans in a row that show the same single frame, as in recordings of a still screen."""
    bounds = np.array(spans)
    first = np.searchsorted(times, bounds[:, 0] + 1e-6, side="right") - 1
    stop = np.searchsorted(times, bounds[:, 1] - 1e-6, side="left")
    single = np.where(stop - first <= 1, first, -1)
    same = (single[1:] == single[:-1]) & (single[1:] >= 0)
    found: list[Span] = []
    for span, joins in zip(spans, [False, *same.tolist()], strict=True):
        if joins:
            span = (found.pop()[0], span[1])
        found.append(span)
    return found


def find_cuts(path: Path, alive: Callable[[], None]) -> list[float]:
    """Decode a video and return the seconds at which new scenes begin, by PySceneDetect.

    alive: called every few frames. Raises DecodeError.
    """
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    # Which scenes are too short is decided by `scenes`, in seconds.
    detector, seconds, found = AdaptiveDetector(min_scene_len=1), [], []
    rate = 25.0  # only tells frames apart: their times are ours
    timecode: Any = FrameTimecode(0, rate)
    for number, (shown_at, pixels) in enumerate(decode_small(path, *SCENE_SIZE)):
        if number % TOLD == 0:
            alive()
        timecode = FrameTimecode(number, rate)
        seconds.append(shown_at)
        found += detector.process_frame(timecode, pixels)
    found += detector.post_process(timecode)
    return [seconds[cut.frame_num] for cut in found]
