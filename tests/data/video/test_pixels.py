"""Frames and images of every kind to upright RGB."""

import io
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from clipvip.data.video.container import Blob, DecodeError
from clipvip.data.video.decode import read_frames
from clipvip.data.video.pixels import Converter, rgb_of
from clipvip.ops.resize_crop import RESIZES, resize_frames


def patches(width: int = 64, height: int = 32) -> Image.Image:
    """Red top left, green top right, blue bottom left, black bottom right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = slice(height // 2), slice(width // 2)
    pixels[top, left, 0] = pixels[top, width // 2 :, 1] = pixels[height // 2 :, left, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_frames_turn_by_their_exif(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = io.BytesIO()
    patches().save(jpeg, "JPEG", quality=95, subsampling=0, exif=exif)
    path = tmp_path / "timelapse.mov"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj444p"
        for position in range(2):
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = position
            out.mux(packet)
    with Image.open(jpeg) as image:
        shown = ImageOps.exif_transpose(image)
    top = (shown.height - 32) // 2
    left = (shown.width - 32) // 2
    expected = np.asarray(shown.crop((left, top, left + 32, top + 32)), int)
    found = read_frames(path, 2, size=32).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found - expected).mean() < 3


def noise(height: int, width: int, count: int = 3) -> np.ndarray:
    """uint8 [count, height, width, 3], without detail that 4:2:0 could not hold."""
    small = np.random.default_rng(height).integers(
        0, 256, (count, 1 + height // 8, 1 + width // 8, 3)
    )
    return small.repeat(8, 1).repeat(8, 2)[:, :height, :width].astype(np.uint8)


LOSSLESS = {
    "h264.mkv": dict(codec="libx264rgb", pixel_format="rgb24", options={"qp": "0"}),
    "ffv1.mkv": dict(codec="ffv1", pixel_format="bgr0"),
    "ffv1-10.mkv": dict(codec="ffv1", pixel_format="gbrp10le"),
    "png.mov": dict(codec="png", pixel_format="rgba"),
    "raw.avi": dict(codec="rawvideo", pixel_format="bgr24"),
}


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("name", LOSSLESS)
def test_a_path_is_read_as_its_frames_are(
    name: str, resize: str, write_video, tmp_path: Path
) -> None:
    shown = noise(51, 90)
    path = write_video(tmp_path / name, list(shown), **LOSSLESS[name])
    found = read_frames(path, 3, size=32, resize=resize)
    expected = resize_frames(torch.from_numpy(shown).permute(0, 3, 1, 2), 32, resize)
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_image_is_read_as_its_pixels_are(mode: str, resize: str, tmp_path: Path) -> None:
    picture = Image.fromarray(noise(51, 90)[0]).convert(mode)
    picture.save(tmp_path / "x.png")
    found = read_frames(tmp_path / "x.png", 3, size=32, resize=resize)
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
    assert torch.equal(found, resize_frames(pixels, 32, resize))


@pytest.mark.parametrize("pixel_format", ["yuva420p", "yuva444p10le"])
def test_alpha_of_frames_is_dropped(pixel_format: str) -> None:
    whole = av.VideoFrame.from_ndarray(noise(48, 64)[0], format="rgb24")
    seen = whole.reformat(format=pixel_format.replace("yuva", "yuv"))
    half = whole.reformat(format=pixel_format)
    half.planes[3].update(bytes(half.planes[3].buffer_size))
    out = np.empty((2, 3, 16, 16), np.uint8)
    for frame, square in zip((seen, half), out, strict=True):
        Converter(16, "vp9").convert(frame, square)
    assert np.array_equal(*out)


def picture_of(mode: str) -> Image.Image:
    """Mid-grey, or as near to it as the mode has."""
    grey = Image.new("L", (40, 30), 128)
    if mode.startswith("I"):
        numbers = np.full((30, 40), 32896, np.int32 if mode == "I" else np.uint16)
        return Image.fromarray(numbers.astype(">u2") if mode == "I;16B" else numbers)
    if mode == "La":  # multiplied by its alpha
        return Image.merge("LA", (grey, Image.new("L", grey.size, 200))).convert("La")
    if mode == "LAB":
        return Image.new("LAB", grey.size, (137, 128, 128))
    if mode == "P":
        return grey.convert("P")
    if mode == "PA":
        return grey.convert("P").convert("PA")
    return (
        grey.convert("RGB").convert(mode)
        if mode != "RGBa"
        else (grey.convert("RGBA").convert("RGBa"))
    )


MODES = ["L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.mark.parametrize("mode", [*MODES, "I", "I;16", "I;16B", "F"])
def test_mid_grey_of_every_mode_is_mid_grey(mode: str) -> None:
    picture = picture_of(mode)
    assert picture.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = rgb_of(picture)
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - 128).max() <= 1
    assert (rgb_of(Image.new("1", (4, 3), 1)) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_colours_below_alpha_are_seen(suffix: str, tmp_path: Path) -> None:
    red = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    path = tmp_path / f"x.{suffix}"
    red.save(path, lossless=True, exact=True)
    assert read_frames(path, 1, size=8).float().mean((0, 2, 3)).tolist() == [255, 0, 0]
    palette = red.convert("RGB").quantize(2)
    for transparency in (0, bytes([0, 7])):  # a colour's number, or an alpha for each
        palette.save(tmp_path / "p.png", transparency=transparency)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = read_frames(tmp_path / "p.png", 1, size=8)
        assert found.float().mean((0, 2, 3)).tolist() == [255, 0, 0]


def test_greys_of_sixteen_bits_keep_their_steps(tmp_path: Path) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).repeat(256).reshape(256, 256).T
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "x.png")
    found = read_frames(tmp_path / "x.png", 1, size=256)[0]
    assert torch.equal(found, torch.arange(256, dtype=torch.uint8).expand(3, 256, 256))


def test_cmyk_of_adobe_is_not_inverted(tmp_path: Path) -> None:
    shown = np.asarray(patches(64, 64), int)
    patches(64, 64).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.mode == "CMYK" and "adobe" in image.info
    found = read_frames(tmp_path / "x.jpg", 1, size=64)[0].permute(1, 2, 0)
    assert np.abs(found.numpy().astype(int) - shown).mean() < 8


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_of_moving_images_the_first_is_read(suffix: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in (40, 90, 200)]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    found = read_frames(path, 3, size=8)
    assert found.shape == (1, 3, 8, 8) and (found[:, 0] == 40).all()


def test_images_that_cannot_be_read_are_errors_of_their_files(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match=r"x.png: .*decompression bomb"):
        read_frames(path, 1, size=8)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DecodeError, match=r"x.png: .*truncated"):
        read_frames(path, 1, size=8)
    path.write_text("no image")
    with pytest.raises(DecodeError, match="not an image of a known format"):
        read_frames(Blob(path.name, path.read_bytes()), 1, size=8)
