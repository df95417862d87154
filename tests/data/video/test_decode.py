import ctypes
import gc
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipvip.data.video import known_index, pixels, strategies
from clipvip.data.video.container import Blob, open_video
from clipvip.data.video.decode import DecodeError, open_clip, read_frames
from clipvip.data.video.sampling import choose_frames
from clipvip.ops import _native

Numbers = Callable[[Tensor], list[int]]

FINE = {"g": "10", "bf": "2", "b": "9M", "qmin": "1", "qmax": "2"}

# name → how it is coded; what matters is where keyframes lie and how frames are reordered
CODINGS = {
    "intra.mp4": {"options": {"g": "1"}},
    "gop10.mp4": {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}},
    "open.mp4": {"options": {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    "one_key.mp4": {"options": {"g": "1000", "bf": "3", "sc_threshold": "0"}},
    "gop10.mkv": {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}},
    "gop10.ts": {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}},
    "gop10.avi": {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime"}},
    "hevc.mp4": {
        "codec": "libx265",
        "size": (64, 64),
        "options": {"x265-params": "keyint=10:log-level=none"},
    },
    "mpeg2.mpg": {
        "codec": "mpeg2video",
        "options": FINE,
    },
    "mpeg4.avi": {
        "codec": "mpeg4",
        "options": FINE,
    },
    "raw.h264": {"options": {"g": "10", "bf": "3", "sc_threshold": "0"}},
}


def test_a_title_need_not_be_utf8(make_video, numbers: Numbers) -> None:
    path = make_video("titled.mp4", count=4)
    content = path.read_bytes()
    assert b"Lavf" in content  # as the file's encoder
    path.write_bytes(content.replace(b"Lavf", b"\xff\xfevf"))
    assert numbers(read_frames(path, 4, size=16)) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", CODINGS)
def test_frames_are_those_asked_for(name: str, make_video, numbers: Numbers) -> None:
    path = make_video(name, **CODINGS[name])
    times = np.arange(60) / 25
    for sampling in ("uniform", "fps:4", "clip:5"):
        for seed in (None, 0, 1):
            first, again = (None if seed is None else np.random.default_rng(seed) for _ in range(2))
            frames = read_frames(path, 8, size=16, sampling=sampling, generator=first)
            expected = choose_frames(times, 8, sampling, again)
            assert numbers(frames) == expected.tolist(), (sampling, seed)
            assert frames.dtype == torch.uint8 and frames.shape[1:] == (3, 16, 16)


@pytest.mark.parametrize("name", CODINGS)
def test_part_of_a_video_is_what_is_shown_from_start_to_end(
    name: str, make_video, numbers: Numbers
) -> None:
    path = make_video(name, **CODINGS[name])
    for start, end, first, last in [
        (0.5, 1.2, 12, 29),
        (None, 0.4, 0, 9),
        (1.98, None, 49, 59),
        (1.0, 1.01, 25, 25),
        (0.0, 99.0, 0, 59),
    ]:
        found = numbers(read_frames(path, 30, size=16, start=start, end=end))
        assert (found[0], found[-1]) == (first, last), (start, end)
        if last - first < 30:
            assert sorted(set(found)) == list(range(first, last + 1)), (start, end)


def test_real_clips_give_the_frames_of_a_full_decode(real_clips: dict[str, Path]) -> None:
    for path in real_clips.values():
        converter = pixels.Converter(32, "h264")
        with av.open(str(path)) as container:
            full = torch.empty(container.streams.video[0].frames, 3, 32, 32, dtype=torch.uint8)
            for frame, out in zip(container.decode(video=0), full, strict=True):
                converter.convert(frame, out.numpy())
            rate = float(container.streams.video[0].average_rate)
        times = np.arange(len(full)) / rate
        for seed in range(4):
            generators = [np.random.default_rng(seed) if seed else None for _ in range(2)]
            frames = read_frames(path, 12, size=32, generator=generators[0])
            assert torch.equal(frames, full[choose_frames(times, 12, generator=generators[1])])


@pytest.mark.parametrize(
    ("name", "count", "jumps"),
    [("one_key.mp4", 4, 1), ("gop10.mp4", 4, 4), ("intra.mp4", 60, 1), ("intra.mp4", 4, 4)],
)
def test_seeks_only_where_a_keyframe_lies_between(
    name: str, count: int, jumps: int, make_video, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(name, **CODINGS[name])
    seek, calls = strategies._seek, []
    monkeypatch.setattr(strategies, "_seek", lambda *given: calls.append(0) or seek(*given))
    read_frames(path, count, size=16)
    assert len(calls) == jumps


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pts of packets fed after the last seek."""
    seek, fed = strategies._seek, []

    def counting(*given):
        source = seek(*given)
        fed.clear()
        return (fed.append(packet.pts) or packet for packet in source)

    monkeypatch.setattr(strategies, "_seek", counting)
    return fed


@pytest.mark.parametrize("name", ["one_key.mp4", "gop10.mp4", "open.mp4"])
def test_no_packet_is_read_after_the_last_that_is_needed(
    name: str, make_video, fed: list[int]
) -> None:
    path = make_video(name, **CODINGS[name])
    with av.open(str(path)) as container:
        packets = [packet.pts for packet in container.demux(video=0) if packet.size]
        tick = container.streams.video[0].time_base
    for wanted in (0, 7, 23, 59):
        read_frames(path, 1, size=16, start=wanted / 25, end=(wanted + 1) / 25)
        assert fed[-1] == round(wanted / 25 / tick) + min(packets)


def test_later_reads_feed_the_decoder_what_the_first_did(
    make_video, tmp_path: Path, fed: list[int]
) -> None:
    coding = {"g": "5", "deadline": "realtime", "cpu-used": "8"}
    whole = make_video("cues.webm", codec="libvpx", options=coding).read_bytes()
    # Without one of its cues, a container seeks well in the file only after it has read through it.
    cues = whole.index(b"\x1c\x53\xbb\x6b")
    for number in range(1, 8):
        places = [found.start() for found in re.finditer(rb"\xbb.\xb3", whole[cues:], re.DOTALL)]
        damaged = bytearray(whole)
        damaged[cues + places[number]] = 0xEC  # an element without meaning
        path = tmp_path / f"{number}.webm"
        path.write_bytes(damaged)
        reads = []
        for _ in range(2):
            read_frames(path, 1, size=16, start=number / 5 + 0.1, end=number / 5 + 0.14)
            reads.append(list(fed))
        assert reads[0] == reads[1]


def packed(source: Path, target: Path, **options: str) -> Path:
    """The same packets in an MP4 written with other options."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=options) as out:
        copy = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    return target


@pytest.mark.parametrize("name", [name for name in CODINGS if name.endswith(".mp4")])
@pytest.mark.parametrize(
    "options", [{}, {"movflags": "faststart"}, {"movflags": "negative_cts_offsets"}]
)
def test_tables_of_an_mp4_say_what_its_packets_say(
    name: str, options: dict[str, str], make_video, tmp_path: Path
) -> None:
    path = packed(make_video(name, **CODINGS[name]), tmp_path / name, **options)
    for media in (path, Blob(name, path.read_bytes())):
        with open_video(media) as video:
            by_tables = known_index.index_by_tables(video)
            by_packets = known_index.index_by_packets(video)
        assert by_tables is not None
        for field in ("pts", "dts", "keyframe", "shown", "times", "duration", "by_count"):
            assert np.array_equal(getattr(by_tables, field), getattr(by_packets, field)), field


def test_tables_that_leave_a_doubt_are_not_used(make_video, numbers, tmp_path: Path) -> None:
    whole = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    fragments = packed(whole, tmp_path / "x.mp4", movflags="frag_keyframe+empty_moov")
    for path in (fragments, make_video("gop10.mkv", **CODINGS["gop10.mkv"])):
        with open_video(path) as video:
            assert known_index.index_by_tables(video) is None
        assert numbers(read_frames(path, 2, size=16)) == [0, 59]


def test_wrong_tables_are_found_out(
    make_video, numbers, monkeypatch: pytest.MonkeyPatch, indexed
) -> None:
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])

    def drawn() -> list[int]:
        return numbers(read_frames(path, 4, size=16, generator=np.random.default_rng(1)))

    right = drawn()
    assert indexed == []
    offsets, found_out = known_index.composition_offsets, 0
    for wrong in (np.flip, lambda table: table * 2, lambda table: table[:0]):
        monkeypatch.setattr(known_index, "_known", known_index._Known())
        monkeypatch.setattr(
            known_index,
            "composition_offsets",
            lambda *given, wrong=wrong: wrong(offsets(*given)),
        )
        indexed.clear()
        # Once found out, they are not tried again.
        assert [drawn(), drawn()] == [right, right] and len(indexed) <= 1
        found_out += len(indexed)
    assert found_out


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Of which files the packets were read, from now on."""
    found: list[Path] = []
    index = known_index.index_by_packets
    monkeypatch.setattr(known_index, "_known", known_index._Known())
    monkeypatch.setattr(
        known_index,
        "index_by_packets",
        lambda video, *part: found.append(video.path) or index(video, *part),
    )
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, indexed) -> list[Path]:
    """Of which files the packets or the tables were read, from now on."""
    by_tables = known_index.index_by_tables

    def watched(video):
        if (index := by_tables(video)) is not None:
            indexed.append(video.path)
        return index

    monkeypatch.setattr(known_index, "index_by_tables", watched)
    return indexed


@pytest.mark.parametrize("clip", [{}, {"start": 0.7, "end": 1.4}], ids=str)
@pytest.mark.parametrize("name", CODINGS)
def test_frames_are_the_same_when_a_file_is_known(name: str, clip, make_video, read) -> None:
    path = make_video(name, **CODINGS[name])
    first, second = (read_frames(path, 6, size=16, **clip) for _ in range(2))
    assert torch.equal(first, second)
    assert len(read) == (2 if Path(name).suffix in (".ts", ".mpg") else 1)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_an_index_is_read_once_while_a_file_stays_as_it_is(
    suffix: str, make_video, numbers: Numbers, tmp_path: Path, read
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(make_video(f"gop10{suffix}", **CODINGS["gop10.mkv"]).read_bytes())
    for start in (None, 0.5, None, 0.5):
        read_frames(path, 4, size=16, start=start)
    assert len(read) == 2
    short = make_video(f"twenty{suffix}", count=20, **CODINGS["gop10.mkv"])
    path.write_bytes(short.read_bytes())
    assert numbers(read_frames(path, 3, size=16)) == [0, 10, 19]
    data = path.read_bytes()
    os.utime(path, ns=(1, 1))  # as another of the same length would have it
    assert path.read_bytes() == data and numbers(read_frames(path, 3, size=16)) == [0, 10, 19]
    assert len(read) == 4


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_what_is_known_is_bounded_and_the_last_used_stays(
    suffix: str, make_video, tmp_path: Path, monkeypatch, read
) -> None:
    data = make_video(f"gop10{suffix}", **CODINGS["gop10.mkv"]).read_bytes()
    paths = [tmp_path / f"{i}{suffix}" for i in range(8)]
    for path in paths:
        path.write_bytes(data)
    read_frames(paths[0], 2, size=16)
    (index,) = known_index._known.kept.values()
    monkeypatch.setattr(known_index, "MOST_KNOWN", 3 * index.bytes)
    for path in paths[1:]:
        read_frames(path, 2, size=16)
        read_frames(paths[0], 2, size=16)
        held = sum(kept.bytes for kept in known_index._known.kept.values())
        assert known_index._known.bytes == held <= known_index.MOST_KNOWN
    assert read == paths


def test_threads_change_nothing(real_clips: dict[str, Path]) -> None:
    one, many = (read_frames(real_clips["bikes"], 5, size=32, threads=n) for n in (1, 0))
    assert torch.equal(one, many)


def test_varying_frame_rate_is_sampled_by_time(make_video, numbers: Numbers) -> None:
    times = [20 * i for i in range(30)] + [600 + 300 * i for i in range(10)]
    for name in ("vfr.mp4", "vfr.mkv"):
        path = make_video(name, count=40, times=times, options={"bf": "2", "g": "15"})
        wanted = np.linspace(0, 3300, 12)
        nearest = [int(np.abs(np.array(times) - t).argmin()) for t in wanted]
        assert numbers(read_frames(path, 12, size=16)) == nearest


def test_frames_before_the_edit_list_are_not_shown(tmp_path: Path, make_video, numbers) -> None:
    whole = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    cut = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = round(13 / 25 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                target.mux(packet)
    with av.open(str(cut)) as container:
        shown = [frame.pts for frame in container.decode(video=0)]
    found = numbers(read_frames(cut, 5, size=16))
    with open_clip(cut, 1) as clip:
        assert len(shown) == len(clip.index.times)
    assert (found[0], found[-1]) == (60 - len(shown), 59)


def test_a_clip_shorter_than_asked_repeats_frames(make_video, numbers: Numbers) -> None:
    path = make_video("short.mp4", count=3)
    assert numbers(read_frames(path, 6, size=16)) == [0, 0, 1, 1, 2, 2]
    assert numbers(read_frames(make_video("single.mp4", count=1), 4, size=16)) == [0] * 4


@pytest.mark.parametrize("seed", [None, 0])
def test_the_middle_frame_is_given_when_asked(seed, make_video, numbers: Numbers) -> None:
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    for with_middle in (False, True):
        generator = None if seed is None else np.random.default_rng(seed)
        part: dict[str, Any] = {"start": 0.4, "end": 1.2, "generator": generator}
        with open_clip(path, 2, with_middle=with_middle, **part) as clip:
            frames, middle = clip.decode(16)
        part["generator"] = None if seed is None else np.random.default_rng(seed)
        assert torch.equal(frames, read_frames(path, 2, size=16, **part))
        assert numbers(middle[None]) == [20] if with_middle else middle is None


@pytest.mark.parametrize("width, height", [(35, 51), (97, 33), (16, 16), (7, 200)])
def test_odd_sizes_are_resized_and_cut_in_the_centre(
    width: int, height: int, write_video, tmp_path: Path
) -> None:
    rows, columns = np.mgrid[0:height, 0:width] / max(width, height)
    shades = [rows, columns, (rows + columns) / 2]
    pixels = (np.stack(shades, -1) * 250).astype(np.uint8)
    path = write_video(tmp_path / "odd.mkv", [pixels], codec="ffv1", pixel_format="bgr0")
    frame = read_frames(path, 1, size=16)[0].float()
    scale = 16 / min(width, height)
    shape = max(16, round(height * scale)), max(16, round(width * scale))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = F.interpolate(image, shape, mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (shape[0] - 16) // 2, (shape[1] - 16) // 2
    difference = (frame - expected[:, top : top + 16, left : left + 16]).abs()
    assert difference.mean() < 1.5 and difference.max() < 8


@pytest.mark.parametrize("width", [16, 18, 20, 22, 24, 26])
def test_what_has_the_size_already_is_whole_to_its_edges(width: int, make_video) -> None:
    path = make_video(f"small{width}.mp4", size=(width, 16), count=30)
    frame = read_frames(path, 2, size=16)[1]
    assert (frame.int() - 4 * 29).abs().max() <= 4


# a, b, c, d of the display matrix; where the frame's top left, top right, bottom left corner go
ORIENTATIONS = {
    "none": ((1, 0, 0, 1), ("top left", "top right", "bottom left")),
    "quarter turn clockwise": ((0, 1, -1, 0), ("top right", "bottom right", "top left")),
    "half turn": ((-1, 0, 0, -1), ("bottom right", "bottom left", "top right")),
    "three quarters": ((0, -1, 1, 0), ("bottom left", "top left", "bottom right")),
    "mirrored": ((-1, 0, 0, 1), ("top right", "top left", "bottom right")),
    "transposed": ((0, 1, 1, 0), ("top left", "bottom left", "top right")),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_rotation_flag_turns_frames(orientation: str, turned_video) -> None:
    matrix, (red, green, blue) = ORIENTATIONS[orientation]
    path = turned_video(matrix)
    frame = read_frames(path, 1, size=32)[0]
    corner = {"top": slice(4, 12), "bottom": slice(20, 28)}
    side = {"left": slice(4, 12), "right": slice(20, 28)}
    for channel, place in enumerate((red, green, blue)):
        row, column = place.split()
        assert frame[channel, corner[row], side[column]].float().mean() > 200
        assert frame[channel].float().mean() < 100


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_is_one_frame_upright(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"photo.{suffix}"
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 40:] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned clockwise: the right half comes to the bottom
    Image.fromarray(pixels).save(path, exif=turned, quality=95)
    frames = read_frames(path, 12, size=20)
    assert frames.shape == (1, 3, 20, 20)
    assert frames[0, :, 12:].float().mean() > 250 and frames[0, :, :8].float().mean() < 5


def make_bad(kind: str, folder: Path, good: Path) -> Path:
    path = folder / f"{kind}.mp4"
    data = good.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(20_000))
    elif kind == "text":
        path = folder / "notes.txt"
        path.write_text("this is not a video\n" * 500)
    elif kind == "cut before the index":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "cut after the index":
        packed(good, path, movflags="faststart")
        path.write_bytes(path.read_bytes()[: len(data) // 2])
    elif kind == "overwritten":
        start = data.index(b"mdat") + len(data) // 4
        path.write_bytes(data[:start] + bytes([0xFF]) * (len(data) // 2) + data[start * 3 :])
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            for position in range(10):
                samples = np.zeros((1, 1024), np.float32)
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, 1024 * position
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    elif kind == "image":
        path = folder / "image.jpg"
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:300])
    return path


BAD = {
    "missing": "no such file",
    "folder": "a folder",
    "empty": "empty file",
    "noise": "not a video",
    "text": "not a video",
    "cut before the index": "cut off",
    "cut after the index": "cut off",
    "overwritten": "damaged",
    "sound only": "no video in it",
    "image": "runcated",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_its_reason(kind: str, make_video, tmp_path: Path) -> None:
    good = make_video("noisy.mp4", count=50, size=(160, 128), options={"crf": "1"})
    path = make_bad(kind, tmp_path, good)
    with pytest.raises(DecodeError) as caught:
        read_frames(path, 12, size=16)
    assert caught.value.path == path and BAD[kind] in caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", [b"DURATION", b"whatever"])
def test_cut_off_webm_is_noticed(tag: bytes, make_video, tmp_path: Path) -> None:
    data = make_video("vp9.webm", **CODINGS["vp9.webm"]).read_bytes()
    path = tmp_path / "cut.webm"
    path.write_bytes(data[: len(data) // 3].replace(b"DURATION", tag))
    with pytest.raises(DecodeError, match=r"cut off: frames end at 0\.\d s of 2\.4 s"):
        read_frames(path, 4, size=16)


def test_start_after_the_end_is_an_error(make_video) -> None:
    for name in ("gop10.mp4", "gop10.avi", "gop10.ts", "vp9.webm"):
        path = make_video(name, **CODINGS[name])
        for start in (5.0, 1e18, 1e300):
            with pytest.raises(DecodeError, match=rf"start {re.escape(f'{start:g}')} s lies after"):
                read_frames(path, 4, size=16, start=start)


def test_names_with_colons_and_percent_signs_are_names(make_video, tmp_path: Path) -> None:
    path = tmp_path / "http:10%d.mp4"
    path.write_bytes(make_video("short.mp4", count=3).read_bytes())
    assert len(read_frames(path, 2, size=16)) == 2


def test_wrong_arguments_are_not_taken_for_bad_files(make_video) -> None:
    path = make_video("short.mp4", count=3)
    with pytest.raises(ValueError, match="num_frames is 0"):
        read_frames(path, 0, size=16)
    with pytest.raises(ValueError, match="sampling is 'best'"):
        read_frames(path, 4, size=16, sampling="best")


def test_no_file_stays_open(make_video, tmp_path: Path) -> None:
    good = make_video("gop10.ts", **CODINGS["gop10.ts"])
    bad = make_bad("cut after the index", tmp_path, make_video("gop10.mp4"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_frames(good, 4, size=16)
        with pytest.raises(DecodeError):
            read_frames(bad, 4, size=16)
    assert len(os.listdir("/proc/self/fd")) == before


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")
        + ("uordblks", "fordblks", "keepcost")
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc of 2.33 or newer")
@pytest.mark.parametrize("name", ["gop10.mp4", "gop10.mkv", "gop10.ts", "gop10.avi"])
def test_memory_is_given_back(name: str, make_video) -> None:
    path = make_video(name, **CODINGS[name])
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo

    def held() -> int:
        for _ in range(60):
            read_frames(path, 4, size=16)
            read_frames(path, 2, size=16, start=0.5, end=1.5)
        gc.collect()
        found = mallinfo()
        return int(found.uordblks + found.hblkhd)

    # What PyAV leaks for every loop over packets that is left early is 260 bytes.
    assert np.diff([held() for _ in range(5)]).min() < 60 * 200


# --- pixels --------------------------------------------------------------------------------------

FORMATS = [  # what a decoder gives, as which codec writes it
    *(("libx264", f"yuv{form}p{bits}") for form in (420, 422, 444) for bits in ("", "10le")),
    *(("mjpeg", f"yuvj{form}p") for form in (420, 422, 444)),
    *(("libx264", "yuvj420p"), ("libx264rgb", "rgb24")),
]


@pytest.mark.parametrize(("codec", "pixel_format"), FORMATS)
def test_colours_of_every_format_are_right(
    codec: str, pixel_format: str, write_video, tmp_path: Path
) -> None:
    y, x = np.mgrid[:64, :96] / 96
    waves = (np.sin(9 * x + 5 * y), np.cos(7 * x - 3 * y), np.sin(11 * y - x))
    shown = np.stack([128 + 70 * wave for wave in waves], 2).round().astype(np.uint8)
    path = tmp_path / "x.mkv"
    write_video(
        path,
        [shown] * 2,
        codec=codec,
        pixel_format=pixel_format,
        options={"x264-params": "qp=2"} if "264" in codec else {"qmin": "1", "qmax": "1"},
    )
    found = read_frames(path, 1, size=32)[0].permute(1, 2, 0)
    expected = Image.fromarray(shown[:, 16:80]).resize((32, 32), Image.Resampling.BICUBIC)
    off = np.abs(found.numpy().astype(int) - np.asarray(expected, int))
    assert off.mean() < 1.5 and off.max() < 9


def test_a_matrix_that_nobody_knows_is_read_as_the_usual_one() -> None:
    frame = av.VideoFrame(32, 32, "yuv420p")
    for plane, value in zip(frame.planes, (81, 90, 240), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    out = np.empty((3, 8, 8), np.uint8)
    for reserved in (0, 2, 3):
        frame.colorspace = reserved
        pixels.Converter(8, "h264").convert(frame, out)
        assert (
            np.abs(out[:, 0, 0] - np.array([254, 0, 0])).max() <= 1 and (out.std((1, 2)) == 0).all()
        )


def test_formats_that_swscale_takes_keep_their_colours() -> None:
    y, x = np.mgrid[:180, :320] / 320
    shown = np.stack([128 + 100 * np.sin(40 * (x + k * y)) for k in (0, 1, 2)], 2)
    frame = av.VideoFrame.from_ndarray(shown.round().astype(np.uint8), format="rgb24")
    planar, other = frame.reformat(format="yuv420p"), frame.reformat(format="nv12")
    assert pixels.planes_of(other, False) is None
    converter = pixels.Converter(112, "mjpeg")  # to an even width
    found, expected = np.empty((2, 3, 112, 112), np.uint8)
    converter.convert(other, found)
    converter.convert(planar, expected)
    assert np.abs(found.astype(int) - expected).mean() < 2


def test_planes_stored_from_their_last_row_on_are_upright() -> None:
    picture = np.repeat(np.arange(0, 240, 5, dtype=np.uint8), 64 * 3).reshape(48, 64, 3)
    graph = av.filter.Graph()
    source = graph.add_buffer(width=64, height=48, format="yuv420p", time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("vflip"), graph.add("buffersink")).configure()
    given = av.VideoFrame.from_ndarray(picture[::-1].copy(), format="rgb24")
    graph.push(given.reformat(format="yuv420p"))
    frame = graph.pull()
    assert all(plane.line_size < 0 for plane in frame.planes)
    out = np.empty((3, 16, 16), np.uint8)
    pixels.Converter(16, "h264").convert(frame, out)
    assert (np.diff(out.astype(int).mean((0, 2))) > 10).all()


def test_a_core_that_cannot_run_is_no_bad_file(make_video, monkeypatch) -> None:
    def missing() -> None:
        raise ImportError("not built")

    monkeypatch.setattr(_native, "module", missing)
    with pytest.raises(ImportError, match="not built"):
        read_frames(make_video("gop10.mp4", **CODINGS["gop10.mp4"]), 2, size=16)


def test_a_frame_stored_from_its_last_row_on_is_upright(write_video, tmp_path: Path) -> None:
    pixels = np.repeat(np.arange(0, 240, 5, dtype=np.uint8), 64 * 3).reshape(48, 64, 3)
    path = tmp_path / "x.avi"
    write_video(path, [pixels] * 2, codec="rawvideo", pixel_format="bgr24")
    rows = read_frames(path, 1, size=16)[0].float().mean((0, 2))
    assert (rows.diff() > 10).all()
