"""Frames to RGB squares: resizing, placing and colours in one pass.

A model reads squares. `resize` says how a frame becomes one:

- `"crop"`: CLIP's own way. The shortest side becomes the square's, then the centre is cut out.
- `"pad"`: the longest side becomes the square's; black bars lie beside it.
- `"squash"`: the whole frame becomes the square, whatever its shape, as in the code of CLIP-ViP's
  authors. Their checkpoints have been trained on this.

Crop and pad filter as PIL and CLIP's preprocessing do: bicubic with a = -½, widened where a frame
shrinks. Squash filters as torchvision resized tensors in 2022 (torch.nn.functional.interpolate
without antialiasing): bicubic with a = -¾ over four pixels, however much a frame shrinks. The
authors kept fractions and values beyond white and black; here they are rounded and clipped.

A decoded frame comes as three planes, luma and two of chroma that are often smaller. Each is
filtered straight from its own size to the target, only for the part that is kept, then the colours
are computed (ITU-T H.273, 8.3), in floating point and rounded once. `resize_crop_reference` is the
same in float64.
"""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clipvip.ops import _native

TOGETHER = 8  # frames that are floating-point numbers at a time
_DTYPES = {np.dtype(name): i for name, i in (("f4", 0), ("i4", 3), ("u1", 4), ("u2", 5))}  # csrc
MATRICES = {
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "bt601": (0.299, 0.114),
    "smpte240m": (0.212, 0.087),
    "bt2020": (0.2627, 0.0593),
}
"""Shares of red and blue in luma, K_R and K_B."""

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


class Colours(NamedTuple):
    """How a frame's numbers stand for colours.

    matrix: one of MATRICES, or "rgb" where the planes are red, green and blue themselves, of full
    range. full_range: black is 0 and not 16 (of 8 bits). chroma_left: chroma lies on the left of
    the luma columns that share it (MPEG-2, H.264 and newer), else between them (JPEG, MPEG-1).
    """

    matrix: str = "bt601"
    full_range: bool = False
    bits: int = 8
    chroma_left: bool = True


RESIZES = ("crop", "squash", "pad")

Turn = tuple[bool, bool, bool]
"""From a frame as stored to how it is shown: axes swapped, then mirrored left-right, then mirrored
top-bottom."""
UPRIGHT: Turn = (False, False, False)


def check_resize(resize: str) -> None:
    """Raise ValueError for anything but one of RESIZES."""
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; expected one of {', '.join(RESIZES)}")


def check_compiled() -> None:
    """Raise RuntimeError or ValueError, with what to do, where the kernel cannot run."""
    _native.module().cpu_capability()


def resize_crop(
    planes: Sequence[Pixels],
    size: int,
    colours: Colours,
    out: NDArray[np.uint8] | None = None,
    *,
    resize: str = "crop",
    turn: Turn = UPRIGHT,
) -> NDArray[np.uint8]:
    """A decoded frame as a square in RGB, upright.

    planes: Y [H, W], U and V [H or ⌈H/2⌉, W or ⌈W/2⌉]; uint8, or uint16 where colours.bits is
    more than 8, in the machine's byte order. Rows may lie apart, or upwards. Chroma lies between
    the luma rows that share it.
    resize: one of RESIZES. turn: what makes the frame upright.
    Returns uint8 [3, size, size]: `out`, contiguous, where given; it may overlap with planes.
    Raises ValueError or TypeError for anything else.
    """
    _check(planes, size, colours)
    if out is None:
        out = np.empty((3, size, size), np.uint8)
    elif out.shape != (3, size, size) or out.dtype != np.uint8 or not out.flags.carray:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, expected uint8 [3, {size}, {size}], contiguous "
            "and writeable"
        )
    filters = _filters(tuple(plane.shape for plane in planes), size, colours, resize, turn)
    rows, columns = filters.axes
    direct = not any(turn) and rows.kept == columns.kept == size
    part = out if direct else np.empty((3, rows.kept, columns.kept), np.uint8)
    function = _native.module().resize_crop
    planes = [plane if _readable(plane, part) else plane.copy() for plane in planes]
    handles = [_handle(plane) for plane in planes]
    given = [handles, filters.of_planes, filters.colours, _handle(part)]
    function(*given, _native.workspace(function(*given, None)))
    if not direct:
        _place(part, filters.axes, turn, out)
    return out


def resize_crop_reference(
    planes: Sequence[Pixels],
    size: int,
    colours: Colours,
    *,
    resize: str = "crop",
    turn: Turn = UPRIGHT,
) -> NDArray[np.float64]:
    """As `resize_crop`, before rounding: float64 [3, size, size]."""
    _check(planes, size, colours)
    frame = planes[0].shape
    axes = placed(frame[0], frame[1], size, resize, turn)
    filtered = []
    for plane in planes:
        rows, columns = _both_axes(plane.shape, frame, axes, colours, resize)
        down, across = _dense(*rows, plane.shape[0]), _dense(*columns, plane.shape[1])
        filtered.append(down @ plane.astype(np.float64) @ across.T)
    matrix = _matrix(colours)
    rgb = np.tensordot(matrix[:, :3], np.stack(filtered), 1) + matrix[:, 3, None, None]
    out = np.empty((3, size, size))
    _place(np.clip(rgb, 0, 255), axes, turn, out)
    return out


def resize_frames(frames: Tensor, size: int, resize: str = "crop") -> Tensor:
    """RGB frames as squares, as `resize_crop` makes them of decoded ones, on the frames' device.

    frames: uint8 [N, 3, H, W], upright. Returns uint8 [N, 3, size, size].
    """
    if frames.device.type != "cpu":
        parts = [resize_frames_by_torch(part, size, resize) for part in frames.split(TOGETHER)]
        return torch.cat(parts)
    squares = torch.empty(len(frames), 3, size, size, dtype=torch.uint8)
    for frame, square in zip(frames, squares.numpy(), strict=True):
        planes = list(frame.contiguous().numpy())
        resize_crop(planes, size, Colours("rgb"), square, resize=resize)
    return squares


def resize_frames_by_torch(frames: Tensor, size: int, resize: str = "crop") -> Tensor:
    """As `resize_frames`, up to rounding, on any device."""
    rows, columns = axes = placed(frames.shape[-2], frames.shape[-1], size, resize)
    sides, smooth = (rows.whole, columns.whole), resize != "squash"
    whole = F.interpolate(frames.float(), sides, mode="bicubic", antialias=smooth)
    part = whole[..., rows.first :, columns.first :][..., : rows.kept, : columns.kept]
    return on_black(part.round().clamp(0, 255).to(torch.uint8), axes, size)


def on_black(part: Tensor, axes: "tuple[Axis, Axis]", size: int) -> Tensor:
    """Squares [..., size, size] with what is shown of frames, [..., H, W], in its place."""
    rows, columns = axes
    sides = [(axis.at, size - axis.at - axis.kept) for axis in (columns, rows)]
    return F.pad(part, (*sides[0], *sides[1]))


# --- geometry ------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """One side of a frame: resized to `whole`, of which `kept` from `first` on are shown, from `at`
    on in the square."""

    whole: int
    first: int
    kept: int
    at: int


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shortest side `size`, the other rounded down as CLIP does."""
    short = min(height, width)
    return height * size // short, width * size // short


def placed(
    height: int, width: int, size: int, resize: str, turn: Turn = UPRIGHT
) -> tuple[Axis, Axis]:
    """Places of a stored frame's rows and columns: the geometry of everything that reads frames.

    Centres are rounded towards the top left, as CLIP's are, of the frame as shown; so they are
    rounded to the other side where `turn` mirrors what is stored.
    """
    check_resize(resize)
    if resize == "crop":
        sides = resized(height, width, size)
    elif resize == "squash":
        sides = size, size
    else:
        long = max(height, width)
        sides = max(height * size // long, 1), max(width * size // long, 1)
    swapped, *mirrored = turn
    row_side, column_side = mirrored if swapped else mirrored[::-1]
    return _axis(sides[0], size, row_side), _axis(sides[1], size, column_side)


def _axis(whole: int, size: int, mirrored: bool) -> Axis:
    kept = min(whole, size)
    first, at = (whole - kept) // 2, (size - kept) // 2
    if mirrored:
        first, at = whole - kept - first, size - kept - at
    return Axis(whole, first, kept, at)


def _place(part: NDArray[Any], axes: tuple[Axis, Axis], turn: Turn, out: NDArray[Any]) -> None:
    """Write the part of a stored frame that is shown into the square, upright, on black."""
    rows, columns = axes
    swapped, mirrored_x, mirrored_y = turn
    stored = out[:, :: -1 if mirrored_y else 1, :: -1 if mirrored_x else 1]
    if swapped:
        stored = stored.transpose(0, 2, 1)
    if part.shape != out.shape:
        out[:] = 0
    stored[:, rows.at :, columns.at :][:, : rows.kept, : columns.kept] = part


# --- filters -------------------------------------------------------------------------------------


def _cubic(x: NDArray[np.float64], a: float) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


Filter = tuple[NDArray[np.int32], NDArray[np.float64]]
"""(first [n], weights [n, taps]): output i sums inputs from first[i] on, each times its weight."""


def _both_axes(
    plane: tuple[int, ...],
    frame: tuple[int, ...],
    axes: tuple[Axis, Axis],
    colours: Colours,
    resize: str,
) -> tuple[Filter, Filter]:
    """Filters for the rows and the columns of a plane; plane, frame: their [height, width]."""
    if resize == "squash":
        rows, columns = (_of_four(*sides) for sides in zip(plane, frame, axes, strict=True))
    else:
        rows = _widened(plane[0], frame[0], axes[0], 0.0)
        columns = _widened(plane[1], frame[1], axes[1], 0.25 if colours.chroma_left else 0.0)
    return rows, columns


def _widened(length: int, luma: int, axis: Axis, aside: float) -> Filter:
    """Bicubic with a = -½, as wide as what one output stands for, less what lies beyond the edges.

    length: elements of the plane; luma: of the frame. Where they are fewer, each lies `aside` of
    its own elements before the middle of the luma elements that share it.
    """
    shared = 1 if length == luma else 2
    step = luma / axis.whole / shared  # of the plane's own elements, per output
    centre = (np.arange(axis.kept) + axis.first + 0.5) * step
    centre += aside if shared > 1 else 0.0
    # Nothing is to be filtered where outputs lie on inputs: a cubic is 0 at whole distances.
    reach = 0.5 if step == 1 and shared == 1 else 2 * max(step, 1.0)
    taps = min(length, math.ceil(2 * reach))
    first = np.clip(np.floor(centre - reach + 0.5), 0, length - taps).astype(np.int32)
    offset = first[:, None] + np.arange(taps) + 0.5 - centre[:, None]
    weights = _cubic(offset / max(step, 1.0), -0.5)
    return first, weights / weights.sum(1, keepdims=True)


def _of_four(length: int, luma: int, axis: Axis) -> Filter:
    """Bicubic with a = -¾ over four elements of luma, the last ones repeated beyond the edges.

    A plane with fewer elements is enlarged by repeating them first, as conversion to RGB did in
    2022.
    """
    centre = (np.arange(axis.kept) + 0.5) * (luma / axis.whole) - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-1, 3)
    weights = _cubic(taps - centre[:, None], -0.75)
    elements = np.clip(taps, 0, luma - 1).astype(np.int32) // (1 if length == luma else 2)
    width = int(np.ptp(elements, 1).max()) + 1
    first = np.minimum(elements.min(1), length - width)
    joined = np.zeros((axis.kept, width))
    np.add.at(joined, (np.arange(axis.kept)[:, None], elements - first[:, None]), weights)
    return first, joined


def _dense(
    first: NDArray[np.int32], weights: NDArray[np.float64], length: int
) -> NDArray[np.float64]:
    """The same filter as a matrix [size, length]."""
    dense = np.zeros((len(first), length))
    np.put_along_axis(dense, first[:, None] + np.arange(weights.shape[1]), weights, 1)
    return dense


def to_rgb(matrix: str) -> NDArray[np.float64]:
    """[3, 3]: from luma of 0 to 1 and chroma (blue, red) of -½ to ½ to (R, G, B) of 0 to 1."""
    red, blue = MATRICES[matrix]
    green = 1 - red - blue
    of_blue, of_red = 2 * (1 - blue), 2 * (1 - red)
    greens = [1, -of_blue * blue / green, -of_red * red / green]
    return np.array([[1, 0, of_red], greens, [1, of_blue, 0]])


def _matrix(colours: Colours) -> NDArray[np.float64]:
    """[3, 4]: (R, G, B) of 0 to 255 from the planes' numbers and 1."""
    if colours.matrix == "rgb":
        return np.eye(3, 4) * (255 / (2**colours.bits - 1))
    unit = 2.0 ** (colours.bits - 8)
    if colours.full_range:
        black, luma, chroma = 0.0, 2.0**colours.bits - 1, 2.0**colours.bits - 1
    else:
        black, luma, chroma = 16 * unit, 219 * unit, 224 * unit
    linear = to_rgb(colours.matrix) * (255 / np.array([luma, chroma, chroma]))
    return np.column_stack([linear, -linear @ [black, 128 * unit, 128 * unit]])


# --- handing over --------------------------------------------------------------------------------


class _Filters(NamedTuple):
    axes: tuple[Axis, Axis]
    arrays: list[NDArray[Any]]  # what the handles point to
    of_planes: list[Any]
    colours: Any


def _check(planes: Sequence[Pixels], size: int, colours: Colours) -> None:
    """Raise ValueError or TypeError for what resize_crop does not take."""
    if len(planes) != 3 or any(plane.ndim != 2 for plane in planes):
        shapes = [list(plane.shape) for plane in planes]
        raise ValueError(f"planes are {shapes}, expected three matrices: Y, U, V")
    if colours.matrix not in (*MATRICES, "rgb") or not 8 <= colours.bits <= 16:
        raise ValueError(
            f"colours are {colours}, expected 8 to 16 bits and of {[*MATRICES, 'rgb']}"
        )
    dtype = np.uint8 if colours.bits == 8 else np.uint16
    height, width = planes[0].shape
    for plane in planes:
        apart, along = plane.strides
        whole = along == plane.itemsize or plane.shape[1] == 1
        whole &= apart % plane.itemsize == 0
        if plane.dtype != dtype or not whole:
            raise TypeError(f"a plane is {plane.dtype}, expected {dtype.__name__}, rows contiguous")
        fits = plane.shape[0] in (height, -(-height // 2)) and (
            plane.shape[1] in (width, -(-width // 2))
        )
        if not fits or plane.size == 0:
            raise ValueError(f"a plane is {list(plane.shape)} of a frame of {[height, width]}")
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")


def _readable(plane: Pixels, out: NDArray[np.uint8]) -> bool:
    """Whether the kernel can read a plane where it is: aligned, row below row, and left alone."""
    forwards = min(plane.strides) >= 0
    return forwards and plane.flags.aligned and not np.may_share_memory(plane, out)


@functools.lru_cache(maxsize=64)
def _filters(
    shapes: tuple[tuple[int, ...], ...], size: int, colours: Colours, resize: str, turn: Turn
) -> _Filters:
    axes = placed(shapes[0][0], shapes[0][1], size, resize, turn)
    arrays: list[NDArray[Any]] = []
    for shape in shapes:
        for first, weights in _both_axes(shape, shapes[0], axes, colours, resize):
            arrays += [first, weights.astype(np.float32)]
    arrays.append(_matrix(colours).astype(np.float32))
    *of_planes, of_colours = (_handle(array) for array in arrays)
    return _Filters(axes, arrays, of_planes, of_colours)


def _handle(array: NDArray[Any]) -> Any:
    strides = tuple(stride // array.itemsize for stride in array.strides)
    place = array.__array_interface__["data"][0], sys.maxsize, 0  # numpy vouches for its own
    return _native.module().Tensor(*place, _DTYPES[array.dtype], array.shape, strides)
