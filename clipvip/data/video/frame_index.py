"""The index of a video: its packets, which frames it shows, and when.

An index is made from an MP4's tables, from the stamps of packets (known_index.py) or by decoding
every frame (in_order.py), each slower and more reliable than the one before. A packet's stamps say
when it is decoded (dts) and shown (pts); below is what can be told from them.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from clipvip.data.video.container import MATROSKA, MP4, DecodeError, Video, holds_picture
from clipvip.data.video.mp4 import is_whole_in_fragments

SMALL = 64  # bytes of a packet that may hold no picture
NO_TIME = np.iinfo(np.int64).min
# Recordings and broadcasts: a jump ahead by more than this many seconds is a new start (ffmpeg's
# dts_delta_threshold), since no player waits for it.
DISCONTINUOUS, LONGEST_GAP = frozenset({"mpeg", "mpegts"}), 10.0
BACK = 1.0  # seconds
# MPEG-4's user data that marks packets of two frames each, followed by an empty one, as DivX and
# XviD made them for AVI.
PACKED = re.compile(rb"DivX\d+b(?:uild)?\d+p", re.IGNORECASE)
# Seconds and share of a video that may be missing before it counts as cut off.
MISSING_END = (1.0, 0.05)
OWN_LENGTHS = frozenset({MP4, "avi", MATROSKA})  # formats that state each stream's own length

Integers = NDArray[np.int64]
Seconds = NDArray[Any]  # float64
Flags = NDArray[np.bool_]


class Trust(IntEnum):
    """The source of an index, the most reliable last."""

    TABLES = 0
    PACKETS = 1
    DECODER = 2


@dataclass(frozen=True, slots=True)
class Index:
    """The packets of a video, or of a part, in decoding order, and its frames, in that of showing.

    The decoder's frames are identified by their pts or, with by_count, where pts do not tell them
    apart, by their count 0, 1, 2, …
    """

    pts: Integers  # of packets, in ticks
    dts: Integers
    keyframe: Flags
    shown: Integers  # by what each frame is identified
    times: Seconds  # from the video's first frame to each
    duration: float  # seconds from the first frame to the end of the last
    by_count: bool
    trust: Trust
    lost: tuple[tuple[float, float], ...] = ()  # stretches of damaged packets, in seconds
    damaged: Flags | None = None  # whether each frame is; None where not all were decoded

    @property
    def bytes(self) -> int:
        arrays = (self.pts, self.dts, self.keyframe, self.shown, self.times)
        return 1024 + sum(array.nbytes for array in arrays)  # 1024 for the objects themselves

    @property
    def damage(self) -> str | None:
        """Describe the stretches that are lost; None where there are none."""
        if not self.lost:
            return None
        stretches = ", ".join(f"{first:.1f}–{last:.1f} s" for first, last in self.lost[:5])
        return f"damaged at {stretches}" + ", …" * (len(self.lost) > 5)

    def keyframes_for(self, wanted: list[int]) -> list[int]:
        """Return, for each pts, the position of the last keyframe shown at or before it."""
        keys = np.flatnonzero(self.keyframe)
        keys = keys[np.argsort(self.pts[keys])]
        found = np.searchsorted(self.pts[keys], wanted, side="right") - 1
        return [int(keys[position]) if position >= 0 else 0 for position in found]


def window_of(times: Seconds, start: float | None, end: float | None, path: Path) -> slice:
    """Return the range of frames shown in [start, end). Raises DecodeError where it is empty."""
    first = 0 if start is None else int(np.searchsorted(times, start + 1e-6, side="right")) - 1
    first = max(first, 0)
    if start is not None and len(times) > 1 and start > 2 * times[-1] - times[-2]:
        raise DecodeError(path, f"start {start:g} s lies after its end ({times[-1]:.2f} s)")
    stop = len(times) if end is None else int(np.searchsorted(times, end - 1e-6, side="left"))
    return slice(first, max(stop, first + 1))


# --- packets and their stamps ---------------------------------------------------------------

Stamp = tuple[int, int, int, bool, bool, bool]  # one packet's entries of Packets


def stamp_of(packet: Packet, stream: VideoStream) -> Stamp:
    hidden = packet.is_discard
    if stream.codec_context.name == "vp8":  # a bit says whether the frame is shown (RFC 6386, 9.1)
        hidden = hidden or not memoryview(packet)[0] & 0x10
    elif packet.size <= SMALL:
        hidden = hidden or not holds_picture(packet, stream)
    pts, dts = (NO_TIME if stamp is None else stamp for stamp in (packet.pts, packet.dts))
    return pts, dts, packet.duration or 0, packet.is_keyframe, hidden, packet.is_corrupt


class Packets(NamedTuple):
    """Facts about packets, in decoding order, without their data: each an array [P]."""

    pts: Integers  # in ticks; NO_TIME where a stamp is missing
    dts: Integers
    duration: Integers
    keyframe: Flags
    hidden: Flags  # gives no frame to show
    lost: Flags  # came damaged, or could not be decoded

    @classmethod
    def of(cls, stamps: list[Stamp]) -> "Packets":
        pts, dts, duration, *flags = np.array(stamps, np.int64).reshape(-1, 6).T
        return cls(pts, dts, duration, *(flag != 0 for flag in flags))

    @property
    def filled(self) -> tuple[Integers, Integers]:
        """pts and dts, where a missing dts is the pts and a missing pts is 0."""
        pts = np.where(self.pts == NO_TIME, 0, self.pts)
        return pts, np.where(self.dts == NO_TIME, pts, self.dts)

    def may_be_dts(self, stream: VideoStream) -> bool:
        """Return whether pts rise in decoding order although the codec may reorder frames. Then
        they may be dts, as in a file that keeps only those."""
        in_order = len(self.pts) > 1 and (np.diff(self.pts) >= 0).all()
        return bool(in_order and stream.codec_context.has_b_frames)

    def tell_apart(self, video: Video) -> bool:
        """Return whether each packet has a pts of its own, such that pts identify frames."""
        if video.format == "avi" or (self.pts == NO_TIME).any():
            return False
        if PACKED.search(video.stream.codec_context.extradata or b""):
            return False
        visible = np.sort(self.pts[~self.hidden])
        return not (np.diff(visible) == 0).any() and not self.new_starts(video).any()

    def in_one_order(self) -> bool:
        """Return whether all packets have a pts, all have a dts, or none has either."""
        pts, dts = self.pts != NO_TIME, self.dts != NO_TIME
        return bool(pts.all() or dts.all() or not (pts.any() or dts.any()))

    def new_starts(self, video: Video) -> Flags:
        """Return, for each packet, whether stamps start again there, as where files were joined.

        They do where time runs back by more than BACK seconds, or back to a keyframe that is shown
        before an earlier packet, or jumps ahead by more than LONGEST_GAP. Smaller steps back are
        inaccuracies of the program that wrote the file.
        """
        known, second = self.dts != NO_TIME, 1 / video.tick  # a second in ticks
        step = np.diff(self.dts[known])
        latest = np.maximum.accumulate(self.pts[known])[:-1]
        again = self.keyframe[known][1:] & (self.pts[known][1:] <= latest)
        new = ((step < 0) & again) | (step < -BACK * second)
        if video.format in DISCONTINUOUS:
            new |= step > LONGEST_GAP * second
        starts = np.zeros(len(known), np.bool_)
        starts[np.flatnonzero(known)[1:]] = new
        return starts


def made_up(video: Video, pts: Integers) -> bool:
    """Return whether the pts of packets, in decoding order, are shifted dts. AVI keeps dts alone,
    from which libav makes pts where it detects reordering."""
    return video.format == "avi" and not (np.diff(pts) < 0).any()


def spacing(times: Seconds, video: Video) -> float:
    """Return the median of seconds between frames."""
    return float(np.median(np.diff(times))) if len(times) > 1 else video.frame_time


def evened(stamps: Integers, video: Video) -> tuple[Seconds, int]:
    """Return seconds from the first stamp to each, and the first stamp.

    stamps: in increasing order. A missing (NO_TIME) or repeated stamp gets a time between its
    neighbours'; at the ends, one by the frame rate.
    """
    highest = np.maximum.accumulate(stamps)
    places = np.flatnonzero(highest > np.append(NO_TIME, highest[:-1]))
    every = np.arange(len(stamps), dtype=np.float64)
    if not len(places):
        return every * video.frame_time, 0
    times = np.interp(every, places, (stamps[places] - stamps[places[0]]) * video.tick)
    times += np.minimum(every - places[0], 0) * video.frame_time
    times += np.maximum(every - places[-1], 0) * video.frame_time
    return times - times[0], int(stamps[places[0]])


def first_pts(video: Video, shown: Integers) -> int:
    """Return the pts of the file's first frame, also where only a later part was read. shown: pts
    of the frames that were read, increasing."""
    start = video.stream.start_time  # libav may make one up while it reads, which may be later
    if video.seekable and start is not None and start <= shown[0]:
        return start
    return int(shown[0])


def stretches(seconds: Seconds) -> tuple[tuple[float, float], ...]:
    """Return (first, last) of each group of seconds that lie within a second of each other."""
    seconds = np.sort(seconds)
    parts = np.split(seconds, np.flatnonzero(np.diff(seconds) > 1.0) + 1)
    return tuple((float(part[0]), float(part[-1])) for part in parts if len(part))


def check_whole(video: Video, packets: Packets, duration: float) -> None:
    """Raise DecodeError where the packets end well before the length that the header states.
    duration: seconds that the frames last."""
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
    with video.reopened() as again:
        ends = [
            float((packet.dts + (packet.duration or 0)) * packet.time_base)
            for packet in again.container.demux()
            if packet.dts is not None and packet.time_base is not None
        ]
    return max(ends, default=0.0)
