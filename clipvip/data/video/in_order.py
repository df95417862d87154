"""Decoding every frame of a file in order, from its start, and the index made of what comes out."""

from collections.abc import Iterator
from contextlib import suppress

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame

from clipvip.data.video.container import DecodeError, Video, holds_picture
from clipvip.data.video.frame_index import (
    LONGEST_GAP,
    MISSING_END,
    NO_TIME,
    Flags,
    Index,
    Integers,
    Packets,
    Seconds,
    Stamp,
    Trust,
    check_whole,
    evened,
    first_pts,
    made_up,
    spacing,
    stamp_of,
    stretches,
)

MARGIN = 1.0  # seconds decoded past the end of a part, for frames that come out of order
FEW = 2  # damaged frames in a row that their neighbours can replace


class InOrder:
    """Every frame of a file, from its start, in the order of showing, each with the number of its
    packet in decoding order. A packet that cannot be decoded is skipped, as players do."""

    def __init__(self, video: Video) -> None:
        self.video = video
        # Numbers of packets:
        self.lost: set[int] = set()  # that came damaged or could not be decoded
        self.doubtful: set[int] = set()  # whose frames the decoder marks as corrupt
        self.keys: set[int] = set()  # that are keyframes, by the container or by the decoder
        self.error: av.FFmpegError | None = None
        self.stopped = False  # when set, no more packets are fed; frames in the decoder follow
        self.seconds = 0.0  # length of what was fed so far, without jumps
        self.unstamped = True  # no packet so far had a dts
        self._stamps: list[Stamp] = []

    @property
    def packets(self) -> Packets:
        """The packets fed so far."""
        return Packets.of(self._stamps)

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
            for packet in self.video.packets():
                if self.stopped:
                    return
                if packet.size:  # an empty one would end the decoding
                    yield packet
        except av.FFmpegError as error:  # the packets that follow cannot be found
            self.error = error

    def _note(self, packet: Packet, number: int) -> None:
        """Record what is known of a packet before it is decoded."""
        stamp = stamp_of(packet, self.video.stream)
        if packet.is_corrupt:
            self.lost.add(number)
        if packet.is_keyframe:
            self.keys.add(number)
        self.unstamped &= stamp[1] == NO_TIME
        step = -1.0
        if self._stamps and NO_TIME not in (stamp[1], self._stamps[-1][1]):
            step = (stamp[1] - self._stamps[-1][1]) * self.video.tick
        # A jump to where stamps start again is no passing of time.
        self.seconds += step if 0 <= step <= LONGEST_GAP else self.video.frame_time
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


# --- the index ------------------------------------------------------------------------------


def index_by_decoding(video: Video, end: float | None) -> Index:
    """Return the index of the frames that decoding gives, at least those before `end` seconds."""
    with video.reopened() as video:
        reader = InOrder(video)
        numbers = _decoded(reader, end)
        packets = reader.packets
        starts = packets.new_starts(video)
        shown, times, by_count = _timeline(reader, numbers, starts)
        between = spacing(times, video)
        duration = float(times[-1]) + between
        if not reader.stopped and not starts.any():
            check_whole(video, Packets._make(each[numbers] for each in packets), duration)
        from_first = by_count or not video.seekable
    lost, head = _lost(reader, numbers, starts)
    damaged = _damaged(numbers, lost, np.array(sorted(reader.keys), np.int64))
    kept = _kept(numbers, times, damaged, head, between)
    order = np.argsort(numbers, kind="stable")
    holes = stretches(np.interp(lost, numbers[order], times[order]))
    shown, times, damaged = shown[kept], times[kept], damaged[kept]
    times = times - times[0] if from_first else times
    pts, dts = packets.filled
    return Index(
        pts, dts, packets.keyframe, shown, times, duration, by_count, Trust.DECODER, holes, damaged
    )


def _decoded(reader: InOrder, end: float | None) -> Integers:
    """Decode frames in order, at least those before `end` seconds, and return the numbers of their
    packets. Raises DecodeError where there is none."""
    found = []
    for number, _ in reader:
        found.append(number)
        # Packets without stamps tell no time: each may hold only half a frame.
        past = len(found) * reader.video.frame_time if reader.unstamped else reader.seconds
        if end is not None and past > end + MARGIN:
            reader.stopped = True
    if not found:
        reason = "no frame could be decoded"
        error = reader.error and reader.error.strerror
        raise DecodeError(reader.video.path, f"{reason} ({error})" if error else reason)
    return np.array(found, np.int64)


def _timeline(reader: InOrder, numbers: Integers, starts: Flags) -> tuple[Integers, Seconds, bool]:
    """Return how frames are identified (their pts or their count), their times in seconds, and
    whether it is by count.

    numbers: the frames' packets, in the order of showing. starts: see Packets.new_starts.
    """
    video, packets = reader.video, reader.packets
    pts = packets.pts[numbers]
    rising = (pts != NO_TIME).all() and (np.diff(pts) > 0).all()
    # Other files may be joined: a jump to where stamps start again is no passing of time.
    joined = not video.seekable and starts.any()
    if rising and not joined and not made_up(video, packets.pts[np.sort(numbers)]):
        times = (pts - first_pts(video, pts)) * video.tick
        if _all_packets(reader).tell_apart(video):
            return pts, times, False
    else:
        times = _stitched(video, packets, numbers, starts)
    return np.arange(len(numbers)), times, True


def _all_packets(reader: InOrder) -> Packets:
    """Return all packets that a seek may lead to. Where files were joined, packets that were not
    decoded may have the stamps of others that were."""
    if reader.stopped and not reader.video.seekable:
        with suppress(av.FFmpegError), reader.video.reopened() as video:
            return Packets.of([stamp_of(p, video.stream) for p in video.packets() if p.size])
    return reader.packets


def _stitched(video: Video, packets: Packets, numbers: Integers, starts: Flags) -> Seconds:
    """Return seconds from the first frame to each, in the order of showing, where stamps start
    again in between, are those of decoding, or are missing."""
    part_of = np.maximum.accumulate(np.cumsum(starts)[numbers])
    parts, offset = [], 0.0
    for part in np.unique(part_of):
        mine = numbers[part_of == part]
        pts, dts = packets.pts[mine], packets.dts[mine]
        known = pts[pts != NO_TIME]
        rising = len(known) and (np.diff(known) > 0).all()
        if rising and not made_up(video, packets.pts[np.sort(mine)]):
            stamps = pts
        else:
            stamps = np.sort(pts if NO_TIME in dts else dts)
        times, _ = evened(stamps, video)
        parts.append(times + offset)
        offset = float(parts[-1][-1]) + spacing(times, video)
    return np.concatenate(parts)


def _lost(reader: InOrder, numbers: Integers, starts: Flags) -> tuple[Integers, int]:
    """Return the numbers of lost packets, sorted, and how many frames at the beginning refer to
    missing ones."""
    # At a joint libav misses the packet that would have followed, and marks one of the last two
    # packets before it as corrupt. That is no damage.
    lost = {number for number in reader.lost if not starts[number + 1 : number + 3].any()}
    doubtful = np.isin(numbers, list(reader.doubtful))
    head = 0
    # The decoder marks nearly all frames of some encoders' files as corrupt. There it is ignored.
    if 2 * doubtful.sum() < len(numbers):
        # A recording that starts anywhere begins with frames that refer to missing ones.
        head = int(doubtful.argmin())
        lost |= set(numbers[head:][doubtful[head:]].tolist())
    return np.array(sorted(lost), np.int64), head


def _damaged(numbers: Integers, lost: Integers, keys: Integers) -> Flags:
    """Return, for the frame of each packet in `numbers`, whether it is lost or may refer to a lost
    one: to any since the keyframe before it or, where it is shown before that keyframe, since the
    keyframe before that."""
    shown_at = dict(zip(numbers.tolist(), range(len(numbers)), strict=True))
    late = np.array([shown_at.get(key, -1) for key in keys.tolist()], np.int64)
    before = np.searchsorted(keys, numbers, side="right") - 1
    leading = (before > 0) & (np.append(late, 0)[before] > np.arange(len(numbers)))
    first = np.append(keys, 0)[before - leading]
    return np.searchsorted(lost, first) < np.searchsorted(lost, numbers, side="right")


def _kept(numbers: Integers, times: Seconds, damaged: Flags, head: int, between: float) -> Flags:
    """Return which frames the index lists: all, if none is whole; else all except for damaged ones
    that nobody misses, at the beginning, at the end, or between whole frames.

    head: frames at the beginning that are left out in any case. between: seconds between frames.
    """
    whole = int(damaged.argmin())
    if times[whole] - times[0] < MISSING_END[0]:
        head = max(head, whole)
    # At the end at most as much is left out as may be missing.
    duration = float(times[-1]) + between
    tail = damaged & (numbers > numbers[~damaged].max(initial=-1))
    tail &= times > duration - max(MISSING_END[0], MISSING_END[1] * duration)
    alone = _alone(damaged, times, between)
    kept = (np.arange(len(numbers)) >= head) & ~tail & ~alone
    return kept | (not kept.any())


def _alone(damaged: Flags, times: Seconds, between: float) -> Flags:
    """Return which damaged frames their neighbours can replace in any sampling: those between
    undamaged frames that lie as close as if FEW were missing between them."""
    (whole,) = np.nonzero(~damaged)
    after = np.searchsorted(whole, np.arange(len(damaged)))
    inside = (after > 0) & (after < len(whole))
    gap = np.diff(times[whole], prepend=0, append=0)[after]
    return damaged & inside & (gap < (FEW + 1.5) * between)
