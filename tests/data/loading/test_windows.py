"""Moments of files, read many at once."""

import itertools
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from clipvip.data.loading import windows as module
from clipvip.data.loading.bad_files import BadFile
from clipvip.data.loading.windows import (
    Division,
    PartReader,
    divide_files,
    moment_batches,
    read_parts,
)
from clipvip.data.video import DecodeError, open_whole, read_frames
from clipvip.data.video.pixels import Converter

READING: dict[str, Any] = {
    "num_frames": 4, "image_size": 16, "sampling": "uniform", "resize": "crop"
}  # fmt: skip
SHORT = Division(0.8, 0.4, scenes=False)
GOP = {"g": "10", "bf": "3", "sc_threshold": "0"}
CODINGS: dict[str, dict[str, Any]] = {
    "gop10.mp4": {"options": GOP},
    "open.mp4": {"options": {"g": "10", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    "gop10.mkv": {"options": GOP},
    "gop10.ts": {"options": GOP},
    "gop10.avi": {"options": GOP},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime"}},
    "raw.h264": {"options": GOP},
    "varying.mp4": {"times": [40 * i + 17 * (i % 3) for i in range(60)], "options": GOP},
}


def read(
    files: list[Any],
    division: Division = SHORT,
    batch_size: int = 4,
    workers: int = 0,
    **reading: Any,
) -> tuple[list[module.MomentBatch], list[BadFile]]:
    given = [file if isinstance(file, tuple) else (file, None) for file in files]
    bad_files: list[BadFile] = []
    reader = PartReader(given, division, **{**READING, **reading})
    wanted = range(len(given))
    return list(moment_batches(reader, wanted, bad_files, batch_size, workers)), bad_files


def moments(batches: list[module.MomentBatch]) -> list[tuple[int, Any]]:
    return [moment for batch in batches for moment in batch.moments]


def frames_of(batches: list[module.MomentBatch]) -> list[Tensor]:
    return [
        batch.pixel_values[first:stop]
        for batch in batches
        for first, stop in itertools.pairwise(batch.frame_offsets.tolist())
    ]


def check_frames(files: list[Path], batches: list[module.MomentBatch], **reading: Any) -> None:
    """A moment's frames are those of a clip, to the bit."""
    given = {**READING, **reading}
    given["size"] = given.pop("image_size")
    for (place, (start, end)), frames in zip(moments(batches), frames_of(batches), strict=True):
        assert frames.equal(read_frames(files[place], **given, start=start, end=end))


@pytest.mark.parametrize("name", CODINGS)
def test_moments_show_the_frames_of_clips(name, make_video, monkeypatch):
    """However a file is coded, and in however many parts it is read."""
    path = make_video(name, **CODINGS[name])
    for moments_per_part in (100, 2):
        monkeypatch.setattr(module, "PART", moments_per_part * 4 * 3 * 16 * 16)
        monkeypatch.setattr(module, "LARGE_PART", 3 * 4 * 3 * 16 * 16)
        batches, bad_files = read([path])
        assert not bad_files and [len(batch.moments) for batch in batches] == [4, 1]
        check_frames([path], batches)
        (done,) = [file for batch in batches for file in batch.done]
        assert done.place == 0 and done.duration == pytest.approx(2.4, abs=0.05)


@pytest.mark.parametrize("sampling", ["authors", "fps:5", "clip:8"])
def test_moments_show_the_frames_of_clips_in_every_sampling(sampling, make_video):
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    batches, _ = read([path], sampling=sampling, num_frames=5, resize="pad")
    assert len(moments(batches)) == 5
    check_frames([path], batches, sampling=sampling, num_frames=5, resize="pad")


def test_a_frame_that_many_moments_show_is_converted_once(make_video, monkeypatch):
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    convert, converted = Converter.convert, []

    def spy(self: Any, frame: Any, out: Any) -> None:
        converted.append(frame.pts)
        convert(self, frame, out)

    monkeypatch.setattr(Converter, "convert", spy)
    batches, _ = read([path], Division(0.8, 0.1, scenes=False), sampling="fps:50", num_frames=20)
    assert len(moments(batches)) == 17 and len(frames_of(batches)[0]) == 20
    assert len(converted) == 60 and converted == sorted(set(converted))


def test_a_part_holds_no_more_frames_than_it_may(make_video, monkeypatch):
    """So a film may be longer than memory."""
    path, moment = make_video("gop10.mp4", **CODINGS["gop10.mp4"]), 4 * 3 * 16 * 16
    for size, parts in (
        (2 * moment, [2, 2, 2, 2, 2, 1]),
        (3.5 * moment, [3, 3, 3, 2]),
        (1, [1] * 11),
    ):
        monkeypatch.setattr(module, "PART", int(size))
        reader = PartReader([(path, None)], Division(0.4, 0.2, scenes=False), **READING)
        found = [part for part, _ in read_parts(reader, [0], 0)]
        assert [len(part.spans) for part in found] == parts
        assert [part.frames.nbytes for part in found] == [moment * count for count in parts]


def test_moments_of_real_clips_show_their_frames(real_clips):
    files = list(real_clips.values())
    batches, bad_files = read(files, Division(2.0, 2.0, scenes=False), num_frames=3)
    assert not bad_files and {place for place, _ in moments(batches)} == {0, 1, 2, 3}
    assert len(moments(batches)) > 10
    check_frames(files, batches, num_frames=3)


def test_batches_do_not_depend_on_workers_or_parts(make_video, monkeypatch, tmp_path):
    long, short = make_video("gop10.mp4", **CODINGS["gop10.mp4"]), make_video("b.mkv", count=20)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    files = [long, tmp_path / "red.png", short, tmp_path / "none.mp4", long, short]
    runs = []
    for workers, size in ((0, 64 << 20), (1, 1), (2, 1), (2, 8 * 4 * 3 * 16 * 16)):
        monkeypatch.setattr(module, "PART", size)
        monkeypatch.setattr(module, "LARGE_PART", size)
        batches, bad_files = read(files, batch_size=3, workers=workers)
        done = [[file.place for file in batch.done] for batch in batches]
        assert [bad.path for bad in bad_files] == [str(files[3])]
        assert [place for batch in done for place in batch] == [0, 1, 2, 4, 5]
        runs.append((moments(batches), [len(b.moments) for b in batches], done))
        frames = torch.cat(frames_of(batches))
        runs[-1] += (frames.tolist(),)
    assert all(run == runs[0] for run in runs)
    assert [place for place, _ in runs[0][0]] == [0] * 5 + [1, 2] + [4] * 5 + [5]


def test_spans_that_are_given_are_read_as_given(make_video):
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    spans = [(1.5, 2.0), (None, None), (0.2, 0.3), (99.0, 100.0), (0.2, 1.7)]
    batches, bad_files = read([(path, spans), (path, [(50.0, 60.0)]), (path, [])])
    wanted = [(None, None), (0.2, 0.3), (0.2, 1.7), (1.5, 2.0)]
    assert moments(batches) == [(0, span) for span in wanted]
    check_frames([path], batches)
    reasons = [bad.reason for bad in bad_files]
    assert reasons[0].endswith("after its end (2.36 s); 1 of its 5 moments are left out")
    assert reasons[1:] == ["start 50 s lies after its end (2.36 s)"]


def test_a_file_that_kills_its_reader_is_left_out(make_video, tmp_path, monkeypatch, caplog):
    good, bad = make_video("gop10.mp4", **CODINGS["gop10.mp4"]), make_video("bad.mp4")

    def die(path: Path) -> Any:
        if path == bad:
            os.kill(os.getpid(), signal.SIGKILL)
        return open_whole(path)

    monkeypatch.setattr(module, "open_whole", die)
    with caplog.at_level(logging.WARNING):
        batches, bad_files = read([good, bad, good], workers=2)
    assert [place for place, _ in moments(batches)] == [0] * 5 + [2] * 5
    assert bad_files == [BadFile(str(bad), "two processes died while they read it", 0)]
    assert sum(f"at {bad}" in text for text in caplog.messages) == 2


def test_a_part_that_kills_its_reader_leaves_the_others(make_video, monkeypatch):
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    monkeypatch.setattr(module, "PART", 2 * 4 * 3 * 16 * 16)
    read_video = PartReader._read_video

    def die(self: Any, video: Any, task: Any) -> Any:
        if task.spans and task.spans[-1][1] > 2.3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_video(self, video, task)

    monkeypatch.setattr(PartReader, "_read_video", die)
    batches, bad_files = read([path], workers=1)
    assert len(moments(batches)) == 4
    (bad,) = bad_files
    assert bad.reason == "two processes died while they read it; 1 of its 5 moments are left out"
    assert [file.place for batch in batches for file in batch.done] == [0]


def test_what_a_damaged_file_still_shows_is_read(make_video, tmp_path, caplog):
    whole = make_video("whole.ts", size=(160, 128), options={"g": "10"})
    content, path = bytearray(whole.read_bytes()), tmp_path / "damaged.ts"
    lost = slice(len(content) // 2, len(content) * 5 // 8)
    content[lost] = b"\xff" * (lost.stop - lost.start)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        batches, bad_files = read([path], Division(0.4, 0.4, scenes=False))
    check_frames([path], batches)
    (bad,) = bad_files
    assert "damaged at 1." in bad.reason and "of its 6 moments are left out" in bad.reason
    read_ones = {span for _, span in moments(batches)}
    assert {(0.0, 0.4), (0.4, 0.8), (2.0, 2.4)} <= read_ones
    assert any(f"damaged {path}" in text for text in caplog.messages)


def test_files_are_divided_without_reading_their_frames(make_video, tmp_path):
    path = make_video("gop10.mp4", **CODINGS["gop10.mp4"])
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    files = [(path, None), (tmp_path / "none.mp4", None), (tmp_path / "red.png", None)]
    files += [(path, [(0.5, 1.0)])]
    bad_files: list[BadFile] = []
    reader = PartReader(files, SHORT, **READING)
    found = dict(divide_files(reader, bad_files, 0))
    assert {place: facts.spans for place, facts in found.items()} == {
        0: [span for _, span in moments(read([path])[0])],
        2: [(None, None)],
        3: [(0.5, 1.0)],
    }
    assert bad_files == [BadFile(str(tmp_path / "none.mp4"), "no such file", 0)]


@pytest.mark.parametrize(
    "stated, seconds",
    [
        ("2021-05-04T03:02:01.000000Z", 1620097321.0),
        ("2021-05-04T03:02:01", 1620097321.0),
        ("2021-05-04 05:02:01+02:00", 1620097321.0),
        ("1904-01-01T00:00:00.000000Z", None),
        ("1970-01-01T00:00:00.000000Z", None),
        ("9999-12-31T23:59:59.000000Z", None),
        ("yesterday \x1b[31m", None),
        ("", None),
    ],
)
def test_the_date_is_that_of_the_container_if_it_can_be_true(
    stated, seconds, make_video, monkeypatch
):
    with open_whole(make_video("b.mkv", count=20)) as video:
        monkeypatch.setattr(type(video.video), "container", Stated(stated))
        monkeypatch.setattr(type(video.video), "stream", Stated(""))
        assert video.video.recorded == seconds


class Stated:
    def __init__(self, date: str) -> None:
        self.metadata = {"creation_time": date}


def test_a_date_is_read_from_a_file(tmp_path):
    import av
    import numpy as np

    path = tmp_path / "dated.mp4"
    with av.open(str(path), "w") as out:
        out.metadata["creation_time"] = "2021-05-04T03:02:01Z"
        stream = out.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in (*stream.encode(frame), *stream.encode()):
            out.mux(packet)
    batches, _ = read([path])
    assert batches[0].done == [module.FileDone(0, batches[0].done[0].duration, 1620097321.0)]


def test_nothing_read_raises_nothing_but_decode_errors(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    batches, bad_files = read([tmp_path / "text.mp4", tmp_path])
    assert not batches and len(bad_files) == 2
    with pytest.raises(DecodeError), open_whole(tmp_path):
        pass
