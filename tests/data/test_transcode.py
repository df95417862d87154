from pathlib import Path

import pytest
import torch

from clipvip.data.decode import probe, read_frames
from clipvip.data.transcode import cut, reencode

CODINGS = {
    "gop10.mp4": {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}},
    "open.mp4": {"options": {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    "gop10.mkv": {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}},
    "gop10.ts": {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "10", "g": "10"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime"}},
}
PARTS = [(None, None), (0.5, 1.2), (None, 0.4), (1.98, None), (1.0, 1.01), (0.0, 99.0)]


@pytest.mark.parametrize("name", CODINGS)
def test_a_cut_shows_the_same_frames(name: str, make_video) -> None:
    path = make_video(name, **CODINGS[name])
    for start, end in PARTS:
        whole = read_frames(path, 30, size=16, start=start, end=end)
        part = cut(path, start, end)
        found = read_frames(part.blob, 30, size=16, start=part.start, end=part.end)
        assert torch.equal(found, whole), (start, end)
    if name != "gop10.ts":
        assert len(cut(path, 1.0, 1.2).blob.data) < path.stat().st_size


def test_a_cut_of_real_clips_shows_the_same_frames(real_clips: dict[str, Path]) -> None:
    for name in ("bigbuckbunny", "carphone_distorted"):
        part = cut(real_clips[name], 1.3, 2.9)
        found = read_frames(part.blob, 8, size=32, start=part.start, end=part.end)
        assert torch.equal(found, read_frames(real_clips[name], 8, size=32, start=1.3, end=2.9))


@pytest.mark.parametrize("name", [*CODINGS, "raw.h264"])
def test_coding_anew_keeps_frames_and_times(name: str, make_video, numbers) -> None:
    path = make_video(name, size=(96, 64), **CODINGS.get(name, {"options": {"g": "10"}}))
    for start, end in PARTS:
        part = reencode(path, 32, start, end)
        whole = read_frames(path, 30, size=16, start=start, end=end)
        assert (part.start, part.end) == (None, None)
        assert numbers(read_frames(part.blob, 30, size=16)) == numbers(whole), (start, end)
        info = probe(part.blob)
        assert (info.width, info.height, info.codec) == (48, 32, "h264")


def test_varying_frame_rate_survives(make_video, numbers) -> None:
    times = [20 * i for i in range(30)] + [600 + 300 * i for i in range(10)]
    path = make_video("vfr.mp4", count=40, times=times, options={"bf": "2", "g": "15"})
    expected = numbers(read_frames(path, 12, size=16))
    assert numbers(read_frames(reencode(path, 16).blob, 12, size=16)) == expected
    assert probe(reencode(path, 16).blob).duration == pytest.approx(3.3, abs=0.31)


def test_a_small_video_is_not_made_larger_and_odd_sides_become_even(make_video) -> None:
    path = make_video("odd.mkv", codec="ffv1", pixel_format="bgr0", size=(35, 51), count=3)
    info = probe(reencode(path, 64).blob)
    assert (info.width, info.height) == (36, 52)


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
def test_what_is_turned_by_a_flag_is_stored_upright(matrix, turned_video) -> None:
    path = turned_video(matrix)
    whole = read_frames(path, 1, size=32).float()
    copied = cut(path, 0.0, 0.1).blob
    assert (read_frames(copied, 1, size=32).float() - whole).abs().mean() < 1
    # Stored with half the chroma, whose edges are then smooth; turned otherwise it is far off.
    again = read_frames(reencode(path, 32).blob, 1, size=32).float()
    turned = [again, *(again.rot90(n, (2, 3)) for n in (1, 2, 3)), again.flip(2), again.flip(3)]
    right, *wrong = ((each - whole).abs().mean() for each in turned)
    assert right < 6 and min(wrong) > 30
