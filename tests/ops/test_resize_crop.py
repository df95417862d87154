"""resize_crop against float64, PIL, PyTorch and CLIP's preprocessing, on every instruction set."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipvip.ops._native import module
from clipvip.ops.resize_crop import (
    MATRICES,
    RESIZES,
    Colours,
    placed,
    resize_crop,
    resize_crop_reference,
    resize_frames,
    resize_frames_by_torch,
    resized,
)

SHAPES = [  # height, width, size: shrinking, growing, odd, thin, and unchanged
    *((240, 320, 224), (97, 61, 32), (720, 1280, 224), (45, 33, 70), (5, 3, 17), (2, 90, 7)),
    *((1, 1, 5), (64, 64, 64), (16, 400, 1)),
]
ROUNDED = 0.5 + 1e-3  # float32 may round a tie the other way


@pytest.fixture(params=module().cpu_capabilities(), autouse=True)
def capability(request):
    before = module().cpu_capability()
    module().set_cpu_capability(request.param)
    yield request.param
    module().set_cpu_capability(before)


def frame(height, width, chroma=(2, 2), bits=8, seed=0, padding=5):
    """Y, U and V of noise, with gaps between their rows."""
    generator = np.random.default_rng(seed)
    planes = []
    for down, across in ((1, 1), chroma, chroma):
        shape = -(-height // down), -(-width // across) + padding
        dtype = np.uint8 if bits == 8 else np.uint16
        planes.append(generator.integers(0, 2**bits, shape, dtype)[:, : shape[1] - padding])
    return planes


def off(planes, size, colours, **how):
    expected = resize_crop_reference(planes, size, colours, **how)
    return np.abs(resize_crop(planes, size, colours, **how) - expected).max()


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size_is_right(shape, resize):
    *sides, size = shape
    assert off(frame(*sides), size, Colours(), resize=resize) <= ROUNDED


@pytest.mark.parametrize("chroma", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("bits", [8, 10, 16])
def test_every_format_is_right(chroma, bits):
    for full_range in (False, True):
        for matrix in (*MATRICES, "rgb"):
            colours = Colours(matrix, full_range, bits)
            assert off(frame(50, 75, chroma, bits), 40, colours) <= ROUNDED, colours


def test_rows_and_out_may_be_parts_of_something_larger():
    planes = frame(50, 75)
    whole = np.full((3, 3, 40, 40), 7, np.uint8)
    assert resize_crop(planes, 40, Colours(), whole[1]).base is whole
    assert (whole[::2] == 7).all()
    apart = [plane.copy() for plane in planes]
    assert np.array_equal(whole[1], resize_crop(apart, 40, Colours()))


@pytest.mark.parametrize(
    ("colours", "yuv", "rgb"),
    [  # the primary colours at 100 %, of ITU-R BT.601-7, BT.709-6 and BT.2020-2
        (Colours("bt601"), (81, 90, 240), (255, 0, 0)),
        (Colours("bt709"), (63, 102, 240), (255, 0, 0)),
        (Colours("bt709"), (173, 42, 26), (0, 255, 0)),
        (Colours("bt2020", bits=10), (293, 387, 960), (255, 0, 0)),
        (Colours("bt601", full_range=True), (76, 85, 255), (254, 0, 0)),
        (Colours(), (235, 128, 128), (255, 255, 255)),
        (Colours(full_range=True), (0, 128, 128), (0, 0, 0)),
        (Colours("bt601", True, 10), (1023, 512, 512), (255, 255, 255)),
    ],
)
def test_known_colours_stay(colours, yuv, rgb):
    dtype = np.uint8 if colours.bits == 8 else np.uint16
    planes = [np.full((9, 16), value, dtype) for value in yuv]
    square = resize_crop(planes, 6, colours)
    assert np.abs(square - np.array(rgb, int)[:, None, None]).max() <= 1
    assert (square == square[:, :1, :1]).all()


@pytest.mark.parametrize("chroma_left", [True, False])
def test_chroma_lies_where_it_is_said_to(chroma_left):
    luma, grey = np.full((24, 48), 100, np.uint8), np.full((12, 24), 128, np.uint8)
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8) * 4 + 80, (12, 24))
    colours = Colours("bt601", True, 8, chroma_left)
    blue = resize_crop_reference([luma, ramp, grey], 24, colours)[2, 0]
    # the k-th of them on luma column 2k, or half a column further
    columns = np.arange(12, 36) - (0 if chroma_left else 0.5)
    expected = 100 + 1.772 * (columns / 2 * 4 + 80 - 128)
    assert np.abs(blue - expected).max() < 1e-9
    assert off([luma, ramp, grey], 24, colours) <= ROUNDED


@pytest.mark.parametrize("shape", [(240, 320, 224), (97, 61, 32), (45, 33, 70)], ids=str)
def test_grey_is_resized_as_pil_does(shape):
    height, width, size = shape
    pil = pytest.importorskip("PIL.Image")
    luma = frame(height, width)[0] // 2 + 64  # PIL rounds and clips after each pass
    grey = np.full((-(-height // 2), -(-width // 2)), 128, np.uint8)
    square = resize_crop([luma, grey, grey], size, Colours(full_range=True))
    rows, columns = resized(height, width, size)
    image = pil.fromarray(luma).resize((columns, rows), pil.Resampling.BICUBIC)
    top, left = (rows - size) // 2, (columns - size) // 2
    expected = np.asarray(image, int)[top : top + size, left : left + size]
    assert np.abs(square - expected).max() <= 1


def rgb(height, width, count=1, seed=0):
    """uint8 [count, 3, H, W] of noise that no filter pushes beyond black or white."""
    return torch.from_numpy(
        np.random.default_rng(seed).integers(64, 192, (count, 3, height, width), np.uint8)
    )


def apart(a, b):
    return (a.int() - b.int()).abs().max()


# Among them sides whose rounded down and rounded to nearest differ, and odd differences to cut.
SIDES = [(240, 320, 224), (320, 240, 224), (97, 61, 32), (45, 33, 70), (719, 1281, 33), (64, 64, 9)]


@pytest.mark.parametrize("shape", SIDES, ids=str)
def test_crop_is_clips_own(shape):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    *sides, size = shape
    frames = rgb(*sides)
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, do_rescale=False, do_normalize=False
    )
    theirs = torch.from_numpy(processor(frames[0].numpy())["pixel_values"][0])
    assert apart(resize_frames(frames, size)[0], theirs) <= 1  # PIL rounds after each pass


@pytest.mark.parametrize("shape", SIDES, ids=str)
def test_squash_is_pytorch_without_antialiasing(shape):
    *sides, size = shape
    frames = rgb(*sides)
    theirs = F.interpolate(frames.double(), (size, size), mode="bicubic", align_corners=False)
    ours = resize_crop_reference(list(frames[0].numpy()), size, Colours("rgb"), resize="squash")
    assert np.abs(ours - theirs[0].clamp(0, 255).numpy()).max() < 1e-6
    # 4:2:0 equals RGB in which four pixels share one chroma.
    y, u, v = frame(*sides)
    full = [y, *(np.repeat(np.repeat(c, 2, 0), 2, 1)[: sides[0], : sides[1]] for c in (u, v))]
    joined = resize_crop_reference(full, size, Colours(), resize="squash")
    assert (
        np.abs(resize_crop_reference([y, u, v], size, Colours(), resize="squash") - joined).max()
        < 1e-6
    )


@pytest.mark.parametrize("shape", SIDES, ids=str)
def test_pad_shows_all_between_black_bars(shape):
    *sides, size = shape
    frames = rgb(*sides)
    square = resize_frames(frames, size, "pad")[0]
    rows, columns = placed(*sides, size, "pad")
    assert max(rows.kept, columns.kept) == size
    assert abs(rows.kept * sides[1] - columns.kept * sides[0]) < max(sides)  # within a pixel
    for axis in (rows, columns):
        assert axis.at == (size - axis.kept) // 2 and axis.kept == axis.whole
    inner = square[:, rows.at : rows.at + rows.kept, columns.at : columns.at + columns.kept]
    whole = F.interpolate(frames.float(), (rows.kept, columns.kept), mode="bicubic", antialias=True)
    assert apart(inner, whole[0].round()) <= 1
    assert square.sum() == inner.sum()


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", SIDES, ids=str)
def test_pytorch_on_any_device_gives_the_same(shape, resize):
    *sides, size = shape
    frames = rgb(*sides, count=3)
    assert (
        apart(resize_frames_by_torch(frames, size, resize), resize_frames(frames, size, resize))
        <= 1
    )
    assert resize_frames(frames[:0], size, resize).shape == (0, 3, size, size)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mirrored_x", [False, True])
@pytest.mark.parametrize("mirrored_y", [False, True])
def test_what_is_turned_is_placed_as_it_is_shown(resize, swapped, mirrored_x, mirrored_y):
    upright = rgb(45, 34)[0].numpy()
    stored = upright[:, :: -1 if mirrored_y else 1, :: -1 if mirrored_x else 1]
    stored = np.ascontiguousarray(stored.transpose(0, 2, 1) if swapped else stored)
    for size in (32, 33, 45):
        found = resize_crop(
            list(stored),
            size,
            Colours("rgb"),
            resize=resize,
            turn=(swapped, mirrored_x, mirrored_y),
        )
        expected = resize_crop(list(upright), size, Colours("rgb"), resize=resize)
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_threads_do_not_disturb_each_other():
    given = [(frame(60 + 9 * i, 80, seed=i), 32 + i, Colours()) for i in range(8)]
    alone = [resize_crop(*each) for each in given]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            together = list(pool.map(lambda each: resize_crop(*each), given))
            assert all(map(np.array_equal, alone, together))


def test_what_does_not_fit_is_said():
    y, u, v = frame(8, 8)
    for planes, size, colours, error in [
        ([y, u], 4, Colours(), "expected three matrices"),
        ([y, u, v[:3]], 4, Colours(), r"a plane is \[3, 4\] of a frame of \[8, 8\]"),
        ([y[:0], u[:0], v[:0]], 4, Colours(), r"a plane is \[0, 8\]"),
        ([y, u, v], 0, Colours(), "size is 0"),
        ([y, u, v], 4, Colours("bt602"), "of .*'bt601'"),
        ([y, u, v], 4, Colours(bits=10), "uint8, expected uint16"),
        ([y, u, v.T], 4, Colours(), "rows contiguous"),
    ]:
        with pytest.raises((ValueError, TypeError), match=error):
            resize_crop(planes, size, colours)
    with pytest.raises(ValueError, match="resize is 'fit'; expected one of crop, squash, pad"):
        resize_crop([y, u, v], 4, Colours(), resize="fit")
    for out in (
        np.empty((3, 5, 4), np.uint8),
        np.empty((3, 4, 4)),
        np.empty((3, 4, 8), "B")[..., ::2],
        np.frombuffer(bytes(48), np.uint8).reshape(3, 4, 4),  # read-only
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \[3, 4, 4\], contiguous"):
            resize_crop([y, u, v], 4, Colours(), out)


def test_planes_may_lie_anywhere():
    """At odd addresses, bottom-up, read-only, or overlapping the result."""
    planes = frame(40, 50, bits=10, padding=0)
    colours = Colours(bits=10)
    want = resize_crop(planes, 24, colours)

    def at_an_odd_address(plane):
        data = b"\0" + plane.tobytes()
        return np.frombuffer(data, np.uint16, offset=1).reshape(plane.shape)

    upwards = [plane[::-1].copy()[::-1] for plane in planes]
    for same in ([at_an_odd_address(plane) for plane in planes], upwards):
        assert np.array_equal(resize_crop(same, 24, colours), want)

    memory = np.zeros(3 * 30 * 30, np.uint8)
    rgb = memory.reshape(3, 30, 30)
    rgb[:] = np.random.default_rng(0).integers(0, 256, rgb.shape)
    for resize in RESIZES:
        want = resize_crop(list(rgb.copy()), 30, Colours("rgb"), resize=resize)
        again = rgb.copy()
        resize_crop(list(again[::-1])[::-1], 30, Colours("rgb"), again, resize=resize)
        assert np.array_equal(again, want)


def test_the_other_byte_order_and_columns_apart_are_refused():
    planes = frame(40, 50, bits=10)
    for other in (
        [plane.astype(plane.dtype.newbyteorder()) for plane in planes],
        [np.asfortranarray(plane) for plane in planes],
        [plane[:, ::-1] for plane in planes],
    ):
        with pytest.raises(TypeError, match="expected uint16, rows contiguous"):
            resize_crop(other, 24, Colours(bits=10))
    with pytest.raises(ValueError, match="a plane is"):
        resize_crop([plane[:0] for plane in planes], 24, Colours(bits=10))
