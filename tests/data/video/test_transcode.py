import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from clipvip.data.video import transcode
from clipvip.data.video.container import Blob, DecodeError, open_video
from clipvip.data.video.decode import open_clip, read_frames
from clipvip.data.video.transcode import Cut, cut, reencode, whole

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
    part = cut(path, 1.0, 1.2)
    if name == "gop10.ts":
        assert part.instead == "stored whole: their container (mpegts) cannot be cut"
    else:
        assert part.instead is None and len(part.blob.data) < path.stat().st_size


OLD: dict[str, dict[str, Any]] = {
    "phone.3gp": {"codec": "h263", "size": (176, 144)},
    "camera.mov": {"codec": "prores_ks", "pixel_format": "yuv422p10le"},
    "screen.mov": {"codec": "qtrle", "pixel_format": "rgb24"},
    "early.mov": {"codec": "svq1", "pixel_format": "yuv410p", "size": (64, 64)},
    "editor.mov": {
        "codec": "dnxhd",
        "pixel_format": "yuv422p",
        "size": (256, 128),
        "options": {"profile": "dnxhr_sq"},
    },
    "vertical.mov": {"codec": "cfhd", "pixel_format": "yuv422p10le", "size": (64, 64)},
    "frames.mov": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2", "g": "10"}},
    "archive.mkv": {"codec": "ffv1"},
}


@pytest.mark.parametrize("name", OLD)
def test_codecs_that_mp4_does_not_hold_are_cut_too(name: str, make_video) -> None:
    path = make_video(name, **OLD[name])
    for start, end in PARTS[1:5]:
        part = cut(path, start, end)
        assert part.instead is None and len(part.blob.data) < path.stat().st_size
        found = read_frames(part.blob, 30, size=16, start=part.start, end=part.end)
        assert torch.equal(found, read_frames(path, 30, size=16, start=start, end=end))


def stored_whole(part: Cut, path: Path) -> bool:
    return part.blob.data == path.read_bytes() and (part.start, part.end) == (0.5, 1.2)


def test_what_no_container_holds_is_stored_whole(make_video, monkeypatch) -> None:
    path = make_video("camera.mov", **OLD["camera.mov"])
    monkeypatch.setattr(transcode, "CONTAINERS", dict.fromkeys(transcode.CONTAINERS, ("mp4",)))
    part = cut(path, 0.5, 1.2)
    assert stored_whole(part, path)
    assert part.instead == "stored whole: their codec (prores) cannot be cut"


@pytest.mark.parametrize("lost", ["a frame", "a time", "a picture", "all"])
def test_a_copy_that_reads_worse_is_stored_whole(lost: str, make_video, monkeypatch) -> None:
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    make = transcode.remux

    def spoiled(stream, packets, stamps, tick, kind):
        middle = len(packets) // 2
        if lost == "a frame":
            packets = packets[:middle] + packets[middle + 1 :]
            stamps = stamps[:middle] + stamps[middle + 1 :]
        elif lost == "a time":
            moved = stamps[middle]._replace(pts=stamps[middle].pts + 200)
            stamps = [*stamps[:middle], moved, *stamps[middle + 1 :]]
        elif lost == "a picture":
            packets = [packets[-1], *packets[1:]]
        return b"nothing" if lost == "all" else make(stream, packets, stamps, tick, kind)

    monkeypatch.setattr(transcode, "remux", spoiled)
    part = cut(path, 0.5, 1.2)
    assert stored_whole(part, path)
    assert part.instead == "stored whole: their packets show other frames by themselves"


def test_a_file_that_cannot_be_read_is_no_clip(tmp_path: Path, make_video) -> None:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"\0" * 1000)
    for path in (damaged, tmp_path / "missing.mp4"):
        with pytest.raises(DecodeError):
            part = cut(path, 0.5, 1.2)
            read_frames(part.blob, 1, size=16)
        with pytest.raises(DecodeError):
            reencode(path, 32, 0.5, 1.2)


def test_a_cut_of_real_clips_shows_the_same_frames(real_clips: dict[str, Path]) -> None:
    for name in ("bigbuckbunny", "carphone_distorted"):
        part = cut(real_clips[name], 1.3, 2.9)
        found = read_frames(part.blob, 8, size=32, start=part.start, end=part.end)
        assert torch.equal(found, read_frames(real_clips[name], 8, size=32, start=1.3, end=2.9))


def coding(blob: Blob) -> tuple[str, int, int]:
    with open_video(blob) as video:
        context = video.stream.codec_context
        return context.name, context.width, context.height


@pytest.mark.parametrize("name", [*CODINGS, "raw.h264"])
def test_coding_anew_keeps_frames_and_times(name: str, make_video, numbers) -> None:
    path = make_video(name, size=(96, 64), **CODINGS.get(name, {"options": {"g": "10"}}))
    for start, end in PARTS:
        part = reencode(path, 32, start, end)
        whole = read_frames(path, 30, size=16, start=start, end=end)
        assert (part.start, part.end) == (None, None)
        assert numbers(read_frames(part.blob, 30, size=16)) == numbers(whole), (start, end)
        assert coding(part.blob) == ("h264", 48, 32)


def test_varying_frame_rate_survives(make_video, numbers) -> None:
    times = [20 * i for i in range(30)] + [600 + 300 * i for i in range(10)]
    path = make_video("vfr.mp4", count=40, times=times, options={"bf": "2", "g": "15"})
    expected = numbers(read_frames(path, 12, size=16))
    assert numbers(read_frames(reencode(path, 16).blob, 12, size=16)) == expected
    with open_clip(reencode(path, 16).blob, 1) as clip:
        assert clip.index.duration == pytest.approx(3.3, abs=0.31)


def test_a_small_video_is_not_made_larger_and_odd_sides_become_even(make_video) -> None:
    path = make_video("odd.mkv", codec="ffv1", pixel_format="bgr0", size=(35, 51), count=3)
    assert coding(reencode(path, 64).blob) == ("h264", 36, 52)


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


SMALL, LARGE, TALL = (80, 60), (160, 120), (60, 80)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
@pytest.mark.parametrize("sizes", [[LARGE, SMALL], [SMALL, LARGE], [SMALL, LARGE, SMALL]], ids=str)
def test_frames_that_change_size_are_shown_alike(
    sizes: list[tuple[int, int]], codec: str, changing_video: Callable[..., Path], numbers
) -> None:
    quick = {"deadline": "realtime", "cpu-used": "8"}
    path = changing_video("changing.webm", sizes, codec=codec, options=quick)
    part = cut(path, 0.1, 0.7)
    assert part.instead is None
    found = read_frames(part.blob, 15, size=16, start=part.start, end=part.end)
    assert torch.equal(found, read_frames(path, 15, size=16, start=0.1, end=0.7))
    again = reencode(path, 90)
    count = 10 * len(sizes)
    assert again.instead is None
    assert numbers(read_frames(again.blob, count, size=16)) == list(range(count))
    assert coding(again.blob) == ("h264", 120, 90)  # the larger's detail is kept


def test_frames_that_change_shape_are_not_distorted(changing_video, numbers) -> None:
    path = changing_video("tall.webm", [LARGE, SMALL, TALL], codec="libvpx")
    part = reencode(path, 90, 0.5, 1.1)
    assert part.instead == "not re-encoded: their frames change shape"
    found = read_frames(part.blob, 15, size=16, start=part.start, end=part.end)
    assert torch.equal(found, read_frames(path, 15, size=16, start=0.5, end=1.1))
    for start, end in [(0.0, 0.7), (0.9, 1.1)]:  # of one shape
        whole = read_frames(path, 5, size=16, start=start, end=end)
        part = reencode(path, 90, start, end)
        assert part.instead is None
        assert numbers(read_frames(part.blob, 5, size=16)) == numbers(whole)


@pytest.mark.parametrize(
    ("matrix", "number", "full", "codec"),
    [
        ("bt601", 5, False, "libvpx-vp9"),
        ("bt601", 2, True, "libvpx-vp9"),
        ("bt601", 5, True, "mjpeg"),
        ("bt709", 1, False, "libvpx-vp9"),
        ("bt709", 1, True, "libvpx-vp9"),
        ("bt2020", 9, False, "libvpx-vp9"),
    ],
)
def test_colours_survive_coding_anew(
    matrix: str, number: int, full: bool, codec: str, flat_video
) -> None:
    path, exact = flat_video(matrix, number, full, codec)
    part = reencode(path, 64)
    assert (read_frames(part.blob, len(exact), size=64) - exact).abs().max() <= 6
    with av.open(BytesIO(part.blob.data)) as new:
        assert new.streams.video[0].codec_context.colorspace == 6  # which DALI decodes, too


def test_what_the_encoder_cannot_take_is_stored_otherwise(make_video, monkeypatch) -> None:
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    monkeypatch.setitem(transcode.CODING, "preset", "none")
    part = reencode(path, 32, 0.5, 1.2)
    assert part.instead == "not re-encoded: their frames cannot be encoded"
    found = read_frames(part.blob, 15, size=16, start=part.start, end=part.end)
    assert torch.equal(found, read_frames(path, 15, size=16, start=0.5, end=1.2))


def test_coding_anew_gives_the_same_bytes_whatever_was_coded_before(write_video, tmp_path) -> None:
    """Videos of many lengths whose content moves: flat ones hide what differs."""
    noise = np.random.default_rng(0)
    paths = []
    for number in range(40):
        height, width, count = 32 + 2 * (number % 7), 48 + 2 * (number % 5), 3 + number % 23
        ground = noise.integers(0, 256, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)
        frames = [
            np.ascontiguousarray(
                np.roll(ground, (i * (number % 3), 2 * i), (0, 1))[:height, :width]
            )
            for i in range(count)
        ]
        paths.append(
            write_video(tmp_path / f"{number}.mp4", frames, options={"preset": "ultrafast"})
        )
    first = [reencode(path, 32).blob.data for path in paths]
    for _ in range(2):
        order = noise.permutation(len(paths)).tolist()
        again = {place: reencode(paths[place], 32).blob.data for place in order}
        assert [place for place in order if again[place] != first[place]] == []


def test_a_gap_of_hours_is_stored(write_video, tmp_path: Path, numbers) -> None:
    frames = [np.full((32, 48, 3), 4 * i, np.uint8) for i in range(6)]
    times = [40 * i + 25_200_000 * (i > 2) for i in range(6)]
    path = write_video(tmp_path / "gap.mkv", frames, times=times)
    for store in (lambda *part: reencode(path, 16, *part), lambda *part: cut(path, *part)):
        for part in [(None, None), (0.04, None), (0.04, 30_000.0), (25_200.0, None)]:
            found = store(*part)
            shown = read_frames(found.blob, 6, size=16, start=found.start, end=found.end)
            expected = read_frames(path, 6, size=16, start=part[0], end=part[1])
            assert numbers(shown) == numbers(expected)


@pytest.mark.parametrize("error", [OverflowError, MemoryError, IndexError, RecursionError])
@pytest.mark.parametrize("place", ["_stamps", "remux", "_Shrink", "has_new_head"])
def test_what_no_way_of_storing_foresees_leads_to_the_next(
    place: str, error: type[Exception], make_video, monkeypatch
) -> None:
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])

    def fail(*arguments: Any) -> Any:
        raise error("of no importance")

    monkeypatch.setattr(transcode, place, fail)
    assert cut(path, 0.5, 1.2).instead is None or stored_whole(cut(path, 0.5, 1.2), path)
    monkeypatch.setattr(transcode, "_Shrink", lambda: fail)
    part = reencode(path, 32, 0.5, 1.2)
    assert part.instead == "not re-encoded: their frames cannot be encoded"


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero"), Path("a\0.mp4"), Path("a" * 300)):
        for store in (whole, lambda path: cut(path, 0.5, 1.0), lambda path: reencode(path, 32)):
            with pytest.raises(DecodeError):
                store(path)
