"""Videos made on the spot; each frame's brightness says which frame it is."""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from clipvip.ops.resize_crop import to_rgb

STEP = 4  # brightness from one frame to the next, so that lossy coding cannot confuse them


@contextmanager
def _usual_priority() -> Iterator[None]:
    """Undo what the encoder of AV1 does as root: it gives this thread real-time priority."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


@_usual_priority()
def _write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    fps: int = 25,
    container: str | None = None,
) -> Path:
    """times: pts in 1/1000 s where frames are not evenly spaced. container: its format, else as
    the path's suffix says."""
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for position, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = position if times is None else times[position]
            frame.time_base = Fraction(1, fps) if times is None else Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    return _write_video


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_video(name, count=…, size=(width, height), **write_video's options) → path."""
    made: dict[str, Path] = {}

    def make(
        name: str, *, count: int = 60, size: tuple[int, int] = (48, 32), **options: Any
    ) -> Path:
        video = repr((name, count, size, sorted(options.items())))
        if video not in made:
            width, height = size
            frames = [np.full((height, width, 3), STEP * i, np.uint8) for i in range(count)]
            path = tmp_path_factory.mktemp("video") / name
            made[video] = _write_video(path, frames, **options)
        return made[video]

    return make


@pytest.fixture
def changing_video(tmp_path: Path) -> Callable[..., Path]:
    """changing_video(name, [(width, height), …], codec=…): ten frames of each size in turn, which
    tell their number by their brightness."""

    @_usual_priority()
    def make(
        name: str,
        sizes: Sequence[tuple[int, int]],
        *,
        codec: str,
        pixel_format: str = "yuv420p",
        options: dict[str, str] | None = None,
    ) -> Path:
        path, shown = tmp_path / name, 0
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options or {})
            for width, height in sizes:
                encoder: Any = stream.codec_context
                if shown:
                    encoder = av.CodecContext.create(codec, "w")
                    encoder.framerate, encoder.time_base = 25, Fraction(1, 25)
                    encoder.options = options or {}
                encoder.width, encoder.height, encoder.pix_fmt = width, height, pixel_format
                for number in range(shown, shown + 10):
                    pixels = np.full((height, width, 3), STEP * number, np.uint8)
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame.pts, frame.time_base = number, Fraction(1, 25)
                    _mux(container, stream, encoder.encode(frame))
                _mux(container, stream, encoder.encode(None))
                shown += 10
        return path

    return make


def _mux(container: Any, stream: Any, packets: list[av.Packet]) -> None:
    for packet in packets:
        packet.stream = stream
        container.mux(packet)


@pytest.fixture
def flat_video(tmp_path: Path) -> Callable[..., tuple[Path, Tensor]]:
    """flat_video(matrix, number, full_range, codec) → a video of the cube of colours, a frame
    each, and what is right of it: int [27, 3, 1, 1]. number: what the file says the matrix is."""

    def make(
        matrix: str, number: int, full_range: bool, codec: str = "libvpx-vp9"
    ) -> tuple[Path, Tensor]:
        cube = np.stack(np.meshgrid(*[[0, 128, 255]] * 3), -1).reshape(-1, 3)
        path, from_rgb = tmp_path / "flat.mkv", np.linalg.inv(to_rgb(matrix))
        black, luma, chroma = (0, 255, 255) if full_range else (16, 219, 224)
        jpeg = codec == "mjpeg"
        options = {"qmin": "1", "qmax": "2"} if jpeg else {"crf": "4", "b": "0", "g": "9"}
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=25, options=options)
            stream.pix_fmt = "yuvj420p" if jpeg else "yuv420p"
            stream.width = stream.height = 64
            stream.codec_context.colorspace, stream.codec_context.color_range = (
                number,
                1 + full_range,
            )
            for count, colour in enumerate(cube):
                y, u, v = from_rgb @ colour / 255
                values = np.array([black + luma * y, 128 + chroma * u, 128 + chroma * v])
                planes = np.repeat(values.round().clip(0, 255), (64 * 64, 32 * 32, 32 * 32))
                frame = av.VideoFrame.from_ndarray(
                    planes.astype(np.uint8).reshape(96, 64), format=stream.pix_fmt
                )
                frame.pts, frame.time_base = count, Fraction(1, 25)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path, torch.from_numpy(cube)[:, :, None, None]

    return make


@pytest.fixture
def turned_video(tmp_path: Path) -> Callable[..., Path]:
    """turned_video((a, b, c, d), codec=…): three frames, stored red top left, green top right,
    blue bottom left, with that display matrix."""

    def make(matrix: tuple[int, int, int, int], codec: str = "libx264") -> Path:
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:16, :32, 0] = pixels[:16, 32:, 1] = pixels[16:, :32, 2] = 255
        frames, path = [pixels] * 3, tmp_path / f"turned-{codec}.mp4"
        return _turn(_write_video(path, frames, codec=codec, pixel_format="yuv444p"), matrix)

    return make


def _turn(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Give an MP4 the display matrix (a, b, c, d)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="session")
def turn() -> Callable[[Path, tuple[int, int, int, int]], Path]:
    return _turn


@pytest.fixture(scope="session")
def numbers() -> Callable[[Tensor], list[int]]:
    """Which frames of a made video these are: uint8 [N, 3, S, S] → N numbers."""

    def read(frames: Tensor) -> list[int]:
        return (frames.float().mean((1, 2, 3)) / STEP).round().int().tolist()

    return read


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A CLIP tokenizer whose words are single bytes: no vocabulary to fetch."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
