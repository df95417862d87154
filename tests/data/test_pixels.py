"""Frames and images of every kind to upright RGB."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from clipvip.data.decode import probe, read_frames


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
    info = probe(path)
    assert (info.width, info.height) == shown.size
    top = (shown.height - 32) // 2
    left = (shown.width - 32) // 2
    expected = np.asarray(shown.crop((left, top, left + 32, top + 32)), int)
    found = read_frames(path, 2, size=32).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found - expected).mean() < 3
