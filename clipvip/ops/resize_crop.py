"""Decoded video frames to RGB squares: resizing, cutting and colours in one pass.

A frame comes as three planes, luma and two of chroma that are often smaller. Each is filtered
straight from its own size to the target (bicubic of a = -½, widened where it shrinks, as in PIL
and in CLIP's own preprocessing), only for the square that is kept, then the colours are
computed (ITU-T H.273, 8.3), in floating point and rounded once. `resize_crop_reference` is the
same in float64.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipvip.ops import _native

_DTYPES = {np.dtype(name): i for name, i in (("f4", 0), ("i4", 3), ("u1", 4), ("u2", 5))}  # csrc
MATRICES = {
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "bt601": (0.299, 0.114),
    "smpte240m": (0.212, 0.087),
    "bt2020": (0.2627, 0.0593),
}
"""The shares of red and blue in luma, K_R and K_B."""

Pixels = NDArray[np.uint8] | NDArray[np.uint16]


class Colours(NamedTuple):
    """How a frame's numbers stand for colours.

    full_range: black is 0 and not 16 (of 8 bits). chroma_left: of luma columns that share chroma
    it lies on the left one (MPEG-2, H.264 and newer), else between them (JPEG, MPEG-1).
    """

    matrix: str = "bt601"
    full_range: bool = False
    bits: int = 8
    chroma_left: bool = True


RESIZES = ("crop", "squash", "pad")


def check_resize(resize: str) -> None:
    """Raises ValueError for anything but one of RESIZES."""
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; expected one of {', '.join(RESIZES)}")


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shortest side `size`, each at least that."""
    scale = size / min(height, width)
    return max(size, round(height * scale)), max(size, round(width * scale))


def check_compiled() -> None:
    """Raises RuntimeError or ValueError, with what to do, where the kernel cannot run."""
    _native.module().cpu_capability()


def resize_crop(
    planes: Sequence[Pixels], size: int, colours: Colours, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """The shortest side resized to `size`, the centre cut out, in RGB.

    planes: Y [H, W], U and V [H or ⌈H/2⌉, W or ⌈W/2⌉]; uint8, or uint16 where colours.bits is
    more than 8. Rows may lie apart. Of luma rows that share chroma it lies between.
    Returns uint8 [3, size, size]: `out`, contiguous, where given.
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
    filters = _filters(tuple(plane.shape for plane in planes), size, colours)
    function = _native.module().resize_crop
    given = [[_handle(plane) for plane in planes], filters.of_planes, filters.colours, _handle(out)]
    function(*given, _native.workspace(function(*given, None)))
    return out


def resize_crop_reference(
    planes: Sequence[Pixels], size: int, colours: Colours
) -> NDArray[np.float64]:
    """As `resize_crop`, before rounding: float64 [3, size, size]."""
    shape = _check(planes, size, colours)
    filtered = []
    for plane in planes:
        rows, columns = _both_axes(plane.shape, shape, size, colours)
        down, across = _dense(*rows, plane.shape[0]), _dense(*columns, plane.shape[1])
        filtered.append(down @ plane.astype(np.float64) @ across.T)
    matrix = _matrix(colours)
    rgb = np.tensordot(matrix[:, :3], np.stack(filtered), 1) + matrix[:, 3, None, None]
    return np.clip(rgb, 0, 255)


# --- geometry ------------------------------------------------------------------------------------


def _cubic(x: NDArray[np.float64], a: float = -0.5) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


Filter = tuple[NDArray[np.int32], NDArray[np.float64]]
"""(first [n], weights [n, taps]): output i sums inputs from first[i] on, each times its weight."""


def _both_axes(
    plane: tuple[int, ...], frame: tuple[int, ...], size: int, colours: Colours
) -> tuple[Filter, Filter]:
    """For the rows and for the columns of a plane of a frame, sides of both given."""
    height, width = resized(frame[0], frame[1], size)
    return (
        _filter(plane[0], frame[0], height, size, 0.0),
        _filter(plane[1], frame[1], width, size, 0.25 if colours.chroma_left else 0.0),
    )


def _filter(length: int, luma: int, whole: int, size: int, aside: float) -> Filter:
    """The `size` in the middle of `whole`, which `luma` elements are resized to. A plane of fewer,
    `length`, lies `aside` of its own elements before the middle of those that share one."""
    shared = 1 if length == luma else 2
    step = luma / whole / shared  # of the plane's own elements, per output
    centre = (np.arange(size) + (whole - size) // 2 + 0.5) * step
    centre += aside if shared > 1 else 0.0
    # Nothing is to be filtered where outputs lie on inputs: a cubic is 0 at whole distances.
    reach = 0.5 if step == 1 and shared == 1 else 2 * max(step, 1.0)
    taps = min(length, math.ceil(2 * reach))
    first = np.clip(np.floor(centre - reach + 0.5), 0, length - taps).astype(np.int32)
    offset = first[:, None] + np.arange(taps) + 0.5 - centre[:, None]
    weights = _cubic(offset / max(step, 1.0))
    return first, weights / weights.sum(1, keepdims=True)


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
    """[3, 4]: (R, G, B) of 0 to 255 from (Y, U, V, 1)."""
    unit = 2.0 ** (colours.bits - 8)
    if colours.full_range:
        black, luma, chroma = 0.0, 2.0**colours.bits - 1, 2.0**colours.bits - 1
    else:
        black, luma, chroma = 16 * unit, 219 * unit, 224 * unit
    linear = to_rgb(colours.matrix) * (255 / np.array([luma, chroma, chroma]))
    return np.column_stack([linear, -linear @ [black, 128 * unit, 128 * unit]])


# --- handing over --------------------------------------------------------------------------------


class _Filters(NamedTuple):
    arrays: list[NDArray[Any]]  # what the handles point to
    of_planes: list[Any]
    colours: Any


def _check(planes: Sequence[Pixels], size: int, colours: Colours) -> tuple[int, int]:
    """Height and width. Raises ValueError or TypeError."""
    if len(planes) != 3 or any(plane.ndim != 2 for plane in planes):
        shapes = [list(plane.shape) for plane in planes]
        raise ValueError(f"planes are {shapes}, expected three matrices: Y, U, V")
    if colours.matrix not in MATRICES or not 8 <= colours.bits <= 16:
        raise ValueError(f"colours are {colours}, expected 8 to 16 bits and of {list(MATRICES)}")
    dtype = np.uint8 if colours.bits == 8 else np.uint16
    height, width = planes[0].shape
    for plane in planes:
        whole = plane.strides[1] == plane.itemsize and plane.strides[0] % plane.itemsize == 0
        if plane.dtype != dtype or not whole:
            raise TypeError(f"a plane is {plane.dtype}, expected {dtype.__name__}, rows contiguous")
        fits = plane.shape[0] in (height, -(-height // 2)) and (
            plane.shape[1] in (width, -(-width // 2))
        )
        if not fits or plane.size == 0:
            raise ValueError(f"a plane is {list(plane.shape)} of a frame of {[height, width]}")
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")
    return height, width


@functools.lru_cache(maxsize=64)
def _filters(shapes: tuple[tuple[int, ...], ...], size: int, colours: Colours) -> _Filters:
    arrays: list[NDArray[Any]] = []
    for shape in shapes:
        for first, weights in _both_axes(shape, shapes[0], size, colours):
            arrays += [first, weights.astype(np.float32)]
    arrays.append(_matrix(colours).astype(np.float32))
    *of_planes, of_colours = (_handle(array) for array in arrays)
    return _Filters(arrays, of_planes, of_colours)


def _handle(array: NDArray[Any]) -> Any:
    strides = [stride // array.itemsize for stride in array.strides]
    return _native.module().Tensor(
        array.__array_interface__["data"][0], _DTYPES[array.dtype], array.shape, strides
    )
