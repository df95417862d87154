"""Every name that counts as a video's, on a file of that format."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from clipvip.data.video.container import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image
from clipvip.data.video.decode import read_frames

FINE = {"b": "4000000", "qmin": "1", "qmax": "2"}
MPEG1 = {"codec": "mpeg1video", "options": FINE}
MPEG2 = {"codec": "mpeg2video", "options": FINE}
MPEG4 = {"codec": "mpeg4", "options": FINE}
H264: dict[str, Any] = {"codec": "libx264", "options": {"bf": "2"}}
HEVC = {"codec": "libx265", "options": {"x265-params": "log-level=error"}}
VP8 = {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}}
JPEG = {"codec": "mjpeg", "pixel_format": "yuvj420p"}
OF: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("264", "h264"), ("h264", H264)),
    **dict.fromkeys(("265", "h265", "hevc"), ("hevc", HEVC)),
    **dict.fromkeys(("mp4", "m4v", "f4v"), ("mp4", H264)),
    **dict.fromkeys(("mov", "qt"), ("mov", MPEG4)),
    **dict.fromkeys(("3gp", "3g2"), ("3gp", MPEG4)),
    **dict.fromkeys(("mkv", "mk3d"), ("matroska", H264)),
    **dict.fromkeys(("avi", "divx", "xvid"), ("avi", MPEG4)),
    **dict.fromkeys(("asf", "wmv"), ("asf", {"codec": "wmv2", "options": FINE})),
    **dict.fromkeys(("mpg", "mpeg", "mpe"), ("mpeg", MPEG1)),
    **dict.fromkeys(("vob", "m2p"), ("vob", MPEG2)),
    **dict.fromkeys(("ts", "m2t", "m2ts", "mts", "tod", "tp", "trp"), ("mpegts", H264)),
    **dict.fromkeys(("m1v", "mpv"), ("mpeg1video", MPEG1)),
    **dict.fromkeys(("ogm", "ogv"), ("ogg", VP8)),
    **dict.fromkeys(("mjpeg", "mjpg"), ("mjpeg", JPEG)),
    "flv": ("flv", {"codec": "flv", "options": FINE}),
    "gif": ("gif", {"codec": "gif", "pixel_format": "gray"}),
    "ivf": ("ivf", VP8),
    "m2v": ("mpeg2video", MPEG2),
    "mxf": ("mxf", MPEG2),
    "rm": ("rm", {"codec": "rv10", "options": FINE}),
    "rmvb": ("rm", {"codec": "rv20", "options": FINE}),
    "webm": ("webm", VP8),
    "wtv": ("wtv", MPEG2),
    "y4m": ("yuv4mpegpipe", {"codec": "rawvideo"}),
}


def test_each_name_is_tried() -> None:
    # AMV's and DV's muxers ask for sound.
    assert {f".{name}" for name in OF} | {".amv", ".dv"} == VIDEO_SUFFIXES


@pytest.mark.parametrize("name", OF)
def test_a_file_of_each_name_is_read(name: str, make_video, numbers, tmp_path: Path) -> None:
    container, coding = OF[name]
    path = make_video(f"named.{name}", size=(176, 144), container=container, **coding)
    every = read_frames(path, 60, size=16)
    # MPEG-1's times are not quite even, and what is sampled follows times.
    apart = 1 if coding is MPEG1 else 0
    assert numbers(every) == pytest.approx(range(60), abs=apart)
    named = path.rename(tmp_path / f"A.{name.upper()}")
    assert torch.equal(read_frames(named, 60, size=16), every)


def test_dv_is_read(tmp_path: Path, numbers) -> None:
    path = tmp_path / "a.dv"  # frames one after the other are a whole file
    encoder: Any = av.CodecContext.create("dvvideo", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 720, 576, "yuv420p"
    encoder.framerate, encoder.time_base = 25, Fraction(1, 25)
    with path.open("wb") as file:
        for number in range(12):
            pixels = np.full((576, 720, 3), 4 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            file.writelines(map(bytes, encoder.encode(frame)))
    assert numbers(read_frames(path, 12, size=16)) == list(range(12))


@pytest.mark.parametrize("name", sorted(IMAGE_SUFFIXES))
def test_an_image_of_each_name_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{name}"
    kind = {".jfif": "jpeg", ".jpe": "jpeg"}.get(name)
    try:
        Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(path, kind)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow does not write {name}")
    assert is_image(path.with_suffix(name.upper()))
    assert (read_frames(path, 1, size=16) - torch.tensor(200.0)).abs().max() <= 2
