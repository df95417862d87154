"""Decoding by NVIDIA DALI in the main process: on a GPU's video engine, or on the CPU.

`choose_engine` and `start_engine` say where DALI decodes, if at all. `DaliDecoder` decodes batches
of clips that worker processes prepared (encode.py). On the CPU, DALI decodes few codecs.
"""

import ctypes
import functools
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from typing import Any

import av
import numpy as np
import torch
from av.codec.codec import UnknownCodecError
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data import DECODERS
from clipvip.data.video.container import Blob
from clipvip.data.video.decode import Frames, open_clip
from clipvip.data.video.encode import CPU, GPU, Encoded, Engine, encode
from clipvip.data.video.pixels import turned
from clipvip.ops.resize_crop import Axis, on_black, placed, resize_frames

logger = logging.getLogger(__name__)

AV1_SINCE = (8, 6)  # compute capability
THREADS = 8  # that feed a GPU's engines
AT_ONCE = 1 << 30  # bytes of full-size frames that are decoded at once
PART = ("size", "begin", "end")  # inputs of the pipeline that say how frames are resized


class DaliError(ValueError):
    """DALI was asked for and is not available."""


def choose_engine(decoder: str) -> Engine | None:
    """Return the engine for `decoder`, one of DECODERS; None for PyAV.

    "auto" chooses DALI where there is a GPU with a video engine. Raises DaliError for "dali" where
    it is not installed, or cannot reach the GPU's video engine.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder is {decoder!r}; expected one of {', '.join(DECODERS)}")
    if decoder == "pyav":
        return None
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    gpu = torch.cuda.is_available()
    if decoder == "auto" and not (installed and gpu and _has_nvdec()):
        return None
    if not installed:
        raise DaliError('decoder is "dali", which is not installed: pip install "clipvip[dali]"')
    if not gpu:
        return CPU
    if not _has_nvdec():
        raise DaliError(
            'decoder is "dali", but the driver\'s video library (libnvcuvid.so.1) is not found; '
            "a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    with_av1 = torch.cuda.get_device_capability() >= AV1_SINCE
    return GPU if with_av1 else GPU._replace(codecs=GPU.codecs - {"av1"})


def start_engine(decoder: str) -> Engine | None:
    """Return the engine that choose_engine chooses, after DALI has decoded a small clip on it.

    If it cannot, "auto" falls back to PyAV (None) and logs why; "dali" raises DaliError.
    """
    engine = choose_engine(decoder)
    problem = None if engine is None else _problem(engine)
    if problem is None:
        return engine
    if decoder == "dali":
        raise DaliError(f'decoder is "dali", which cannot start ({problem}); use auto or pyav')
    _warn_once(f"DALI cannot start ({problem}): PyAV decodes all clips")
    return None


@functools.cache
def _problem(engine: Engine) -> str | None:
    """Return the reason why DALI cannot decode on an engine; None where it can."""
    try:
        with open_clip(Blob("the clip that DALI starts with", _sample(engine)), 1) as clip:
            encoded = encode(clip, engine)
        (frames,) = DaliDecoder(encoded.height, engine).decode([encoded])
    except UnknownCodecError:  # PyAV was built without the encoder that makes the clip
        return None
    except Exception as error:  # raised by DALI, its libraries or the driver
        return _reason(error)
    return frames if isinstance(frames, str) else None


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def _sample(engine: Engine) -> bytes:
    """Make a video file of one frame, to try DALI with."""
    buffer = io.BytesIO()
    codec, pixels = ("libx264", "yuv420p") if engine.device == "gpu" else ("mjpeg", "yuvj420p")
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 176, 144, pixels
        black = np.zeros((144 * 3 // 2, 176), np.uint8)
        out.mux(stream.encode(VideoFrame.from_ndarray(black, format=pixels)))
        out.mux(stream.encode())
    return buffer.getvalue()


def _has_nvdec() -> bool:
    """Return whether the driver's video library is there; containers may lack it."""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return False
    return True


class DaliDecoder:
    """Decoder of clips to squares, resized as clipvip.ops.resize_crop says.

    threads: number of threads for decoding on the CPU. On a GPU it uses the device that is current
    when it is created.
    """

    def __init__(self, size: int, engine: Engine, threads: int = 1, resize: str = "crop") -> None:
        self.size = size
        self.resize = resize
        on_gpu = engine.device == "gpu"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        self._threads = THREADS if on_gpu else max(threads, 1)
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._pipeline: Any = None
        self._most = 0

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
        if self._pipeline is None or len(clips) > self._most:
            self._most = max(len(clips), self._most)
            self._pipeline = self._build(self._most)
        try:
            packed = self._run(clips)
        except RuntimeError as error:
            # The pipeline is invalid now, and the other clips' frames are lost: decode each half of
            # the clips again, until the clip that fails is alone.
            self._pipeline = None
            if len(clips) == 1:
                return [_reason(error)]
            half = len(clips) // 2
            return [*self._decode(clips[:half]), *self._decode(clips[half:])]
        parts = packed.split([len(clip.chosen.positions) for clip in clips])
        return [
            Frames(*clip.chosen.split(turned(part, clip.turn)))
            for part, clip in zip(parts, clips, strict=True)
        ]

    def _run(self, clips: Sequence[Encoded]) -> Tensor:
        """Decode all clips' frames, one after another: uint8 [F, 3, size, size]."""
        axes = [
            placed(clip.height, clip.width, self.size, self.resize, clip.turn) for clip in clips
        ]
        inputs: dict[str, list[NDArray[Any]]] = {
            "data": [clip.data.numpy() for clip in clips],
            "frames": [clip.chosen.positions for clip in clips],
        }
        if self.resize != "squash":
            parts = [_part(clip, sides) for clip, sides in zip(clips, axes, strict=True)]
            inputs |= {name: [part[name] for part in parts] for name in PART}
        (given,) = self._pipeline.run(**inputs)
        frames = [torch.from_dlpack(given[i]).permute(0, 3, 1, 2) for i in range(len(clips))]
        counts = [len(part) for part in frames]
        wanted = [len(clip.chosen.positions) for clip in clips]
        if counts != wanted:
            raise RuntimeError(f"gave {counts} frames of {wanted}")
        packed = torch.cat(list(map(self._squares, frames, axes)))
        if self._stream is not None:
            self._stream.synchronize()  # the next run overwrites the pipeline's frames
        return packed

    def _squares(self, frames: Tensor, axes: tuple[Axis, Axis]) -> Tensor:
        if self.resize == "squash":
            return resize_frames(frames, self.size, self.resize)
        return on_black(frames, axes, self.size)

    def _build(self, most: int) -> Any:
        """Build DALI's pipeline for up to `most` clips at once."""
        from nvidia.dali import Pipeline, fn, types

        gpu = self._stream is not None
        pipeline = Pipeline(
            batch_size=most,
            num_threads=self._threads,
            device_id=self.device.index if isinstance(self.device, torch.device) else None,
            prefetch_queue_depth=1,
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
    """Split clips into portions whose full-size frames fit into AT_ONCE bytes."""
    first, total = 0, 0
    for last, clip in enumerate(clips):
        size = 3 * clip.width * clip.height * len(clip.chosen.positions)
        if total and total + size > AT_ONCE:
            yield clips[first:last]
            first, total = last, 0
        total += size
    if clips:
        yield clips[first:]


def _part(clip: Encoded, axes: tuple[Axis, Axis]) -> dict[str, NDArray[np.float32]]:
    """Return the part of a clip's frames that is shown, from `begin` (top, left) to `end` (bottom,
    right), and the size that it is resized to."""
    whole, first, kept, _ = np.array(tuple(zip(*axes, strict=True)), np.float32)
    unit = np.array([clip.height, clip.width], np.float32) / whole
    return {"size": kept, "begin": first * unit, "end": (first + kept) * unit}


def _reason(error: Exception) -> str:
    """Return DALI's message without the lines around it."""
    text = str(error)
    said = text.partition("encountered:")[2].strip() or text.strip()
    return f"DALI: {said.splitlines()[0] if said else 'an error without words'}"
