"""Choice of a clip's frames, given the times at which they are shown.

A sampling is a string, so that a configuration can hold it:

- `"uniform"`: num_frames over the whole clip, first and last frame included. In training both
  ends move inwards by up to one interval (arXiv 2209.06430, section 4.1).
- `"authors"`: uniform by frame number instead of time, as in the authors' code: numbers evenly
  spaced, rounded down. In training both ends move by whole frames.
- `"fps:R"`: R frames per second. A clip too short for num_frames gives fewer; one that would give
  more than num_frames is sampled uniformly instead.
- `"clip:R"`: num_frames at R per second from one place of the clip: a random place in training,
  else the middle. Past the clip's end the last frame is repeated.

Except with "authors", each wanted time takes the frame nearest to it. So varying frame rates need
no special case, nor do clips with fewer frames than wanted, whose frames repeat.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TIE = 1e-6  # seconds; a time half way between two frames takes the later one


class Choice(NamedTuple):
    """Positions of the frames to take from a list of frames.

    frames: integers [N]. middle: the clip's middle frame; None unless asked for.
    """

    frames: NDArray[Any]
    middle: int | None = None

    @property
    def positions(self) -> NDArray[Any]:
        """All positions in one array, the middle frame's last: [N] or [N + 1]."""
        if self.middle is None:
            return self.frames
        return np.append(self.frames, np.array(self.middle, self.frames.dtype))

    def split(self, pixels: Any) -> tuple[Any, Any]:
        """Split what belongs to `positions`, [N] or [N + 1], into that of `frames`, [N], and that
        of `middle`, or None."""
        count = len(self.frames)
        return pixels[:count], None if self.middle is None else pixels[count]


def check_sampling(sampling: str) -> tuple[str, float]:
    """Return ("uniform" | "authors" | "fps" | "clip", frames per second). Raises ValueError."""
    kind, _, rate = sampling.partition(":")
    try:
        value = float(rate) if rate else 0.0
    except ValueError:
        value = -1.0
    known = not rate if kind in ("uniform", "authors") else kind in ("fps", "clip") and value > 0
    if not known or not math.isfinite(value):
        raise ValueError(
            f"sampling is {sampling!r}; expected 'uniform', 'authors', 'fps:R' or 'clip:R'"
        )
    return kind, value


def choose_frames(
    times: NDArray[np.float64],
    num_frames: int,
    sampling: str = "uniform",
    generator: np.random.Generator | None = None,
) -> NDArray[np.int64]:
    """Return the indices of the frames to take, not decreasing.

    times: [n], n ≥ 1, seconds, increasing. num_frames: at least 1. generator: moves the places at
    random, for training.
    Returns [num_frames]; with "fps:R" there may be fewer, but at least one.
    """
    kind, rate = check_sampling(sampling)
    if kind == "authors":
        return _by_number(len(times), num_frames, generator)
    first, last = float(times[0]), float(times[-1])
    if kind == "fps":
        count = math.floor((last - first) * rate + TIE) + 1
        if count < num_frames:
            slack = last - first - (count - 1) / rate
            offset = generator.uniform(0.0, max(slack, 0.0)) if generator else 0.0
            return nearest(times, first + offset + np.arange(count) / rate)
    elif kind == "clip":
        slack = max(last - first - (num_frames - 1) / rate, 0.0)
        offset = generator.uniform(0.0, slack) if generator else slack / 2
        return nearest(times, first + offset + np.arange(num_frames) / rate)
    return nearest(times, _uniform(first, last, num_frames, generator))


def middle_frame(times: NDArray[np.float64], sampling: str = "uniform") -> int:
    """Return the index of the frame nearest to the middle of the clip; with "authors", the middle
    number."""
    if sampling == "authors":
        return len(times) // 2
    return int(nearest(times, np.array([(times[0] + times[-1]) / 2]))[0])


def nearest(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return, for each wanted time, the index of the nearest of `times` (increasing)."""
    boundaries = (times[1:] + times[:-1]) / 2
    return np.searchsorted(boundaries, wanted + TIE, side="right").astype(np.int64)


def _uniform(
    first: float, last: float, num_frames: int, generator: np.random.Generator | None
) -> NDArray[np.float64]:
    if num_frames == 1:
        return np.array([generator.uniform(first, last) if generator else (first + last) / 2])
    if generator:
        # With two frames, by up to half the clip each, so that the ends cannot cross.
        interval = (last - first) / max(num_frames - 1, 2)
        first, last = first + generator.uniform(0, interval), last - generator.uniform(0, interval)
    return np.linspace(first, last, num_frames)


def _by_number(
    count: int, num_frames: int, generator: np.random.Generator | None
) -> NDArray[np.int64]:
    """Choose frames as the authors do: numbers evenly spaced, rounded down."""
    first, last = 0, count - 1
    if generator:
        interval = count // max(num_frames - 1, 1)
        start = int(generator.integers(0, interval, endpoint=True))
        end = int(generator.integers(last - interval, last, endpoint=True))
        # With few frames in the clip, or few wanted, the ends may leave the clip or cross.
        first, last = sorted((min(start, last), max(end, 0)))
    return np.linspace(first, last, num_frames).astype(np.int64)
