"""Preparing clips in the worker processes for NVIDIA DALI, which decodes in the main process.

Worker processes cannot share the main process's GPU. So a worker does all but decoding: it opens
the file, chooses the frames as any reader does, and copies the packets that they need into a small
Matroska file in memory, in which frames are numbered in the order of showing. In this way one
demuxer, PyAV's, decides which frame is which, whatever edit lists, times or cut ends a file has.

Refused is raised for clips that DALI cannot decode, or would decode wrong: frames that change size,
colours other than BT.601's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from clipvip.data.video.container import DecodeError, Stamps, open_file, packets_from, remux
from clipvip.data.video.decode import OpenClip
from clipvip.data.video.headers import CHANGED, difference, is_reset
from clipvip.data.video.pixels import MATRIX_NAMES, orientation
from clipvip.data.video.sampling import Choice
from clipvip.ops.resize_crop import Turn

TICKS = Fraction(1, 1000)  # seconds per tick of the copies
STEP = 40  # ticks between frames


class Engine(NamedTuple):
    """A device that DALI decodes on, and the codecs and pixel formats that it decodes there, by
    FFmpeg's names."""

    device: Literal["cpu", "gpu"]
    codecs: frozenset[str]
    pixels: frozenset[str]


CPU = Engine(
    "cpu",
    frozenset({"vp8", "vp9", "mjpeg"}),
    frozenset({"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}),
)
GPU = Engine(
    "gpu",
    frozenset({"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"}),
    frozenset({"yuv420p", "yuvj420p"}),
)


@dataclass(slots=True)
class Encoded:
    """Frames of a clip, not decoded yet.

    data: uint8 [bytes], a Matroska file. chosen: the wanted frames, int32 [N], counted in the file
    in the order of showing. width, height: of the stored frames. turn: turns them upright, see
    pixels.orientation.
    """

    data: Tensor
    chosen: Choice
    width: int
    height: int
    turn: Turn


class Refused(DecodeError):
    """A clip that DALI cannot decode; PyAV may."""


def encode(clip: OpenClip, engine: Engine) -> Encoded:
    """Prepare the clip's frames for DALI on `engine`. Raises Refused, or errors of PyAV."""
    path, head = clip.path, clip.video.stream.codec_context
    codec = head.codec.canonical_name
    if codec not in engine.codecs:
        raise Refused(path, f"{codec} on the {engine.device.upper()}")
    if clip.index.by_count:
        raise Refused(path, "no times of showing in the file")
    _check_colours(path, head.colorspace)
    positions = clip.chosen.positions
    wanted = clip.index.shown[positions]
    # Half a tick later, or rounding could lead to the keyframe before.
    first = clip.index.times[positions.min()] + clip.video.tick / 2
    with open_file(clip.video.file) as video:
        stream = video.stream
        stated = stream.codec_context.width, stream.codec_context.height
        packets = _needed(packets_from(video, first), set(wanted.tolist()), stream)
        if packets and (problem := difference(stream, packets)):
            raise Refused(path, problem)
        frame = _first_frame(packets)
        if frame is None:
            raise Refused(path, "frames out of order")
        if (frame.width, frame.height) != stated:  # DALI allocates what the file states
            raise Refused(path, CHANGED)
        _check_picture(path, frame, engine)
        times = np.array([packet.pts for packet in packets], np.int64)
        shown, order = np.unique(times, return_inverse=True)
        if len(shown) < len(times):
            raise Refused(path, "two frames at one time")
        delay = int((np.arange(len(packets)) - order).max())  # none is shown before it is decoded
        stamps = [
            Stamps((place + delay) * STEP, decoded * STEP, STEP)
            for decoded, place in enumerate(order.tolist())
        ]
        data = remux(stream, packets, stamps, TICKS, "matroska")
    numbers, middle = clip.chosen.split(np.searchsorted(shown, wanted).astype(np.int32))
    return Encoded(
        torch.frombuffer(data, dtype=torch.uint8),
        Choice(numbers, None if middle is None else int(middle)),
        frame.width,
        frame.height,
        orientation(frame),
    )


def _check_picture(path: Path, frame: VideoFrame, engine: Engine) -> None:
    """Raise Refused where DALI would give the frame other pixels."""
    _check_colours(path, frame.colorspace)
    if frame.format.name not in engine.pixels:
        raise Refused(path, f"{frame.format.name} pixels on the {engine.device.upper()}")
    if engine.device == "gpu" and frame.interlaced_frame:
        raise Refused(path, "interlaced")
    if engine.device == "gpu" and (frame.width % 2 or frame.height % 2):
        raise Refused(path, "a width or height that is odd")


def _check_colours(path: Path, number: int) -> None:
    """Raise Refused for colours other than BT.601's, by their number in H.273.

    DALI converts all as if they were BT.601's and clips the result to 0 to 255, which cannot be
    corrected later: saturated colours would be off by up to 40.
    """
    name = MATRIX_NAMES.get(int(number))
    if name != "bt601":
        raise Refused(path, f"{name or 'other'} colours")


def _needed(packets: Iterator[Packet], wanted: set[int], stream: VideoStream) -> list[Packet]:
    """Return packets in decoding order, from the first keyframe to the last wanted packet, without
    the stretches between resets in which none is wanted. Return none if a wanted one is missing.

    wanted: their pts.
    """
    needed: list[Packet] = []
    stretch, used = 0, False  # where the packets since the last reset begin, if any is wanted
    for packet in packets:
        if not packet.size or packet.pts is None:
            continue
        if is_reset(packet, stream):
            if not used:
                del needed[stretch:]
            stretch, used = len(needed), False
        # Packets that refer to frames before the first keyframe cannot be decoded.
        if not needed or packet.pts >= (needed[0].pts or 0):
            needed.append(packet)
            used |= packet.pts in wanted
            wanted.discard(packet.pts)
        if not wanted:
            return needed
    return []


def _first_frame(packets: list[Packet]) -> VideoFrame | None:
    """Decode one frame: only a decoded frame states its turn and colours."""
    for packet in packets:
        for frame in packet.decode():
            assert isinstance(frame, VideoFrame)
            return frame
    flushed = packets[0].stream.decode(None) if packets else []
    return flushed[0] if flushed else None
