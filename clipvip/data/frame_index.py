"""Which frames a video has and when each is shown."""

import math
import os
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from clipvip.data.container import (
    MP4,
    SEEKABLE,
    DecodeError,
    File,
    packets_from,
)
from clipvip.data.mp4 import composition_offsets

KEYFRAME = 1  # the flag of an entry of libav's index


MOST_KNOWN = 1 << 26  # bytes of files' indices that a process keeps: some 7,000 of ten seconds


MISSING_END = (1.0, 0.05)  # seconds and share of a video that may lack before it counts as cut off


NO_TIME = np.iinfo(np.int64).min


class _Packets(NamedTuple):
    """What is kept of packets, in decoding order: not their data. NO_TIME where one has none."""

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    duration: NDArray[np.int64]
    keyframe: NDArray[np.bool_]
    discard: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Index:
    """The packets of a video.

    In decoding order: pts and dts in ticks, keyframe. In the order of showing: `shown`, the
    ticks, and `times`, the same in seconds from the first. Where a container keeps no
    time of showing (AVI, raw streams), `by_count`: frames come out of the decoder in that order
    and are counted, `shown` being 0, 1, 2, … `by_tables`: no packet has been read yet.
    """

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    keyframe: NDArray[np.bool_]
    shown: NDArray[np.int64]
    times: NDArray[np.float64]
    duration: float
    by_count: bool
    by_tables: bool = False

    @property
    def bytes(self) -> int:
        arrays = (self.pts, self.dts, self.keyframe, self.shown, self.times)
        return 1024 + sum(array.nbytes for array in arrays)  # and the objects themselves

    def keyframes_for(self, wanted: list[int]) -> list[int]:
        """For each pts, the position of the last-shown keyframe from which its frame decodes."""
        keys = np.flatnonzero(self.keyframe)
        keys = keys[np.argsort(self.pts[keys])]
        found = np.searchsorted(self.pts[keys], wanted, side="right") - 1
        return [int(keys[position]) if position >= 0 else 0 for position in found]


def read_index(
    container: InputContainer,
    stream: VideoStream,
    path: Path,
    start: float | None = None,
    end: float | None = None,
) -> Index:
    """The packets needed for what is shown in [start, end) seconds, or all of them."""
    packets, whole = _packets(container, stream, path, start, end)
    index = _in_order(container, stream, packets, path)
    if whole:
        _check_whole(container, stream, index.duration, path)
    return index


class _Known:
    """This process's indices of files: MOST_KNOWN bytes of them, the last used at the end."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[Any, ...], Index] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple[Any, ...]) -> "Index | None":
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def keep(self, key: tuple[Any, ...], index: "Index") -> None:
        with self.lock:
            if key in self.kept:
                self.bytes -= self.kept.pop(key).bytes
            self.kept[key] = index
            self.bytes += index.bytes
            while self.bytes > MOST_KNOWN:
                self.bytes -= self.kept.popitem(last=False)[1].bytes


_known = _Known()


# A forked worker is alone in its copy, which another thread may have been holding.
os.register_at_fork(after_in_child=lambda: setattr(_known, "lock", threading.Lock()))


def known_index(
    container: InputContainer,
    stream: VideoStream,
    file: File,
    start: float | None = None,
    end: float | None = None,
    *,
    trust_tables: bool = True,
) -> Index:
    """What is shown in [start, end): by an MP4's tables, or else as read_index finds it. Neither is
    read in every epoch of a file that stays as it is."""

    def read() -> Index:
        if trust_tables and start is None and end is None:  # of a part, that part is read
            index = _index_of_tables(container, stream, file)
            if index is not None:
                return index
        return read_index(container, stream, file.path, start, end)

    # To seek well, other formats have to have been read through.
    if file.data is not None or container.format.name not in SEEKABLE:
        return read()
    status = os.stat(file.path)
    identity = (str(file.path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    key = (*identity, start, end)
    index = _known.get(key)
    if index is None or (index.by_tables and not trust_tables):
        index = read()
        _known.keep(key, index)
    return index


def _index_of_tables(container: InputContainer, stream: VideoStream, file: File) -> Index | None:
    """All packets of an MP4 file, without reading them; None where its tables leave a doubt.

    What they say of a packet is compared when that packet is decoded.
    """
    entries = getattr(stream, "index_entries", None)  # PyAV 17 and newer
    if not entries or container.format.name != MP4 or stream.start_time is None:
        return None
    with file.binary() as source:
        offsets = composition_offsets(source, stream.id)
        length = source.seek(0, os.SEEK_END)
    if offsets is None or len(offsets) not in (0, len(entries)):
        return None
    found = [(e.timestamp, e.flags, e.size, e.pos + e.size) for e in entries]
    dts, flags, size, stop = np.array(found, np.int64).T
    if (flags & ~KEYFRAME).any() or not size.all() or (stop > length).any():
        return None
    pts = dts + offsets if len(offsets) else dts
    pts = pts - pts.min() + stream.start_time
    duration = np.diff(dts, append=2 * dts[-1] - dts[max(len(dts) - 2, 0)])
    packets = _Packets(pts, dts, duration, flags != 0, np.zeros(len(dts), np.bool_))
    index = _in_order(container, stream, packets, file.path)
    _check_whole(container, stream, index.duration, file.path)
    return replace(index, by_tables=True)


def _in_order(
    container: InputContainer, stream: VideoStream, packets: _Packets, path: Path
) -> Index:
    if stream.time_base is None:
        raise DecodeError(path, "no time base in it")
    visible = packets.pts[~packets.discard]
    if not len(visible):
        raise DecodeError(path, "no frames in it")
    pts = np.where(packets.pts == NO_TIME, 0, packets.pts)
    by_count = container.format.name == "avi" or bool((visible == NO_TIME).any())
    if by_count:
        shown = np.arange(len(visible), dtype=np.int64)
        frame_time = float(1 / stream.average_rate) if stream.average_rate else 0.04
        times = shown * frame_time
        duration = len(visible) * frame_time
    else:
        tick = float(stream.time_base)
        shown = np.unique(visible)
        # Frames that refer to what came before the first keyframe cannot be decoded.
        if packets.keyframe.any():
            shown = shown[shown >= pts[packets.keyframe.argmax()]]
        zero = shown[0] if stream.start_time is None else stream.start_time
        times = (shown - zero) * tick
        last = packets.duration[~packets.discard][visible.argmax()]
        duration = float(times[-1] + last * tick)
    return Index(
        pts=pts,
        dts=np.where(packets.dts == NO_TIME, pts, packets.dts),
        keyframe=packets.keyframe,
        shown=shown,
        times=times.astype(np.float64),
        duration=duration,
        by_count=by_count,
    )


def _packets(
    container: InputContainer,
    stream: VideoStream,
    path: Path,
    start: float | None,
    end: float | None,
) -> tuple[_Packets, bool]:
    """Packets in decoding order, and whether they reach to the end of the file.

    Of a part of a long video only that part is read, where the format is good at seeking.
    """
    last = math.inf
    if container.format.name in SEEKABLE and stream.start_time is not None and stream.time_base:
        last = math.inf if end is None else stream.start_time + end / float(stream.time_base)
    whole, found = True, []
    for packet in packets_from(container, stream, start):
        pts, dts = packet.pts, packet.dts
        if packet.size:
            if packet.is_corrupt:
                raise DecodeError(path, "cut off or damaged: a packet of its video is not whole")
            found.append(
                (
                    NO_TIME if pts is None else pts,
                    NO_TIME if dts is None else dts,
                    packet.duration or 0,
                    packet.is_keyframe,
                    packet.is_discard,
                )
            )
        if dts is not None and dts > last:
            whole = False
            break
    pts, dts, duration, keyframe, discard = np.array(found, np.int64).reshape(-1, 5).T
    return _Packets(pts, dts, duration, keyframe != 0, discard != 0), whole


def _check_whole(
    container: InputContainer, stream: VideoStream, duration: float, path: Path
) -> None:
    """DecodeError where the packets end well before the length that the header claims."""
    claimed = 0.0
    if stream.duration is not None and stream.time_base is not None:
        claimed = float(stream.duration * stream.time_base)
    elif tag := re.match(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")):
        claimed = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
        claimed -= (stream.start_time or 0) * float(stream.time_base or 0)
    elif container.duration is not None and len(container.streams) == 1:
        claimed = container.duration / av.time_base
    seconds_allowed, share_allowed = MISSING_END
    if duration < claimed - max(seconds_allowed, share_allowed * claimed):
        raise DecodeError(path, f"cut off: frames end at {duration:.1f} s of {claimed:.1f} s")


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
