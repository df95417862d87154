"""The index of a video by its packets' stamps, from an MP4's tables or the packets themselves.

Stamps may be missing, start again in the middle, be those of decoding, or belong to packets that
give no frame. Where they leave a doubt, all frames are decoded instead.
"""

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipvip.data.video.container import (
    MP4,
    SEEKABLE,
    DecodeError,
    File,
    Unseekable,
    Video,
    demux,
    open_file,
    packets_from,
)
from clipvip.data.video.frame_index import Index, Trust, check_whole, first_pts, stretches
from clipvip.data.video.in_order import InOrder
from clipvip.data.video.index_by_decoding import index_by_decoding
from clipvip.data.video.mp4 import composition_offsets
from clipvip.data.video.stamps import (
    NO_TIME,
    Packets,
    evened,
    gathered,
    in_one_order,
    made_up,
    may_be_dts,
    new_starts,
    spacing,
    stamp_of,
    tell_apart,
)

KEYFRAME = 1  # the flag of an entry of libav's index
BEGINNING = 20.0  # seconds of a file that tell whether its pts may be dts


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
    if may_be_dts(stream, packets) or not tell_apart(video, packets):
        return None
    packets = _without_lost_leaders(packets, video.file, None)
    index = _by_pts(video, packets)
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
        packets, whole = _packets_from_first(video.file, end)
    doubt = may_be_dts(video.stream, packets)
    if doubt and start and video.format in SEEKABLE:  # a part may have no B-frames
        doubt = may_be_dts(video.stream, _packets_from_first(video.file, BEGINNING)[0])
    if not doubt and tell_apart(video, packets):
        index = _by_pts(video, _without_lost_leaders(packets, video.file, start))
    elif new_starts(video, packets).any() or not in_one_order(packets):
        return index_by_decoding(video.file, end)
    else:
        if start:  # frames are counted from the first
            packets, whole = _packets_from_first(video.file, end)
        index = _by_count(video, packets)
    if whole:
        check_whole(video, packets, index.duration)
    return index


def _is_edited(video: Video) -> bool:
    """Return whether an MP4's edit lists leave samples out, or show them in another order. Seeking
    then does not lead where times say."""
    if video.format != MP4:
        return False
    entries = getattr(video.stream, "index_entries", None) or ()
    return any(entry.flags & ~KEYFRAME for entry in entries)


# --- reading packets ------------------------------------------------------------------------


def _packets(video: Video, start: float | None, end: float | None) -> tuple[Packets, bool]:
    """Return packets in decoding order, and whether they reach to the end of the file.

    Of a part of a video only that part is read, where the format is in SEEKABLE.
    """
    last, stream = math.inf, video.stream
    if video.format in SEEKABLE and stream.start_time is not None and stream.time_base:
        head = next(demux(video), None) if start else None
        if head is not None and (head.pts is None or head.pts < stream.start_time):
            raise Unseekable(video.path, "its first stamps are missing")
        last = math.inf if end is None else stream.start_time + end / float(stream.time_base)
    whole, found = True, []
    for packet in packets_from(video, start):
        dts = packet.dts
        if packet.size:
            found.append(stamp_of(packet, stream))
        if dts is not None and dts > last:
            whole = False
            break
    return gathered(found), whole


def _packets_from_first(file: File, end: float | None) -> tuple[Packets, bool]:
    with open_file(file) as video:
        return _packets(video, None, end)


def _without_lost_leaders(packets: Packets, file: File, start: float | None) -> Packets:
    """Hide the packets shown before the first keyframe that refer to earlier, missing frames.

    They cannot be decoded. Others, as in a closed group of pictures, can; decoding tells which.
    """
    leading = ~packets.hidden
    if packets.keyframe.any():
        key = int(packets.keyframe.argmax())
        leading &= packets.pts < packets.pts[key]
        leading[:key] = ~packets.hidden[:key]
    if not packets.keyframe.any() or not leading.any():
        return packets
    come_out: set[int] = set()
    # Where a part begins with a keyframe, packets shown before it do not belong to the part.
    if not start or key:
        with open_file(file) as video:
            reader = InOrder(video)
            for number, _ in reader:
                if number == key:
                    break
                come_out.add(number)
            come_out -= reader.lost | reader.doubtful
    lost = [number for number in np.flatnonzero(leading).tolist() if number not in come_out]
    hidden = packets.hidden.copy()
    hidden[lost] = True
    return packets._replace(hidden=hidden)


# --- from packets to an index ---------------------------------------------------------------


def _by_pts(video: Video, packets: Packets) -> Index:
    """Return the index of packets whose pts identify their frames."""
    visible = packets.pts[~packets.hidden]
    if not len(visible):
        raise DecodeError(video.path, "no frames in it")
    shown = np.sort(visible)
    zero = first_pts(video, shown)
    times = (shown - zero) * video.tick
    last = packets.duration[~packets.hidden][visible.argmax()]
    duration = float(times[-1] + last * video.tick)
    return _index(video, packets, shown, times, duration, zero=zero)


def _by_count(video: Video, packets: Packets) -> Index:
    """Return the index of packets that give a frame each, in an order that their stamps do not
    tell: the n-th frame shown gets the n-th of all times."""
    visible = ~packets.hidden
    if not visible.any():
        raise DecodeError(video.path, "no frames in it")
    pts, dts = packets.pts[visible], packets.dts[visible]
    by_dts = (made_up(video, pts) or NO_TIME in pts) and NO_TIME not in dts
    times, zero = evened(np.sort(dts if by_dts else pts), video.stream, video.tick)
    duration = float(times[-1] + spacing(times, video.stream))
    return _index(video, packets, np.arange(len(times)), times, duration, zero=zero, by_count=True)


def _index(
    video: Video,
    packets: Packets,
    shown: NDArray[np.int64],
    times: NDArray[Any],
    duration: float,
    *,
    zero: int,
    by_count: bool = False,
) -> Index:
    """Return an index; zero: the stamp at time 0."""
    pts, dts = packets.filled
    lost = stretches((dts[packets.lost] - zero) * video.tick)
    return Index(pts, dts, packets.keyframe, shown, times, duration, by_count, Trust.PACKETS, lost)
