"""Only what is right is timed, and fairly; what got worse or was lost between runs is found."""

import copy
import functools
import json
import math
import time
from types import SimpleNamespace

import bench_decode
import bench_elementwise
import bench_gradient_caching
import bench_growth
import bench_index
import bench_linear
import bench_load
import bench_model
import bench_pairwise_logsumexp
import bench_proxy_attention
import bench_resize_crop
import bench_train
import cases
import changes
import device
import harness
import peers
import pytest
import records
import torch
from torch.overrides import TorchFunctionMode

from clipvip import cli

RIGHT = torch.arange(1.0, 5.0)


def dead():
    raise MemoryError("too large,\nby far")


# name → a contestant, and what is said of it
FAULTY = {
    "wrong": (lambda: [RIGHT * 1.1, RIGHT], "is off by 1.00e-01, allowed 1.00e-03"),
    "late wrong": (lambda: [RIGHT, RIGHT + 1], "is off by 2.50e-01"),
    "nan": (lambda: [RIGHT, RIGHT * torch.nan], "is off by inf"),
    "shape": (lambda: [RIGHT, RIGHT[None]], "a shape is (1, 4), expected (4,)"),
    "few": (lambda: [RIGHT], "1 results, expected 2"),
    "none": (lambda: [], "0 results, expected 2"),
    "dead": (dead, "MemoryError: too large,"),
}


def right():
    return [RIGHT, RIGHT]


def contest(contestants, **options):
    options = {"seconds": 0.0, "min_rounds": 2, "tolerance": 1e-3} | options
    return harness.compare(contestants, expected=[x.double() for x in right()], **options)


def test_faulty_contestants_are_left_out_in_a_line_and_the_others_timed():
    faulty = {name: run for name, (run, _) in FAULTY.items()}
    found = contest({"eager": right, **faulty, "ours": right}, left_out={"absent": "no such"})
    assert list(found["results"]) == ["eager", "ours"]
    assert found["left_out"].keys() == {*FAULTY, "absent"}
    for name, (_, reason) in FAULTY.items():
        assert reason in found["left_out"][name] and "\n" not in found["left_out"][name]
    for result in found["results"].values():
        assert result["error"] == 0 and result["rounds"] == 2 and result["ratio"] > 0


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_ours_is_written_down(fault):
    found = contest({"eager": right, "ours": FAULTY[fault][0]})
    assert list(found["results"]) == ["eager"]
    assert FAULTY[fault][1].split(", allowed")[0] in records.failure(found)


def test_ours_may_be_off_by_twice_the_baseline_but_not_by_more():
    def off(share):
        return lambda: [RIGHT * (1 + share), RIGHT]

    for share, allowed in ((1.9e-4, True), (2.1e-4, False), (2e-3, False)):
        found = contest({"eager": off(1e-4), "peer": off(5e-4), "ours": off(share)})
        assert ("ours" in found["results"]) == allowed and "peer" in found["results"]
    # what is exact does not ask for the impossible, nor does a baseline that is wrong excuse ours
    assert "ours" in contest({"eager": right, "ours": off(0.9e-4)})["results"]
    assert "ours" not in contest({"eager": off(1e-2), "ours": off(2e-3)})["results"]
    # without it, the next one is the measure, but not one of another function
    wide = {"tolerance": 0.5, "expected_of": {"pooled": right()}}
    others = {"eager": dead, "pooled": off(0.4), "peer": off(0.1)}
    assert "ours" in contest({**others, "ours": off(0.19)}, **wide)["results"]
    assert "ours" not in contest({**others, "ours": off(0.21)}, **wide)["results"]


def test_who_dies_while_it_is_timed_is_left_out_and_the_others_are_timed_on():
    calls = iter([right(), right(), right()])  # checked, its memory taken, timed once

    def tired():
        return next(calls)

    found = contest({"eager": right, "tired": tired, "ours": right}, min_rounds=4)
    assert list(found["results"]) == ["eager", "ours"] and "StopIteration" in str(found["left_out"])
    assert found["results"]["ours"]["rounds"] == 4


class Event:
    """Stands for torch.cuda.Event: the host's clock."""

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


class Pretence(TorchFunctionMode):
    """Tensors that should go to a GPU stay on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(x):
            return "cpu" if isinstance(x, str) and x == "cuda" else x

        return func(*map(here, args), **{key: here(x) for key, x in (kwargs or {}).items()})


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A CPU that stands for a GPU: all that is done on one is done, if not by it."""
    for name, stand_in in {
        "Event": Event,
        "_sleep": lambda clocks: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 2**21,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(device, "L2_BYTES", 2**20)
    device._buffers.cache_clear()
    with Pretence():
        yield
    device._buffers.cache_clear()


def test_on_a_gpu_all_others_are_timed_before_ours_is_tried(pretended_gpu, monkeypatch, tmp_path):
    order = []

    def named(name, seconds=0.0):
        def run():
            order.append(name)
            time.sleep(seconds)
            return right()

        return run

    def gone():
        saved = json.loads((tmp_path / "found.json").read_text())
        order.extend(saved["results"])
        raise MemoryError

    contestants = {
        "eager": named("eager", 0.002),
        "slow": named("slow", 0.004),
        "quick": named("quick"),
        "ours": named("ours"),
        "ours compiled": gone,
    }
    (tmp_path / "given.json").write_text("{}")
    monkeypatch.setenv(harness.Diary.FOLDER, str(tmp_path))
    found = contest(contestants, device="cuda")
    first = order.index("ours")
    assert order[:first].count("slow") == 4 and "slow" not in order[first:-4]
    # once to be checked, once for its memory, and two rounds with those it is compared with
    assert order[first:-4] == ["ours"] * 2 + ["eager", "quick", "ours"] * 2
    assert order[-4:] == ["eager", "slow", "quick", "ours"]  # were written down before it died
    assert list(found["results"]) == order[-4:] and found["left_out"].keys() == {"ours compiled"}
    assert all(result["host_ms"] >= 0 for result in found["results"].values())
    assert all(result["ratio"] > 0 for result in found["results"].values())


def test_one_that_fails_beside_ours_keeps_the_times_it_had(pretended_gpu):
    calls = iter([right()] * 4)  # checked, its memory taken, timed twice

    def tired():
        return next(calls)

    found = contest({"eager": right, "tired": tired, "ours": right}, device="cuda")
    assert list(found["results"]) == ["eager", "tired", "ours"] and not found["left_out"]


def test_a_trace_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    given = {"profile": "ours", "trace": str(tmp_path / "file" / "trace")}
    (tmp_path / "given.json").write_text(json.dumps(given))
    monkeypatch.setenv(harness.Diary.FOLDER, str(tmp_path))
    found = contest({"eager": right, "ours": right})
    assert list(found["results"]) == ["eager", "ours"]
    assert "no trace of ours: " in capsys.readouterr().err


def test_a_contestant_of_another_function_is_held_to_that():
    other = {"pooled": lambda: [RIGHT * 2, RIGHT]}
    contestants = {"eager": right, **other, "ours": right}
    assert "pooled" in contest(contestants)["left_out"]
    expected_of = {"pooled": [RIGHT.double() * 2, RIGHT.double()]}
    assert "pooled" in contest(contestants, expected_of=expected_of)["results"]


def take_turns(monkeypatch, times, **options):
    """With a clock that says what is given, by contestant."""
    clocks, order = {name: iter(each) for name, each in times.items()}, []

    def elapsed(run, device):
        order.append(run())
        return harness.Took(next(clocks[order[-1]]), 0.0)

    monkeypatch.setattr(harness, "elapsed", elapsed)
    contestants = {name: functools.partial(str, name) for name in times}
    rounds = len(next(iter(times.values())))
    options = {"min_rounds": rounds, "max_rounds": rounds} | options
    return harness.take_turns(contestants, **options), order


def test_ratios_are_of_one_rounds_times(monkeypatch):
    slower = [1, 10, 2, 1000, 30]  # what else the machine does, in each round
    found, order = take_turns(
        monkeypatch, {"eager": [2 * x for x in slower], "ours": slower, "peer": [1] * 5}
    )
    ratios = [found["ours"][key] for key in ("ratio_low", "ratio", "ratio_high")]
    assert ratios == [0.5] * 3 and found["eager"]["ratio"] == 1
    assert found["ours"]["median_ms"] == 10e3 and found["ours"]["min_ms"] == 1e3
    assert order == ["eager", "ours", "peer"] * 5
    found, _ = take_turns(monkeypatch, {"eager": [1, 10, 100], "ours": [2, 5, 300]})
    assert found["ours"]["ratio"] == 2  # where that of the medians is 1/2


def test_times_are_of_a_unit_and_ratios_of_the_baseline_alone(monkeypatch):
    times = {"peer": [4, 4], "ours": [2, 2]}
    assert take_turns(monkeypatch, times, units=4)[0]["ours"]["median_ms"] == 500
    found = take_turns(monkeypatch, times, baseline="eager")[0]
    assert all(result["ratio"] is None for result in found.values())


def test_peak_memory_is_that_of_a_call():
    def run(mib):
        torch.ones(mib, 2**20, dtype=torch.uint8)

    for mib in (0, 64, 256):
        run(mib)
        peak = device.peak_memory(functools.partial(run, mib)) / 2**20
        assert 0.95 * mib - 1 <= peak <= 1.05 * mib + changes.MEMORY_NOISE_MIB


# --- what moved between two runs -----------------------------------------------------------------


def result(ms, ratio, mib):
    spread = {"low_ms": 0.98 * ms, "high_ms": 1.02 * ms}
    if ratio is not None:
        spread |= {"ratio_low": 0.98 * ratio, "ratio_high": 1.02 * ratio}
    return {"median_ms": ms, "ratio": ratio, "rounds": 100, "peak_mib": mib, **spread}


RESULTS = {
    "eager": result(20.0, 1.0, 300.0),
    "chunked linear_cross_entropy": result(16.0, 0.8, 200.0),
    "ours": result(8.0, 0.4, 100.0),
    "ours by DALI": result(4.0, 0.2, 100.0),
}
MACHINE = {"cpu": "this", "cores": 2, "torch": "2.13", "commit": "abc"}


def record(case="attention-b16", results=RESULTS, suite="ops", machine=MACHINE, **more):
    parts = {"suite": suite, "case": case, "machine": machine, "results": results}
    return copy.deepcopy({"params": {"compiled": True}, "left_out": {}, **parts, **more})


def scaled(results, name, *figures, by=1.3):
    """A copy in which figures of a contestant, their quartiles too, are so many times as high."""
    changed = copy.deepcopy(results)
    kinds = {"ms": ("median_ms", "low_ms", "high_ms"), "MiB": ("peak_mib",)}
    kinds["ratio"] = ("ratio", "ratio_low", "ratio_high")
    for key in (key for figure in figures for key in kinds[figure]):
        changed[name][key] *= by
    return changed


def without(results, *names):
    return {name: each for name, each in results.items() if name not in names}


@pytest.fixture
def compared(tmp_path):
    """What is said of two lists of records, and how many cases regressed past a tenth."""

    def run(before, after, allow=0.1):
        for folder, given in (("before", before), ("after", after)):
            (tmp_path / folder).mkdir(exist_ok=True)
            for i, each in enumerate(given):
                (tmp_path / folder / f"{i}.json").write_text(json.dumps(each))
        return changes.compare(tmp_path / "before", tmp_path / "after", allow)

    return run


PLANTED = {
    "time": scaled(RESULTS, "ours", "ms", "ratio"),
    "ratio": scaled(RESULTS, "ours", "ratio"),
    "memory": scaled(RESULTS, "ours", "MiB"),
    "a variant": scaled(RESULTS, "ours by DALI", "ms", "ratio", by=3),
    "absent": without(RESULTS, "ours"),
    "a variant absent": without(RESULTS, "ours by DALI"),
    "NaN time": scaled(RESULTS, "ours", "ms", by=math.nan),
    "NaN ratio": scaled(RESULTS, "ours", "ratio", by=math.nan),
    "infinite memory": scaled(RESULTS, "ours", "MiB", by=math.inf),
}
HARMLESS = {
    "nothing": RESULTS,
    "within the share": scaled(RESULTS, "ours", "ms", "ratio", "MiB", by=1.08),
    "better": scaled(RESULTS, "ours", "ms", "ratio", "MiB", by=0.5),
    "a slower machine": scaled(scaled(RESULTS, "ours", "ms"), "eager", "ms"),
    "a slower peer": scaled(RESULTS, "chunked linear_cross_entropy", "ms", "ratio", by=3),
    "no peer": without(RESULTS, "chunked linear_cross_entropy"),
    "wide quartiles": RESULTS
    | {"ours": scaled(RESULTS, "ours", "ms", "ratio")["ours"] | {"low_ms": 7, "ratio_low": 0.35}},
    "a MiB more of little": scaled(RESULTS, "ours", "MiB", by=1.02),
}
ELSEWHERE = MACHINE | {"cpu": "another"}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_regressions_are_found_and_named(planted, compared):
    text, bad = compared([record()], [record(results=PLANTED[planted])])
    name = "ours by DALI" if planted.startswith("a variant") else "ours"
    (line,) = (line for line in text.splitlines() if "REGRESSION" in line)
    assert bad == 1 and line.startswith(f"  {name}  ")
    lost = planted.startswith(("a variant absent", "absent", "NaN", "infinite"))
    assert ("→ lost (" in line) == lost and ("past 10%" in line) != lost


@pytest.mark.parametrize("harmless", HARMLESS)
def test_nothing_else_regresses(harmless, compared):
    text, bad = compared([record()], [record(results=HARMLESS[harmless])])
    assert bad == 0 and "REGRESSION" not in text


def test_why_ours_was_left_out_is_said(compared):
    results = without(RESULTS, "ours by DALI")
    text, bad = compared([record()], [record(results=results, left_out={"ours by DALI": "no GPU"})])
    assert bad == 1 and "4.00 → lost (no GPU)" in text


def test_without_a_common_ratio_times_are_judged(compared):
    alone = without(RESULTS, "eager")
    for name in alone:
        alone[name] = alone[name] | {"ratio": None}
    for before, after in ((alone, alone), (RESULTS, alone)):
        slower = scaled(after, "ours", "ms")
        assert compared([record(results=before)], [record(results=after)])[1] == 0
        assert compared([record(results=before)], [record(results=slower)])[1] == 1
    # to another baseline, as where eager's logits no longer fit into memory
    other = without(RESULTS, "eager")
    other["chunked linear_cross_entropy"] = result(16.0, 1.0, 200.0)
    other["ours"], other["ours by DALI"] = result(8.0, 0.5, 100.0), result(4.0, 0.25, 100.0)
    assert compared([record()], [record(results=other)])[1] == 0


@pytest.mark.parametrize(
    ["results", "expected"],
    [
        (RESULTS, 0),
        (scaled(RESULTS, "ours", "ms", by=10), 0),
        (scaled(RESULTS, "ours", "MiB", by=10), 0),
        (scaled(RESULTS, "ours", "ratio"), 1),
        (scaled(RESULTS, "ours", "ms", by=math.nan), 1),
        (without(RESULTS, "ours"), 1),
    ],
    ids=["same", "time", "memory", "ratio", "NaN", "absent"],
)
def test_of_different_machines_ratios_alone_are_compared(results, expected, compared):
    text, bad = compared([record()], [record(results=results, machine=ELSEWHERE)])
    assert bad == expected and "only ratios to the baseline are compared" in text


def test_what_cannot_be_judged_is_said(compared):
    alone = {"ours": result(8.0, None, 100.0)}
    text, bad = compared([record()], [record(results=alone, machine=ELSEWHERE)], 0.1)
    assert "ours is not judged" in text and "0 within noise" in text
    assert bad == 1  # for "ours by DALI" is absent


def test_a_case_that_is_absent_is_lost_if_its_suite_was_run_as_before(compared):
    peers = {"eager": RESULTS["eager"]}
    before = [record(), record("attention-b32"), record("attention-peers", peers)]
    before += [record("loss-1024"), record("b16", suite="model")]
    text, bad = compared(before, [record()])
    assert bad == 1 and "ops attention-b32: absent in " in text
    (named,) = (line for line in text.splitlines() if line.startswith("only in "))
    assert named.endswith("ops attention-peers, ops loss-1024, model b16")


def test_a_quick_run_is_not_held_to_what_it_leaves_out(compared):
    quick = record(
        results=without(RESULTS, "ours by DALI"),
        params={"compiled": False},
        left_out={"ours by DALI": "minutes of compiling"},
    )
    text, bad = compared([record(), record("attention-b32")], [quick])
    assert bad == 0 and "only in " in text
    slower = quick | {"results": scaled(quick["results"], "ours", "ratio")}
    assert compared([record(), record("attention-b32")], [slower])[1] == 1


def test_a_gpus_cases_are_expected_of_a_run_on_a_gpu_alone(compared, tmp_path):
    small, large = (record(f"attention-{x}-cuda", params={"device": "cuda"}) for x in (1, 32))
    before = [record(), small, large]
    assert compared(before, [record()])[1] == 0
    assert compared(before, [record(), small])[1] == 1
    # a file is held to its own case alone
    after = tmp_path / "after/0.json"
    assert changes.compare(tmp_path / "before", after, 0.1)[1] == 0


def test_a_file_of_lines_is_compared_as_a_folder_is(compared, tmp_path):
    compared(*2 * ([record(), record("loss-1024")],))
    lines = [record(results=PLANTED["ratio"]), record("loss-1024")]
    (tmp_path / "after.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, bad = changes.compare(tmp_path / "before", tmp_path / "after.jsonl", 0.1)
    assert bad == 1 and "2 cases compared" in text


def test_points_of_a_sweep_are_cases(compared):
    points = [{"value": n, "results": RESULTS, "left_out": {}} for n in (1, 2, 4)]
    sweep = functools.partial(record, "frames", suite="growth", sweep={"over": "frames"})
    slower = [*points[:2], points[2] | {"results": scaled(RESULTS, "ours", "ratio")}]
    text, bad = compared([sweep(points=points)], [sweep(points=slower)])
    assert bad == 1 and "growth frames 4\n" in text and "3 cases compared" in text
    text, bad = compared([sweep(points=points)], [sweep(points=points[:2])])
    assert bad == 1 and "growth frames 4: absent" in text
    quick = sweep(points=points[:2], params={"values": [1, 2]})
    assert compared([sweep(points=points)], [quick])[1] == 0


def test_columns_stay_apart(compared):
    slower = {name: result(10 * r["median_ms"], 3 * r["ratio"], 900) for name, r in RESULTS.items()}
    text, _ = compared([record()], [record(results=slower | {"eager": RESULTS["eager"]})])
    lines = [line for line in text.splitlines() if " → " in line and line.startswith("  ")]
    columns = {max(line.find(f"  {what} ") for what in ("ms", "ratio", "MiB")) for line in lines}
    assert len(lines) == 9 and columns == {len("  chunked linear_cross_entropy")}


def test_two_runs_of_one_function_agree_within_the_noise(compared):
    x = torch.randn(2 * 2**20)

    def run():
        return [x.sin() + 1]

    def once():
        found = harness.compare(
            {"eager": run, "ours": run}, expected=run(), tolerance=0, seconds=0.5, max_rounds=20
        )
        return record(**found)

    text, bad = compared([once()], [once()], allow=0.5)  # a share that no load makes of the same
    assert bad == 0, text


def test_the_command_ends_with_what_was_found(compared, tmp_path, capsys):
    compared([record()], [record(results=PLANTED["ratio"])])
    before, after = tmp_path / "before", tmp_path / "after"
    cli.bench(compare=(before, before))
    assert "1 cases compared, 1 within noise, 0 lost or regressed" in capsys.readouterr().out
    cli.bench(compare=(before, after), allow=0.5)
    for given, allow, status in (
        ((before, after), 0.1, 1),
        ((before, tmp_path / "none"), 0.1, 2),
        ((before, after), -1, 2),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.bench(compare=given, allow=allow)
        assert ended.value.code == status
    (after / "0.json").write_text(json.dumps(record() | {"results": {"ours": {}}}))
    with pytest.raises(ValueError, match=r"0\.json is no whole record"):
        changes.compare(before, after, 0.1)


# --- the suites ----------------------------------------------------------------------------------

ATTENTION = dict(videos=1, frames=2, patches=9)
VISION = dict(patch=32, layers=1)
FP32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
MEASURES = {
    "proxy_attention": (bench_proxy_attention, ATTENTION | FP32 | {"way": "both"}),
    "proxy_attention forward": (bench_proxy_attention, ATTENTION | BF16 | {"way": "forward"}),
    "proxy_attention backward": (bench_proxy_attention, ATTENTION | FP32 | {"way": "backward"}),
    "proxy_attention ragged": (
        bench_proxy_attention,
        ATTENTION | FP32 | {"way": "both", "videos": 3, "frames": 3, "ragged": True},
    ),
    "proxy_attention heads of 72": (
        bench_proxy_attention,
        ATTENTION | BF16 | {"way": "both", "heads": 2, "head_dim": 72},
    ),
    "symmetric": (bench_pairwise_logsumexp, dict(loss="symmetric", n=70) | FP32),
    "symmetric bf16": (bench_pairwise_logsumexp, dict(loss="symmetric", n=70) | BF16),
    "vsc_fc": (bench_pairwise_logsumexp, dict(loss="vsc_fc", n=70) | FP32),
    "linear": (bench_linear, dict(tokens=70) | FP32),
    "resize_crop": (bench_resize_crop, dict(width=300, height=240)),
    "model": (bench_model, VISION | FP32 | {"videos": 1, "backward": True}),
    "model forward": (bench_model, VISION | BF16 | {"videos": 1, "backward": False}),
    "train": (bench_train, VISION | FP32 | {"videos": 2}),  # the loss of one is zero
}


ON_GPU = {
    "proxy_attention": (bench_proxy_attention, ATTENTION | BF16 | {"way": "both"}),
    "proxy_attention ragged backward": (
        bench_proxy_attention,
        ATTENTION | BF16 | {"way": "backward", "videos": 3, "frames": 3, "ragged": True},
    ),
    "symmetric": (bench_pairwise_logsumexp, dict(loss="symmetric", n=128) | BF16),
    "vsc_fc": (bench_pairwise_logsumexp, dict(loss="vsc_fc", n=70) | BF16),
    "sum and norm": (bench_elementwise, dict(part="norm", tokens=70) | BF16),
    "quick_gelu": (bench_elementwise, dict(part="gelu", tokens=70) | BF16),
    "model": (bench_model, VISION | BF16 | {"videos": 1, "backward": True}),
    "train": (bench_train, VISION | BF16 | {"videos": 2}),
}


@pytest.mark.parametrize("suite", ON_GPU)
def test_every_suite_measures_where_a_cpu_stands_for_a_gpu(suite, pretended_gpu):
    """What these cannot be on a CPU, others' kernels, are left out by name."""
    module, size = ON_GPU[suite]
    found = module.measure(**size, device="cuda", compiled=False, budget=0.0)
    assert records.baseline(found["results"]) and "ours" in found["results"]
    assert all(result["host_ms"] > 0 for result in found["results"].values())
    assert all(result["peak_mib"] == 1 for result in found["results"].values())
    theirs = {*peers.ATTENTION, *peers.LOSSES, *peers.OTHER_LOSSES}
    absent = {name for name, why in found["left_out"].items() if "compil" not in why}
    assert absent <= theirs and bool(absent) == (suite in ("symmetric", *list(ON_GPU)[:2]))


@pytest.mark.parametrize("suite", MEASURES)
def test_every_contestant_of_a_suite_is_right(suite):
    module, size = MEASURES[suite]
    options = {} if module is bench_resize_crop else {"compiled": False}
    found = module.measure(**size, **options, budget=0.0)
    assert records.baseline(found["results"]) and "ours" in found["results"]
    assert all("compil" in reason for reason in found["left_out"].values())
    assert found["machine"]["cores"] and all(x > 0 for x in found["work"].values())


def test_a_sweep_measures_every_value():
    fixed = bench_growth.ATTENTION | {"videos": 1, "patches": 9}
    found = bench_growth.measure("proxy_attention", "frames", [1, 2], fixed, "cpu", budget=0.0)
    assert [point["value"] for point in found["points"]] == [1, 2]
    assert all("ours" in point["results"] for point in found["points"])


def test_decoders_give_the_expected_frames():
    if not bench_decode.FILMS.exists():
        pytest.skip(f"no films in {bench_decode.FILMS}; `make test` fetches them")
    size = dict(codec="h264", width=320, height=240, seconds=10, on="one")
    # in a process of its own, for it takes all threads and cores but one from it
    found = cases.run("bench_decode", "measure", size | {"budget": 0.0})
    assert {"naive", "ours", "PyAV seeking"} <= found["results"].keys()


def test_gradient_caching_gives_the_same_and_goes_where_records_go(tmp_path, monkeypatch):
    rows = bench_gradient_caching.rows(clips=2 * bench_gradient_caching.MICRO_BATCH)
    assert rows.keys() == {"at once", "in parts"}  # which it holds equal
    monkeypatch.setattr(bench_gradient_caching, "BATCHES", ())
    config = SimpleNamespace(getoption={"--bench-out": tmp_path}.get)
    bench_gradient_caching.test_gradient_caching(SimpleNamespace(config=config))
    assert "micro_batch" in json.loads((tmp_path / "gradient_caching.json").read_text())


def test_loads_are_compared_and_go_where_records_go(tmp_path, monkeypatch):
    """Here in one process; the benchmark gives each load its own."""
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 1}
    monkeypatch.setattr(bench_load, "B32", {"text_config": tower, "vision_config": tower})
    monkeypatch.setattr(bench_load, "ROUNDS", 1)
    monkeypatch.setattr(cases, "run", lambda module, function, given: bench_load.load(**given))
    config = SimpleNamespace(getoption={"--bench-out": tmp_path}.get)
    bench_load.test_load(SimpleNamespace(config=config))
    results = json.loads((tmp_path / "load.json").read_text())["results"]
    assert results.keys() == bench_load.SOURCES.keys()
    for row in results.values():
        assert row["ratio"]["both_seconds"] > 0
        assert row["ours"]["both_seconds"] > row["ours"]["load_seconds"] > 0


def test_windows_read_together_are_compared_with_clips_of_their_own(
    tmp_path, monkeypatch, real_clips
):
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    vision = {**tower, "num_attention_heads": 1, "image_size": 32, "patch_size": 16}
    text = {**tower, "num_attention_heads": 1}
    towers = {"vision_config": vision, "text_config": text}
    for name, value in {
        "B32": towers,
        "ROUNDS": 1,
        "MINUTES": 0.1,
        "WINDOW": 2.0,
        "STRIDE": 2.0,
    }.items():
        monkeypatch.setattr(bench_index, name, value)
    monkeypatch.setenv("CLIPVIP_TEST_CLIPS", str(real_clips["bikes"].parent))
    config = SimpleNamespace(getoption={"--bench-out": tmp_path}.get)
    bench_index.test_index(SimpleNamespace(config=config))
    record = json.loads((tmp_path / "index.json").read_text())
    assert record["film_seconds"] == pytest.approx(5.28, abs=0.05)
    assert record["seconds"].keys() == record["hours_per_hour"].keys() and all(
        seconds > 0 for seconds in record["seconds"].values()
    )
