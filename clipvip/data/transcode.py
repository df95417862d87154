"""Clips cut out of videos, into memory: their packets copied, or coded anew at a training size."""

import io
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from clipvip.data.container import Blob, DecodeError, add_copy, open_video, packets_from
from clipvip.data.decode import decode_clip
from clipvip.data.pixels import orientation

CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "matroska"}  # PyAV's names
TICKS = Fraction(1, 90000)
# Visually lossless at such sizes; a keyframe about every second, since few frames are wanted.
CODING = {"crf": "20", "preset": "fast", "threads": "1", "g": "25"}
PLAIN = {"fflags": "+bitexact"}  # no random identifiers
COLOURS = ("colorspace", "color_range")  # what decides how it becomes RGB


class Cut(NamedTuple):
    """A video in memory; the clip is what it shows in [start, end)."""

    blob: Blob
    start: float | None = None
    end: float | None = None


def whole(path: Path, start: float | None = None, end: float | None = None) -> Cut:
    """The file as it is. Raises DecodeError."""
    try:
        return Cut(Blob(path.name, path.read_bytes()), start, end)
    except FileNotFoundError:
        raise DecodeError(path, "no such file") from None
    except OSError as error:
        raise DecodeError(path, error.strerror or str(error)) from error


def cut(path: Path, start: float | None, end: float | None) -> Cut:
    """The packets from the keyframe at or before `start` to `end`, unchanged, without sound.

    The clip within it holds the same frames. A format whose packets cannot be cut exactly
    (neither MP4 nor Matroska) comes back whole. Raises DecodeError.
    """
    if start is None and end is None:
        return whole(path)
    with open_video(path) as (container, stream):
        kind = CONTAINERS.get(container.format.name)
        tick, zero = stream.time_base, stream.start_time
        if kind is None or tick is None or zero is None:
            return whole(path, start, end)
        packets: list[Packet] = []
        last = None if end is None else zero + end / float(tick)
        for packet in packets_from(container, stream, start):
            if not packet.size or packet.pts is None:
                continue
            # What refers to frames before the keyframe cannot be decoded without them.
            if not packets or packet.pts >= (packets[0].pts or 0):
                packets.append(packet)
            if last is not None and packet.dts is not None and packet.dts > last:
                break
        if not packets:
            raise DecodeError(path, "no frames in it")
        pts = np.array([packet.pts for packet in packets])
        # Matroska keeps no times of decoding, so they are given anew: rising, none past its pts.
        dts = np.sort(pts) - (np.sort(pts) - pts).max()
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=kind, options=PLAIN) as out:
            copy = add_copy(out, stream)
            copy.time_base = tick
            for packet, shown, decoded in zip(packets, pts - dts[0], dts - dts[0], strict=True):
                packet.pts, packet.dts = int(shown), int(decoded)
                packet.stream = copy
                out.mux(packet)
    offset = float((pts[0] - zero) * tick)
    name = path.with_suffix(".mp4" if kind == "mp4" else ".mkv").name
    return Cut(
        Blob(name, buffer.getvalue()),
        None if start is None else max(start - offset, 0.0),
        None if end is None else end - offset,
    )


def reencode(path: Path, size: int, start: float | None = None, end: float | None = None) -> Cut:
    """The clip's frames at their own times as H.264 in MP4, the shortest side `size` (or as it
    is, where smaller), upright, without sound. Raises DecodeError."""
    buffer = io.BytesIO()
    shrink = _Shrink(size)
    with av.open(buffer, "w", format="mp4", options=PLAIN) as out:
        stream = out.add_stream("libx264", rate=25, options=CODING)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = TICKS
        for seconds, decoded in decode_clip(path, start, end):
            frame = shrink(decoded)
            if not stream.codec_context.is_open:
                stream.width, stream.height = frame.width, frame.height
                for name in COLOURS:
                    setattr(stream.codec_context, name, getattr(frame, name))
            frame.pts, frame.time_base = round(seconds / TICKS), TICKS
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return Cut(Blob(path.with_suffix(".mp4").name, buffer.getvalue()))


class _Shrink:
    """Frames of one video to yuv420p, upright, of even sides, the shortest `size` at most."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        scale = min(1.0, self.size / min(frame.width, frame.height))
        width, height = (
            max(2, 2 * round(side * scale / 2)) for side in (frame.width, frame.height)
        )
        swapped, mirrored_x, mirrored_y = orientation(frame)
        if swapped or mirrored_x or mirrored_y:
            pixels = self._resize(frame, width, height, "rgb24").to_ndarray(format="rgb24")
            if swapped:
                pixels = pixels.transpose(1, 0, 2)
                width, height = height, width
            pixels = pixels[:: -1 if mirrored_y else 1, :: -1 if mirrored_x else 1]
            upright = np.ascontiguousarray(pixels, np.uint8)
            frame = VideoFrame.from_ndarray(upright, format="rgb24")
        small = self._resize(frame, width, height, "yuv420p")
        small.pict_type = PictureType.NONE  # the encoder's to choose, not the old one's
        return small

    def _resize(self, frame: VideoFrame, width: int, height: int, pixels: str) -> VideoFrame:
        return self.reformatter.reformat(
            frame, width, height, pixels, interpolation=Interpolation.BICUBIC
        )
