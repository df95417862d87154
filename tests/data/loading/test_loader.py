import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipvip.data.annotations import Clip
from clipvip.data.loading import in_worker, reader, samples, workers
from clipvip.data.loading.bad_files import LoaderError
from clipvip.data.loading.loader import ClipLoader, build_loader
from clipvip.data.loading.samples import Batch, LoaderOptions
from clipvip.data.loading.workers import WorkerError
from clipvip.data.video import open_clip, read_frames
from clipvip.inputs import tokenize
from clipvip.ops.resize_crop import RESIZES

SIZE = 16
Load = Callable[..., ClipLoader]


@pytest.fixture(scope="module")
def clips(make_video) -> list[Clip]:
    """Twenty clips: parts of two videos, so that the frames of each tell it apart."""
    videos = [make_video(f"{name}.mp4", options={"g": "10", "bf": "2"}) for name in ("one", "two")]
    return [
        Clip(
            videos[i % 2],
            start=0.1 * i,
            end=0.1 * i + 0.4,
            text=(f"text {i}", f"other {i}"),
            subtitle=f"speech {i}" if i % 3 else None,
            caption=f"picture {i}" if i % 4 else None,
            line=i + 1,
        )
        for i in range(20)
    ]


@pytest.fixture
def load(clips: list[Clip], tokenizer: Any) -> Load:
    def make(
        given: list[Clip] | None = None,
        *,
        training: bool = True,
        drop_last: bool | None = None,
        **options: Any,
    ) -> ClipLoader:
        settings: dict[str, Any] = {
            "tokenizer": tokenizer,
            "image_size": SIZE,
            "num_frames": 3,
            "text_length": 16,
            "task": "retrieval",
            "batch_size": 4,
            "seed": 7,
            "max_bad_share": 0.2,
        }
        settings |= options
        return build_loader(
            given or clips, LoaderOptions(**settings), training=training, drop_last=drop_last
        )

    return make


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def places(batches: Iterator[Batch] | ClipLoader | list[Batch]) -> list[int]:
    return [place for batch in batches for place in batch["clip_index"].tolist()]


@pytest.mark.parametrize("task", ["retrieval", "omnisource", "video"])
def test_batches_do_not_depend_on_the_number_of_workers(task: str, load: Load) -> None:
    runs = [list(load(task=task, num_workers=workers)) for workers in (0, 1, 2)]
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2])


def test_an_epoch_is_another_order_other_frames_and_the_same_when_repeated(load: Load) -> None:
    loader = load(num_workers=2)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
    assert equal(epochs[0], epochs[2])
    assert places(epochs[0]) != places(epochs[1])
    assert sorted(places(epochs[0])) == sorted(places(epochs[1])) == list(range(20))
    frames = [
        dict(zip(places(e), torch.cat([b["pixel_values"] for b in e]).split(3), strict=True))
        for e in epochs[:2]
    ]
    assert any(not torch.equal(frames[0][i], frames[1][i]) for i in range(20))
    assert places(load(seed=8)) != places(epochs[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_gives_what_would_have_followed(workers: int, load: Load, monkeypatch) -> None:
    whole = list(load())
    loader = load(num_workers=workers)
    if not workers:
        decoded: list[Path] = []
        monkeypatch.setattr(
            reader, "open_clip", lambda *a, **k: decoded.append(a[0]) or open_clip(*a, **k)
        )
    loader.skip(3)
    assert equal(list(loader), whole[3:])
    if not workers:
        assert len(decoded) == 8  # two batches of four: nothing of those skipped
    assert equal(list(loader), whole) and len(loader) == 5


def test_leaving_an_epoch_early_does_not_disturb_the_next(load: Load) -> None:
    loader = load(num_workers=2)
    for batch in loader:
        assert batch
        break
    assert equal(list(loader), list(load()))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_divide_one_global_order(world: int, load: Load) -> None:
    ranks = [
        [b["clip_index"].tolist() for b in load(batch_size=2, rank=r, world_size=world)]
        for r in range(world)
    ]
    together = [[place for part in step for place in part] for step in zip(*ranks, strict=True)]
    alone = [b["clip_index"].tolist() for b in load(batch_size=2 * world)]
    assert together == alone
    seen = [place for step in together for place in step]
    assert len(seen) == len(set(seen)) == 20 // (2 * world) * (2 * world)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_every_clip_once_and_in_order(world: int, load: Load) -> None:
    loaders = [load(training=False, batch_size=3, rank=r, world_size=world) for r in range(world)]
    ranks = [[b["clip_index"].tolist() for b in loader] for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in ranks]
    steps = range(max(map(len, ranks)))
    seen = [place for s in steps for r in ranks if s < len(r) for place in r[s]]
    assert seen == list(range(20))


def test_frames_are_packed_and_are_the_clips_own(load: Load, clips: list[Clip], numbers) -> None:
    batch = next(iter(load(training=False, num_frames=5)))
    assert batch["pixel_values"].shape == (20, 3, SIZE, SIZE)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["frame_offsets"].tolist() == [0, 5, 10, 15, 20]
    assert batch["frame_offsets"].dtype == torch.int32
    found = numbers(batch["pixel_values"])
    for row, place in enumerate(batch["clip_index"].tolist()):
        own = found[5 * row : 5 * row + 5]
        assert own[0] == int(2.5 * place + 1e-6) and len(set(own)) == 5


@pytest.mark.parametrize("resize", RESIZES)
def test_frames_and_images_are_made_square_as_asked(
    resize: str, load: Load, clips, tmp_path
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "x.png")
    given = [Clip(tmp_path / "x.png", image=tmp_path / "x.png", text=("a",)), clips[0]]
    batch = next(iter(load(given, resize=resize, task="omnisource", training=False, batch_size=2)))
    square = read_frames(tmp_path / "x.png", 1, size=SIZE, resize=resize)[0]
    assert torch.equal(batch["image"][0], square)
    assert torch.equal(batch["pixel_values"][0], square)
    clip = {"start": clips[0].start, "end": clips[0].end}
    frames = read_frames(clips[0].video, 3, size=SIZE, resize=resize, **clip)
    assert torch.equal(batch["pixel_values"][-3:], frames)


def test_images_and_sparse_clips_make_ragged_batches(
    load: Load, clips: list[Clip], tmp_path: Path
) -> None:
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(tmp_path / "a.png")
    given = [clips[0], Clip(tmp_path / "a.png", text=("a picture",)), clips[1]]
    batch = next(iter(load(given, training=False)))
    assert batch["frame_offsets"].tolist() == [0, 3, 4, 7]
    sparse = next(
        iter(
            load(
                [replace(clips[0], start=0.0, end=2.0)],
                training=False,
                sampling="fps:1",
                num_frames=8,
            )
        )
    )
    assert sparse["frame_offsets"].tolist() == [0, 2]


def test_training_draws_one_text_and_evaluation_gives_all(
    load: Load, clips: list[Clip], tokenizer: Any
) -> None:
    training = list(load())
    drawn = {
        place: tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
        for batch in training
        for place, ids in zip(batch["text_clip"].tolist(), batch["text_ids"], strict=True)
    }
    assert {text.rstrip("0123456789") for text in drawn.values()} == {"text", "other"}
    assert all(text.endswith(str(place)) for place, text in drawn.items())
    assert all(torch.equal(b["text_clip"], b["clip_index"]) for b in training)
    batch = next(iter(load(training=False)))
    assert batch["text_clip"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(batch["text_ids"]) == len(batch["text_mask"]) == 8


def test_omnisource_marks_what_is_absent_and_never_says_none(
    load: Load, clips: list[Clip], tokenizer: Any
) -> None:
    empty = tokenize(tokenizer, [""], 16)[0][0].tolist()
    for batch in load([replace(clip, text=()) for clip in clips], task="omnisource"):
        for name in ("subtitle", "caption"):
            for row, place in enumerate(batch["clip_index"].tolist()):
                text = getattr(clips[place], name)
                assert batch[f"{name}_present"][row].item() == (text is not None)
                kept = batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist()
                expected = tokenize(tokenizer, [text or ""], 16)[0][0].tolist()
                assert kept == expected and (text is not None or kept == empty)


def test_omnisource_image_is_the_annotated_one_or_the_middle_frame(
    load: Load, clips: list[Clip], numbers, tmp_path: Path
) -> None:
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(tmp_path / "a.png")
    given = [
        replace(clips[0], start=0.0, end=2.0, image=tmp_path / "a.png"),
        replace(clips[0], start=0.0, end=2.04),
    ]
    batch = next(iter(load(given, task="omnisource", batch_size=2, training=False)))
    assert batch["image"].shape == (2, 3, SIZE, SIZE)
    assert numbers(batch["image"]) == [50, 25]


def test_tokens_keep_both_ends_and_undo_html(tokenizer: Any) -> None:
    ids, mask = tokenize(tokenizer, ["a word " * 40, "salt &amp; pepper"], 16)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids.shape == mask.shape == (2, 16) and ids.dtype == torch.int64
    assert ids[0, 0] == start and ids[0, -1] == end
    assert torch.equal(ids[1], tokenize(tokenizer, ["x" * 40, "salt & pepper"], 16)[0][1])


def test_a_text_of_megabytes_takes_no_longer_than_its_beginning(tokenizer: Any) -> None:
    started = time.monotonic()
    ids, _ = tokenize(tokenizer, ["a word " * 3_000_000], 16)
    assert torch.equal(ids, tokenize(tokenizer, ["a word " * 40], 16)[0])
    assert time.monotonic() - started < 5


# --- bad files ------------------------------------------------------------------------------


@pytest.fixture
def spoiled(clips: list[Clip], tmp_path: Path) -> list[Clip]:
    """The clips, two of them unreadable."""
    (tmp_path / "empty.mp4").touch()
    spoiled = list(clips)
    spoiled[4] = replace(clips[4], video=tmp_path / "missing.mp4")
    spoiled[9] = replace(clips[9], video=tmp_path / "empty.mp4")
    return spoiled


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_bad_files_and_lists_them(
    workers: int, load: Load, spoiled: list[Clip], tmp_path: Path, caplog
) -> None:
    out = tmp_path / "out" / "bad_files.jsonl"
    loader = load(spoiled, num_workers=workers, bad_files=out)
    with caplog.at_level(logging.WARNING):
        runs = []
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            runs.append(list(loader))
    assert all(len(places(run)) == 20 and not {4, 9} & set(places(run)) for run in runs)
    assert equal(runs[0], runs[2])
    expected = {
        str(tmp_path / "missing.mp4"): ("no such file", 5),
        str(tmp_path / "empty.mp4"): ("empty file (0 bytes)", 10),
    }
    assert {bad.path: (bad.reason, bad.line) for bad in loader.bad_files} == expected
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["path"]: (row["reason"], row["line"]) for row in written} == expected
    assert len(written) == len(loader.bad_files) == 2
    for path in expected:
        assert sum(path in message for message in caplog.messages) == 1


def test_replacement_is_the_same_for_any_number_of_workers(load: Load, spoiled: list[Clip]) -> None:
    assert equal(list(load(spoiled)), list(load(spoiled, num_workers=2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_elsewhere_costs_no_clip_but_is_listed(
    workers: int, load: Load, make_video, tmp_path: Path
) -> None:
    video = make_video("whole.ts", size=(160, 128), options={"g": "10"})
    data = bytearray(video.read_bytes())
    path, out = tmp_path / "damaged.ts", tmp_path / "bad_files.jsonl"
    data[len(data) // 2 : len(data) * 5 // 8] = b"\xff" * (len(data) * 5 // 8 - len(data) // 2)
    path.write_bytes(data)
    given = [Clip(video=path, start=start, end=start + 0.3, line=1) for start in (0.0, 0.2, 2.0)]
    options: dict[str, Any] = {"task": "video", "training": False, "num_workers": workers}
    loader = load(given, bad_files=out, **options)
    expected = load([replace(clip, video=video) for clip in given], **options)
    assert equal(list(loader), list(expected))
    assert loader.bad_files == []
    (written,) = map(json.loads, out.read_text().splitlines())
    assert written["path"] == str(path) and written["damaged"] is True
    assert re.fullmatch(r"damaged at 1\.\d–1\.\d s", written["reason"])


def test_list_of_bad_files_survives_a_killed_run_and_names_each_once(
    load: Load, spoiled: list[Clip], tmp_path: Path
) -> None:
    out = tmp_path / "bad_files.jsonl"
    list(load(spoiled, bad_files=out))
    out.write_text(out.read_text() + '{"path": "cut in the mi')
    list(load(spoiled, bad_files=out))
    (tmp_path / "empty.mp4").rename(tmp_path / "hollow.mp4")
    spoiled[9] = replace(spoiled[9], video=tmp_path / "hollow.mp4")
    list(load(spoiled, bad_files=out))
    lines = out.read_text().splitlines()
    names = [Path(json.loads(line)["path"]).name for line in lines if line.endswith("}")]
    assert sorted(names) == ["empty.mp4", "hollow.mp4", "missing.mp4"]


def test_evaluation_leaves_bad_clips_out_and_says_so(load: Load, spoiled: list[Clip]) -> None:
    loader = load(spoiled, training=False, batch_size=3)
    assert places(loader) == [i for i in range(20) if i not in (4, 9)]
    assert len(loader.bad_files) == 2
    alone = load(spoiled, training=False, batch_size=1)
    assert places(alone) == [i for i in range(20) if i not in (4, 9)]


@pytest.mark.parametrize("training", [True, False])
def test_too_many_bad_files_stop_the_run(training: bool, load: Load, spoiled: list[Clip]) -> None:
    loader = load(spoiled, training=training, max_bad_share=0.05)
    with pytest.raises(LoaderError) as caught:
        list(loader)
    message = str(caught.value)
    assert "2 of 20 clips tried could not be read (10.0%, allowed 5.0%)" in message
    assert "\n" not in message


def test_a_few_bad_files_at_the_start_do_not_stop_a_long_run(
    load: Load, clips: list[Clip], tmp_path: Path
) -> None:
    bad = [Clip(tmp_path / f"{i}.mp4", text=("a",)) for i in range(3)]
    given = bad + [clips[i % 20] for i in range(97)]
    loader = load(given, training=False, max_bad_share=0.03)
    assert len(places(loader)) == 97


def test_nothing_readable_is_an_error_not_a_search_without_end(
    load: Load, clips: list[Clip], tmp_path: Path
) -> None:
    given = [replace(clip, video=tmp_path / "gone.mp4") for clip in clips]
    with pytest.raises(LoaderError, match=r"20 of 20 clips tried could not be read.*gone\.mp4"):
        list(load(given, max_bad_share=1.0))


def dying(
    clip: Clip, times: Path, deaths: int, sent: int = signal.SIGKILL
) -> Callable[..., torch.Tensor]:
    """open_clip that takes its process with it the first `deaths` times it sees the clip."""

    def read(path: Path, *given: Any, **options: Any) -> torch.Tensor:
        if options["start"] == clip.start and times.stat().st_size < deaths:
            with times.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), sent)
        return open_clip(path, *given, **options)

    return read


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_dead_worker_is_named_and_replaced(
    deaths: int, load: Load, clips: list[Clip], tmp_path: Path, monkeypatch, caplog
) -> None:
    whole = list(load())
    (tmp_path / "times").touch()
    monkeypatch.setattr(reader, "open_clip", dying(clips[6], tmp_path / "times", deaths))
    loader = load(num_workers=2)
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    named = [text for text in caplog.messages if "was killed by SIGKILL" in text]
    assert len(named) == deaths
    assert all(f"at {clips[6].video} (line 7)" in text for text in named)
    if deaths == 1:
        assert equal(batches, whole) and not loader.bad_files
    else:  # another clip takes the place of one that kills
        assert len(places(batches)) == 20 and 6 not in places(batches)
        assert [bad.line for bad in loader.bad_files] == [7]


def test_sigterm_to_workers_says_nothing_of_the_clips_they_read(
    load: Load, clips: list[Clip], tmp_path: Path, monkeypatch
) -> None:
    whole = list(load())
    (tmp_path / "times").touch()
    read = dying(clips[6], tmp_path / "times", workers.DEATHS_IN_A_ROW + 1, signal.SIGTERM)
    monkeypatch.setattr(reader, "open_clip", read)
    loader = load(num_workers=1)
    assert equal(list(loader), whole) and not loader.bad_files


def test_workers_that_always_die_stop_the_run(load: Load, monkeypatch) -> None:
    def die(path: Path, *given: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(reader, "open_clip", die)
    with pytest.raises(WorkerError, match=r"11th to die .* memory ran out"):
        list(load(num_workers=1))


def test_a_stuck_worker_is_replaced(load: Load, clips, tmp_path, monkeypatch, caplog) -> None:
    whole = list(load())
    (tmp_path / "times").touch()

    def stick(path: Path, *given: Any, **options: Any) -> torch.Tensor:
        if options["start"] == clips[6].start and not (tmp_path / "times").stat().st_size:
            (tmp_path / "times").write_text("x")
            time.sleep(60)
        return open_clip(path, *given, **options)

    monkeypatch.setattr(reader, "open_clip", stick)
    monkeypatch.setattr(workers, "TIMEOUT", 3.0)
    assert equal(list(load(num_workers=2)), whole)
    assert any("did not respond within 3 s" in text for text in caplog.messages)


def test_an_error_in_a_worker_is_raised_with_its_traceback(load: Load, monkeypatch) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise KeyError("of the worker's own")

    monkeypatch.setattr(samples, "tokenize", fail)
    with pytest.raises(KeyError, match="of the worker's own") as caught:
        list(load(num_workers=1))
    assert "in fail" in str(caught.value.__cause__)


class Particular(Exception):
    """Cannot be unpickled."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(name)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    "error", [IndexError("x"), MemoryError(), RecursionError("x"), Particular("x", 1)]
)
def test_whatever_reading_a_clip_raises_is_that_clips_fault(
    error: Exception, count: int, load: Load, clips: list[Clip], monkeypatch
) -> None:
    def fail(path: Path, *given: Any, **options: Any) -> Any:
        if options["start"] == clips[6].start:
            raise error
        return open_clip(path, *given, **options)

    monkeypatch.setattr(reader, "open_clip", fail)
    loader = load(training=False, num_workers=count)
    assert places(loader) == [place for place in range(20) if place != 6]
    (bad,) = loader.bad_files
    assert bad.line == 7 and bad.path == str(clips[6].video)
    assert re.fullmatch(rf"{type(error).__name__}: x? ?\(test_loader\.py:\d+\)", bad.reason)


@pytest.mark.skipif(sys.platform != "linux", reason="no limit elsewhere")
def test_a_clip_that_asks_for_absurd_memory_costs_no_more_than_itself(
    load: Load, clips: list[Clip], monkeypatch
) -> None:
    def greedy(path: Path, *given: Any, **options: Any) -> Any:
        if options["start"] == clips[6].start:
            np.ones(20 << 30, np.uint8)
        return open_clip(path, *given, **options)

    monkeypatch.setattr(reader, "open_clip", greedy)
    monkeypatch.setattr(in_worker, "_memory", lambda: 4 << 30)
    loader = load(training=False, num_workers=1)
    assert places(loader) == [place for place in range(20) if place != 6]
    (bad,) = loader.bad_files
    assert "Unable to allocate 20.0 GiB" in bad.reason


def test_an_error_of_every_clip_stops_the_run_and_is_shown(load: Load, monkeypatch) -> None:
    monkeypatch.setattr(reader, "open_clip", lambda path: None)  # called with arguments it has not
    with pytest.raises(LoaderError, match=r"20 of 20 .* TypeError: .* \(reader\.py:\d+\)"):
        list(load())


def test_a_clip_whose_image_cannot_be_read_is_left_out(
    load: Load, clips: list[Clip], tmp_path: Path
) -> None:
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(tmp_path / "a.png")
    given = [replace(clip, image=tmp_path / "a.png") for clip in clips]
    given[5] = replace(clips[5], image=tmp_path / "gone.png")
    batches = list(load(given, task="omnisource", training=False))
    assert places(batches) == [place for place in range(20) if place != 5]
    assert all(len(batch["image"]) == len(batch["clip_index"]) for batch in batches)


def test_batches_in_page_locked_memory_are_the_same(
    load: Load, clips: list[Clip], tmp_path: Path, monkeypatch
) -> None:
    whole = list(load())
    pinned: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self)
    assert equal(list(load(num_workers=2)), whole)
    assert len(pinned) == sum(map(len, whole))
    (tmp_path / "times").touch()  # a worker is replaced from within the thread, too
    monkeypatch.setattr(reader, "open_clip", dying(clips[6], tmp_path / "times", 1))
    loader = load(num_workers=2)
    for batch in loader:
        assert batch
        break
    assert equal(list(loader), whole)
    with pytest.raises(LoaderError):
        list(load([replace(clip, video=tmp_path / "gone.mp4") for clip in clips]))


def test_random_state_of_the_process_is_left_alone(load: Load) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(load())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "retreival"}, "task is 'retreival'; expected one of retrieval, omnisource"),
        ({"sampling": "dense"}, "sampling is 'dense'"),
        ({"resize": "fit"}, "resize is 'fit'"),
        ({"batch_size": 32}, "20 clips make no batch of 32"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of 2"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str, load: Load) -> None:
    with pytest.raises(ValueError) as caught:
        load(**options)
    assert message in str(caught.value)


def test_retrieval_needs_texts(load: Load, clips: list[Clip]) -> None:
    with pytest.raises(ValueError, match=r"line 20 \(.*\) has no 'text'"):
        load([*clips[:19], replace(clips[19], text=())])


# --- the end --------------------------------------------------------------------------------

TRAINING = """
import sys, time
from pathlib import Path
from clipvip.data.annotations import Clip
from clipvip.data.loading import LoaderOptions, build_loader

loader = build_loader(
    [Clip(Path(sys.argv[1]))] * 64,
    LoaderOptions(
        tokenizer=None, image_size=16, num_frames=2, text_length=8, task="video", batch_size=4,
        seed=0, num_workers=2,
    ),
    training=True,
)
for epoch in range(1000):
    for batch in loader:
        print(epoch, flush=True)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(sent: int, make_video) -> None:
    video = make_video("one.mp4", options={"g": "10", "bf": "2"})
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(video)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.send_signal(sent)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_open_files_stay_flat(load: Load) -> None:
    loader = load(num_workers=1)
    (worker,) = Path("/proc/thread-self/children").read_text().split()[-1:]
    counts = []
    for epoch in range(6):
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch
        counts.append([len(os.listdir(f"/proc/{pid}/fd")) for pid in (worker, "self")])
    assert np.ptp(counts[1:], axis=0).max() <= 4
