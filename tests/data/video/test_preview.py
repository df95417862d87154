"""Properties of pictures and films that are made for people to look at."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from clipvip.data.video.container import DecodeError
from clipvip.data.video.decode import read_frames
from clipvip.data.video.preview import film_of, picture_of, plain_copy

STEP = 4  # brightness from one frame of make_video to the next
KINDS = {
    "a.mp4": {},
    "a.mkv": {"codec": "ffv1"},
    "a.ts": {"options": {"g": "10"}},
    "a.avi": {"codec": "mpeg4"},
    "a.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}},
}


def shade(data: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean()) / STEP


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_lies_in_its_moment(name, make_video):
    path = make_video(name, **KINDS[name])  # 60 frames, 25 per second
    for start, end in ((0.0, 0.4), (0.8, 1.2), (2.0, 2.4), (1.0, 99.0), (None, None)):
        number = shade(picture_of(path, start, end))
        first, last = 25 * (start or 0), 25 * min(end or 9, 2.4)
        assert first - 2 <= number < last + 1, (start, end)


@pytest.mark.parametrize("name", KINDS)
def test_a_film_shows_its_part_as_h264(name, make_video):
    path = make_video(name, **KINDS[name])
    with av.open(io.BytesIO(film_of(path, 0.8, 1.6))) as film:
        assert film.format.name.startswith("mov,mp4")
        assert film.streams.video[0].codec_context.name == "h264"
        shades = [frame.to_ndarray(format="rgb24").mean() / STEP for frame in film.decode(video=0)]
    assert len(shades) in (19, 20, 21)
    assert abs(shades[0] - 20) < 2 and abs(shades[-1] - 39) < 2


def test_large_pictures_are_made_smaller_and_small_ones_are_not(make_video):
    wide = make_video("wide.mp4", count=3, size=(320, 90))
    for side, size in ((160, (160, 45)), (640, (320, 90))):
        assert Image.open(io.BytesIO(picture_of(wide, side=side))).size == size


def test_a_turned_video_is_shown_upright(make_video, turn):
    path = turn(make_video("turned.mp4", count=30, size=(96, 64)), (0, 1, -1, 0))
    assert Image.open(io.BytesIO(picture_of(path))).size == (64, 96)
    with av.open(io.BytesIO(film_of(path, 0.0, 1.0))) as film:
        assert (film.streams.video[0].width, film.streams.video[0].height) == (64, 96)


def test_a_part_past_the_end_has_a_picture_and_no_film(make_video):
    path = make_video("a.mp4")
    assert picture_of(path, 50.0, 60.0)
    with pytest.raises(DecodeError, match="no frames in this part"):
        film_of(path, 50.0, 60.0)


def test_a_copy_has_the_colours_of_an_image_and_the_frames_of_a_video(make_video, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    copy = plain_copy(tmp_path / "a.png")
    assert copy.name == "copy.png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(copy.data))), pixels)
    for name in KINDS:
        path = make_video(name, **KINDS[name])
        copied = read_frames(plain_copy(path), 8, size=32).float()
        wanted = read_frames(path, 8, size=32).float()
        assert (copied - wanted).abs().mean() < STEP  # a frame beside the wanted one, at most


@pytest.mark.parametrize("content", [b"", b"junk" * 99, b"\0\0\0\x18ftypmp42" + b"\0" * 99])
def test_what_is_no_video_is_a_decode_error(content, tmp_path):
    for name in ("a.mp4", "a.png"):
        path = tmp_path / name
        path.write_bytes(content)
        for show in (picture_of, plain_copy, lambda path: film_of(path, 0.0, 1.0)):
            with pytest.raises(DecodeError):
                show(path)
