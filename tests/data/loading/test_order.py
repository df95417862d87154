"""Clips of several annotation files: their shares, passes, and what a batch depends on."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipvip.data.annotations import Clip
from clipvip.data.loading import ClipLoader, ClipSource, ClipSources, LoaderOptions, build_loader
from clipvip.data.loading.order import FileOrder, MixedOrder

Load = Callable[..., ClipLoader]


def mixed(counts: list[int], ratios: list[float]) -> ClipSources:
    pairs = zip(counts, ratios, strict=True)
    return ClipSources(
        [ClipSource(f"{i}.jsonl", [Clip(Path())] * n, ratio) for i, (n, ratio) in enumerate(pairs)]
    )


def order_of(clips: ClipSources, batch_size: int, rank: int = 0, world_size: int = 1) -> MixedOrder:
    options = LoaderOptions(
        task="video",
        tokenizer=None,
        batch_size=batch_size,
        image_size=16,
        num_frames=1,
        text_length=8,
        seed=5,
        rank=rank,
        world_size=world_size,
    )
    return MixedOrder(clips, options)


@pytest.mark.parametrize("ratios", [[8, 2, 2], [1, 1, 1], [100, 1, 0.01], [1, 7, 3]], ids=str)
@pytest.mark.parametrize("world", [1, 2, 5])
def test_ratios_hold_in_every_epoch_over_all_ranks(ratios: list[float], world: int) -> None:
    clips = mixed([50, 7, 140], ratios)
    orders = [order_of(clips, 3, rank, world) for rank in range(world)]
    for epoch in (0, 1, 9):
        drawn = [pair for order in orders for batch in order.tasks(epoch, 0) for pair in batch]
        assert len(drawn) == len(set(drawn)) == 197 // (3 * world) * 3 * world
        given = np.bincount([clips.number(place) for _, place in drawn], minlength=3)
        assert np.abs(given - len(drawn) * np.array(ratios) / sum(ratios)).max() < 2


def test_a_source_that_is_less_than_a_clip_per_epoch_is_drawn_in_some() -> None:
    clips = mixed([20, 5], [100, 1])
    order = order_of(clips, 4)
    drawn = [pair for epoch in range(100) for batch in order.tasks(epoch, 0) for pair in batch]
    assert sum(clips.number(place) for _, place in drawn) == pytest.approx(len(drawn) / 101, abs=2)
    assert len(drawn) == len(set(drawn)) == 2400


def test_a_pass_draws_each_clip_of_a_source_once_in_an_order_of_its_own() -> None:
    clips = mixed([20, 3, 40], [1, 1, 1])
    order = order_of(clips, 4)
    drawn = [pair for epoch in range(12) for batch in order.tasks(epoch, 0) for pair in batch]
    for number, count in enumerate(map(len, clips.sources)):
        own = [pair for pair in drawn if clips.number(pair[1]) == number]
        passes = [own[first : first + count] for first in range(0, len(own) - count + 1, count)]
        assert len(passes) == 12 * 20 // count
        for which, each in enumerate(passes):
            assert {pass_number for pass_number, _ in each} == {which}
            first = clips.firsts[number]
            assert sorted(place for _, place in each) == list(range(first, first + count))
        assert len({tuple(place for _, place in each) for each in passes}) > 1


def test_a_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    clips = mixed([50, 7, 140], [3, 2, 1])
    alone = list(order_of(clips, 12).tasks(2, 0))
    for world in (2, 3):
        ranks = [order_of(clips, 12 // world, rank, world).tasks(2, 0) for rank in range(world)]
        assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("epoch", [0, 3])
def test_skipping_gives_what_would_have_followed(epoch: int) -> None:
    order = order_of(mixed([50, 7], [1, 2]), 3)
    whole = list(order.tasks(epoch, 0))
    for skipped in (1, 10, len(order)):
        assert list(order.tasks(epoch, skipped)) == whole[skipped:]


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Load:
    """Loads 30 pictures whose numbers are their brightness: 20 of one file, and 10 of another."""
    paths = [tmp_path / f"{i}.png" for i in range(30)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((16, 16, 3), 5 * i, np.uint8)).save(path)
    clips = [
        Clip(path, text=(f"a {i}", f"b {i}"), caption=f"c {i}", line=i)
        for i, path in enumerate(paths)
    ]

    def make(ratios: tuple[float, ...] = (1, 2), **options: Any) -> ClipLoader:
        settings = {
            "tokenizer": tokenizer,
            "task": "omnisource",
            "image_size": 16,
            "num_frames": 1,
            "text_length": 16,
            "batch_size": 4,
            "seed": 1,
            "max_bad_share": 0.3,
            **options,
        }
        parts = [("one", clips[:20]), ("two", clips[20:])][: len(ratios)]
        sources = [
            ClipSource(name, part, ratio) for (name, part), ratio in zip(parts, ratios, strict=True)
        ]
        return build_loader(ClipSources(sources), LoaderOptions(**settings), training=True)

    return make


def test_batches_are_the_clips_that_their_places_say_whatever_reads_them(load: Load) -> None:
    whole = list(load())
    assert len(whole) == 7
    for batch in whole:
        shown = batch["image"][:, 0, 0, 0].float() / 5
        assert torch.equal(shown.round().long(), batch["clip_index"])
    again = list(load(num_workers=2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(whole, again, strict=True) for key in a)
    ranks = [list(load(batch_size=2, rank=rank, world_size=2)) for rank in (0, 1)]
    for both, batch in zip(zip(*ranks, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([part["clip_index"] for part in both]), batch["clip_index"])


def test_an_unreadable_clip_is_replaced_by_one_of_its_source(load: Load, tmp_path: Path) -> None:
    for broken in (3, 21, 24):
        (tmp_path / f"{broken}.png").write_bytes(b"no picture")
    loader = load()
    for epoch in range(8):
        loader.set_epoch(epoch)
        drawn = torch.cat([batch["clip_index"] for batch in loader])
        assert not set(drawn.tolist()) & {3, 21, 24}
        assert (drawn >= 20).sum() == pytest.approx(len(drawn) * 2 / 3, abs=1)
    assert len({file.path for file in loader.bad_files}) == 3


def test_one_source_is_a_file_alone(load: Load) -> None:
    assert type(load((3.0,))._order) is FileOrder
