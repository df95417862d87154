"""Ways of decoding chosen frames, by seeking or in order, each checked against the index.

A way gives the frames at the wanted positions of an index. Every frame that comes out is compared
with the index; at the first difference the way raises Mismatch, and the next of WAYS is tried.
Frames that a way gave before then are void: the next way starts over, maybe by a better index.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from clipvip.data.video.container import DecodeError, Video
from clipvip.data.video.frame_index import NO_TIME, Index, Trust
from clipvip.data.video.in_order import InOrder

Positions = NDArray[np.int64]  # in Index.shown, increasing
Decoded = Iterator[tuple[int, VideoFrame]]  # each frame with its position in Index.shown


class Mismatch(Exception):
    """A way of decoding gives other frames than the index says."""


def by_seeking(video: Video, index: Index, wanted: Positions) -> Decoded:
    """Decode only what the wanted frames need.

    Seek forward where a keyframe lies between the decoder and the next wanted frame, feed nothing
    after the last frame wanted before the seek, and let the decoder drop frames that no other frame
    refers to. Raises Mismatch also where seeking fails, or where a frame does not come out, comes
    out of order or is damaged.
    """
    try:
        if index.by_count or _goes_in_order_only(video):
            raise Mismatch
        yield from _seek_and_decode(video, index, wanted)
    except av.FFmpegError as error:
        raise Mismatch from error


def _goes_in_order_only(video: Video) -> bool:
    """Return whether the video is 4:4:4 coded by x264 before 2018, in a way of its own. Only the
    file's first packet tells the decoder so."""
    context = video.stream.codec_context
    if context.name != "h264" or "444" not in (context.pix_fmt or ""):
        return False
    with video.reopened() as again:
        head = next(again.packets())
    coder = re.search(rb"x264 - core (\d+)", bytes(head))
    return coder is not None and int(coder[1]) < 151


@dataclass(slots=True)
class _Group:
    """The frames that come out of the decoder after one seek."""

    first: int  # pts of the keyframe
    last: int = NO_TIME  # pts of the frame that came out last

    def check(self, frame: VideoFrame) -> None:
        """Raise Mismatch for a frame that is out of order or damaged."""
        if frame.pts is None or frame.pts <= self.last:
            raise Mismatch
        if frame.pts >= self.first:  # earlier ones may refer to frames that were not read
            # A keyframe by the container need not be one by the decoder.
            key = frame.pts == self.first and frame.key_frame
            if frame.is_corrupt or (self.last < self.first and not key):
                raise Mismatch
        self.last = frame.pts


def _seek_and_decode(video: Video, index: Index, wanted: Positions) -> Decoded:
    stamps = index.shown[wanted].tolist()
    unfed: dict[int | None, int] = dict(zip(stamps, range(len(stamps)), strict=True))
    inside: dict[int | None, int] = {}  # fed to the decoder, but not out yet
    context, known = video.stream.codec_context, index.pts
    # In VP8, frames that none refers to can still change the segments of later ones.
    unwanted: Literal["DEFAULT", "NONREF"] = "DEFAULT" if context.name == "vp8" else "NONREF"
    keys = index.keyframes_for(stamps)
    while unfed:
        key = keys[next(iter(unfed.values()))]
        fed, packets = key, _seek(video, index, key)
        context.skip_frame, skipping = unwanted, True
        group = _Group(first=known[fed])
        for packet in packets:
            pts = packet.pts
            if fed == len(known) or pts != known[fed]:
                raise Mismatch
            skip = pts not in unfed
            if not skip:
                inside[pts] = unfed.pop(pts)
                key = keys[next(iter(unfed.values()))] if unfed else 0
            if skip != skipping:  # setting it costs more than skipping a packet
                context.skip_frame, skipping = unwanted if skip else "DEFAULT", skip
            fed += 1
            leave = not unfed or key > fed  # only a later keyframe is worth another seek
            if packet.is_corrupt:
                raise Mismatch
            frames = packet.decode()
            if leave:  # flush what waits in the decoder, instead of feeding more packets
                frames += context.decode(None)
            for frame in frames:
                group.check(frame)
                if frame.pts in inside:
                    yield int(wanted[inside.pop(frame.pts)]), frame
            if leave:
                break
        if inside or not leave:
            raise Mismatch


def _seek(video: Video, index: Index, key: int) -> Iterator[Packet]:
    """Return the packets from keyframe `key` on; key: its position in index.pts.

    A seek may land before it, and where depends on what the container has read so far. The packets
    in between are not decoded, as the pictures of a damaged file would depend on them.
    """
    for offset in (index.pts[key], index.dts[key]):
        video.container.seek(int(offset), stream=video.stream)
        packets = video.packets()
        first = next(packets, None)
        if first is None or first.pts is None:
            continue
        reached = np.flatnonzero((index.pts == first.pts) & index.keyframe)
        if len(reached) == 1 and reached[0] <= key:
            packets = itertools.chain([first], packets)
            between = index.pts[reached[0] : key].tolist()
            if [packet.pts for packet in itertools.islice(packets, len(between))] != between:
                raise Mismatch
            return packets
    raise Mismatch


def in_order(video: Video, index: Index, wanted: Positions) -> Decoded:
    """Decode every frame from the start of a newly opened file to the last wanted one, and compare
    each with the index. Raises DecodeError where a wanted frame is damaged."""
    reader, made_by_decoding = InOrder(video), index.trust is Trust.DECODER
    # Where a frame is identified by its count alone, the count of all must be right.
    count_all = index.by_count and not made_by_decoding
    position, due, given = -1, 0, 0  # position: of the last frame that the index lists
    for number, frame in reader:
        this = given if index.by_count else reader.pts(number)
        given += 1
        if position + 1 == len(index.shown) or this != index.shown[position + 1]:
            # An index made by decoding lists fewer frames than decoding gives.
            if made_by_decoding or (position < 0 and this < index.shown[0]):
                continue
            raise Mismatch
        position += 1
        if due < len(wanted) and position == wanted[due]:
            if index.damaged is None and (reader.lost or reader.doubtful):
                raise Mismatch  # nobody knows which frames refer to the damaged ones
            if index.damaged is not None and index.damaged[position]:
                raise DecodeError(video.path, f"damaged at {index.times[position]:.2f} s")
            yield position, frame
            due += 1
            if due == len(wanted):
                reader.stopped = True
                if not count_all:
                    return
    if due < len(wanted) or (count_all and given != (~reader.packets.hidden).sum()):
        raise Mismatch


# The fastest first: the index to use, and the way to decode by it.
WAYS = (
    (Trust.TABLES, by_seeking),
    (Trust.PACKETS, by_seeking),
    (Trust.PACKETS, in_order),
    (Trust.DECODER, by_seeking),
    (Trust.DECODER, in_order),
)
