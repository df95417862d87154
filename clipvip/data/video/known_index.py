"""Obtaining the index of a video's frames: from what this process keeps, or from the file."""

import os
import threading
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import av

from clipvip.data.video.container import MATROSKA, SEEKABLE, Video, open_file
from clipvip.data.video.frame_index import Index, Trust
from clipvip.data.video.index_by_decoding import index_by_decoding
from clipvip.data.video.index_by_packets import index_by_packets, index_by_tables

MOST_KNOWN = 1 << 26  # bytes of indices that a process keeps: some 7,000 videos of ten seconds


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
    video: Video,
    start: float | None = None,
    end: float | None = None,
    *,
    trust: Trust = Trust.TABLES,
) -> Index:
    """Return the index of the frames shown in [start, end), at least as reliable as `trust`.

    It is kept for later epochs, for as long as the file stays unchanged.
    """
    if video.file.data is not None:
        return _read(video, start, end, trust)
    path = video.path
    status = os.stat(path)
    identity = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    key = (*identity, start, end)
    index = _known.get(key)
    if index is None or index.trust < trust:
        index = _read(video, start, end, trust)
        # In other formats libav seeks well only once it has read through the file.
        if video.format in SEEKABLE or index.by_count or index.trust is Trust.DECODER:
            _known.keep(key, index)
    return index


def _read(video: Video, start: float | None, end: float | None, trust: Trust) -> Index:
    if trust is Trust.TABLES and start is None and end is None:  # of a part, packets are read
        index = index_by_tables(video)
        if index is not None:
            return index
    if trust <= Trust.PACKETS:
        with suppress(av.FFmpegError):  # where reading stops midway, earlier frames can be decoded
            if video.format != MATROSKA or video.file.data is not None:
                return index_by_packets(video, start, end)
            # Where a seek leads depends on what its container has read. Later reads find the index
            # kept and seek in a container that has read nothing, so this read does too.
            with open_file(video.file) as again:
                return index_by_packets(again, start, end)
    return index_by_decoding(video.file, end)
