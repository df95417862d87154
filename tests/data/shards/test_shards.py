import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipvip import cli, files
from clipvip.data.annotations import load_annotations
from clipvip.data.loading import LoaderError
from clipvip.data.shards import tars, verify_files, verify_shards, write
from clipvip.data.shards.manifest import ShardError, load_manifest
from clipvip.data.shards.tars import read_samples, unpack
from clipvip.data.shards.write import write_shards
from clipvip.data.video import read_frames
from clipvip.files import only_run

COUNT = 20


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def annotations(make_video, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty clips: parts of a video, and of a whole one; some with an annotated image."""
    folder = tmp_path_factory.mktemp("annotated")
    long = make_video("gop10.mp4", options={"g": "10", "bf": "3", "sc_threshold": "0"})
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(folder / "a.png")
    records: list[dict[str, Any]] = []
    for i in range(COUNT):
        record: dict[str, Any] = {"video": str(long), "start": 0.1 * i, "end": 0.1 * i + 0.4}
        record["text"] = [f"text {i}", f"ünï {i}"]
        if i % 2:
            record["subtitle"] = f"speech {i}"
        if i % 5 == 0:
            record |= {"caption": f"picture {i}", "image": "a.png"}
        records.append(record)
    records[7] = {"video": "a.png", "text": "a picture"}
    records[8] = {"video": str(long), "text": "all of it"}
    return write_lines(folder / "clips.jsonl", records)


def stored(out: Path) -> dict[int, Any]:
    """Place in the annotations → what a folder of shards holds of it."""
    found = {}
    for path in sorted(out.glob("*.tar")):
        with path.open("rb") as file:
            for sample in read_samples(file, str(path)):
                found[int(sample.key)] = unpack(sample, str(path))
    return found


@pytest.mark.parametrize("options", [{}, {"cut": True}, {"size": 24}])
def test_shards_hold_the_clips(options: dict[str, Any], annotations: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_shards(annotations, out, clips_per_shard=6, num_workers=0, **options)
    assert sorted(path.name for path in out.glob("*.tar")) == [f"0000{i}.tar" for i in range(4)]
    clips, found = load_annotations(annotations), stored(out)
    assert sorted(found) == list(range(COUNT))
    for place, clip in enumerate(clips):
        there = found[place]
        texts = (clip.text, clip.subtitle, clip.caption)
        assert (there.clip.text, there.clip.subtitle, there.clip.caption) == texts
        assert there.annotation is not None and there.clip.line == place + 1
        part = {"size": 16, "start": there.clip.start, "end": there.clip.end}
        frames = read_frames(there.video, 5, **part)
        expected = read_frames(clip.video, 5, size=16, start=clip.start, end=clip.end)
        if "size" in options:
            assert (frames.float() - expected.float()).abs().mean() < 3
        else:
            assert torch.equal(frames, expected)
        if clip.image is not None:
            assert there.image is not None and there.image.data == clip.image.read_bytes()
    assert list(found) != sorted(found)  # spread over the shards


def test_the_manifest_counts_and_sums_up(annotations: Path, tmp_path: Path) -> None:
    written = write_shards(annotations, tmp_path, clips_per_shard=6, num_workers=0)
    assert [shard.clips for shard in written] == [6, 6, 6, 2]
    totals = [sum(getattr(s, k) for s in written) for k in ("texts", "subtitles", "captions")]
    clips = load_annotations(annotations)
    assert totals == [COUNT, sum(c.subtitle is not None for c in clips), 4]
    for shard in written:
        data = (tmp_path / shard.shard).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    named = load_manifest(f"{tmp_path}/{{00001..00003}}.tar")
    assert [shard for _, shard in named] == written[1:]
    assert load_manifest(str(tmp_path)) == load_manifest(f"{tmp_path}/manifest.jsonl")
    with pytest.raises(ShardError, match=r"00004\.tar is not in .*manifest\.jsonl, which names 4"):
        load_manifest(f"{tmp_path}/{{00000..00004}}.tar")
    with pytest.raises(ShardError, match=r"no manifest .*verify --manifest"):
        load_manifest(str(tmp_path / "none" / "0.tar"))


def test_shards_do_not_depend_on_the_number_of_processes(annotations: Path, tmp_path) -> None:
    runs = [
        write_shards(annotations, tmp_path / str(n), clips_per_shard=6, num_workers=n)
        for n in (0, 2)
    ]
    assert runs[0] == runs[1]
    other = write_shards(annotations, tmp_path / "2", clips_per_shard=6, num_workers=0)
    assert other == runs[0]  # all finished: nothing to do
    with pytest.raises(ShardError, match="holds shards made with cut=False; give another folder"):
        write_shards(annotations, tmp_path / "2", clips_per_shard=6, cut=True)


def children(process: int) -> set[int]:
    """Every process below this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found, more = set[int](), {process}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= more
    return found


def alive(processes: set[int]) -> set[int]:
    def lives(process: int) -> bool:
        try:
            text = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return False
        return text.rpartition(")")[2].split()[0] != "Z"

    return {process for process in processes if lives(process)}


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_process_and_is_resumed(
    killed_by: int, real_clips: dict[str, Path], tmp_path: Path
) -> None:
    video = str(real_clips["carphone_distorted"])
    records = [{"video": video, "text": f"text {i}", "start": 0.01 * i} for i in range(60)]
    source, out = write_lines(tmp_path / "clips.jsonl", records), tmp_path / "out"
    command = [sys.executable, "-m", "clipvip.cli", "shard", str(source), str(out)]
    command += ["--clips-per-shard", "5", "--size", "72", "--workers", "2"]
    manifest = out / "manifest.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: manifest.exists() and manifest.read_text().count("\n") >= 2)
    crew = children(process.pid)
    assert len(crew) >= 2
    process.send_signal(killed_by)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if killed_by == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    wait_for(lambda: not alive(crew))
    finished = [json.loads(line)["shard"] for line in manifest.read_text().splitlines()]
    assert 2 <= len(finished) < 12
    if killed_by == signal.SIGINT:
        return
    before = {name: (out / name).stat().st_mtime_ns for name in finished}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{out}: 12 shards, 60 clips" in again.stdout and "are finished" in again.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == before
    assert not list(out.glob("*.tar.partial"))
    assert sorted(stored(out)) == list(range(60))
    assert verify_shards(str(out), num_workers=0) == (60, [])


class Killed(BaseException):
    """No error that anything may catch."""


@pytest.fixture
def moving(write_video, tmp_path: Path) -> Path:
    """Forty clips of many lengths whose content moves."""
    noise = np.random.default_rng(0)
    for number in range(40):
        ground = noise.integers(0, 256, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)
        frames = [np.roll(ground, i * (number % 3), 0)[:32, :48] for i in range(3 + number % 19)]
        frames = [np.ascontiguousarray(frame) for frame in frames]
        write_video(tmp_path / f"{number}.mp4", frames, options={"preset": "ultrafast"})
    records = [{"video": f"{number}.mp4", "text": f"{number}"} for number in range(40)]
    return write_lines(tmp_path / "clips.jsonl", records)


@pytest.mark.parametrize("moment", ["append_to_manifest", "members_of"])
def test_a_resumed_run_equals_an_unbroken_one(
    moment: str, moving: Path, tmp_path: Path, monkeypatch
) -> None:
    options: dict[str, Any] = {"clips_per_shard": 8, "size": 16, "num_workers": 0}
    write_shards(moving, tmp_path / "unbroken", **options)
    work, calls = getattr(write, moment), 0

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 13 == 3:
            raise Killed
        return work(*arguments)

    monkeypatch.setattr(write, moment, broken)
    for _ in range(20):
        with contextlib.suppress(Killed):
            write_shards(moving, tmp_path / "resumed", **options)
            break
    assert calls > 5
    names = sorted(path.name for path in (tmp_path / "unbroken").iterdir())
    assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == names
    for name in set(names) - {".lock"}:
        one, other = (tmp_path / folder / name for folder in ("unbroken", "resumed"))
        assert one.read_bytes() == other.read_bytes(), name


def test_bad_files_are_listed_before_their_shard_counts_as_finished(
    spoiled: Path, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"clips_per_shard": 20, "num_workers": 0, "max_bad_share": 1.0}

    def killed(path: Path, record: dict[str, Any]) -> None:
        raise Killed

    monkeypatch.setattr(write, "append_to_manifest", killed)
    with pytest.raises(Killed):
        write_shards(spoiled, out, **options)
    monkeypatch.undo()
    assert (out / "bad_files.jsonl").read_text().count("\n") == 2
    write_shards(spoiled, out, **options)
    assert (out / "bad_files.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("options", [{}, {"cut": True}, {"size": 16}], ids=str)
def test_no_clip_ends_the_command(
    options: dict[str, Any], make_video, tmp_path: Path, monkeypatch
) -> None:
    shutil.copy(make_video("tiny.mp4", count=3), tmp_path / "right.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "empty.png").touch()
    names = ["pipe.mp4", "folder.mp4", "zero.mp4", "loop.mp4", "empty.png", "right.mp4/a.mp4"]
    names += [
        "x" * 300,
        "x" * 300 + ".png",
        "y/" * 3000,
        "..",
        "/",
        "right.mp4\n",
        "file:right.mp4",
    ]
    records: list[dict[str, Any]] = [{"video": "right.mp4", "text": "right"}]
    for name in names:
        records.append({"video": name, "text": "a"})
        records.append({"video": name, "text": "a", "start": 0.01, "end": 0.1})
        records.append({"video": "right.mp4", "caption": "a", "image": name})
    source = write_lines(tmp_path / "clips.jsonl", records)
    found = write_shards(source, tmp_path / "out", max_bad_share=1.0, num_workers=0, **options)
    assert [(shard.clips, shard.bad) for shard in found] == [(1, len(records) - 1)]
    clips, bad = verify_files(source, num_workers=0)
    assert (clips, len(bad)) == (len(records), len(records) - 1)


@pytest.mark.parametrize(
    "error", [OverflowError, MemoryError, IndexError, RecursionError, UnicodeError, AssertionError]
)
@pytest.mark.parametrize(
    ("module", "name"),
    [(write, "whole"), (write, "members_of"), (tars, "check_decodes")],
)
def test_what_nobody_foresaw_of_a_clip_is_its_fault(
    module: Any,
    name: str,
    error: type[Exception],
    annotations: Path,
    tmp_path: Path,
    monkeypatch,
) -> None:
    work, calls = getattr(module, name), 0

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("of no importance")
        return work(*arguments)

    monkeypatch.setattr(module, name, fail)
    (shard,) = write_shards(annotations, tmp_path, max_bad_share=0.1, num_workers=0)
    assert (shard.clips, shard.bad) == (COUNT - 1, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_is_no_fault_of_a_clip(
    workers: int, annotations: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    unbroken = write_shards(annotations, tmp_path / "unbroken", clips_per_shard=6, num_workers=0)
    out, write = tmp_path / "out", files.Hashed.write

    def full(self: Any, data: Any) -> int:
        if "00002" in self.file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(files.Hashed, "write", full)
    arguments = ["shard", str(annotations), str(out), "--clips-per-shard", "6"]
    monkeypatch.setattr(sys, "argv", ["clipvip", *arguments, "--workers", str(workers)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 1 and error.startswith("clipvip: error: [Errno 28] No space left")
    assert "finished shards are kept" in error and "/00002.tar" in error
    assert not list(out.glob("00002*")) and not (out / "bad_files.jsonl").exists()
    finished = (out / "manifest.jsonl").read_text().count("\n")
    assert finished >= (1 if workers else 2)
    monkeypatch.setattr(files.Hashed, "write", write)
    assert write_shards(annotations, out, clips_per_shard=6, num_workers=0) == unbroken


@pytest.mark.parametrize(
    "said", [b"[]", b"5", b"[" * 100_000, b"\xff"], ids=["list", "5", "deep", "ff"]
)
def test_settings_of_any_kind_are_one_error(said: bytes, annotations: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_bytes(said)
    with pytest.raises(ShardError, match=r"settings\.json: .*; give a new or empty"):
        write_shards(annotations, tmp_path, num_workers=0)


def test_a_line_half_written_is_not_a_finished_shard(annotations: Path, tmp_path: Path) -> None:
    whole = write_shards(annotations, tmp_path, clips_per_shard=6, num_workers=0)
    lines = (tmp_path / "manifest.jsonl").read_text()
    (tmp_path / "manifest.jsonl").write_text(lines[: len(lines) - 30])
    (tmp_path / "00001.tar").unlink()
    (tmp_path / "00002.tar.partial").write_bytes(b"half")
    assert write_shards(annotations, tmp_path, clips_per_shard=6, num_workers=0) == whole
    assert (tmp_path / "manifest.jsonl").read_text() == lines


def test_what_is_damaged_is_named_and_what_to_do(annotations: Path, tmp_path: Path) -> None:
    whole = write_shards(annotations, tmp_path, clips_per_shard=6, num_workers=0)
    path = tmp_path / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], bytes(20) + b"\n", *lines[2:]]))
    with pytest.raises(ShardError, match=r"manifest\.jsonl:.*delete that line"):
        write_shards(annotations, tmp_path, clips_per_shard=6, num_workers=0)
    with pytest.raises(ShardError, match=r"manifest\.jsonl:2: expected a shard"):
        load_manifest(str(tmp_path))
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    assert write_shards(annotations, tmp_path, clips_per_shard=6, num_workers=0) == whole


@pytest.mark.parametrize("name", ["00000.tar", "manifest.jsonl", "00000.tar.partial"])
def test_a_folder_of_others_tars_is_left_as_it_was(name, annotations: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(ShardError, match=rf"holds '{name}' and no settings\.json"):
        write_shards(annotations, tmp_path, num_workers=0)
    assert (tmp_path / name).read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {name, ".lock"}


def test_a_partial_file_of_others_is_no_partial_shard(annotations: Path, tmp_path: Path) -> None:
    write_shards(annotations, tmp_path, clips_per_shard=6, num_workers=0)
    (tmp_path / "film.tar.partial").write_bytes(b"precious")
    write_shards(annotations, tmp_path, clips_per_shard=6, num_workers=0)
    assert (tmp_path / "film.tar.partial").read_bytes() == b"precious"


def test_a_second_run_at_the_same_time_is_refused(
    annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipvip.files.HERE_WAIT", 0.0)
    refused = pytest.raises(ShardError, match=f"another run writes shards there .*{os.getpid()}, ")
    with only_run(tmp_path, "writes shards"), refused:
        write_shards(annotations, tmp_path, num_workers=0)
    write_shards(annotations, tmp_path, num_workers=0)


@pytest.fixture
def mixed(make_video, changing_video, tmp_path: Path) -> Path:
    """Parts of videos of several formats and names, and an image."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    coded = {
        "A.GIF": ("gif", {"codec": "gif", "pixel_format": "gray"}),
        "b.ts": ("mpegts", {"codec": "libx264"}),
        "c.Ts": ("mpegts", {"codec": "libx264"}),
        "d.mov": ("mov", {"codec": "prores_ks", "pixel_format": "yuv422p10le"}),
        "without a suffix": ("mp4", {"options": {"g": "10"}}),
    }
    for name, (container, coding) in coded.items():
        made = make_video(f"mixed-{name}", container=container, **coding)
        (folder / name).write_bytes(made.read_bytes())
    sizes = [(80, 60), (60, 80)]
    changing_video("z.webm", sizes, codec="libvpx").rename(folder / "z.webm")
    names = sorted(path.name for path in folder.iterdir())
    records = [{"video": name, "text": name, "start": 0.1, "end": 0.7} for name in names]
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(folder / "P.TIFF")
    records.append({"video": "P.TIFF", "text": "P.TIFF"})
    return write_lines(folder / "clips.jsonl", records)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, []),
        (
            {"cut": True},
            [
                "2 clips stored whole: their container (mpegts) cannot be cut",
                "1 clip stored whole: their container (gif) cannot be cut",
            ],
        ),
        ({"size": 24}, ["1 clip not re-encoded: their frames change shape"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("workers", [0, 2])
def test_videos_of_every_format_come_back_and_what_is_stored_otherwise_is_counted(
    options: dict[str, Any], told: list[str], workers: int, mixed: Path, tmp_path: Path, caplog
) -> None:
    out, clips = tmp_path / "shards", load_annotations(mixed)
    write_shards(mixed, out, clips_per_shard=3, num_workers=workers, **options)
    assert sorted(caplog.messages) == sorted(told)
    found = stored(out)
    assert sorted(found) == list(range(len(clips)))
    for place, clip in enumerate(clips):
        there = found[place]
        part = {"size": 16, "start": there.clip.start, "end": there.clip.end}
        frames = read_frames(there.video, 9, **part)
        expected = read_frames(clip.video, 9, size=16, start=clip.start, end=clip.end)
        if "size" in options:
            assert (frames.float() - expected.float()).abs().mean() < 3, clip.video
        else:
            assert torch.equal(frames, expected), clip.video
    assert verify_shards(str(out), num_workers=0) == (len(clips), [])


@pytest.fixture
def spoiled(annotations: Path, tmp_path: Path, make_video) -> Path:
    """Twenty clips of which one file is missing and one is cut off."""
    records = [json.loads(line) for line in annotations.read_text().splitlines()]
    for record in records:
        for key in {"image", "video"} & record.keys():
            record[key] = str(annotations.parent / record[key])
    cut_off = tmp_path / "cut.mp4"
    cut_off.write_bytes(make_video("gop10.mp4").read_bytes()[:2000])
    records[3]["video"], records[9]["video"] = str(tmp_path / "missing.mp4"), str(cut_off)
    return write_lines(tmp_path / "spoiled.jsonl", records)


def test_bad_files_are_listed_and_left_out_up_to_a_share(spoiled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(LoaderError, match=r"2 of 20 clips .* \(10\.0%, allowed 5\.0%\)"):
        write_shards(spoiled, out, clips_per_shard=6, num_workers=0)
    found = write_shards(spoiled, out, clips_per_shard=6, num_workers=2, max_bad_share=0.1)
    assert sum(s.clips for s in found) == 18 and sum(s.bad for s in found) == 2
    assert set(stored(out)) == set(range(COUNT)) - {3, 9}
    listed = [json.loads(line) for line in (out / "bad_files.jsonl").read_text().splitlines()]
    assert sorted((row["line"], row["path"]) for row in listed) == [
        (4, str(tmp_path / "missing.mp4")),
        (10, str(tmp_path / "cut.mp4")),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_verify_names_bad_files_and_writes_the_rest(workers, spoiled, tmp_path) -> None:
    clean = tmp_path / "new" / "clean.jsonl"
    clips, bad = verify_files(spoiled, clean, num_workers=workers)
    assert clips == COUNT and [file.line for file in bad] == [4, 10]
    before = load_annotations(spoiled)
    after = load_annotations(clean)
    assert [(c.text, os.path.abspath(c.video), c.start, c.image) for c in after] == [
        (c.text, os.path.abspath(c.video), c.start, c.image)
        for i, c in enumerate(before)
        if i not in (3, 9)
    ]


def test_verify_finds_what_happened_to_shards(annotations: Path, tmp_path: Path) -> None:
    write_shards(annotations, tmp_path, clips_per_shard=6, cut=True, num_workers=0)
    clean = tmp_path / "clean.jsonl"
    assert verify_shards(str(tmp_path), clean, num_workers=2) == (COUNT, [])
    clips = load_annotations(annotations)
    texts = [(clip.text, clip.start, clip.video.name, clip.image) for clip in clips]
    found = load_annotations(clean)
    assert [(clip.text, clip.start, clip.video.name, clip.image) for clip in found] == texts

    flipped = bytearray((tmp_path / "00000.tar").read_bytes())
    flipped[-2000] ^= 1  # behind the last clip: nothing but the checksum shows it
    (tmp_path / "00000.tar").write_bytes(flipped)
    data = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "00002.tar").unlink()
    _, bad = verify_shards(str(tmp_path), clean, num_workers=0)
    assert [Path(file.path).name for file in bad] == ["00000.tar", "00001.tar", "00002.tar"]
    reasons = [file.reason for file in bad]
    assert "sha256 is" in reasons[0] and reasons[2] == "no such file"
    assert reasons[1].startswith("cut off at byte ")
    assert len(load_annotations(clean)) == 2


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def test_tars_made_elsewhere_get_a_manifest(make_video, tmp_path: Path) -> None:
    video = make_video("gop10.mp4").read_bytes()
    facts = json.dumps({"url": "http://a", "width": 3, "caption": "own"}).encode()
    samples = [
        {"mp4": video if i else b"broken", "txt": f"words {i}".encode(), "json": facts}
        for i in range(3)
    ]
    write_tar(tmp_path / "cc-0.tar", samples)
    manifest = tmp_path / "m" / "manifest.jsonl"
    clips, bad = verify_shards(f"{tmp_path}/cc-{{0..0}}.tar", manifest=manifest, num_workers=0)
    assert clips == 3 and [Path(file.path).name for file in bad] == ["00000.mp4"]
    ((url, shard),) = load_manifest(str(manifest))
    assert (shard.clips, shard.texts, shard.captions) == (3, 3, 3)
    with open(url, "rb") as file:
        clip = unpack(list(read_samples(file, url))[1], url).clip
    assert (clip.text, clip.caption) == (("words 1",), "own")


def test_tars_joined_into_one_file_are_reported(make_video, tmp_path: Path, caplog) -> None:
    tar = tmp_path / "0.tar"
    write_tar(tar, [{"mp4": make_video("gop10.mp4").read_bytes()}])
    assert verify_shards(str(tar), manifest=tmp_path / "m.jsonl", num_workers=0) == (1, [])
    assert not caplog.records
    tar.write_bytes(2 * tar.read_bytes())
    assert verify_shards(str(tar), manifest=tmp_path / "m.jsonl", num_workers=0) == (1, [])
    assert "0.tar: the tar ends before its file; if tars were joined by cat" in caplog.text


@pytest.mark.parametrize("given", ["img/{0..1}.tar", "./img/{0..1}.tar", "{}/img/{0..1}.tar"])
@pytest.mark.parametrize("manifest", ["img/manifest.jsonl", "{}/img/manifest.jsonl"])
def test_tars_made_elsewhere_are_found_by_any_name(
    given: str, manifest: str, make_video, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img").mkdir()
    for i in range(2):
        video = make_video("gop10.mp4").read_bytes()
        write_tar(tmp_path / "img" / f"{i}.tar", [{"mp4": video, "txt": b"words"}] * (i + 1))
    path = Path(manifest.replace("{}", str(tmp_path)))
    verify_shards(given.replace("{}", str(tmp_path)), manifest=path, num_workers=0)
    tars = [f"img/{i}.tar" for i in range(2)]
    for used in ["img/{0..1}.tar", f"{tmp_path}/img/{{0..1}}.tar", str(path), "img", "img/"]:
        found = load_manifest(used)
        assert [os.path.relpath(url) for url, _ in found] == tars
        assert [shard.clips for _, shard in found] == [1, 2]
    (tmp_path / "img").rename(tmp_path / "moved")
    assert [url for url, _ in load_manifest("moved")] == ["moved/0.tar", "moved/1.tar"]


def test_a_manifest_elsewhere_than_its_tars_names_them_in_full(
    make_video, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "img").mkdir()
    write_tar(tmp_path / "img" / "0.tar", [{"mp4": make_video("gop10.mp4").read_bytes()}])
    verify_shards("img/0.tar", manifest=Path("all.jsonl"), num_workers=0)
    ((url, _),) = load_manifest("all.jsonl")
    assert url == f"{tmp_path}/img/0.tar"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shard", "none.jsonl", "out"], "none.jsonl: No such file"),
        (["shard", "{}", "out", "--clips-per-shard", "0"], "clips_per_shard is 0"),
        (["verify", "none/"], "no manifest none/manifest.jsonl; `clipvip shard` writes one"),
    ],
)
def test_errors_are_one_line(arguments, message, annotations, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [str(annotations) if word == "{}" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["clipvip", *given])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 1 and error.startswith(f"clipvip: error: {message}")
    assert error.count("\n") == 1


def test_commands_say_what_they_did(spoiled: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    clean, out = tmp_path / "clean.jsonl", tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["clipvip", "verify", str(spoiled), str(clean)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().out
    assert caught.value.code == 1 and "missing.mp4 (line 4): no such file" in said
    assert f"{spoiled}: 20 clips, 2 bad" in said and f"wrote {clean}" in said
    monkeypatch.setattr(sys, "argv", ["clipvip", "shard", str(clean), str(out), "--cut"])
    cli.main()
    assert f"{out}: 1 shards, 18 clips" in capsys.readouterr().out
    tar = out / "00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-2000] + b"x" + data[-1999:])
    monkeypatch.setattr(sys, "argv", ["clipvip", "verify", str(out)])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"{tar}: sha256 is" in (said := capsys.readouterr().out)
    assert "to replace a bad tar: delete it and run `clipvip shard` again" in said
    tar.unlink()
    monkeypatch.setattr(sys, "argv", ["clipvip", "shard", str(clean), str(out), "--cut"])
    cli.main()
    assert tar.read_bytes() == data
