"""Stamps of packets: when each is decoded (dts) and shown (pts), and what can be told from them."""

import re
from typing import Any, NamedTuple

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from clipvip.data.video.container import Video, holds_picture

SMALL = 64  # bytes of a packet that may hold no picture
NO_TIME = np.iinfo(np.int64).min
# Recordings and broadcasts: a jump ahead by more than this many seconds is a new start (ffmpeg's
# dts_delta_threshold), since no player waits for it.
DISCONTINUOUS, LONGEST_GAP = frozenset({"mpeg", "mpegts"}), 10.0
BACK = 1.0  # seconds
# MPEG-4's user data that marks packets of two frames each, followed by an empty one, as DivX and
# XviD made them for AVI.
PACKED = re.compile(rb"DivX\d+b(?:uild)?\d+p", re.IGNORECASE)


class Packets(NamedTuple):
    """Facts about packets, in decoding order, without their data.

    pts, dts, duration: int64 [P], in ticks; NO_TIME where a stamp is missing. keyframe, hidden,
    lost: bool [P]. hidden: gives no frame to show. lost: came damaged, or could not be decoded.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    duration: NDArray[np.int64]
    keyframe: NDArray[np.bool_]
    hidden: NDArray[np.bool_]
    lost: NDArray[np.bool_]

    @property
    def filled(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """pts and dts, where a missing dts is the pts and a missing pts is 0."""
        pts = np.where(self.pts == NO_TIME, 0, self.pts)
        return pts, np.where(self.dts == NO_TIME, pts, self.dts)


Stamp = tuple[int, int, int, bool, bool, bool]


def stamp_of(packet: Packet, stream: VideoStream) -> Stamp:
    """Return one packet's entries of Packets."""
    pts, dts = packet.pts, packet.dts
    hidden = packet.is_discard
    if stream.codec_context.name == "vp8":  # a bit says whether the frame is shown (RFC 6386, 9.1)
        hidden = hidden or not memoryview(packet)[0] & 0x10
    elif packet.size <= SMALL:
        hidden = hidden or not holds_picture(packet, stream)
    return (
        NO_TIME if pts is None else pts,
        NO_TIME if dts is None else dts,
        packet.duration or 0,
        packet.is_keyframe,
        hidden,
        packet.is_corrupt,
    )


def gathered(stamps: list[Stamp]) -> Packets:
    pts, dts, duration, keyframe, hidden, lost = np.array(stamps, np.int64).reshape(-1, 6).T
    return Packets(pts, dts, duration, keyframe != 0, hidden != 0, lost != 0)


# --- whether stamps can be trusted ----------------------------------------------------------


def may_be_dts(stream: VideoStream, packets: Packets) -> bool:
    """Return whether pts rise in decoding order although the codec may reorder frames. Then they
    may be dts, as in a file that keeps only those."""
    in_order = len(packets.pts) > 1 and (np.diff(packets.pts) >= 0).all()
    return bool(in_order and stream.codec_context.has_b_frames)


def tell_apart(video: Video, packets: Packets) -> bool:
    """Return whether each packet has a pts of its own, such that pts identify frames."""
    pts = packets.pts
    if video.format == "avi" or (pts == NO_TIME).any():
        return False
    if PACKED.search(video.stream.codec_context.extradata or b""):
        return False
    visible = np.sort(pts[~packets.hidden])
    return not (np.diff(visible) == 0).any() and not new_starts(video, packets).any()


def in_one_order(packets: Packets) -> bool:
    """Return whether all packets have a pts, all have a dts, or none has either."""
    return any((stamps != NO_TIME).all() for stamps in (packets.pts, packets.dts)) or bool(
        (packets.pts == NO_TIME).all() and (packets.dts == NO_TIME).all()
    )


def new_starts(video: Video, packets: Packets) -> NDArray[np.bool_]:
    """Return, for each packet, whether stamps start again there, as where files were joined.

    They do where time runs back by more than BACK seconds, or back to a keyframe that is shown
    before an earlier packet, or jumps ahead by more than LONGEST_GAP. Smaller steps back are
    inaccuracies of the program that wrote the file.
    """
    dts, known = packets.dts, packets.dts != NO_TIME
    starts, second = np.zeros(len(dts), np.bool_), 1 / float(video.stream.time_base or 1)
    step = np.diff(dts[known])
    latest = np.maximum.accumulate(packets.pts[known])[:-1]
    again = packets.keyframe[known][1:] & (packets.pts[known][1:] <= latest)
    starts[np.flatnonzero(known)[1:]] = ((step < 0) & again) | (step < -BACK * second)
    if video.format in DISCONTINUOUS:
        starts[np.flatnonzero(known)[1:]] |= step > LONGEST_GAP * second
    return starts


def made_up(video: Video, pts: NDArray[np.int64]) -> bool:
    """Return whether the pts of packets, in decoding order, are shifted dts. AVI keeps dts alone,
    from which libav makes pts where it detects reordering."""
    return video.format == "avi" and not (np.diff(pts) < 0).any()


# --- times ----------------------------------------------------------------------------------


def frame_time(stream: VideoStream) -> float:
    """Return the seconds per frame that the header states, else 1/25."""
    return float(1 / stream.average_rate) if stream.average_rate else 0.04


def spacing(times: NDArray[Any], stream: VideoStream) -> float:
    """Return the median of seconds between frames."""
    return float(np.median(np.diff(times))) if len(times) > 1 else frame_time(stream)


def evened(
    stamps: NDArray[np.int64], stream: VideoStream, tick: float
) -> tuple[NDArray[np.float64], int]:
    """Return seconds from the first stamp to each, and the first stamp.

    stamps: in increasing order. A missing (NO_TIME) or repeated stamp gets a time between its
    neighbours'; at the ends, one by the frame rate. tick: seconds per tick.
    """
    highest = np.maximum.accumulate(stamps)
    places = np.flatnonzero(highest > np.append(NO_TIME, highest[:-1]))
    every = np.arange(len(stamps), dtype=np.float64)
    if not len(places):
        return every * frame_time(stream), 0
    times = np.interp(every, places, (stamps[places] - stamps[places[0]]) * tick)
    times += np.minimum(every - places[0], 0) * frame_time(stream)
    times += np.maximum(every - places[-1], 0) * frame_time(stream)
    return times - times[0], int(stamps[places[0]])
