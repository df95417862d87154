"""Clips cut out of videos, into memory: their packets copied, or coded anew at a training size.

The result is compared with the file before it is returned. Where it cannot be made or shows
anything else, the clip is stored in another way, and `Cut.instead` says so.
"""

import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data.video.container import (
    MATROSKA,
    MP4,
    Blob,
    DecodeError,
    Media,
    add_copy,
    as_decode_errors,
    open_video,
    packets_from,
)
from clipvip.data.video.decode import decode_clip, open_clip
from clipvip.data.video.frame_index import window_of
from clipvip.data.video.headers import has_new_head
from clipvip.data.video.pixels import MATRIX_NAMES, ONE_THREAD, orientation
from clipvip.ops.resize_crop import UPRIGHT, Turn, resized, to_rgb

# Containers for the packets of each format (PyAV's names), the best first: QuickTime takes codecs
# that MP4 does not, and Matroska rounds times to milliseconds.
CONTAINERS = {MP4: ("mp4", "mov", "matroska"), MATROSKA: ("matroska",)}
SUFFIXES = {"mp4": ".mp4", "mov": ".mov", "matroska": ".mkv"}
TICKS = Fraction(1, 90000)
# Visually lossless at such sizes; a keyframe about every second, since few frames are wanted. With
# x264's macroblock tree, the bytes of a clip would depend on what the process coded before it.
CODING = {"crf": "20", "preset": "fast", "threads": "1", "g": "25", "mbtree": "0"}
PLAIN = {"fflags": "+bitexact"}  # no random identifiers
BT601 = 6  # as H.273 numbers matrices


class Cut(NamedTuple):
    """A video in memory; the clip is what it shows in [start, end).

    instead: how it was stored and why, where that is not what was asked for. compared: whether its
    first, middle and last picture have been decoded, and are the file's.
    """

    blob: Blob
    start: float | None = None
    end: float | None = None
    instead: str | None = None
    compared: bool = False


class _Impossible(DecodeError):
    """A clip that cannot be stored in some way; `reason` is worded for the frames of many clips."""


def whole(path: Path, start: float | None = None, end: float | None = None) -> Cut:
    """The file as it is. Raises DecodeError."""
    with as_decode_errors(path):
        return Cut(Blob(path.name, path.read_bytes()), start, end)


# --- copying packets ------------------------------------------------------------------------


def cut(path: Path, start: float | None, end: float | None) -> Cut:
    """The packets from the keyframe at or before `start` to `end`, unchanged, without sound.

    The clip within them has the same frames. A file whose packets cannot be cut so comes whole.
    Raises DecodeError.
    """
    if start is None and end is None:
        return whole(path)
    try:
        part = _copied(path, start, end)
    except DecodeError as error:
        known = isinstance(error, _Impossible)
        reason = error.reason if known else "their packets cannot be read by themselves"
        return whole(path, start, end)._replace(instead=f"stored whole: {reason}")
    shown = _shown(path, start, end)
    try:
        same = _alike(shown, _shown(part.blob, part.start, part.end))
    except DecodeError:
        same = False
    if not same:
        reason = "their packets show other frames by themselves"
        return whole(path, start, end)._replace(instead=f"stored whole: {reason}")
    return part._replace(compared=True)


def _copied(path: Path, start: float | None, end: float | None) -> Cut:
    """Copy the packets, without comparing them with the file. Raises DecodeError."""
    with open_video(path) as video:
        stream, kinds = video.stream, CONTAINERS.get(video.format, ())
        tick, zero = stream.time_base, stream.start_time
        if not kinds:
            raise _Impossible(path, f"their container ({video.format}) cannot be cut")
        if tick is None or zero is None:
            raise _Impossible(path, "their times are not known")
        last = None if end is None else zero + end / float(tick)
        packets = _needed(packets_from(video, start), last)
        if not packets:
            raise DecodeError(path, "no frames in it")
        if any(map(has_new_head, packets)):
            raise _Impossible(path, "their coding changes midway")
        codec = stream.codec_context.codec.canonical_name
        stamps = _stamps(packets)
        for kind in kinds:
            data = _file_of(stream, packets, stamps, tick, kind)
            if data is not None:
                break
        else:
            raise _Impossible(path, f"their codec ({codec}) cannot be cut")
        offset = float((stamps[0].pts - zero) * tick)
        return Cut(
            Blob(path.with_suffix(SUFFIXES[kind]).name, data),
            None if start is None else max(start - offset, 0.0),
            None if end is None else end - offset,
        )


def _needed(source: Iterable[Packet], last: float | None) -> list[Packet]:
    packets: list[Packet] = []
    for packet in source:
        if not packet.size or packet.pts is None:
            continue
        # What refers to frames before the keyframe cannot be decoded without them.
        if not packets or packet.pts >= (packets[0].pts or 0):
            packets.append(packet)
        if last is not None and packet.dts is not None and packet.dts > last:
            break
    return packets


class _Stamps(NamedTuple):
    pts: int
    dts: int
    duration: int | None


def _stamps(packets: list[Packet]) -> list[_Stamps]:
    pts = np.array([packet.pts for packet in packets])
    # Matroska keeps no times of decoding, so they are given anew: rising, none past its pts.
    dts = np.sort(pts) - (np.sort(pts) - pts).max()
    durations = [packet.duration for packet in packets]
    return list(map(_Stamps, pts.tolist(), dts.tolist(), durations))


def _file_of(
    stream: VideoStream, packets: list[Packet], stamps: list[_Stamps], tick: Fraction, kind: str
) -> bytes | None:
    """The packets as a file of that kind, their times from 0 on; None where it does not take
    them."""
    buffer, zero = io.BytesIO(), stamps[0].dts
    try:
        with av.open(buffer, "w", format=kind, options=PLAIN) as out:
            copy = add_copy(out, stream)
            copy.time_base = tick
            for packet, stamp in zip(packets, stamps, strict=True):
                packet.pts, packet.dts = stamp.pts - zero, stamp.dts - zero
                packet.duration, packet.time_base = stamp.duration, tick
                packet.stream = copy
                out.mux(packet)
    except Exception:  # the muxer may refuse times, sizes or codecs in any way
        return None
    return buffer.getvalue()


class _Shown(NamedTuple):
    """What a reader sees of a clip: seconds from its first frame to each of its frames, its first,
    middle and last picture, and how exact its times are."""

    times: NDArray[np.float64]
    pictures: Tensor
    tick: float


def _shown(source: Media, start: float | None, end: float | None) -> _Shown:
    """Raises DecodeError."""
    with open_clip(source, 3, start=start, end=end) as clip:
        context = clip.video.stream.codec_context
        pictures = clip.decode(max(min(context.width, context.height), 1)).frames
        times = clip.index.times[window_of(clip.index.times, start, end, clip.path)]
        return _Shown(times - times[0], pictures, float(clip.video.stream.time_base or 0))


def _alike(one: _Shown, other: _Shown) -> bool:
    within = max(one.tick, other.tick) + 1e-6
    return (
        len(one.times) == len(other.times)
        and np.allclose(one.times, other.times, rtol=0, atol=within)
        and torch.equal(one.pictures, other.pictures)
    )


# --- coding anew ----------------------------------------------------------------------------


def reencode(path: Path, size: int, start: float | None = None, end: float | None = None) -> Cut:
    """The clip's frames at their own times as H.264 in MP4, the shortest side `size` (or as it
    is, where smaller), upright, in the colours of BT.601, without sound.

    Frames that change their shape, which no stream of one size shows right, come as from `cut`.
    Raises DecodeError.
    """
    short: int | None = None
    while True:
        try:
            data = _coded(path, size, short, start, end)
            return Cut(Blob(path.with_suffix(".mp4").name, data))
        except _Larger as larger:
            short = larger.side
        except _Impossible as error:
            return cut(path, start, end)._replace(instead=f"not coded anew: {error.reason}")


class _Larger(Exception):
    """A frame whose shortest side, `side`, is longer than that of the frames coded so far."""

    def __init__(self, side: int) -> None:
        super().__init__(side)
        self.side = side


def _coded(
    path: Path, size: int, short: int | None, start: float | None, end: float | None
) -> bytes:
    """Code the clip as H.264. short: length of the shortest side, else that of the first frame.
    Raises _Larger, DecodeError."""
    buffer, times, shrink = io.BytesIO(), [], _Shrink()
    try:
        with av.open(buffer, "w", format="mp4", options=PLAIN) as out:
            stream = out.add_stream("libx264", rate=25, options=CODING)
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.time_base = stream.time_base = TICKS
            context.colorspace, context.color_range = BT601, ColorRange.MPEG
            for seconds, decoded in decode_clip(path, start, end):
                side = min(size, decoded.width, decoded.height)
                short = side if short is None else short
                if side > short:
                    raise _Larger(side)
                frame = shrink(decoded, short)
                if not context.is_open:
                    stream.width, stream.height = frame.width, frame.height
                if (frame.width, frame.height) != (stream.width, stream.height):
                    raise _Impossible(path, "their frames change shape")
                frame.pts, frame.time_base = round(seconds / TICKS), TICKS
                out.mux(stream.encode(frame))
                times.append(seconds)
            out.mux(stream.encode())
    except (DecodeError, _Larger):
        raise
    except Exception as error:  # by swscale, x264 or the muxer; decode_clip's are DecodeErrors
        raise _Impossible(path, "their frames cannot be coded") from error
    data = buffer.getvalue()
    try:
        with open_clip(Blob(path.with_suffix(".mp4").name, data), 1) as clip:
            found = clip.index.times
    except DecodeError as error:
        raise _Impossible(path, "their frames cannot be read once they are coded") from error
    if len(found) != len(times) or not np.allclose(found, times, rtol=0, atol=2 * float(TICKS)):
        raise _Impossible(path, "their times cannot be kept")
    return data


class _Shrink:
    """Frames of one video to yuv420p in the colours of BT.601, upright, of even sides."""

    def __init__(self) -> None:
        self.reformatters: dict[tuple[Any, ...], VideoReformatter] = {}

    def __call__(self, frame: VideoFrame, short: int) -> VideoFrame:
        """short: the shortest side."""
        sides = resized(frame.height, frame.width, short)
        height, width = (side + side % 2 for side in sides)
        turn, name = orientation(frame), frame.format.name
        matrix, full = MATRIX_NAMES.get(int(frame.colorspace)), False
        if name.startswith("yuv") and matrix is not None:
            jpeg = "j" if name.startswith("yuvj") else ""
            full = bool(jpeg) or frame.color_range == ColorRange.JPEG
            if turn == UPRIGHT and not full and matrix == "bt601":
                small = self._reformat(frame, width, height, "yuv420p")
            else:
                small = self._reformat(frame, width, height, f"yuv{jpeg}444p")
        else:
            matrix, rgb = "bt601", self._reformat(frame, width, height, "rgb24")
            colours = {"dst_colorspace": BT601, "dst_color_range": ColorRange.MPEG}
            small = self._reformat(rgb, width, height, "yuv444p", **colours)
        if small.format.name != "yuv420p":
            planes = _turned(_in_bt601(small.to_ndarray(), matrix, full), turn)
            upright = VideoFrame.from_ndarray(planes, format="yuv444p")
            small = self._reformat(upright, upright.width, upright.height, "yuv420p")
        small.pict_type = PictureType.NONE  # the encoder's to choose, not the old one's
        return small

    def _reformat(
        self, frame: VideoFrame, width: int, height: int, pixels: str, **colours: int
    ) -> VideoFrame:
        # PyAV 15 keeps the colours of a reformatter's first frame.
        now = (frame.format.name, frame.colorspace, frame.color_range, pixels)
        reformatter = self.reformatters.setdefault(now, VideoReformatter())
        return reformatter.reformat(
            frame,
            width,
            height,
            pixels,
            interpolation=Interpolation.BICUBIC,
            **colours,
            **ONE_THREAD,
        )


def _in_bt601(planes: NDArray[Any], matrix: str, full_range: bool) -> NDArray[np.uint8]:
    """Y, U and V, [3, H, W], as if their matrix had been BT.601's, of the limited range.

    swscale converts by way of RGB of 8 bits, which would clip colours that only one of the matrices
    has.
    """
    black, luma, chroma = (0, 255, 255) if full_range else (16, 219, 224)
    change = np.linalg.inv(to_rgb("bt601")) @ to_rgb(matrix) / [luma, chroma, chroma]
    change *= np.array([[219], [224], [224]])
    offset = np.array([16, 128, 128]) - change @ [black, 128, 128]
    changed = np.tensordot(change.astype(np.float32), planes.astype(np.float32), 1)
    changed += offset.astype(np.float32)[:, None, None]
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def _turned(planes: NDArray[np.uint8], turn: Turn) -> NDArray[np.uint8]:
    """[3, H, W] as they are to be shown."""
    swapped, mirrored_x, mirrored_y = turn
    upright = planes.transpose(0, 2, 1) if swapped else planes
    return np.ascontiguousarray(upright[:, :: -1 if mirrored_y else 1, :: -1 if mirrored_x else 1])
