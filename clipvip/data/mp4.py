"""When the samples of an MP4 are shown, out of its tables (ISO/IEC 14496-12).

libav gives what it reads of those tables, sample by sample, but not the offsets from times of
decoding to times of showing ("ctts"); without them every packet would have to be read.
"""

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

MAX_TABLES = 1 << 28  # bytes; a claim of more is damage


def composition_offsets(file: BinaryIO, track: int) -> NDArray[np.int64] | None:
    """Time of showing minus time of decoding of each sample of a track, in its ticks.

    [0] long where all are 0. None where the file has no such table that can be read.
    """
    try:
        movie = _movie(file)
        if next(_inside(movie, b"mvex"), None) is not None:
            return None  # the samples of fragments are described with them
        for trak in _inside(movie, b"trak"):
            header = next(_inside(trak, b"tkhd"))
            # version and flags, two times of 4 or 8 bytes, then the track's number
            (number,) = struct.unpack_from(">I", header, 20 if header[0] else 12)
            if number == track:
                table = trak
                for name in (b"mdia", b"minf", b"stbl"):
                    table = next(_inside(table, name))
                return _offsets(next(_inside(table, b"ctts"), None))
    except (OSError, ValueError, StopIteration, IndexError, struct.error):
        pass
    return None


def _offsets(table: memoryview | None) -> NDArray[np.int64]:
    if table is None:
        return np.zeros(0, np.int64)
    (count,) = struct.unpack_from(">I", table, 4)
    runs = np.frombuffer(table, ">i4", 2 * count, 8).reshape(-1, 2)
    if runs[:, 0].min(initial=0) < 0 or runs[:, 0].sum() > MAX_TABLES:
        raise ValueError("runs of absurd length")
    return np.repeat(runs[:, 1], runs[:, 0]).astype(np.int64)


def is_whole_in_fragments(file: BinaryIO) -> bool:
    """Whether samples are in fragments, and the file ends where its last box does."""
    names = set()
    try:
        for name, _, _ in _outermost(file):
            names.add(name)
    except (OSError, ValueError, struct.error):
        return False
    return b"moof" in names


def _movie(file: BinaryIO) -> memoryview:
    """The box of all tables, wherever it lies among the file's outermost boxes."""
    for name, start, size in _outermost(file):
        if name == b"moov":
            if size > MAX_TABLES:
                break
            file.seek(start)
            return memoryview(file.read(size))
    raise ValueError("no tables")


def _outermost(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Name of each box that is in no other, where its content starts, and its size in bytes."""
    end = file.seek(0, os.SEEK_END)
    at = 0
    while at + 8 <= end:
        file.seek(at)
        size, name, header = _box(file.read(16), end - at)
        yield name, at + header, size - header
        at += size


def _inside(box: memoryview, wanted: bytes) -> Iterator[memoryview]:
    at = 0
    while at + 8 <= len(box):
        size, name, header = _box(box[at : at + 16], len(box) - at)
        if name == wanted:
            yield box[at + header : at + size]
        at += size


def _box(head: bytes | memoryview, left: int) -> tuple[int, bytes, int]:
    """(size, name, bytes of the header); a size of 0 means all that is left."""
    size, name = struct.unpack_from(">I4s", head)
    header = 8
    if size == 1:
        (size,) = struct.unpack_from(">Q", head, 8)
        header = 16
    size = size or left
    if size < header or size > left:
        raise ValueError("a box of no possible size")
    return size, name, header
