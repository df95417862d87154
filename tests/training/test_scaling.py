"""The model of a step on many ranks: what it must say whatever the rates, and where it was held
against a measurement."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import scaling

ROOT = Path(__file__).parents[2]


def cost_on(ranks):
    """Of a step of as many clips a rank, whatever the ranks."""
    cost = scaling.cost_of("gradients")
    clips, before = 32 * ranks, cost.clips
    loss = cost.loss_flops * (clips / before) ** 2
    return replace(cost, clips=clips, processes=ranks, loss_flops=loss)


def seconds(ranks, **changes):
    machine = replace(scaling.H100, **changes)
    return scaling.step_seconds(cost_on(ranks), machine, ranks, 512, 1)


def test_a_step_takes_longer_on_more_ranks_and_shorter_on_faster_machines():
    steps = [sum(seconds(ranks).values()) for ranks in scaling.WORLDS]
    assert steps == sorted(steps)
    slow = {"latency": 1e-3, "hidden": 0.0}
    for rate in ("flops", "loss_flops", "near", "memory"):
        faster = sum(seconds(8, **slow, **{rate: 2 * getattr(scaling.H100, rate)}).values())
        assert faster < sum(seconds(8, **slow).values())


def test_a_step_is_its_operations_where_nothing_takes_time_to_move():
    endless = {"near": 1e30, "far": 1e30, "memory": 1e30, "latency": 0.0}
    cost = cost_on(64)
    alone = seconds(1)
    assert alone["gradients"] == alone["features"] == 0.0
    parts = seconds(64, **endless)
    assert parts["gradients"] == pytest.approx(0.0) == parts["features"]
    each = 32 * (cost.tower_flops + cost.backward_flops)
    assert parts["towers"] == pytest.approx(each / scaling.H100.flops) == alone["towers"]
    assert parts["loss"] == pytest.approx(64 * alone["loss"])  # against all ranks' columns


def test_gradients_hide_behind_backward_as_far_as_it_goes():
    alone = replace(scaling.H100, memory=1e30, latency=0.0, near=1e9)
    bare = scaling.step_seconds(cost_on(2), replace(alone, hidden=0.0), 2, 512, 1)["gradients"]
    assert bare == pytest.approx(4 * cost_on(2).trained / 1e9)
    backward = 32 * cost_on(2).backward_flops / alone.flops
    half = scaling.step_seconds(cost_on(2), replace(alone, hidden=0.5), 2, 512, 1)["gradients"]
    assert half == pytest.approx(bare - backward / 2)


def test_deviations_are_reported():
    row = {"predicted_ms": 100.0, "measured_ms": 110.0}
    assert scaling.misses({"near": row}) == []
    (line,) = scaling.misses({"near": row, "far": {**row, "measured_ms": 140.0}})
    assert line.startswith("far: 100.0 ms predicted, 140.0 ms measured, over 25% apart")


def test_the_record_was_held_against_two_processes_and_is_what_the_page_shows():
    record = json.loads((ROOT / "bench" / "results" / "scaling.json").read_text())
    assert set(record["check"]) == set(scaling.LOCAL)
    assert not scaling.misses(record["check"])
    features = record["check"]["features"]
    assert features["features_ms"] > features["gradients_ms"]
    page = (ROOT / "docs" / "training.md").read_text()
    for row, wide in zip(record["predicted"]["B/32"], record["predicted"]["B/16"], strict=True):
        speeds = [f"{each['clips_per_second']:,.0f}" for each in (row, wide)]
        shown = rf"^\| {row['gpus']} \| {speeds[0]} \| \d+% \| {speeds[1]} \| \d+% \|$"
        assert re.search(shown, page, re.MULTILINE), shown
    for check in record["check"].values():
        for name in ("predicted_ms", "measured_ms"):
            assert f"{check[name]:,.0f} ms" in page
