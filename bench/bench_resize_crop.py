"""A decoded frame to an RGB square of 224: `clipvip bench ops --only resize_crop`.

Frames are 8-bit 4:2:0 of common sizes, one of which needs no resizing. Each contestant has one
thread, like a loader's worker. "naive" is the usual way: the whole frame to RGB, then an
antialiased resize of a uint8 tensor. swscale makes the whole resized frame, packed or planar,
because PyAV cannot ask for a part. The content is smooth, so that filters of different sharpness
agree.
Records: ops-resize_crop-*.
"""

from collections.abc import Callable
from typing import Any

import av
import harness
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor

from clipvip.data.video.pixels import ONE_THREAD, Converter, planes_of
from clipvip.ops.resize_crop import resize_crop_reference, resized

SIZE = 224
CASES = {
    f"{width}x{height}-default": dict(width=width, height=height)
    for width, height in ((298, 224), (320, 240), (640, 360), (1280, 720), (1920, 1080))
}
QUICK: dict[str, dict] = {"320x240-default": {}}


def made(width: int, height: int) -> av.VideoFrame:
    """Return a frame with a pattern of waves, in the format that a decoder gives."""
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, phase in zip(frame.planes, (0.0, 1.0, 2.0), strict=True):
        y, x = (np.linspace(0, 8 * np.pi, n, dtype=np.float32) for n in (plane.height, plane.width))
        waves = 128 + 24 * np.sin(x + phase) + 24 * np.cos(y[:, None] - phase)
        pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        pixels[:, : plane.width] = waves.round()
    return frame


def cut(pixels: Tensor) -> Tensor:
    """[…, H, W] → contiguous […, SIZE, SIZE]."""
    top, left = ((side - SIZE) // 2 for side in pixels.shape[-2:])
    return pixels[..., top : top + SIZE, left : left + SIZE].contiguous()


def naive(frame: av.VideoFrame) -> Tensor:
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24", **ONE_THREAD)).permute(2, 0, 1)[None]
    sides = resized(frame.height, frame.width, SIZE)
    return cut(F.interpolate(pixels, sides, mode="bicubic", antialias=True)[0])


def pil(frame: av.VideoFrame) -> Tensor:
    height, width = resized(frame.height, frame.width, SIZE)
    image = frame.to_image(**ONE_THREAD).resize((width, height), Image.Resampling.BICUBIC)
    return cut(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def swscale(pixels: str) -> Callable[[av.VideoFrame], Tensor]:
    reformatter = VideoReformatter()

    def convert(frame: av.VideoFrame) -> Tensor:
        height, width = resized(frame.height, frame.width, SIZE)
        whole = reformatter.reformat(
            frame, width, height, pixels, interpolation="BICUBIC", **ONE_THREAD
        )
        array = torch.from_numpy(whole.to_ndarray())  # [H, W, 3]
        return cut(array.permute(2, 0, 1))

    return convert


def ours() -> Callable[[av.VideoFrame], Tensor]:
    converter = Converter(SIZE, "mjpeg")  # chroma is centred between luma, as swscale assumes here

    def convert(frame: av.VideoFrame) -> Tensor:
        out = torch.empty(3, SIZE, SIZE, dtype=torch.uint8)
        converter.convert(frame, out.numpy())
        return out

    return convert


def measure(width: int, height: int, budget: float = 8.0) -> dict[str, Any]:
    """Time every contestant on one frame, in this process."""
    torch.set_num_threads(1)
    frame = made(width, height)
    found = planes_of(frame, chroma_left=False)  # a frame that no decoder made does not tell
    assert found is not None
    planes, colours = found
    forms = {
        "naive": naive,
        "PIL": pil,
        "swscale": swscale("rgb24"),
        "swscale planar": swscale("gbrp"),
        "ours": ours(),
    }
    return harness.compare(
        {name: lambda form=form: [form(frame)] for name, form in forms.items()},
        expected=[torch.from_numpy(resize_crop_reference(planes, SIZE, colours))],
        tolerance=0.03,
        work={"bytes": sum(plane.size for plane in planes) + 3 * SIZE * SIZE},
        seconds=budget,
    )


@pytest.mark.parametrize("case", CASES)
def test_resize_crop(case: str, run_case) -> None:
    run_case(CASES[case])
