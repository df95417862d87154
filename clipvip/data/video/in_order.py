"""Frames of a file in order, from its start, with the packets that they come from."""

from collections.abc import Iterator

import av
from av.packet import Packet
from av.video.frame import VideoFrame

from clipvip.data.video.container import Video, demux, holds_picture
from clipvip.data.video.stamps import (
    LONGEST_GAP,
    NO_TIME,
    Packets,
    Stamp,
    frame_time,
    gathered,
    stamp_of,
)


class InOrder:
    """Every frame of a file, from its start, in the order of showing, each with the number of its
    packet in decoding order. A packet that cannot be decoded is skipped, as players do.

    lost: numbers of packets that came damaged or could not be decoded. doubtful: numbers of packets
    whose frames the decoder marks as corrupt. keys: numbers of packets that are keyframes, by the
    container or by the decoder. seconds: length of what was fed so far, without jumps. unstamped:
    whether no packet so far had a dts.
    """

    def __init__(self, video: Video) -> None:
        self.video = video
        self.lost: set[int] = set()
        self.doubtful: set[int] = set()
        self.keys: set[int] = set()
        self.error: av.FFmpegError | None = None
        self.stopped = False
        self.seconds = 0.0
        self.unstamped = True
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
        for packet in self._packets():
            number = len(self._stamps)
            self._note(packet, number)
            packet.pts = number  # the decoder gives it back with the frame
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if holds_picture(packet, self.video.stream):
                    self.error = error
                    self.lost.add(number)
                continue
            yield from map(self._numbered, frames)  # type: ignore[arg-type]
        try:
            frames = self.video.stream.codec_context.decode(None)
        except av.FFmpegError as error:
            self.error = error
            return
        yield from map(self._numbered, frames)  # type: ignore[arg-type]

    def _packets(self) -> Iterator[Packet]:
        try:
            for packet in demux(self.video):
                if self.stopped:
                    return
                if packet.size:  # an empty one would end the decoding
                    yield packet
        except av.FFmpegError as error:  # the packets that follow cannot be found
            self.error = error

    def _note(self, packet: Packet, number: int) -> None:
        """Record what is known of a packet before it is decoded."""
        stream = self.video.stream
        stamp = stamp_of(packet, stream)
        if packet.is_corrupt:
            self.lost.add(number)
        if packet.is_keyframe:
            self.keys.add(number)
        self.unstamped &= stamp[1] == NO_TIME
        step = -1.0
        if self._stamps and NO_TIME not in (stamp[1], self._stamps[-1][1]):
            step = (stamp[1] - self._stamps[-1][1]) * float(stream.time_base or 0)
        # A jump to where stamps start again is no passing of time.
        self.seconds += step if 0 <= step <= LONGEST_GAP else frame_time(stream)
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
