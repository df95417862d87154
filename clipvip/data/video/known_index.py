"""Obtaining the index of a video's frames: kept from before, or from the file.

An MP4's tables are the fastest source, then the stamps of packets. Stamps may be missing, start
again in the middle, be those of decoding, or belong to packets that give no frame. Where they leave
a doubt, all frames are decoded instead (in_order.py).
"""

import math
import os
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from typing import Any

import av
import numpy as np

from clipvip.data.video.container import MATROSKA, MP4, DecodeError, Unseekable, Video
from clipvip.data.video.frame_index import (
    NO_TIME,
    Index,
    Packets,
    Trust,
    check_whole,
    evened,
    first_pts,
    made_up,
    spacing,
    stamp_of,
    stretches,
)
from clipvip.data.video.in_order import InOrder, index_by_decoding
from clipvip.data.video.mp4 import composition_offsets

MOST_KNOWN = 1 << 26  # bytes of indices that a process keeps: some 7,000 videos of ten seconds
KEYFRAME = 1  # the flag of an entry of libav's index
BEGINNING = 20.0  # seconds of a file that tell whether its pts may be dts


class _Known:
    """The indices that this process keeps: at most MOST_KNOWN bytes, the last used at the end."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Any, ...], Index] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple[Any, ...]) -> Index | None:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def keep(self, key: tuple[Any, ...], index: Index) -> None:
        with self.lock:
            if key in self.kept:
                self.bytes -= self.kept.pop(key).bytes
            self.kept[key] = index
            self.bytes += index.bytes
            while self.bytes > MOST_KNOWN:
                self.bytes -= self.kept.popitem(last=False)[1].bytes


_known = _Known()
# Another thread may hold the lock while the process forks; nobody would release the copy.
os.register_at_fork(after_in_child=lambda: setattr(_known, "lock", threading.Lock()))


def known_index(
    video: Video, start: float | None = None, end: float | None = None, trust: Trust = Trust.TABLES
) -> Index:
    """Return the index of the frames shown in [start, end), at least as reliable as `trust`. It is
    kept for later epochs, for as long as the file stays unchanged."""
    if video.file.data is not None:
        return _read(video, start, end, trust)
    status = os.stat(video.path)
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    key = (str(video.path), *identity, start, end)
    index = _known.get(key)
    if index is None or index.trust < trust:
        index = _read(video, start, end, trust)
        # In other formats libav seeks well only once it has read through the file.
        if video.seekable or index.by_count or index.trust is Trust.DECODER:
            _known.keep(key, index)
    return index


def _read(video: Video, start: float | None, end: float | None, trust: Trust) -> Index:
    of_all = start is None and end is None  # of a part, packets are read
    if trust is Trust.TABLES and of_all and (index := index_by_tables(video)) is not None:
        return index
    if trust <= Trust.PACKETS:
        with suppress(av.FFmpegError):  # where reading stops midway, earlier frames can be decoded
            if video.format != MATROSKA or video.file.data is not None:
                return index_by_packets(video, start, end)
            # Where a seek leads depends on what its container has read. Later reads find the index
            # kept and seek in a container that has read nothing, so this read does too.
            with video.reopened() as again:
                return index_by_packets(again, start, end)
    return index_by_decoding(video, end)


# --- from tables and packets ----------------------------------------------------------------


def index_by_tables(video: Video) -> Index | None:
    """Return the index of an MP4 by its tables, without reading packets; None where they leave a
    doubt. Each packet is compared with the index when it is decoded."""
    stream = video.stream
    entries = getattr(stream, "index_entries", None)  # PyAV 17 and newer
    if not entries or video.format != MP4 or stream.start_time is None:
        return None
    with video.file.binary() as opened:
        offsets = composition_offsets(opened, stream.id, len(entries))
        length = opened.seek(0, os.SEEK_END)
    if offsets is None:
        return None
    found = [(e.timestamp, e.flags, e.size, e.pos + e.size) for e in entries]
    dts, flags, size, stop = np.array(found, np.int64).T
    if (flags & ~KEYFRAME).any() or not size.all() or (stop > length).any():
        return None
    pts = dts + offsets if len(offsets) else dts
    pts = pts - pts.min() + stream.start_time
    duration = np.diff(dts, append=2 * dts[-1] - dts[max(len(dts) - 2, 0)])
    nothing = np.zeros(len(dts), np.bool_)
    packets = Packets(pts, dts, duration, flags != 0, nothing, nothing)
    if packets.may_be_dts(stream) or not packets.tell_apart(video):
        return None
    packets = _without_lost_leaders(packets, video, None)
    index = _index(video, packets)
    check_whole(video, packets, index.duration)
    return replace(index, trust=Trust.TABLES)


def index_by_packets(video: Video, start: float | None = None, end: float | None = None) -> Index:
    """Return the index of the frames shown in [start, end) seconds, or of all, by the stamps of
    packets; by decoding where those leave a doubt."""
    if (start is not None or end is not None) and _is_edited(video):
        start = end = None
    try:
        packets, whole = _packets(video, start, end)
    except Unseekable:
        start = None
        packets, whole = _packets_from_first(video, end)
    doubt = packets.may_be_dts(video.stream)
    if doubt and start and video.seekable:  # a part may have no B-frames
        doubt = _packets_from_first(video, BEGINNING)[0].may_be_dts(video.stream)
    if not doubt and packets.tell_apart(video):
        index = _index(video, _without_lost_leaders(packets, video, start))
    elif packets.new_starts(video).any() or not packets.in_one_order():
        return index_by_decoding(video, end)
    else:
        if start:  # frames are counted from the first
            packets, whole = _packets_from_first(video, end)
        index = _index(video, packets, by_count=True)
    if whole:
        check_whole(video, packets, index.duration)
    return index


def _is_edited(video: Video) -> bool:
    """Return whether an MP4's edit lists leave samples out, or show them in another order. Seeking
    then does not lead where times say."""
    entries = getattr(video.stream, "index_entries", None) or ()
    return video.format == MP4 and any(entry.flags & ~KEYFRAME for entry in entries)


def _packets(video: Video, start: float | None, end: float | None) -> tuple[Packets, bool]:
    """Return packets in decoding order, and whether they reach to the end of the file. Where it
    is seekable, only the part from `start` to `end` is read."""
    last, stream = math.inf, video.stream
    if video.seekable and stream.start_time is not None:
        head = next(video.packets(), None) if start else None
        if head is not None and (head.pts is None or head.pts < stream.start_time):
            raise Unseekable(video.path, "its first stamps are missing")
        last = math.inf if end is None else stream.start_time + end / video.tick
    whole, found = True, []
    for packet in video.packets_from(start):
        dts = packet.dts
        if packet.size:
            found.append(stamp_of(packet, stream))
        if dts is not None and dts > last:
            whole = False
            break
    return Packets.of(found), whole


def _packets_from_first(video: Video, end: float | None) -> tuple[Packets, bool]:
    with video.reopened() as again:
        return _packets(again, None, end)


def _without_lost_leaders(packets: Packets, video: Video, start: float | None) -> Packets:
    """Hide the packets shown before the first keyframe that cannot be decoded, since they refer to
    missing frames. Others, as in a closed group of pictures, can; decoding tells which."""
    if not packets.keyframe.any():
        return packets
    key = int(packets.keyframe.argmax())
    leading = ~packets.hidden & (packets.pts < packets.pts[key])
    leading[:key] = ~packets.hidden[:key]
    if not leading.any():
        return packets
    come_out: set[int] = set()
    # Where a part begins with a keyframe, packets shown before it do not belong to the part.
    if not start or key:
        with video.reopened() as again:
            reader = InOrder(again)
            for number, _ in reader:
                if number == key:
                    break
                come_out.add(number)
            come_out -= reader.lost | reader.doubtful
    lost = [number for number in np.flatnonzero(leading).tolist() if number not in come_out]
    hidden = packets.hidden.copy()
    hidden[lost] = True
    return packets._replace(hidden=hidden)


def _index(video: Video, packets: Packets, *, by_count: bool = False) -> Index:
    """Return the index of packets whose pts identify their frames.

    by_count: they give a frame each, in an order that their stamps do not tell; the n-th frame
    shown gets the n-th of all times.
    """
    visible = ~packets.hidden
    if not visible.any():
        raise DecodeError(video.path, "no frames in it")
    pts, dts = packets.pts[visible], packets.dts[visible]
    if by_count:
        by_dts = (made_up(video, pts) or NO_TIME in pts) and NO_TIME not in dts
        times, zero = evened(np.sort(dts if by_dts else pts), video)
        shown, last = np.arange(len(times)), spacing(times, video)
    else:
        shown = np.sort(pts)
        zero = first_pts(video, shown)
        times = (shown - zero) * video.tick
        last = packets.duration[visible][pts.argmax()] * video.tick
    duration = float(times[-1] + last)
    pts, dts = packets.filled
    lost = stretches((dts[packets.lost] - zero) * video.tick)
    return Index(pts, dts, packets.keyframe, shown, times, duration, by_count, Trust.PACKETS, lost)
