"""Which frames a video has and when each is shown.

There are three sources, each slower and more reliable than the one before: an MP4's tables, the
packets' stamps, and decoding everything in order. Decoding compares its frames with the index, and
where they differ asks for a more reliable one (`Trust`): a file's stamps may be missing, start
again in the middle, be those of decoding, or belong to packets that give no frame.
"""

import math
import os
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from clipvip.data.video.container import (
    MATROSKA,
    MP4,
    SEEKABLE,
    DecodeError,
    File,
    Unseekable,
    demux,
    open_container,
    packets_from,
    video_stream,
)
from clipvip.data.video.in_order import (
    DISCONTINUOUS,
    LONGEST_GAP,
    NO_TIME,
    InOrder,
    Packets,
    frame_time,
    gathered,
    stamp_of,
)
from clipvip.data.video.mp4 import composition_offsets, is_whole_in_fragments

KEYFRAME = 1  # the flag of an entry of libav's index
MOST_KNOWN = 1 << 26  # bytes of files' indices that a process keeps: some 7,000 of ten seconds
MISSING_END = (
    1.0,
    0.05,
)  # seconds and share of a video that may be missing before it counts as cut off
FEW = 2  # damaged frames in a row that their neighbours stand in for
BEGINNING = 20.0  # seconds of a file that tell whether its stamps are those of showing
BACK = 1.0  # seconds
MARGIN = 1.0  # seconds decoded past the end of a part, for frames that come out of order
OWN_LENGTHS = frozenset({MP4, "avi", MATROSKA})  # that give each stream's own length
# How MPEG-4's user data says that packets hold two frames each and the next none, as DivX and XviD
# made them for AVI.
PACKED = re.compile(rb"DivX\d+b(?:uild)?\d+p", re.IGNORECASE)


class Trust(IntEnum):
    """The source of an index, the most reliable last."""

    TABLES = 0
    PACKETS = 1
    DECODER = 2


class IndexWrong(Exception):
    """An index does not agree with what the decoder gives."""


@dataclass(frozen=True, slots=True)
class Index:
    """The packets of a video, and its frames.

    In decoding order: pts and dts of packets in ticks, keyframe. In the order of showing: `times`
    of frames in seconds from the video's first, and `shown`, which identifies the decoder's frames:
    their pts, or, with `by_count`, where pts do not tell frames apart, 0, 1, 2, … as they come out
    of it. lost: stretches, in seconds, of damaged packets. damaged: for each frame whether it is;
    None where not all were decoded.
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
        return 1024 + sum(array.nbytes for array in arrays)  # and the objects themselves

    def keyframes_for(self, wanted: list[int]) -> list[int]:
        """Return, for each pts, the position of the last keyframe shown at or before it."""
        keys = np.flatnonzero(self.keyframe)
        keys = keys[np.argsort(self.pts[keys])]
        found = np.searchsorted(self.pts[keys], wanted, side="right") - 1
        return [int(keys[position]) if position >= 0 else 0 for position in found]


# --- cache ----------------------------------------------------------------------------------


class _Known:
    """Indices that this process keeps: MOST_KNOWN bytes of them, the last used at the end."""

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
# Another thread may hold the lock while the process forks; nobody would free the copy.
os.register_at_fork(after_in_child=lambda: setattr(_known, "lock", threading.Lock()))


def known_index(
    container: InputContainer,
    stream: VideoStream,
    file: File,
    start: float | None = None,
    end: float | None = None,
    *,
    trust: Trust = Trust.TABLES,
) -> Index:
    """Return the index of what is shown in [start, end), at least as reliable as `trust`. It is
    kept for later epochs, while the file stays as it is."""
    if file.data is not None:
        return _read(container, stream, file, start, end, trust)
    status = os.stat(file.path)
    identity = (str(file.path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    key = (*identity, start, end)
    index = _known.get(key)
    if index is None or index.trust < trust:
        index = _read(container, stream, file, start, end, trust)
        # In other formats libav seeks well only after it has read through the file.
        if container.format.name in SEEKABLE or index.by_count or index.trust is Trust.DECODER:
            _known.keep(key, index)
    return index


def _read(
    container: InputContainer,
    stream: VideoStream,
    file: File,
    start: float | None,
    end: float | None,
    trust: Trust,
) -> Index:
    if trust is Trust.TABLES and start is None and end is None:  # a part's packets are read
        index = _index_of_tables(container, stream, file)
        if index is not None:
            return index
    if trust <= Trust.PACKETS:
        with suppress(av.FFmpegError):  # midway: what comes before it can still be decoded
            if container.format.name != MATROSKA or file.data is not None:
                return read_index(container, stream, file, start, end)
            # Where seeks lead depends on what a container has read. Later reads, which know the
            # index, seek in a new one; so does this.
            with open_container(file) as own:
                return read_index(own, video_stream(own, file.path), file, start, end)
    return _index_by_decoding(file, end)


# --- by tables and packets ------------------------------------------------------------------


def _index_of_tables(container: InputContainer, stream: VideoStream, file: File) -> Index | None:
    """All packets of an MP4 file, without reading them; None where its tables leave a doubt.

    Each packet is compared with them when it is decoded.
    """
    entries = getattr(stream, "index_entries", None)  # PyAV 17 and newer
    if not entries or container.format.name != MP4 or stream.start_time is None:
        return None
    with file.binary() as source:
        offsets = composition_offsets(source, stream.id, len(entries))
        length = source.seek(0, os.SEEK_END)
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
    if _may_be_dts(stream, packets) or not _tell_apart(container, stream, packets):
        return None
    packets = _without_lost_leaders(packets, file, None)
    index = _by_stamps(container, stream, packets, file.path)
    _check_whole(container, stream, packets, index.duration, file)
    return replace(index, trust=Trust.TABLES)


def read_index(
    container: InputContainer,
    stream: VideoStream,
    file: File,
    start: float | None = None,
    end: float | None = None,
) -> Index:
    """The frames shown in [start, end) seconds, or all of them, by the stamps of their packets;
    by decoding where those leave a doubt."""
    if (start is not None or end is not None) and _is_edited(container, stream):
        start = end = None
    try:
        packets, whole = _packets(container, stream, start, end)
    except Unseekable:
        start = None
        packets, whole = _packets_from_first(file, end)
    doubt = _may_be_dts(stream, packets)
    if doubt and start and container.format.name in SEEKABLE:  # a part may have no B-frames
        doubt = _may_be_dts(stream, _packets_from_first(file, BEGINNING)[0])
    if not doubt and _tell_apart(container, stream, packets):
        index = _by_stamps(
            container, stream, _without_lost_leaders(packets, file, start), file.path
        )
    elif _starts(container, stream, packets).any() or not _one_order(packets):
        return _index_by_decoding(file, end)
    else:
        if start:  # frames are counted from the first
            packets, whole = _packets_from_first(file, end)
        index = _by_count(container, stream, packets, file.path)
    if whole:
        _check_whole(container, stream, packets, index.duration, file)
    return index


def _without_lost_leaders(packets: Packets, file: File, start: float | None) -> Packets:
    """Hide the packets shown before the first keyframe that refer to what came before it: they
    cannot be decoded. Decoding tells them from others, as in a closed group of pictures."""
    leading = ~packets.hidden
    if packets.keyframe.any():
        key = int(packets.keyframe.argmax())
        leading &= packets.pts < packets.pts[key]
        leading[:key] = ~packets.hidden[:key]
    if not packets.keyframe.any() or not leading.any():
        return packets
    come_out: set[int] = set()
    if not start or key:  # where the first packet is a keyframe, what leads it is before the part
        with open_container(file) as container:
            reader = InOrder(container, video_stream(container, file.path))
            for number, _ in reader:
                if number == key:
                    break
                come_out.add(number)
            come_out -= reader.lost | reader.doubtful
    lost = [number for number in np.flatnonzero(leading).tolist() if number not in come_out]
    hidden = packets.hidden.copy()
    hidden[lost] = True
    return packets._replace(hidden=hidden)


def _is_edited(container: InputContainer, stream: VideoStream) -> bool:
    """Return whether an MP4's edit lists leave samples out, or show them in another order: seeking
    then does not lead where times say."""
    if container.format.name != MP4:
        return False
    entries = getattr(stream, "index_entries", None) or ()
    return any(entry.flags & ~KEYFRAME for entry in entries)


def _may_be_dts(stream: VideoStream, packets: Packets) -> bool:
    """Return whether pts are in decoding order although frames need not be, as where a file keeps
    only dts."""
    in_order = len(packets.pts) > 1 and (np.diff(packets.pts) >= 0).all()
    return bool(in_order and stream.codec_context.has_b_frames)


def _tell_apart(container: InputContainer, stream: VideoStream, packets: Packets) -> bool:
    """Return whether each packet has a pts of its own, so that pts identify frames."""
    pts = packets.pts
    if container.format.name == "avi" or (pts == NO_TIME).any():
        return False
    if PACKED.search(stream.codec_context.extradata or b""):
        return False
    visible = np.sort(pts[~packets.hidden])
    return not (np.diff(visible) == 0).any() and not _starts(container, stream, packets).any()


def _one_order(packets: Packets) -> bool:
    """Return whether all packets have a pts, all have a dts, or none has either."""
    return any((stamps != NO_TIME).all() for stamps in (packets.pts, packets.dts)) or bool(
        (packets.pts == NO_TIME).all() and (packets.dts == NO_TIME).all()
    )


def _starts(container: InputContainer, stream: VideoStream, packets: Packets) -> NDArray[np.bool_]:
    """Return, for each packet, whether stamps start anew there: time runs back by more than BACK
    seconds, or to a keyframe that is shown before what came before it; or leaps ahead by more than
    players wait. Smaller steps back are inaccuracies of the program that wrote the file."""
    dts, known = packets.dts, packets.dts != NO_TIME
    starts, second = np.zeros(len(dts), np.bool_), 1 / float(stream.time_base or 1)
    step = np.diff(dts[known])
    latest = np.maximum.accumulate(packets.pts[known])[:-1]
    again = packets.keyframe[known][1:] & (packets.pts[known][1:] <= latest)
    starts[np.flatnonzero(known)[1:]] = ((step < 0) & again) | (step < -BACK * second)
    if container.format.name in DISCONTINUOUS:
        starts[np.flatnonzero(known)[1:]] |= step > LONGEST_GAP * second
    return starts


def _by_stamps(
    container: InputContainer, stream: VideoStream, packets: Packets, path: Path
) -> Index:
    """Return the index of packets whose pts identify their frames."""
    tick = _tick(stream, path)
    visible = packets.pts[~packets.hidden]
    if not len(visible):
        raise DecodeError(path, "no frames in it")
    shown = np.sort(visible)
    zero = _zero(container, stream, shown)
    times = (shown - zero) * tick
    last = packets.duration[~packets.hidden][visible.argmax()]
    return _index(packets, shown, times, float(times[-1] + last * tick), False, tick, zero)


def _zero(container: InputContainer, stream: VideoStream, shown: NDArray[np.int64]) -> int:
    """Return the pts of the file's first frame, also where only a later part was read."""
    start = stream.start_time  # one that libav makes up while it reads may be later
    if container.format.name in SEEKABLE and start is not None and start <= shown[0]:
        return start
    return int(shown[0])


def _by_count(
    container: InputContainer, stream: VideoStream, packets: Packets, path: Path
) -> Index:
    """Return the index of packets that give a frame each, in an order that their stamps do not
    tell: the n-th frame shown has the n-th of all times."""
    tick, visible = _tick(stream, path), ~packets.hidden
    if not visible.any():
        raise DecodeError(path, "no frames in it")
    pts, dts = packets.pts[visible], packets.dts[visible]
    by_dts = (_made_up(container, pts) or NO_TIME in pts) and NO_TIME not in dts
    stamps = dts if by_dts else pts
    times, zero = _evened(np.sort(stamps), stream, tick)
    return _index(
        packets, np.arange(len(times)), times, times[-1] + _spacing(times, stream), True, tick, zero
    )


def _made_up(container: InputContainer, pts: NDArray[np.int64]) -> bool:
    """Return whether the pts of packets, in decoding order, are shifted dts: AVI keeps dts alone,
    and libav makes pts of them where it sees reordering."""
    return container.format.name == "avi" and not (np.diff(pts) < 0).any()


def _evened(
    stamps: NDArray[np.int64], stream: VideoStream, tick: float
) -> tuple[NDArray[np.float64], int]:
    """Return seconds from the first of stamps that do not fall, and that first one. Where one is
    missing (NO_TIME) or repeated, its time lies between its neighbours', at the ends by the frame
    rate."""
    highest = np.maximum.accumulate(stamps)
    places = np.flatnonzero(highest > np.append(NO_TIME, highest[:-1]))
    every = np.arange(len(stamps), dtype=np.float64)
    if not len(places):
        return every * frame_time(stream), 0
    times = np.interp(every, places, (stamps[places] - stamps[places[0]]) * tick)
    times += np.minimum(every - places[0], 0) * frame_time(stream)
    times += np.maximum(every - places[-1], 0) * frame_time(stream)
    return times - times[0], int(stamps[places[0]])


def _spacing(times: NDArray[Any], stream: VideoStream) -> float:
    """Return the median of seconds between frames."""
    return float(np.median(np.diff(times))) if len(times) > 1 else frame_time(stream)


def _tick(stream: VideoStream, path: Path) -> float:
    if stream.time_base is None:
        raise DecodeError(path, "no time base in it")
    return float(stream.time_base)


def _index(
    packets: Packets,
    shown: NDArray[np.int64],
    times: NDArray[Any],
    duration: float,
    by_count: bool,
    tick: float,
    zero: int,
) -> Index:
    pts = np.where(packets.pts == NO_TIME, 0, packets.pts)
    dts = np.where(packets.dts == NO_TIME, pts, packets.dts)
    return Index(
        pts=pts,
        dts=dts,
        keyframe=packets.keyframe,
        shown=shown,
        times=times.astype(np.float64),
        duration=float(duration),
        by_count=by_count,
        trust=Trust.PACKETS,
        lost=_stretches((dts[packets.lost] - zero) * tick),
    )


def _stretches(seconds: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Return (first, last) of each group of seconds that lie within a second of each other."""
    if not len(seconds):
        return ()
    seconds = np.sort(seconds)
    parts = np.split(seconds, np.flatnonzero(np.diff(seconds) > 1.0) + 1)
    return tuple((float(part[0]), float(part[-1])) for part in parts)


def _packets(
    container: InputContainer,
    stream: VideoStream,
    start: float | None,
    end: float | None,
) -> tuple[Packets, bool]:
    """Return packets in decoding order, and whether they reach to the end of the file.

    For a part of a video only that part is read, where the format is good at seeking.
    """
    last = math.inf
    if container.format.name in SEEKABLE and stream.start_time is not None and stream.time_base:
        head = next(demux(container, stream), None) if start else None
        if head is not None and (head.pts is None or head.pts < stream.start_time):
            raise Unseekable(container.name, "its first stamps are missing")
        last = math.inf if end is None else stream.start_time + end / float(stream.time_base)
    whole, found = True, []
    for packet in packets_from(container, stream, start):
        dts = packet.dts
        if packet.size:
            found.append(stamp_of(packet, stream))
        if dts is not None and dts > last:
            whole = False
            break
    return gathered(found), whole


def _packets_from_first(file: File, end: float | None) -> tuple[Packets, bool]:
    with open_container(file) as container:
        return _packets(container, video_stream(container, file.path), None, end)


def _check_whole(
    container: InputContainer, stream: VideoStream, packets: Packets, duration: float, file: File
) -> None:
    """Raise DecodeError where the packets end well before the length that the header claims."""
    claimed = 0.0
    if stream.duration is not None and stream.time_base is not None:
        claimed = float(stream.duration * stream.time_base)
    elif container.format.name == MATROSKA and (  # others may have it from a file they copy
        tag := re.match(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    ):
        claimed = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    elif container.duration is not None and len(container.streams) == 1:
        claimed = container.duration / av.time_base
    seconds_allowed, share_allowed = MISSING_END
    allowed = claimed - max(seconds_allowed, share_allowed * claimed)
    # Some give the time from the first stamp to the end, others the stamp at the end.
    stamps = np.where(packets.pts == NO_TIME, packets.dts, packets.pts)
    last = float((stamps + packets.duration).max(initial=0)) * _tick(stream, file.path)
    if max(duration, last) >= allowed:
        return
    if container.format.name == MP4:
        with file.binary() as source:
            if is_whole_in_fragments(source):  # a part of what its head speaks of, as in DASH
                return
    if container.format.name not in OWN_LENGTHS and len(container.streams) > 1:
        # The claimed length may be that of the sound.
        with open_container(file) as again:
            ends = [
                float((packet.dts + (packet.duration or 0)) * packet.time_base)
                for packet in again.demux()
                if packet.dts is not None and packet.time_base is not None
            ]
        if max(ends, default=0.0) >= allowed:
            return
    raise DecodeError(file.path, f"cut off: frames end at {duration:.1f} s of {claimed:.1f} s")


def window_of(
    times: NDArray[np.float64], start: float | None, end: float | None, path: Path
) -> slice:
    """The frames shown during [start, end)."""
    first = 0 if start is None else int(np.searchsorted(times, start + 1e-6, side="right")) - 1
    first = max(first, 0)
    if start is not None and len(times) > 1 and start > 2 * times[-1] - times[-2]:
        raise DecodeError(path, f"start {start:g} s lies after its end ({times[-1]:.2f} s)")
    stop = len(times) if end is None else int(np.searchsorted(times, end - 1e-6, side="left"))
    return slice(first, max(stop, first + 1))


# --- by decoding ----------------------------------------------------------------------------


def _index_by_decoding(file: File, end: float | None) -> Index:
    """Return the index of the frames that decoding gives, at least those before `end` seconds."""
    with open_container(file) as container:
        stream = video_stream(container, file.path)
        reader, found = InOrder(container, stream), []
        for number, _ in reader:
            found.append(number)
            # Without stamps packets tell nothing: each may hold only half a frame.
            past = len(found) * frame_time(stream) if reader.unstamped else reader.seconds
            if end is not None and past > end + MARGIN:
                reader.stop()
        if not found:
            reason = "no frame could be decoded"
            error = reader.error and reader.error.strerror
            raise DecodeError(file.path, f"{reason} ({error})" if error else reason)
        packets, tick = reader.packets, _tick(stream, file.path)
        numbers = np.array(found, np.int64)
        pts, starts = packets.pts[numbers], _starts(container, stream, packets)
        in_order = (pts != NO_TIME).all() and (np.diff(pts) > 0).all()
        by_count = not _tell_apart(container, stream, _all_packets(container, reader, file))
        seekable = container.format.name in SEEKABLE
        made_up = _made_up(container, packets.pts[np.sort(numbers)])
        # Other files may be joined: a leap to where stamps start anew is none of time.
        if in_order and not made_up and (seekable or not starts.any()):
            times = (pts - _zero(container, stream, pts)) * tick
        else:
            by_count = True
            times = _stitched(numbers, packets, starts, container, stream)
        shown_by = np.arange(len(numbers)) if by_count else pts
        duration = float(times[-1]) + _spacing(times, stream)
        if not reader.stopped and not starts.any():
            shown = Packets._make(each[numbers] for each in packets)
            _check_whole(container, stream, shown, duration, file)
    # At a joint libav misses what would have followed, and marks one of the last two packets before
    # it as corrupt: that is no damage.
    lost = {number for number in reader.lost if not starts[number + 1 : number + 3].any()}
    doubtful = np.isin(numbers, list(reader.doubtful))
    head = 0
    # The decoder marks nearly all frames of some encoders' files as corrupt: there it is ignored.
    if 2 * doubtful.sum() < len(found):
        # A recording that starts anywhere begins with frames that refer to missing ones.
        head = int(doubtful.argmin())
        lost |= set(numbers[head:][doubtful[head:]].tolist())
    missing = np.array(sorted(lost), np.int64)
    damaged = _damaged(numbers, missing, np.array(sorted(reader.keys), np.int64))
    whole = int(damaged.argmin())
    if times[whole] - times[0] < MISSING_END[0]:
        head = max(head, whole)
    # Damage at the end is left out where no more is damaged than may be missing.
    tail = damaged & (numbers > numbers[~damaged].max(initial=-1))
    tail &= times > duration - max(MISSING_END[0], MISSING_END[1] * duration)
    alone = _alone(damaged, times, _spacing(times, stream))
    kept = (np.arange(len(numbers)) >= head) & ~tail & ~alone
    kept |= not kept.any()
    order = np.argsort(numbers, kind="stable")
    index = _index(packets, shown_by[kept], times[kept], duration, by_count, tick, 0)
    return replace(
        index,
        times=index.times - (index.times[0] if by_count or not seekable else 0.0),
        trust=Trust.DECODER,
        lost=_stretches(np.interp(missing, numbers[order], times[order])),
        damaged=damaged[kept],
    )


def _all_packets(container: InputContainer, reader: InOrder, file: File) -> Packets:
    """Return all packets that a seek may lead to: where files were joined, some that were not
    decoded may have the stamps of others that were."""
    if reader.stopped and container.format.name not in SEEKABLE:
        with suppress(av.FFmpegError):
            return _packets_from_first(file, None)[0]
    return reader.packets


def _alone(damaged: NDArray[np.bool_], times: NDArray[Any], spacing: float) -> NDArray[np.bool_]:
    """Return which damaged frames their neighbours in the order of showing can replace in any
    sampling: those where undamaged frames lie as close as if FEW were gone between them."""
    (whole,) = np.nonzero(~damaged)
    after = np.searchsorted(whole, np.arange(len(damaged)))
    between = (after > 0) & (after < len(whole))
    gap = np.diff(times[whole], prepend=0, append=0)[after]
    return damaged & between & (gap < (FEW + 1.5) * spacing)


def _damaged(
    numbers: NDArray[np.int64], lost: NDArray[np.int64], keys: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return whether the frame of each packet, in the order of showing, is lost or may refer to a
    lost one: to any since the keyframe before it, or, where it is shown before that keyframe, since
    the one before."""
    shown_at = dict(zip(numbers.tolist(), range(len(numbers)), strict=True))
    late = np.array([shown_at.get(key, -1) for key in keys.tolist()], np.int64)
    before = np.searchsorted(keys, numbers, side="right") - 1
    leading = (before > 0) & (np.append(late, 0)[before] > np.arange(len(numbers)))
    first = np.append(keys, 0)[before - leading]
    return np.searchsorted(lost, first) < np.searchsorted(lost, numbers, side="right")


def _stitched(
    numbers: NDArray[np.int64],
    packets: Packets,
    starts: NDArray[np.bool_],
    container: InputContainer,
    stream: VideoStream,
) -> NDArray[np.float64]:
    """Return seconds from the first of these packets' frames, in the order of showing, where stamps
    start anew in between, are those of decoding, or are missing."""
    part_of = np.maximum.accumulate(np.cumsum(starts)[numbers])
    parts, offset = [], 0.0
    for part in np.unique(part_of):
        mine = numbers[part_of == part]
        pts, dts = packets.pts[mine], packets.dts[mine]
        known = pts[pts != NO_TIME]
        rising = len(known) and (np.diff(known) > 0).all()
        if rising and not _made_up(container, packets.pts[np.sort(mine)]):
            stamps = pts
        else:
            stamps = np.sort(pts if NO_TIME in dts else dts)
        times, _ = _evened(stamps, stream, float(stream.time_base or 0))
        parts.append(times + offset)
        offset = float(parts[-1][-1]) + _spacing(times, stream)
    return np.concatenate(parts)
