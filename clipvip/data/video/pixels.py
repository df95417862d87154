"""Pixels: decoded frames and images to RGB squares, upright and in their right colours.

An image file is one frame, the first of an animated one (WebP, PNG). A GIF is a video.
"""

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from clipvip.data.video.container import PYAV, DecodeError, File, too_large
from clipvip.ops.resize_crop import UPRIGHT, Colours, Turn, resize_crop

if TYPE_CHECKING:
    from PIL.Image import Image

CENTRED_CHROMA = frozenset(  # codecs that put chroma between the columns that share it
    {"flv", "h261", "h263", "h263p", "mjpeg", "mpeg1video", "theora", "vp3", "vp4"}
)


class Converter:
    """Conversion of one video's frames to RGB squares; keeps swscale's tables between frames."""

    def __init__(self, size: int, codec: str, resize: str = "crop") -> None:
        self.size = size
        self.resize = resize
        self.chroma_left = codec not in CENTRED_CHROMA
        self.reformatter = VideoReformatter()

    def convert(self, frame: VideoFrame, out: NDArray[np.uint8]) -> None:
        """Write the frame, upright, into out, uint8 [3, size, size]."""
        planes, colours = planes_of(frame, self.chroma_left) or self._by_swscale(frame)
        turn = orientation(frame)
        resize_crop(planes, self.size, colours, out, resize=self.resize, turn=turn)

    def _by_swscale(self, frame: VideoFrame) -> tuple[list[NDArray[Any]], Colours]:
        """Return red, green and blue of a frame whose format resize_crop does not take."""
        packed = self.reformatter.reformat(
            frame, format="rgb24", interpolation=Interpolation.BICUBIC, **ONE_THREAD
        )
        rows = _rows(packed.planes[0], np.uint8)[:, : 3 * packed.width]
        return [np.ascontiguousarray(rows[:, c::3]) for c in range(3)], Colours("rgb")


# Alpha is ignored, as in images.
_PLANAR_YUV = re.compile(r"yuv([aj]?)4(?:20|22|44)p(?:(9|10|12|14|16)le)?")
_PLANAR_RGB = re.compile(r"gbra?p(?:(9|10|12|14|16)le)?")


# Matrices by their numbers in H.273, table 4; BT.601 where a file states none. BT.2020 is treated
# alike with constant luminance and without.
MATRIX_NAMES = dict.fromkeys((0, 2, 3, 5, 6), "bt601")
MATRIX_NAMES |= {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}


@functools.lru_cache(maxsize=64)
def _colours(name: str, matrix: int, full_range: bool, chroma_left: bool) -> Colours | None:
    if rgb := _PLANAR_RGB.fullmatch(name):
        return Colours("rgb", bits=int(rgb[1] or 8))
    yuv = _PLANAR_YUV.fullmatch(name)
    if yuv is None or matrix not in MATRIX_NAMES:
        return None
    full_range = full_range or yuv[1] == "j"
    return Colours(MATRIX_NAMES[matrix], full_range, int(yuv[2] or 8), chroma_left)


def planes_of(frame: VideoFrame, chroma_left: bool) -> tuple[list[NDArray[Any]], Colours] | None:
    """Return the frame's planes and their colours; None where resize_crop does not take them."""
    full_range = frame.color_range == ColorRange.JPEG
    colours = _colours(frame.format.name, int(frame.colorspace), full_range, chroma_left)
    planes = frame.planes[:3]
    if colours is None or any(plane.line_size < 0 for plane in planes):  # bottom up
        return None
    dtype = np.uint8 if colours.bits == 8 else np.uint16
    pixels = [_rows(plane, dtype)[:, : plane.width] for plane in planes]
    if colours.matrix == "rgb":  # stored as green, blue, red
        pixels = [pixels[2], *pixels[:2]]
    return pixels, colours


def _rows(plane: VideoPlane, dtype: type) -> NDArray[Any]:
    """Return the rows of a plane, with their padding."""
    return np.frombuffer(memoryview(plane), dtype).reshape(plane.height, -1)


def orientation(frame: VideoFrame) -> Turn:
    """Return the turn that shows the frame upright, by its display matrix."""
    data = _display_matrix(frame)
    if not isinstance(data, SideData):
        return UPRIGHT
    # Shown x = a·x + c·y and y = b·x + d·y, in 16.16 fixed point, in rows of three.
    a, b, _, c, d = np.frombuffer(memoryview(data), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def turned(frames: Tensor, turn: Turn) -> Tensor:
    """Return frames, or planes, [N, ..., H, W], turned upright."""
    swapped, mirrored_x, mirrored_y = turn
    frames = frames.mT if swapped else frames
    axes = [axis for axis, mirrored in ((-1, mirrored_x), (-2, mirrored_y)) if mirrored]
    return frames.flip(axes) if axes else frames


def _display_matrix(frame: VideoFrame) -> Any:
    """Return the frame's display matrix; None where it has none.

    PyAV raises "31 is not a valid Type" for side data that it has no name for, such as EXIF or the
    views of spatial video, and then lists no side data at all. Such data is removed first.
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
    """Return the frame without side data of one kind, by its number in FFmpeg."""
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


# Pillow recognises more formats, by content and not by name; for EPS it runs Ghostscript.
IMAGE_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "TIFF", "WEBP")
# Scans of a progressive JPEG; each may be a few bytes and takes as long as a whole image.
MOST_SCANS = 500


@contextmanager
def open_image(file: File) -> "Iterator[Image]":
    """Open an image of one of IMAGE_FORMATS, without decoding it. Raises DecodeError where decoding
    it would take too much memory or time."""
    from PIL import Image, UnidentifiedImageError

    Image.init()  # some builds lack some formats
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file.readable(), formats=formats)
    except UnidentifiedImageError:  # its message names a Python object for bytes in memory
        raise DecodeError(file.path, "not an image of a known format") from None
    with image:
        reason = too_large(*image.size)
        if reason is None and image.format in ("JPEG", "MPO") and _scans(file) > MOST_SCANS:
            reason = f"a JPEG of more than {MOST_SCANS} scans"
        if reason is not None:
            raise DecodeError(file.path, reason)
        yield image


def _scans(file: File) -> int:
    """Count the scans of a JPEG, by their markers."""
    with file.binary() as source:
        return sum(piece.count(b"\xff\xda") for piece in iter(lambda: source.read(1 << 20), b""))


def read_image(file: File, size: int, resize: str = "crop") -> Tensor:
    """Read an image as a square: uint8 [1, 3, size, size]."""
    with open_image(file) as image:
        pixels = rgb_of(image)
    planes = [np.ascontiguousarray(pixels[..., colour]) for colour in range(3)]
    return torch.from_numpy(resize_crop(planes, size, Colours("rgb"), resize=resize))[None]


def rgb_of(image: "Image") -> NDArray[np.uint8]:
    """Return pixels, uint8 [H, W, 3], of an image of any mode, upright by its EXIF.

    Alpha is dropped, which shows the colours below it, as in CLIP's own preprocessing. Greys of 16
    bits, which Pillow would clip, are scaled; floating-point greys range from 0 to 255.
    """
    from PIL import ExifTags, ImageOps

    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    upright = ImageOps.exif_transpose(image) if turned else image  # which would copy it
    if upright.mode.startswith("I"):  # I;16, or I when read from some files
        grey = np.clip(np.asarray(upright), 0, 65535).astype(np.float32)
        grey /= 257
        return np.repeat(grey.round(out=grey).astype(np.uint8)[..., None], 3, 2)
    if upright.mode == "La":  # Pillow converts it to LA only
        upright = upright.convert("LA")
    elif upright.mode == "P":  # or Pillow warns that it drops alpha
        upright = upright.convert("RGBA")
    return np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))


# PyAV 17 and newer starts a thread per core for each converter by default.
ONE_THREAD: dict[str, Any] = {"threads": 1} if PYAV >= 17 else {}
