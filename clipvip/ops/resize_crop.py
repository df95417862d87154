"""Resizing, cropping and colour conversion of a decoded frame in one pass.

A model reads squares. `resize` says how a frame becomes one:

- `"crop"`: as in CLIP. The shortest side is resized to the square's, then the centre is cut out.
- `"pad"`: the longest side is resized to the square's, with black bars beside the frame.
- `"squash"`: the whole frame is resized to the square whatever its shape, as in the code of
  CLIP-ViP's authors. Their checkpoints were trained on this.

Crop and pad filter as PIL and CLIP's preprocessing do: bicubic with a = -½, widened where a frame
shrinks. Squash filters as torchvision resized tensors in 2022 (torch.nn.functional.interpolate
without antialiasing): bicubic with a = -¾ over four pixels, however much a frame shrinks. The
authors kept fractions and values beyond white and black; here they are rounded and clipped.

A decoded frame has three planes: luma, and two of chroma that are often smaller. Each plane is
filtered straight from its own size to the target's, and only for the part that is kept. Then the
colours are computed (ITU-T H.273, 8.3), in floating point and rounded once.
`resize_crop_reference` does the same in float64.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clipvip.ops import _native

TOGETHER = 8  # frames converted to floating point at a time
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
    """How a frame's values stand for colours.

    matrix: one of MATRICES, or "rgb" where the planes are red, green and blue, of full range.
    full_range: whether black is 0, and not 16 (of 8 bits).
    bits: bits per value, 8 to 16.
    chroma_left: whether chroma lies on the left of the luma columns that share it (MPEG-2, H.264
        and newer), and not between them (JPEG, MPEG-1).
    """

    matrix: str = "bt601"
    full_range: bool = False
    bits: int = 8
    chroma_left: bool = True


RESIZES = ("crop", "squash", "pad")

Turn = tuple[bool, bool, bool]
"""How a stored frame becomes upright: swap axes, then mirror left-right, then mirror top-bottom."""
UPRIGHT: Turn = (False, False, False)


class Axis(NamedTuple):
    """The place of a frame's rows or columns in the square, in pixels."""

    whole: int  # length after resizing
    first: int  # first visible one
    kept: int  # number of visible ones
    at: int  # place of the first visible one in the square


Axes = tuple[Axis, Axis]  # of rows and of columns
Shape = tuple[int, ...]


def check_resize(resize: str) -> None:
    """Raise ValueError unless resize is one of RESIZES."""
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
    """Return a decoded frame as an upright RGB square.

    Equivalent, for planes of one size and a plain matrix of colours, to

        rgb = torch.einsum("cp,phw->chw", matrix, planes.float()) + offset
        part = F.interpolate(rgb[None], resized(H, W, size), mode="bicubic", antialias=True)[0]
        return centre_crop(part, size).clamp(0, 255).round().to(torch.uint8)

    Args:
        planes: Y [H, W], U and V [H or ⌈H/2⌉, W or ⌈W/2⌉]; uint8, or uint16 in the machine's byte
            order where colours.bits is more than 8. Each row is contiguous; rows may have gaps
            between them or be stored bottom-up. Chroma rows lie between the luma rows that share
            them.
        size: the square's side in pixels.
        colours: how the planes' values stand for colours.
        out: uint8 [3, size, size], contiguous, to write to; it may overlap with planes.
        resize: one of RESIZES.
        turn: how the stored frame becomes upright.

    Returns:
        uint8 [3, size, size], which is `out` where given.

    Raises:
        ValueError, TypeError: shapes, dtypes or strides are not those above.
        RuntimeError: the compiled module is missing.
    """
    _check(planes, size, colours)
    if out is None:
        out = np.empty((3, size, size), np.uint8)
    elif out.shape != (3, size, size) or out.dtype != np.uint8 or not out.flags.carray:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)}, expected uint8 [3, {size}, {size}], contiguous "
            "and writeable"
        )
    shapes = tuple(plane.shape for plane in planes)
    axes, (*of_planes, of_colours), _memory = _filters(shapes, size, colours, resize, turn)
    rows, columns = axes
    direct = not any(turn) and rows.kept == columns.kept == size
    part = out if direct else np.empty((3, rows.kept, columns.kept), np.uint8)
    planes = [plane if _readable(plane, part) else plane.copy() for plane in planes]
    handles = [_native.array_handle(plane) for plane in planes]
    _native.run("resize_crop", handles, of_planes, of_colours, _native.array_handle(part))
    if not direct:
        _place(part, axes, turn, out)
    return out


def resize_crop_reference(
    planes: Sequence[Pixels],
    size: int,
    colours: Colours,
    *,
    resize: str = "crop",
    turn: Turn = UPRIGHT,
) -> NDArray[np.float64]:
    """Compute `resize_crop` in NumPy without rounding: float64 [3, size, size]."""
    _check(planes, size, colours)
    frame = planes[0].shape
    axes = placed(frame[0], frame[1], size, resize, turn)
    filtered = []
    for plane in planes:
        filters = _both_axes(plane.shape, frame, axes, colours, resize)
        down, across = map(_dense, filters, plane.shape)
        filtered.append(down @ plane.astype(np.float64) @ across.T)
    matrix = _matrix(colours)
    rgb = np.tensordot(matrix[:, :3], np.stack(filtered), 1) + matrix[:, 3, None, None]
    out = np.empty((3, size, size))
    _place(np.clip(rgb, 0, 255), axes, turn, out)
    return out


def resize_frames(frames: Tensor, size: int, resize: str = "crop") -> Tensor:
    """Return RGB frames as squares, as `resize_crop` does for decoded frames.

    frames: uint8 [N, 3, H, W], upright. Returns uint8 [N, 3, size, size] on the same device.
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
    """Compute `resize_frames` by PyTorch on any device; results match up to rounding."""
    rows, columns = axes = placed(frames.shape[-2], frames.shape[-1], size, resize)
    sides, smooth = (rows.whole, columns.whole), resize != "squash"
    whole = F.interpolate(frames.float(), sides, mode="bicubic", antialias=smooth)
    part = whole[..., rows.first :, columns.first :][..., : rows.kept, : columns.kept]
    return on_black(part.round().clamp(0, 255).to(torch.uint8), axes, size)


def on_black(part: Tensor, axes: Axes, size: int) -> Tensor:
    """Return black squares [..., size, size] that hold the visible part of frames, [..., H, W]."""
    bars = [(axis.at, size - axis.at - axis.kept) for axis in reversed(axes)]
    return F.pad(part, (*bars[0], *bars[1]))


# --- geometry ------------------------------------------------------------------------------------


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Return height and width with the shortest side `size`; rounds the other down, as in CLIP."""
    short = min(height, width)
    return height * size // short, width * size // short


def placed(height: int, width: int, size: int, resize: str, turn: Turn = UPRIGHT) -> Axes:
    """Return the places of a stored frame's rows and columns, for all code that reads frames.

    Centres are rounded towards the top left of the upright frame, as in CLIP, and so to the other
    side of the stored frame where `turn` mirrors it.
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


def _place(part: NDArray[Any], axes: Axes, turn: Turn, out: NDArray[Any]) -> None:
    """Write the visible part of a stored frame into the square, upright, on black."""
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
"""(first [n], weights [n, taps]): output i is Σ_k weights[i, k]·input[first[i] + k]."""


def _both_axes(
    plane: Shape, frame: Shape, axes: Axes, colours: Colours, resize: str
) -> tuple[Filter, Filter]:
    """Return the filters for rows and columns of a plane; plane, frame: their [height, width]."""
    if resize == "squash":
        rows, columns = (_of_four(*sides) for sides in zip(plane, frame, axes, strict=True))
    else:
        rows = _widened(plane[0], frame[0], axes[0], 0.0)
        columns = _widened(plane[1], frame[1], axes[1], 0.25 if colours.chroma_left else 0.0)
    return rows, columns


def _widened(length: int, luma: int, axis: Axis, aside: float) -> Filter:
    """Return a bicubic filter with a = -½, widened where a frame shrinks, cut off at the edges.

    length: elements of the plane.
    luma: elements of the frame; where there are more, two share an element of the plane.
    aside: how far that element lies before their middle, in elements of the plane.
    """
    shared = 1 if length == luma else 2
    step = luma / axis.whole / shared  # elements of the plane per output
    centre = (np.arange(axis.kept) + axis.first + 0.5) * step
    centre += aside if shared > 1 else 0.0
    # Where outputs lie on inputs no filter is needed: the cubic is 0 at whole distances.
    reach = 0.5 if step == 1 and shared == 1 else 2 * max(step, 1.0)
    taps = min(length, math.ceil(2 * reach))
    first = np.clip(np.floor(centre - reach + 0.5), 0, length - taps).astype(np.int32)
    offset = first[:, None] + np.arange(taps) + 0.5 - centre[:, None]
    weights = _cubic(offset / max(step, 1.0), -0.5)
    return first, weights / weights.sum(1, keepdims=True)


def _of_four(length: int, luma: int, axis: Axis) -> Filter:
    """Return a bicubic filter with a = -¾ over four luma elements; the edges are repeated outside.

    The elements of a smaller plane are repeated first, as conversion to RGB did in 2022.
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


def _dense(filter_: Filter, length: int) -> NDArray[np.float64]:
    """Return a filter as a matrix [size, length]."""
    first, weights = filter_
    dense = np.zeros((len(first), length))
    np.put_along_axis(dense, first[:, None] + np.arange(weights.shape[1]), weights, 1)
    return dense


def to_rgb(matrix: str) -> NDArray[np.float64]:
    """Return [3, 3], which maps luma (0 to 1) and blue and red chroma (-½ to ½) to RGB (0 to 1)."""
    red, blue = MATRICES[matrix]
    green = 1 - red - blue
    of_blue, of_red = 2 * (1 - blue), 2 * (1 - red)
    greens = [1, -of_blue * blue / green, -of_red * red / green]
    return np.array([[1, 0, of_red], greens, [1, of_blue, 0]])


def _matrix(colours: Colours) -> NDArray[np.float64]:
    """Return [3, 4], which maps the planes' values and a 1 to RGB (0 to 255)."""
    if colours.matrix == "rgb":
        return np.eye(3, 4) * (255 / (2**colours.bits - 1))
    unit = 2.0 ** (colours.bits - 8)
    black, luma, chroma = 16 * unit, 219 * unit, 224 * unit
    if colours.full_range:
        black, luma, chroma = 0.0, 2.0**colours.bits - 1, 2.0**colours.bits - 1
    linear = to_rgb(colours.matrix) * (255 / np.array([luma, chroma, chroma]))
    return np.column_stack([linear, -linear @ [black, 128 * unit, 128 * unit]])


def _check(planes: Sequence[Pixels], size: int, colours: Colours) -> None:
    """Raise ValueError or TypeError for arguments that resize_crop does not take."""
    if len(planes) != 3 or any(plane.ndim != 2 for plane in planes):
        shapes = [list(plane.shape) for plane in planes]
        raise ValueError(f"planes are {shapes}, expected three matrices: Y, U, V")
    if colours.matrix not in (*MATRICES, "rgb") or not 8 <= colours.bits <= 16:
        raise ValueError(
            f"colours are {colours}, expected 8 to 16 bits and of {[*MATRICES, 'rgb']}"
        )
    dtype = np.uint8 if colours.bits == 8 else np.uint16
    frame = planes[0].shape
    heights, widths = ((side, -(-side // 2)) for side in frame)
    for plane in planes:
        apart, along = plane.strides
        whole = apart % plane.itemsize == 0 and (along == plane.itemsize or plane.shape[1] == 1)
        if plane.dtype != dtype or not whole:
            raise TypeError(f"a plane is {plane.dtype}, expected {dtype.__name__}, rows contiguous")
        fits = plane.shape[0] in heights and plane.shape[1] in widths
        if not fits or plane.size == 0:
            raise ValueError(f"a plane is {list(plane.shape)} of a frame of {list(frame)}")
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")


def _readable(plane: Pixels, out: NDArray[np.uint8]) -> bool:
    """Return whether the kernel can read a plane in place: aligned, top-down, apart from `out`."""
    top_down = min(plane.strides) >= 0
    return top_down and plane.flags.aligned and not np.may_share_memory(plane, out)


@functools.lru_cache(maxsize=64)
def _filters(
    shapes: tuple[Shape, ...], size: int, colours: Colours, resize: str, turn: Turn
) -> tuple[Axes, list[Any], list[NDArray[Any]]]:
    """Return the places, what the kernel takes, and the arrays that own the memory of that."""
    axes = placed(shapes[0][0], shapes[0][1], size, resize, turn)
    arrays: list[NDArray[Any]] = []
    for shape in shapes:
        for first, weights in _both_axes(shape, shapes[0], axes, colours, resize):
            arrays += [first, weights.astype(np.float32)]
    arrays.append(_matrix(colours).astype(np.float32))
    return axes, list(map(_native.array_handle, arrays)), arrays
