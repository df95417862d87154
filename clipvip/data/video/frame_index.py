"""The index of a video: its packets, which frames it shows, and when.

An index has one of three sources, each slower and more reliable than the one before: an MP4's
tables and the stamps of packets (index_by_packets.py), and decoding every frame
(index_by_decoding.py). known_index.py chooses among them.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from clipvip.data.video.container import (
    MATROSKA,
    MP4,
    SEEKABLE,
    DecodeError,
    Video,
    open_file,
)
from clipvip.data.video.mp4 import is_whole_in_fragments
from clipvip.data.video.stamps import NO_TIME, Packets

# Seconds and share of a video that may be missing before it counts as cut off.
MISSING_END = (1.0, 0.05)
OWN_LENGTHS = frozenset({MP4, "avi", MATROSKA})  # formats that state each stream's own length


class Trust(IntEnum):
    """The source of an index, the most reliable last."""

    TABLES = 0
    PACKETS = 1
    DECODER = 2


@dataclass(frozen=True, slots=True)
class Index:
    """The packets of a video, or of a part, and its frames.

    pts, dts, keyframe: of packets, in decoding order; ticks. times: seconds from the video's first
    frame to each frame, in the order of showing. shown: how the decoder's frames are identified, in
    the order of showing: by their pts or, with by_count, where pts do not tell frames apart, by
    their count 0, 1, 2, … duration: seconds from the first frame to the end of the last. lost:
    stretches of damaged packets, in seconds. damaged: whether each frame is damaged; None where not
    all were decoded.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    keyframe: NDArray[np.bool_]
    shown: NDArray[np.int64]
    times: NDArray[np.float64]
    duration: float
    by_count: bool
    trust: Trust
    lost: tuple[tuple[float, float], ...] = ()
    damaged: NDArray[np.bool_] | None = None

    @property
    def bytes(self) -> int:
        arrays = (self.pts, self.dts, self.keyframe, self.shown, self.times)
        return 1024 + sum(array.nbytes for array in arrays)  # 1024 for the objects themselves

    def keyframes_for(self, wanted: list[int]) -> list[int]:
        """Return, for each pts, the position of the last keyframe shown at or before it."""
        keys = np.flatnonzero(self.keyframe)
        keys = keys[np.argsort(self.pts[keys])]
        found = np.searchsorted(self.pts[keys], wanted, side="right") - 1
        return [int(keys[position]) if position >= 0 else 0 for position in found]


def window_of(
    times: NDArray[np.float64], start: float | None, end: float | None, path: Path
) -> slice:
    """Return the range of frames shown in [start, end). Raises DecodeError where it is empty."""
    first = 0 if start is None else int(np.searchsorted(times, start + 1e-6, side="right")) - 1
    first = max(first, 0)
    if start is not None and len(times) > 1 and start > 2 * times[-1] - times[-2]:
        raise DecodeError(path, f"start {start:g} s lies after its end ({times[-1]:.2f} s)")
    stop = len(times) if end is None else int(np.searchsorted(times, end - 1e-6, side="left"))
    return slice(first, max(stop, first + 1))


# --- shared by the sources ------------------------------------------------------------------


def first_pts(video: Video, shown: NDArray[np.int64]) -> int:
    """Return the pts of the file's first frame, also where only a later part was read.

    shown: pts of the frames that were read, increasing.
    """
    start = video.stream.start_time  # libav may make one up while it reads, which may be later
    if video.format in SEEKABLE and start is not None and start <= shown[0]:
        return start
    return int(shown[0])


def stretches(seconds: NDArray[Any]) -> tuple[tuple[float, float], ...]:
    """Return (first, last) of each group of seconds that lie within a second of each other."""
    if not len(seconds):
        return ()
    seconds = np.sort(seconds)
    parts = np.split(seconds, np.flatnonzero(np.diff(seconds) > 1.0) + 1)
    return tuple((float(part[0]), float(part[-1])) for part in parts)


def check_whole(video: Video, packets: Packets, duration: float) -> None:
    """Raise DecodeError where the packets end well before the length that the header states.

    duration: seconds that the frames last.
    """
    claimed = _stated_length(video)
    seconds_allowed, share_allowed = MISSING_END
    allowed = claimed - max(seconds_allowed, share_allowed * claimed)
    # Some headers state the time from the first stamp to the end, others the stamp at the end.
    stamps = np.where(packets.pts == NO_TIME, packets.dts, packets.pts)
    last = float((stamps + packets.duration).max(initial=0)) * video.tick
    if max(duration, last) >= allowed:
        return
    if video.format == MP4:
        with video.file.binary() as opened:
            # A segment of a longer video, whose header states the length of all, as in DASH.
            if is_whole_in_fragments(opened):
                return
    sound = video.format not in OWN_LENGTHS and len(video.container.streams) > 1
    if sound and _last_of_all_streams(video) >= allowed:  # the length may be that of the sound
        return
    raise DecodeError(video.path, f"cut off: frames end at {duration:.1f} s of {claimed:.1f} s")


def _stated_length(video: Video) -> float:
    """Return the seconds that the header states for the video stream; 0 where it states none."""
    stream, container = video.stream, video.container
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # Other formats may have the tag from a file that was copied.
    tag = re.match(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    if video.format == MATROSKA and tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return 0.0


def _last_of_all_streams(video: Video) -> float:
    """Return the seconds at which the last packet of any stream ends."""
    with open_file(video.file) as again:
        ends = [
            float((packet.dts + (packet.duration or 0)) * packet.time_base)
            for packet in again.container.demux()
            if packet.dts is not None and packet.time_base is not None
        ]
    return max(ends, default=0.0)
