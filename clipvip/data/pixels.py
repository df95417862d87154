"""Pixels: decoded frames and images to RGB squares, upright and in their right colours."""

import functools
import re
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data.container import PYAV, File
from clipvip.ops.resize_crop import Colours, resize_crop, resized

CENTRED_CHROMA = frozenset(  # codecs that put chroma between the columns that share it
    {"flv", "h261", "h263", "h263p", "mjpeg", "mpeg1video", "theora", "vp3", "vp4"}
)


class Converter:
    """Frames of one video to RGB squares; keeps swscale's tables between frames."""

    def __init__(self, size: int, codec: str, resize: str = "crop") -> None:
        self.size = size
        self.resize = resize
        self.chroma_left = codec not in CENTRED_CHROMA
        self.reformatter = VideoReformatter()

    def convert(self, frame: VideoFrame, out: NDArray[np.uint8]) -> None:
        """Writes the frame as it is to be shown into out [3, size, size]."""
        swapped, mirrored_x, mirrored_y = orientation(frame)
        turned = swapped or mirrored_x or mirrored_y
        yuv = planes_of(frame, self.chroma_left)
        if yuv is None:
            square = self._by_swscale(frame)
        else:
            planes, colours = yuv
            square = resize_crop(planes, self.size, colours, None if turned else out)
            if not turned:
                return
        if swapped:
            square = square.transpose(0, 2, 1)
        out[:] = square[:, :: -1 if mirrored_y else 1, :: -1 if mirrored_x else 1]

    def _by_swscale(self, frame: VideoFrame) -> NDArray[np.uint8]:
        height, width = resized(frame.height, frame.width, self.size)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        # To packed RGB swscale gives two columns one chroma; but where nothing is to be resized, it
        # leaves last columns of planar RGB unwritten.
        packed = (height, width) == (frame.height, frame.width)
        whole = self.reformatter.reformat(
            frame,
            width,
            height,
            "rgb24" if packed else "gbrp",
            interpolation=Interpolation.BICUBIC,
            **ONE_THREAD,
        )
        rows = [_rows(plane, np.uint8)[top : top + self.size] for plane in whole.planes]
        if packed:
            return np.stack([rows[0][:, 3 * left + c :: 3][:, : self.size] for c in range(3)])
        green, blue, red = (plane[:, left : left + self.size] for plane in rows)
        return np.stack([red, green, blue])


_PLANAR_YUV = re.compile(r"yuv(j?)4(?:20|22|44)p(?:(9|10|12|14|16)le)?")


# By their numbers in H.273, table 4. BT.601 where a file does not say; of BT.2020's two forms the
# one of constant luminance is treated as the other.
MATRIX_NAMES = dict.fromkeys((0, 2, 3, 5, 6), "bt601")


MATRIX_NAMES |= {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}


@functools.lru_cache(maxsize=64)
def _colours(name: str, matrix: int, full_range: bool, chroma_left: bool) -> Colours | None:
    form = _PLANAR_YUV.fullmatch(name)
    if form is None or matrix not in MATRIX_NAMES:
        return None
    full_range = full_range or form[1] == "j"
    return Colours(MATRIX_NAMES[matrix], full_range, int(form[2] or 8), chroma_left)


def planes_of(frame: VideoFrame, chroma_left: bool) -> tuple[list[NDArray[Any]], Colours] | None:
    """The frame's planes and what they mean; None where resize_crop does not take its format."""
    full_range = frame.color_range == ColorRange.JPEG
    colours = _colours(frame.format.name, int(frame.colorspace), full_range, chroma_left)
    planes = frame.planes
    if colours is None or any(plane.line_size < 0 for plane in planes):  # rows from the last on
        return None
    dtype = np.uint8 if colours.bits == 8 else np.uint16
    return [_rows(plane, dtype)[:, : plane.width] for plane in planes], colours


def _rows(plane: VideoPlane, dtype: type) -> NDArray[Any]:
    """With what pads them."""
    return np.frombuffer(memoryview(plane), dtype).reshape(plane.height, -1)


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """(axes swapped, then mirrored left-right, then mirrored top-bottom), of the display matrix."""
    data = _display_matrix(frame)
    if not isinstance(data, SideData):
        return False, False, False
    # Shown x = a·x + c·y and y = b·x + d·y, in 16.16 fixed point, in rows of three.
    a, b, _, c, d = np.frombuffer(memoryview(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def _display_matrix(frame: VideoFrame) -> Any:
    """The frame's own; None where it has none.

    PyAV raises "31 is not a valid Type" over side data that it has no name for, such as EXIF or
    the views of spatial video, and then lists none. That is removed, wherever it stands.
    """
    while True:
        try:
            return frame.side_data.get("DISPLAYMATRIX")
        except ValueError as error:
            unnamed = re.match(r"\d+", str(error))
            if unnamed is None:
                raise
            frame = _without(frame, unnamed[0])


def _without(frame: VideoFrame, kind: str) -> VideoFrame:
    """The frame without side data of one kind, by its number in FFmpeg."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1)
    )
    removal = graph.add("sidedata", mode="delete", type=kind)
    graph.link_nodes(source, removal, graph.add("buffersink")).configure()
    graph.push(frame)
    found = graph.pull()
    assert isinstance(found, VideoFrame)
    return found


def read_image(file: File, size: int, resize: str = "crop") -> Tensor:
    """uint8 [1, 3, size, size]."""
    from PIL import Image, ImageOps

    with Image.open(file.readable()) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    height, width = resized(upright.height, upright.width, size)
    top, left = (height - size) // 2, (width - size) // 2
    whole = upright.resize((width, height), Image.Resampling.BICUBIC)
    square = np.asarray(whole.crop((left, top, left + size, top + size)))
    return torch.from_numpy(square.transpose(2, 0, 1).copy())[None]


# From 17 on PyAV starts a thread a core for every converter where it is not told how many.
ONE_THREAD: dict[str, Any] = {"threads": 1} if PYAV >= 17 else {}
