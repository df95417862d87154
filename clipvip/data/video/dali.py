"""Decoding by NVIDIA DALI: clips prepared in workers, decoded in the main process.

Worker processes cannot share the main process's GPU. So a worker does all but decoding (`encode`):
it opens the file, chooses the frames as any reader does, and copies the packets that they need into
a small Matroska file in memory, in which frames are numbered in the order of showing. In this way
one demuxer, PyAV's, decides which frame is which, whatever edit lists, times or cut ends a file
has. The main process decodes batches of them (`DaliDecoder`), on a GPU's video engine or on the
CPU, where DALI decodes few codecs. engines.py says which, if any.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data.video.container import (
    NAL,
    DecodeError,
    File,
    Stamps,
    open_file,
    remux,
)
from clipvip.data.video.decode import Frames, OpenClip
from clipvip.data.video.headers import CHANGED, difference, is_reset
from clipvip.data.video.pixels import MATRIX_NAMES, orientation, turned
from clipvip.data.video.sampling import Choice
from clipvip.ops.resize_crop import Axis, Turn, on_black, placed, resize_frames

logger = logging.getLogger(__name__)

THREADS = 8  # that feed a GPU's engines
AT_ONCE = 2 << 30  # bytes of memory that decoding takes at once
# What DALI holds per clip on a GPU: full-size RGB frames that wait for their turn to be shown, and
# at most these surfaces of the video engine, in YUV 4:2:0.
WAITING, SURFACES = 8, 20
PART = ("size", "begin", "end")  # inputs of the pipeline that say how frames are resized
TICKS = Fraction(1, 1000)  # seconds per tick of the copies
STEP = 40  # ticks between frames
FAILURES = 3  # clips of one codec and size, with none decoded, after which DALI leaves it to PyAV
IN_A_ROW = 32  # failures of any codec and size after which DALI leaves all clips to PyAV

Kind = tuple[str, int, int]  # codec, width, height


class Engine(NamedTuple):
    """A device that DALI decodes on, and the codecs and pixel formats that it decodes there, by
    FFmpeg's names. refused: codecs and sizes that it turned out to fail on."""

    device: Literal["cpu", "gpu"]
    codecs: frozenset[str]
    pixels: frozenset[str]
    refused: frozenset[Kind] = frozenset()


# --- in a worker process --------------------------------------------------------------------


@dataclass(slots=True)
class Encoded:
    """Frames of a clip, not decoded yet."""

    kind: Kind
    data: Tensor  # uint8 [bytes], a Matroska file
    chosen: Choice  # the wanted frames, int32 [N], counted in the file in the order of showing
    width: int  # of the stored frames; the file may hold more, at their right and lower edges
    height: int
    turn: Turn  # turns them upright


class Refused(DecodeError):
    """A clip that DALI cannot decode; PyAV may."""


DAMAGED, OUT_OF_ORDER = "damaged", "frames out of order"


def encode(clip: OpenClip, engine: Engine) -> Encoded:
    """Prepare the clip's frames for DALI on `engine`. Raises Refused, or errors of PyAV."""
    path, head = clip.path, clip.video.stream.codec_context
    codec = head.codec.canonical_name
    kind = codec, head.width, head.height
    if codec not in engine.codecs:
        raise Refused(path, f"{codec} on the {engine.device.upper()}")
    if kind in engine.refused:
        raise Refused(path, _failing(kind))
    if clip.index.by_count:
        raise Refused(path, "no times of showing in the file")
    if clip.index.lost:
        raise Refused(path, DAMAGED)
    _check_colours(path, head.colorspace)
    positions = clip.chosen.positions
    wanted = clip.index.shown[positions]
    # Half a tick later, or rounding could lead to the keyframe before.
    first = clip.index.times[positions.min()] + clip.video.tick / 2
    with clip.video.reopened() as video:
        stream = video.stream
        stated = stream.codec_context.width, stream.codec_context.height
        packets = _needed(video.packets_from(first), set(wanted.tolist()), stream)
        # A GPU shows something in place of what is missing, without an error.
        if any(packet.is_corrupt for packet in packets):
            raise Refused(path, DAMAGED)
        if packets and (problem := difference(stream, packets)):
            raise Refused(path, problem)
        frame = _first_frame(packets)
        if frame is None:
            raise Refused(path, OUT_OF_ORDER)
        if (frame.width, frame.height) != stated:  # DALI allocates what the file states
            raise Refused(path, CHANGED)
        _check_picture(path, frame, engine)
        times = np.array([packet.pts for packet in packets], np.int64)
        shown, order = np.unique(times, return_inverse=True)
        if len(shown) < len(times):
            raise Refused(path, "two frames at one time")
        delay = int((np.arange(len(packets)) - order).max())  # none is shown before it is decoded
        if engine.device == "gpu" and delay >= WAITING:  # DALI would show the next one first
            raise Refused(path, OUT_OF_ORDER)
        stamps = [
            Stamps((place + delay) * STEP, decoded * STEP, STEP)
            for decoded, place in enumerate(order.tolist())
        ]
        coded = stream.codec_context.coded_width, stream.codec_context.coded_height
        whole = coded if engine.device == "gpu" and codec in NAL and coded != stated else None
        data = remux(stream, packets, stamps, TICKS, "matroska", whole)
    if whole is not None:
        _check_whole(path, data, whole)
    numbers, middle = clip.chosen.split(np.searchsorted(shown, wanted).astype(np.int32))
    chosen = Choice(numbers, None if middle is None else int(middle))
    file = torch.frombuffer(data, dtype=torch.uint8)
    return Encoded(kind, file, chosen, frame.width, frame.height, orientation(frame))


def _failing(kind: Kind) -> str:
    codec, width, height = kind
    return f"DALI fails on {codec} of {width} × {height}"


def _check_whole(path: Path, data: memoryview, whole: tuple[int, int]) -> None:
    """Raise Refused unless a file's frames are of the size `whole`. They are smaller where the left
    or upper edge of the coded pictures is cut off too."""
    with open_file(File(path, bytes(data))) as copy:
        frame = _first_frame(list(copy.packets()))
    if frame is None or (frame.width, frame.height) != whole:
        raise Refused(path, "a cut left or upper edge")


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
    """Return packets in decoding order, from the first keyframe to the last wanted pts, without the
    stretches between resets in which none is wanted. Return none if a wanted one is missing."""
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


# --- in the main process --------------------------------------------------------------------


class DaliDecoder:
    """Decoder of clips to squares, resized as clipvip.ops.resize_crop says.

    threads: number of threads for decoding on the CPU. On a GPU it uses the device that is current
    when it is created.
    """

    def __init__(self, size: int, engine: Engine, threads: int = 1, resize: str = "crop") -> None:
        self.size = size
        self.resize = resize
        self.engine: Engine | None = engine
        on_gpu = engine.device == "gpu"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        self._threads = THREADS if on_gpu else max(threads, 1)
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._pipeline: Any = None
        self._most = 0
        self._decoded: set[Kind] = set()
        self._failed: Counter[Kind] = Counter()
        self._in_a_row = 0

    def decode(self, clips: Sequence[Encoded]) -> list[Frames | str]:
        """Return each clip's frames, on the device; or the reason why DALI could not decode it."""
        with self.apart():
            return list(chain.from_iterable(map(self._decode, _portions(clips))))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Run the GPU's work within on a stream of its own, and wait for it at the end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def _decode(self, clips: Sequence[Encoded]) -> list[Frames | str]:
        """Decode all clips at once, except for those that DALI is known to fail on."""
        reasons = [self._refusal(clip.kind) for clip in clips]
        tried = [clip for clip, why in zip(clips, reasons, strict=True) if why is None]
        decoded = iter(self._try(tried) if tried else [])
        return [next(decoded) if why is None else why for why in reasons]

    def _refusal(self, kind: Kind) -> str | None:
        if self.engine is None:
            return "DALI fails on all clips"
        return _failing(kind) if kind in self.engine.refused else None

    def _try(self, clips: Sequence[Encoded]) -> list[Frames | str]:
        try:
            if self._pipeline is None or len(clips) > self._most:
                self._pipeline = None  # its memory is free before the next one takes some
                self._most = max(len(clips), self._most)
                self._pipeline = self._build(self._most)
            packed = self._run(clips)
        except Exception as error:  # raised by DALI, its libraries or the driver
            reason = reason_of(error)
        else:
            return self._unpacked(packed, clips)
        # The error has let go of the memory it held. The pipeline is invalid now, and the other
        # clips' frames are lost: decode each half of the clips again, until the clip that fails is
        # alone.
        if self._pipeline is None:
            self._most = 0  # so many at once may be too many
        self._pipeline = None
        if len(clips) == 1:
            self._note_failure(clips[0].kind, reason)
            return [reason]
        half = len(clips) // 2
        return [*self._decode(clips[:half]), *self._decode(clips[half:])]

    def _unpacked(self, packed: Tensor, clips: Sequence[Encoded]) -> list[Frames | str]:
        self._decoded.update(clip.kind for clip in clips)
        self._in_a_row = 0
        parts = packed.split([len(clip.chosen.positions) for clip in clips])
        return [
            Frames(*clip.chosen.split(turned(part, clip.turn)))
            for part, clip in zip(parts, clips, strict=True)
        ]

    def _note_failure(self, kind: Kind, reason: str) -> None:
        """Count a clip that failed alone. Where no end of failures is in sight, leave the kind, or
        all clips, to PyAV."""
        self._failed[kind] += 1
        self._in_a_row += 1
        if self.engine is None:
            return
        if self._in_a_row >= IN_A_ROW:
            self.engine = None
            said = "DALI failed on %d clips in a row (%s): PyAV decodes all clips from here on"
            logger.warning(said, IN_A_ROW, reason)
        elif self._failed[kind] >= FAILURES and kind not in self._decoded:
            self.engine = self.engine._replace(refused=self.engine.refused | {kind})
            logger.warning("%s (%s): PyAV decodes these clips", _failing(kind), reason)

    def _run(self, clips: Sequence[Encoded]) -> Tensor:
        """Decode all clips' frames, one after another: uint8 [F, 3, size, size]."""
        axes = [
            placed(clip.height, clip.width, self.size, self.resize, clip.turn) for clip in clips
        ]
        positions = [clip.chosen.positions for clip in clips]
        shapes = [np.array([clip.height, clip.width], np.int32) for clip in clips]
        data = [clip.data.numpy() for clip in clips]
        inputs: dict[str, list[Any]] = {"data": data, "frames": positions, "shape": shapes}
        if self.resize != "squash":
            parts = [_part(clip, sides) for clip, sides in zip(clips, axes, strict=True)]
            inputs |= {name: [part[name] for part in parts] for name in PART}
        (given,) = self._pipeline.run(**inputs)
        frames = [torch.from_dlpack(given[i]).permute(0, 3, 1, 2) for i in range(len(clips))]
        counts, wanted = list(map(len, frames)), list(map(len, positions))
        if counts != wanted:
            raise RuntimeError(f"gave {counts} frames of {wanted}")
        if self.resize == "squash":
            packed = torch.cat([resize_frames(each, self.size, self.resize) for each in frames])
        else:
            packed = torch.cat(
                [on_black(*each, self.size) for each in zip(frames, axes, strict=True)]
            )
        if self._stream is not None:
            self._stream.synchronize()  # the next run overwrites the pipeline's frames
        return packed

    def _build(self, most: int) -> Any:
        """Build DALI's pipeline for up to `most` clips at once."""
        from nvidia.dali import Pipeline, fn, types

        gpu = self._stream is not None
        device = self.device.index if isinstance(self.device, torch.device) else None
        pipeline = Pipeline(
            batch_size=most, num_threads=self._threads, device_id=device, prefetch_queue_depth=1
        )
        with pipeline:
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1, no_copy=True)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            # With "none" a frame past the end is an error, not a black frame.
            decoded = fn.decoders.video(
                data,
                frames=frames,
                pad_mode="none",
                device="mixed" if gpu else "cpu",
                affine=False,  # or all ranks of a machine would share the same few cores
            )
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            decoded = fn.slice(decoded, start=[0, 0], shape=shape, axes=[1, 2])
            if self.resize != "squash":  # DALI has no filter like that of "squash"
                size, begin, end = (
                    fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in PART
                )
                decoded = fn.resize(
                    decoded,
                    size=size,
                    roi_start=begin,
                    roi_end=end,
                    interp_type=types.INTERP_CUBIC,
                    antialias=True,
                )
            pipeline.set_outputs(decoded)
        pipeline.build()
        return pipeline


def _portions(clips: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    """Split clips into portions that decoding takes at most AT_ONCE bytes for, or of one clip."""
    first, total = 0, 0
    for last, clip in enumerate(clips):
        size = _memory(clip)
        if total and total + size > AT_ONCE:
            yield clips[first:last]
            first, total = last, 0
        total += size
    if clips:
        yield clips[first:]


def _memory(clip: Encoded) -> int:
    """Return an upper bound of the bytes that decoding a clip takes: its frames, as decoded and
    without their hidden edges, and what a GPU holds besides."""
    rgb = 3 * (2 * len(clip.chosen.positions) + WAITING)
    pixels = math.ceil(clip.width / 16) * math.ceil(clip.height / 16) * 256
    return pixels * (rgb + SURFACES * 3 // 2)


def _part(clip: Encoded, axes: tuple[Axis, Axis]) -> dict[str, NDArray[np.float32]]:
    """Return the part of a clip's frames that is shown, from `begin` (top, left) to `end` (bottom,
    right), and the size that it is resized to."""
    whole, first, kept, _ = np.array(tuple(zip(*axes, strict=True)), np.float32)
    unit = np.array([clip.height, clip.width], np.float32) / whole
    return {"size": kept, "begin": first * unit, "end": (first + kept) * unit}


def reason_of(error: Exception) -> str:
    """Return DALI's message without the lines around it."""
    text = str(error)
    said = text.partition("encountered:")[2].strip() or text.strip()
    return f"DALI: {said.splitlines()[0] if said else 'an error without words'}"
