"""Whole pictures of a clip: which frames they are, and their shape, turn and colours."""

import numpy as np
import pytest
from PIL import Image

from clipvip.data.video import Blob, DecodeError, open_clip, read_frames, read_pictures

STEP = 4  # brightness from one frame of a made video to the next


def shown(pictures) -> list[int]:
    return [round(frame.mean() / STEP) for frame in pictures.frames]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11, 60])
@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_one_picture_is_the_middle_frame(make_video, numbers, count, codec):
    path = make_video("a.mkv", count=count, codec=codec)
    assert shown(read_pictures(path, side=100)) == [count // 2]
    with open_clip(path, 2, sampling="authors", with_middle=True) as clip:
        assert numbers(clip.decode(16).middle[None]) == [count // 2]  # as the loader takes it
    assert shown(read_pictures(Blob("a.mkv", path.read_bytes()), side=100)) == [count // 2]


def test_several_pictures_are_spread_over_the_clip(make_video, numbers):
    path = make_video("a.mp4", count=60)
    for given in ({}, {"start": 0.4, "end": 1.6}, {"start": 2.0}):
        found = shown(read_pictures(path, 5, side=100, **given))
        assert found == numbers(read_frames(path, 5, size=16, sampling="authors", **given))
    assert shown(read_pictures(path, 1, side=100, start=0.4, end=1.6)) == [25]


def test_a_short_clip_gives_each_of_its_frames_once(make_video):
    path = make_video("a.mp4", count=3)
    assert shown(read_pictures(path, 8, side=100)) == [0, 1, 2]


@pytest.mark.parametrize("side,expected", [(1280, (90, 160)), (80, (45, 80))])
def test_a_picture_keeps_its_shape(make_video, tmp_path, side, expected):
    path = make_video("a.mp4", count=3, size=(160, 90))
    assert read_pictures(path, side=side).frames[0].shape == (*expected, 3)
    Image.fromarray(np.full((90, 160, 3), 7, np.uint8)).save(tmp_path / "a.png")
    (frame,) = read_pictures(tmp_path / "a.png", 4, side=side).frames
    assert frame.shape == (*expected, 3) and (frame == 7).all() and frame.dtype == np.uint8


def test_a_turned_video_is_shown_upright(turned_video):
    (frame,) = read_pictures(turned_video((0, 1, -1, 0)), side=100).frames  # clockwise
    assert frame.shape == (64, 32, 3)
    corners = [frame[y, x].argmax() for y, x in ((16, 8), (16, 24), (48, 24))]
    assert corners == [2, 0, 1]  # blue was bottom left, red top left, green top right


@pytest.mark.parametrize("matrix,number", [("bt601", 6), ("bt709", 1)])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_follow_the_files_matrix_and_range(flat_video, matrix, number, full_range):
    path, expected = flat_video(matrix, number, full_range)
    for colour, frame in zip(expected, read_pictures(path, 27, side=64).frames, strict=True):
        found = frame[16:48, 16:48].reshape(-1, 3).mean(0)
        assert np.abs(found - colour.flatten().numpy()).max() < 8


def test_what_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for path in (tmp_path / "a.mp4", tmp_path / "none.mp4", tmp_path / "none.png"):
        with pytest.raises(DecodeError):
            read_pictures(path, side=64)
