import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipvip.data.loading import (
    Batch,
    ClipLoader,
    LoaderError,
    LoaderOptions,
    reader,
    set_place,
)
from clipvip.data.shards import stream
from clipvip.data.shards.manifest import ShardError
from clipvip.data.shards.plan import Plan, Shards, Source
from clipvip.data.shards.stream import build_shard_loader
from clipvip.data.shards.write import write_shards
from clipvip.data.video import Frames, read_frames

COUNT = 101
Load = Callable[..., ClipLoader]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(make_video, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """videos/: 101 clips in 8 shards; images/: 12 in 2. Each clip's text says which it is."""
    folder = tmp_path_factory.mktemp("sources")
    video = make_video("gop10.mp4", options={"g": "10", "bf": "2"}, count=60)
    records = [
        {"video": str(video), "start": i / 60, "end": i / 60 + 0.4, "text": [f"a{i}", f"b{i}"]}
        for i in range(COUNT)
    ]
    for i, record in enumerate(records):
        record |= {"subtitle": f"s{i}"} | ({"caption": f"c{i}"} if i % 2 else {})
    write_shards(
        write_lines(folder / "v.jsonl", records), folder / "videos", clips_per_shard=13, cut=True
    )
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(folder / "a.png")
    pictures = [{"video": "a.png", "caption": f"picture {i}"} for i in range(12)]
    write_shards(write_lines(folder / "i.jsonl", pictures), folder / "images", clips_per_shard=6)
    return folder


@pytest.fixture
def load(folder: Path, tokenizer: Any) -> Load:
    def make(
        *sources: Source, paragraph: bool = False, shuffle: int = 64, **options: Any
    ) -> ClipLoader:
        settings: dict[str, Any] = {
            "tokenizer": tokenizer,
            "image_size": 16,
            "num_frames": 2,
            "text_length": 16,
            "task": "retrieval",
            "batch_size": 4,
            "seed": 7,
        }
        given = sources or (Source(str(folder / "videos")),)
        settings |= options
        return build_shard_loader(
            Shards(given), LoaderOptions(**settings), paragraph=paragraph, shuffle=shuffle
        )

    return make


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def places(batches: Any) -> list[int]:
    return [place for batch in batches for place in batch["clip_index"].tolist()]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of nothing: where only the order matters."""

    class Nothing:
        damage = None

        def __init__(self, frames: int, with_middle: bool) -> None:
            self.frames = frames
            self.with_middle = with_middle
            self.index = SimpleNamespace(times=np.zeros(frames))
            self.chosen = SimpleNamespace(frames=np.arange(frames))

        def decode(self, size: int, **options: Any) -> Frames:
            frames = torch.zeros(self.frames, 3, size, size, dtype=torch.uint8)
            return Frames(frames, frames[0] if self.with_middle else None)

    @contextmanager
    def opened(
        video: Any, count: int, *, with_middle: bool = False, **options: Any
    ) -> Iterator[Nothing]:
        yield Nothing(count, with_middle)

    monkeypatch.setattr(reader, "open_clip", opened)


def test_batches_do_not_depend_on_the_number_of_workers(load: Load) -> None:
    runs = [list(load(num_workers=workers)) for workers in (0, 1, 3)]
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2])
    assert len(runs[0]) == len(load()) == COUNT // 4


def test_clips_are_those_of_the_tars(load: Load, folder: Path, tokenizer: Any) -> None:
    loader = load()
    for batch in loader:
        for row, place in enumerate(batch["clip_index"].tolist()):
            said = tokenizer.decode(batch["text_ids"][row], skip_special_tokens=True)
            index, tar = loader.name(place).removeprefix("clip ").split(" of ")
            order = np.random.default_rng(0).permutation(COUNT)
            number = order[13 * int(Path(tar).stem) + int(index)]
            assert said.replace(" ", "") in (f"a{number}", f"b{number}")
    assert batch.keys() >= {"pixel_values", "frame_offsets", "text_mask", "text_clip"}


@pytest.mark.parametrize("world", [1, 2, 5, 20])
def test_an_epoch_gives_every_clip_at_most_once_whatever_the_ranks(
    world: int, load: Load, fast: None
) -> None:
    for epoch in (0, 3):
        loaders = [load(batch_size=2, rank=rank, world_size=world) for rank in range(world)]
        for loader in loaders:
            loader.set_epoch(epoch)
        parts = [places(loader) for loader in loaders]
        assert len({len(part) for part in parts}) == 1
        seen = [place for part in parts for place in part]
        assert len(seen) == len(set(seen)) == COUNT // (2 * world) * 2 * world


def test_epochs_and_seeds_differ_and_repeat(load: Load, fast: None) -> None:
    loader = load()
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
    assert equal(epochs[0], epochs[2]) and places(epochs[0]) != places(epochs[1])
    assert places(load(seed=8)) != places(epochs[0])


@pytest.mark.parametrize("shuffle", [1, 200, 1000])
def test_clips_near_each_other_are_parted(shuffle: int, load: Load, fast: None) -> None:
    found = places(load(shuffle=shuffle, batch_size=6))
    near = [abs(a - b) == 1 for a, b in itertools.pairwise(found)]
    assert (np.mean(near) > 0.5) == (shuffle == 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_skipping_gives_what_would_have_followed(
    workers: int, mixed: bool, load: Load, folder: Path
) -> None:
    sources = [Source(str(folder / "videos"), 2.0)]
    sources += [Source(str(folder / "images"))] * mixed
    options = {"task": "omnisource", "num_workers": workers}
    whole = []
    loader = load(*sources, **options)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        whole.append(list(loader))
    for epoch, skipped in ((0, 7), (0, 20), (1, 0), (1, 3)):
        fresh = load(*sources, **options)
        fresh.set_epoch(epoch)
        fresh.skip(skipped)
        assert equal(list(fresh), whole[epoch][skipped:])


def test_skipping_opens_only_what_follows(load: Load, fast: None, monkeypatch) -> None:
    loader = load(batch_size=2, shuffle=1, num_workers=0)
    opened: list[str] = []
    read = stream._read
    monkeypatch.setattr(stream, "_read", lambda url, *part: opened.append(url) or read(url, *part))
    loader.skip(len(loader) - 1)
    list(loader)
    assert len(set(opened)) <= 2


def test_sources_are_mixed_by_ratio_and_read_evenly(load: Load, folder: Path, fast: None) -> None:
    sources = [Source(str(folder / "videos"), 3.0), Source(str(folder / "images"), 1.0)]
    loader = load(*sources, task="omnisource", batch_size=4)
    assert len(loader) == (COUNT + 12) // 4
    seen: Counter[int] = Counter()
    for epoch in range(12):
        loader.set_epoch(epoch)
        found = places(loader)
        pictures = sum(place >= COUNT for place in found)
        assert pictures == pytest.approx(len(found) / 4, abs=9)
        seen.update(found)
    # Videos were gone through 9 to 10 times, images by each of 16 lanes 1 to 2 times.
    assert {seen[place] for place in range(COUNT)} <= set(range(7, 13))
    assert {seen[place] for place in range(COUNT, COUNT + 12)} <= set(range(16, 33))


def plan_of(shards: Shards, batch_size: int, rank: int, world_size: int) -> Plan:
    options = LoaderOptions(
        task="video",
        tokenizer=None,
        batch_size=batch_size,
        image_size=16,
        num_frames=1,
        text_length=8,
        seed=0,
        rank=rank,
        world_size=world_size,
    )
    return Plan(shards, options, 64)


@pytest.mark.parametrize("ratios", [[8, 2, 2], [1, 1, 1], [100, 1], [1, 7, 0.013, 3], [5]], ids=str)
@pytest.mark.parametrize("world", [1, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_ratios_hold_over_all_ranks_whatever_they_are(
    ratios: list[float], world: int, batch_size: int, folder: Path
) -> None:
    shards = Shards([Source(str(folder / "videos"), ratio) for ratio in ratios])
    given, lanes = np.zeros(len(ratios), int), 0
    for rank in range(world):
        plan = plan_of(shards, batch_size, rank, world)
        for lane in range(plan.lanes):
            quotas = plan.quotas(lane)
            assert (quotas >= 0).all() and quotas.sum() == plan.lane_batches(lane) * batch_size
            counts = np.bincount(plan.picks(4, lane), minlength=len(ratios))
            assert counts.tolist() == quotas.tolist()
            given, lanes = given + quotas, lanes + 1
    exact = given.sum() * np.array(ratios) / sum(ratios)
    assert np.abs(given - exact).max() < 2
    assert given.sum() == plan.batches * batch_size * world


@pytest.mark.parametrize("ratio", [2.0, 0.1, 0.02])
def test_no_part_of_a_source_is_left_to_lanes_that_never_draw_it(ratio, folder: Path) -> None:
    shards = Shards([Source(str(folder / "videos"), each) for each in (1.0, ratio)])
    drawn = np.zeros(COUNT, bool)
    for rank in range(2):
        plan = plan_of(shards, 1, rank, 2)
        for lane in range(plan.lanes):
            low, high = plan.span(1, lane)
            drawn[low:high] |= plan.quotas(lane)[1] > 0
    assert drawn.all()


def test_image_and_video_sources_share_a_batch(load: Load, folder: Path) -> None:
    sources = [Source(str(folder / "videos")), Source(str(folder / "images"))]
    batches = list(load(*sources, task="omnisource", batch_size=8))
    for batch in batches:
        images = batch["clip_index"] >= COUNT
        lengths = batch["frame_offsets"].diff()
        assert torch.equal(lengths == 0, images)  # an image is compared as a frame alone
        assert torch.equal(batch["video_present"], ~images)
        assert torch.equal(batch["subtitle_present"], ~images)
        assert batch["caption_present"][images].all()
        assert (batch["image"][images].float() - 200).abs().max() <= 2


def test_paragraphs(load: Load, tokenizer: Any) -> None:
    batch = next(iter(load(paragraph=True)))
    words = tokenizer.decode(batch["text_ids"][0], skip_special_tokens=True).replace(" ", "")
    assert words.startswith("a") and f"b{words[1 : words.index('b')]}" in words


def test_any_fsspec_url(load: Load, folder: Path, fast: None) -> None:
    import fsspec

    class Bucket(fsspec.AbstractFileSystem):
        protocol = "bucket"

        def _open(self, path: str, mode: str = "rb", **options: Any) -> io.BytesIO:
            return io.BytesIO((folder / path).read_bytes())

    fsspec.register_implementation("bucket", Bucket, clobber=True)
    urls = ["bucket://videos/{00000..00007}.tar", "bucket://videos/manifest.jsonl"]
    expected = places(load())
    for url in [*urls, f"file://{folder}/videos/{{00000..00007}}.tar", f"{folder}/videos/"]:
        assert places(load(Source(url))) == expected


# --- what goes wrong ------------------------------------------------------------------------


@pytest.fixture
def spoiled(folder: Path, tmp_path: Path) -> Source:
    """One shard missing, one cut off, one clip overwritten."""
    out = tmp_path / "spoiled"
    out.mkdir()
    for path in (folder / "videos").iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    (out / "00002.tar").unlink()
    data = (out / "00004.tar").read_bytes()
    (out / "00004.tar").write_bytes(data[: len(data) // 2])
    data = bytearray((out / "00005.tar").read_bytes())
    at = data.index(b"ftyp")
    data[at - 4 : at + 1000] = bytes(1004)
    (out / "00005.tar").write_bytes(data)
    return Source(str(out))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_bad_clips_and_tars(
    workers: int, load: Load, spoiled: Source, tmp_path: Path
) -> None:
    out = tmp_path / "bad_files.jsonl"
    loader = load(spoiled, num_workers=workers, max_bad_share=0.3, bad_files=out)
    batches = list(loader)
    assert all(len(batch["clip_index"]) == 4 for batch in batches)
    assert not {place for place in places(batches) if 26 <= place < 39}
    found = {
        Path(bad.path).parent.name + "/" + Path(bad.path).name: bad for bad in loader.bad_files
    }
    assert len(found) == 3 and found["spoiled/00002.tar"].reason == "no such file"
    assert found["spoiled/00004.tar"].reason.startswith("cut off at byte ")
    (clip,) = [bad for name, bad in found.items() if name.startswith("00005.tar/")]
    assert clip.line > 0 and "not a video" in clip.reason
    assert len(out.read_text().splitlines()) == 3
    again = load(spoiled, num_workers=0, max_bad_share=0.3)
    again.skip(9)
    assert equal(list(again), batches[9:])
    with pytest.raises(LoaderError, match=r"clips tried could not be read .* allowed 5\.0%"):
        list(load(spoiled))


def test_a_worker_killed_by_a_clip_is_replaced(
    load: Load, tmp_path: Path, monkeypatch, caplog
) -> None:
    whole = list(load())
    fatal = whole[8]["clip_index"][1].item()
    name = load().name(fatal)
    (tmp_path / "times").touch()
    read_sample = stream._ShardBatchReader._sample

    def die(self: Any, drawn: Any, *rest: Any) -> Any:
        if drawn.place == fatal and not (tmp_path / "times").stat().st_size:
            (tmp_path / "times").write_text("x")
            set_place(fatal)
            os.kill(os.getpid(), signal.SIGKILL)
        return read_sample(self, drawn, *rest)

    monkeypatch.setattr(stream._ShardBatchReader, "_sample", die)
    assert equal(list(load(num_workers=2)), whole)
    assert any(f"was killed by SIGKILL at {name}" in text for text in caplog.messages)


def test_what_the_task_needs_is_asked_of_the_manifest(load: Load, folder: Path) -> None:
    with pytest.raises(ShardError, match="images: 12 of 12 clips have no text"):
        load(Source(str(folder / "images")))
    with pytest.raises(ShardError, match=r"ratio of .* is 0; expected above 0"):
        Source(str(folder / "images"), 0)
    with pytest.raises(ValueError, match="101 clips make no batch of 64 on 2 ranks"):
        load(batch_size=64, world_size=2)


RANK = """
import json, os, sys
import torch
import torch.distributed as dist
from clipvip.data.loading import LoaderOptions
from clipvip.data.shards import Shards, Source, build_shard_loader
dist.init_process_group("gloo")
loader = build_shard_loader(
    Shards([Source(sys.argv[1])]),
    LoaderOptions(
        tokenizer=None, image_size=16, num_frames=1, text_length=8, task="video", batch_size=4,
        seed=7, num_workers=2, rank=dist.get_rank(), world_size=dist.get_world_size(),
    ),
    shuffle=64,
)
own = [batch["clip_index"] for batch in loader]
for batch in own:  # all ranks have a batch at each step, of the same size
    parts = [torch.empty_like(batch) for _ in range(2)]
    dist.all_gather(parts, batch)
print(json.dumps(torch.cat(own).tolist()))
"""


def test_two_processes_share_the_clips(folder: Path, load: Load, fast: None) -> None:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29573", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder / "videos")],
            env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [json.loads(process.communicate(timeout=120)[0]) for process in ranks]
    assert [len(part) for part in found] == [48, 48] and not set(found[0]) & set(found[1])
    alone = [places(load(rank=rank, world_size=2, task="video")) for rank in range(2)]
    assert found == alone


def test_frames_come_from_memory_as_from_files(load: Load, folder: Path, numbers) -> None:
    loader = load(task="video", num_frames=2)
    order = np.random.default_rng(0).permutation(COUNT)
    lines = [json.loads(line) for line in (folder / "v.jsonl").read_text().splitlines()]
    batch = next(iter(loader))
    for row, place in enumerate(batch["clip_index"].tolist()):
        index, tar = loader.name(place).removeprefix("clip ").split(" of ")
        record = lines[order[13 * int(Path(tar).stem) + int(index)]]
        part = {"start": record["start"], "end": record["end"]}
        known = set(numbers(read_frames(record["video"], 30, size=16, **part)))
        assert set(numbers(batch["pixel_values"][2 * row : 2 * row + 2])) <= known
