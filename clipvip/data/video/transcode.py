"""Clips cut out of videos, into memory: packets copied, or frames re-encoded at a training size.

A copy is compared with the file before it is returned. Where a clip cannot be stored as asked, or
would show other frames, it is stored in another way, and `Cut.instead` says so.
"""

import io
from collections.abc import Iterable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data.video.container import (
    MATROSKA,
    MP4,
    PLAIN,
    Blob,
    DecodeError,
    Media,
    Stamps,
    as_decode_errors,
    open_video,
    remux,
)
from clipvip.data.video.decode import decode_clip, open_clip
from clipvip.data.video.frame_index import window_of
from clipvip.data.video.headers import has_new_head
from clipvip.data.video.pixels import MATRIX_NAMES, ONE_THREAD, orientation, turned
from clipvip.ops.resize_crop import UPRIGHT, resized, to_rgb

# Containers for the packets of each format (PyAV's names), the best first. QuickTime takes codecs
# that MP4 does not; Matroska rounds times to milliseconds.
CONTAINERS = {MP4: ("mp4", "mov", "matroska"), MATROSKA: ("matroska",)}
SUFFIXES = {"mp4": ".mp4", "mov": ".mov", "matroska": ".mkv"}
TICKS = Fraction(1, 90000)
# Visually lossless at such sizes; a keyframe about every second, since few frames are wanted. With
# x264's macroblock tree, a clip's bytes would depend on the clips that the process encoded before.
CODING = {"crf": "20", "preset": "fast", "threads": "1", "g": "25", "mbtree": "0"}
BT601 = 6  # the matrix's number in H.273
BICUBIC = Interpolation.BICUBIC


class Cut(NamedTuple):
    """A video in memory; the clip is what it shows in [start, end).

    instead: how it was stored and why, where that is not as asked. compared: whether its first,
    middle and last frame have been decoded, and are those of the file.
    """

    blob: Blob
    start: float | None = None
    end: float | None = None
    instead: str | None = None
    compared: bool = False


class _Impossible(DecodeError):
    """A clip cannot be stored in some way. `reason` is worded to be counted over many clips."""


def whole(path: Path, start: float | None = None, end: float | None = None) -> Cut:
    """Store the file unchanged. Raises DecodeError."""
    with as_decode_errors(path):
        return Cut(Blob(path.name, path.read_bytes()), start, end)


# --- copying packets ------------------------------------------------------------------------


def cut(path: Path, start: float | None, end: float | None) -> Cut:
    """Store the packets from the keyframe at or before `start` to `end`, unchanged, without sound.

    The clip within them has the same frames. If its packets cannot be cut in this way, the whole
    file is stored. Raises DecodeError.
    """
    if start is None and end is None:
        return whole(path)
    try:
        part = _copied(path, start, end)
    except DecodeError as error:
        known = isinstance(error, _Impossible)
        reason = error.reason if known else "their packets cannot be read by themselves"
    else:
        shown = _shown(path, start, end)
        with suppress(DecodeError):
            if _alike(shown, _shown(part.blob, part.start, part.end)):
                return part._replace(compared=True)
        reason = "their packets show other frames by themselves"
    return whole(path, start, end)._replace(instead=f"stored whole: {reason}")


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
        packets = _needed(video.packets_from(start), last)
        if not packets:
            raise DecodeError(path, "no frames in it")
        if any(map(has_new_head, packets)):
            raise _Impossible(path, "their coding changes in the middle")
        codec = stream.codec_context.codec.canonical_name
        stamps = _stamps(packets)
        offset = float(((packets[0].pts or 0) - zero) * tick)
        for kind in kinds:
            with suppress(Exception):  # the muxer may refuse times, sizes or codecs in any way
                data = bytes(remux(stream, packets, stamps, tick, kind))
                break
        else:
            raise _Impossible(path, f"their codec ({codec}) cannot be cut")
        return Cut(
            Blob(path.with_suffix(SUFFIXES[kind]).name, data),
            None if start is None else max(start - offset, 0.0),
            None if end is None else end - offset,
        )


def _needed(given: Iterable[Packet], last: float | None) -> list[Packet]:
    """Return the packets with data that can be decoded, to the first whose dts is past `last`."""
    packets: list[Packet] = []
    for packet in given:
        if not packet.size or packet.pts is None:
            continue
        # Packets that refer to frames before the first keyframe cannot be decoded.
        if not packets or packet.pts >= (packets[0].pts or 0):
            packets.append(packet)
        if last is not None and packet.dts is not None and packet.dts > last:
            break
    return packets


def _stamps(packets: list[Packet]) -> list[Stamps]:
    """Return stamps for a copy, from 0 on."""
    pts = np.array([packet.pts for packet in packets])
    # Matroska keeps no dts, so all get new ones: increasing, none later than its pts.
    dts = np.sort(pts) - (np.sort(pts) - pts).max()
    durations = [packet.duration for packet in packets]
    return list(map(Stamps, (pts - dts[0]).tolist(), (dts - dts[0]).tolist(), durations))


class _Shown(NamedTuple):
    """A clip as a reader sees it."""

    times: NDArray[np.float64]  # seconds from its first frame to each
    pictures: Tensor  # its first, middle and last frame
    tick: float  # seconds to which its times are exact


def _shown(media: Media, start: float | None, end: float | None) -> _Shown:
    with open_clip(media, 3, start=start, end=end) as clip:
        context = clip.video.stream.codec_context
        pictures = clip.decode(max(min(context.width, context.height), 1)).frames
        times = clip.index.times[window_of(clip.index.times, start, end, clip.path)]
        return _Shown(times - times[0], pictures, clip.video.tick)


def _alike(one: _Shown, other: _Shown) -> bool:
    within = max(one.tick, other.tick) + 1e-6
    return (
        len(one.times) == len(other.times)
        and np.allclose(one.times, other.times, rtol=0, atol=within)
        and torch.equal(one.pictures, other.pictures)
    )


# --- re-encoding ----------------------------------------------------------------------------


def reencode(path: Path, size: int, start: float | None = None, end: float | None = None) -> Cut:
    """Store the clip's frames at their own times as H.264 in MP4, without sound.

    The shortest side becomes `size` pixels, unless it is smaller; frames are upright and in the
    colours of BT.601. Frames that change their shape, which no stream of one size can show, are
    stored as by `cut`. Raises DecodeError.
    """
    short: int | None = None
    while True:
        try:
            data = _coded(path, size, short, start, end)
            return Cut(Blob(path.with_suffix(".mp4").name, data))
        except _Larger as larger:
            (short,) = larger.args
        except _Impossible as error:
            return cut(path, start, end)._replace(instead=f"not re-encoded: {error.reason}")


class _Larger(Exception):
    """A frame has a longer shortest side, the argument, than the frames encoded so far."""


def _coded(
    path: Path, size: int, short: int | None, start: float | None, end: float | None
) -> bytes:
    """Encode the clip as H.264. short: length of the shortest side; None for the first frame's.
    Raises _Larger or DecodeError."""
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
    except Exception as error:  # of swscale, x264 or the muxer
        raise _Impossible(path, "their frames cannot be encoded") from error
    data = buffer.getvalue()
    try:
        with open_clip(Blob(path.with_suffix(".mp4").name, data), 1) as clip:
            found = clip.index.times
    except DecodeError as error:
        raise _Impossible(path, "their frames cannot be read once they are encoded") from error
    if len(found) != len(times) or not np.allclose(found, times, rtol=0, atol=2 * float(TICKS)):
        raise _Impossible(path, "their times cannot be kept")
    return data


class _Shrink:
    """Conversion of one video's frames to yuv420p in the colours of BT.601, upright, with sides of
    even length."""

    def __init__(self) -> None:
        self.reformatters: dict[tuple[Any, ...], VideoReformatter] = {}

    def __call__(self, frame: VideoFrame, short: int) -> VideoFrame:
        """Convert a frame; short: length of the shortest side."""
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
            planes = turned(torch.from_numpy(_in_bt601(small.to_ndarray(), matrix, full)), turn)
            upright = VideoFrame.from_ndarray(planes.contiguous().numpy(), format="yuv444p")
            small = self._reformat(upright, upright.width, upright.height, "yuv420p")
        small.pict_type = PictureType.NONE  # for the encoder to choose
        return small

    def _reformat(
        self, frame: VideoFrame, width: int, height: int, pixels: str, **colours: int
    ) -> VideoFrame:
        # PyAV 15 keeps the colours of a reformatter's first frame.
        now = (frame.format.name, frame.colorspace, frame.color_range, pixels)
        reformatter = self.reformatters.setdefault(now, VideoReformatter())
        return reformatter.reformat(
            frame, width, height, pixels, interpolation=BICUBIC, **colours, **ONE_THREAD
        )


def _in_bt601(planes: NDArray[Any], matrix: str, full_range: bool) -> NDArray[np.uint8]:
    """Convert Y, U and V, [3, H, W], from another matrix to BT.601's, of the limited range.

    swscale would convert by way of 8-bit RGB, and so clip colours that only one matrix can express.
    """
    black, luma, chroma = (0, 255, 255) if full_range else (16, 219, 224)
    change = np.linalg.inv(to_rgb("bt601")) @ to_rgb(matrix) / [luma, chroma, chroma]
    change *= np.array([[219], [224], [224]])
    offset = np.array([16, 128, 128]) - change @ [black, 128, 128]
    changed = np.tensordot(change.astype(np.float32), planes.astype(np.float32), 1)
    changed += offset.astype(np.float32)[:, None, None]
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)
