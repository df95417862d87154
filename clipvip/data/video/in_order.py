"""Packets as a file holds them, and frames as a decoder gives them, in order."""

from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from clipvip.data.video.container import demux, holds_picture

SMALL = 64  # bytes of a packet that may hold no picture
NO_TIME = np.iinfo(np.int64).min
# Recordings and broadcasts: a jump ahead by more than this many seconds is a new start (ffmpeg's
# dts_delta_threshold), since no player waits for it.
DISCONTINUOUS, LONGEST_GAP = frozenset({"mpeg", "mpegts"}), 10.0


class Packets(NamedTuple):
    """Facts about packets, in decoding order, without their data. NO_TIME: no stamp.

    hidden: gives no frame to show. lost: came damaged, or could not be decoded.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    duration: NDArray[np.int64]
    keyframe: NDArray[np.bool_]
    hidden: NDArray[np.bool_]
    lost: NDArray[np.bool_]


Stamp = tuple[int, int, int, bool, bool, bool]


def stamp_of(packet: Packet, stream: VideoStream) -> Stamp:
    """One packet's entries in Packets."""
    pts, dts = packet.pts, packet.dts
    hidden = packet.is_discard
    if stream.codec_context.name == "vp8":  # what is decoded but not shown says so (RFC 6386, 9.1)
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


def frame_time(stream: VideoStream) -> float:
    return float(1 / stream.average_rate) if stream.average_rate else 0.04


class InOrder:
    """Every frame of a file, from its start, in the order of showing, with the number of its packet
    in decoding order. A packet that cannot be decoded is skipped, as players do.

    lost: numbers of packets that came damaged or could not be decoded. doubtful: numbers of packets
    whose frames the decoder marks as corrupt. keys: numbers of packets that are keyframes, by the
    container or by the decoder.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container = container
        self.stream = stream
        self.lost: set[int] = set()
        self.doubtful: set[int] = set()
        self.keys: set[int] = set()
        self.error: av.FFmpegError | None = None
        self.stopped = False
        self.seconds = 0.0  # fed so far, without leaps
        self.unstamped = True  # all of them
        self._stamps: list[Stamp] = []

    def stop(self) -> None:
        """Feed no more packets; only frames that wait in the decoder follow."""
        self.stopped = True

    @property
    def packets(self) -> Packets:
        """The packets fed so far."""
        return gathered(self._stamps)

    def pts(self, number: int) -> int:
        return self._stamps[number][0]

    def __iter__(self) -> Iterator[tuple[int, VideoFrame]]:
        for packet in self._fed():
            number = len(self._stamps)
            self._feed(packet, number)
            packet.pts = number  # comes out with the frame, whatever stamps the file has
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if holds_picture(packet, self.stream):
                    self.error = error
                    self.lost.add(number)
                continue
            yield from map(self._numbered, frames)  # type: ignore[arg-type]
        try:
            frames = self.stream.codec_context.decode(None)
        except av.FFmpegError as error:
            self.error = error
            return
        yield from map(self._numbered, frames)  # type: ignore[arg-type]

    def _fed(self) -> Iterator[Packet]:
        try:
            for packet in demux(self.container, self.stream):
                if self.stopped:
                    return
                if packet.size:  # an empty one would end the decoding
                    yield packet
        except av.FFmpegError as error:  # what follows cannot be found
            self.error = error

    def _feed(self, packet: Packet, number: int) -> None:
        stamp = stamp_of(packet, self.stream)
        if packet.is_corrupt:
            self.lost.add(number)
        if packet.is_keyframe:
            self.keys.add(number)
        self.unstamped &= stamp[1] == NO_TIME
        step = -1.0
        if self._stamps and NO_TIME not in (stamp[1], self._stamps[-1][1]):
            step = (stamp[1] - self._stamps[-1][1]) * float(self.stream.time_base or 0)
        # Where a leap leads to stamps that start anew, no time passes.
        self.seconds += step if 0 <= step <= LONGEST_GAP else frame_time(self.stream)
        self._stamps.append(stamp)

    def _numbered(self, frame: VideoFrame) -> tuple[int, VideoFrame]:
        number = len(self._stamps) - 1 if frame.pts is None else frame.pts
        pts = self._stamps[number][0]
        frame.pts = None if pts == NO_TIME else pts
        if frame.key_frame:
            self.keys.add(number)
        if frame.is_corrupt:
            self.doubtful.add(number)
        return number, frame
