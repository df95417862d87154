"""Whole runs of the suites, planted cases too: what crashes, hangs or is wrong costs itself alone.

These are the programs that measure on a GPU, at tiny sizes on a CPU.
"""

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import bench_proxy_attention
import cases
import changes
import kernels
import pytest
import records
import tables
import torch

from clipvip import benchmark, cli

BENCH = Path(__file__).parents[1] / "bench"

SUITE = """
import atexit
import os
import pathlib
import signal
import time

import harness
import pytest
import torch

CASES = {
    "right": {},
    "crash": {"crash": ["ours"]},
    "hang": {"hang": ["ours"]},
    "wrong": {"wrong": ["ours"]},
    "peers": {"crash": ["peer"], "wrong": ["other"]},
    "setup": {"setup": True},
    "late": {"slow": ["peer"], "hang_once": ["ours"]},
    "fails at exit": {"abort": True},
    "gpu": {"device": "cuda"},
}
QUICK = {"right": {}}


def again():
    return harness.Diary().settled


def measure(
    budget, crash=(), hang=(), wrong=(), slow=(), hang_once=(), setup=False, abort=False
):
    if setup:
        raise MemoryError("the reference does not fit")
    if abort:
        atexit.register(os.abort)
    x = torch.ones(8)

    def contestant(name):
        def run():
            if name in crash:
                os.kill(os.getpid(), signal.SIGSEGV)
            if name in hang or (name in hang_once and not again()):
                time.sleep(600)
            if name in slow and not again():
                slow.remove(name)
                time.sleep(31)  # over two thirds of the limit, so that ours is late
            return [x * (2 if name in wrong else 1)]

        return run

    names = ("eager", "peer", "other", "ours")
    # On a GPU peers are timed before ours; this is that order, by the clock of a CPU.
    elapsed, harness.elapsed = harness.elapsed, lambda run, device: elapsed(run)
    harness.peak_memory, harness.settle = lambda run, device: 0, lambda device: None
    return harness.compare(
        {name: contestant(name) for name in names},
        expected=[x],
        tolerance=1e-3,
        seconds=0,
        min_rounds=2,
        device="cuda",
        work={"flop": 1e9},
    )


@pytest.mark.parametrize("case", CASES)
def test_tiny(case, run_case):
    run_case(CASES[case])
"""
CONFTEST = """
import sys

sys.path.insert(0, {bench!r})
import cases
import records

records.SUITES["tiny"] = records.Suite("Tiny", ("bench_tiny",))
cases.LIMITS["cpu"] = {limit}
"""
FACTS = """
import machine

Run.facts = machine.machine() | {"ceilings": {}}  # measuring these takes seconds
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Runs the planted suite, into tmp_path/new/out, each of its processes for some seconds."""
    folder = tmp_path / "suites"
    folder.mkdir()
    (folder / "bench_tiny.py").write_text(SUITE)
    monkeypatch.setitem(records.SUITES, "tiny", records.Suite("Tiny", ("bench_tiny",)))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("CLIPVIP_COMMIT", "abc1234")
    monkeypatch.setattr(benchmark, "BENCH", folder)

    def run(limit=20, facts=FACTS, **options):
        conftest = CONFTEST.format(bench=str(BENCH), limit=limit)
        (folder / "conftest.py").write_text(conftest + (BENCH / "conftest.py").read_text() + facts)
        return benchmark.run("tiny", **{"out": tmp_path / "new/out", "device": "cpu"} | options)

    return run


def found_in(store):
    return {record["case"]: record for record in records.read(store)[0]}


def test_what_crashes_hangs_or_is_wrong_costs_its_case_and_is_written_down(tiny, tmp_path, capfd):
    out = tmp_path / "new/all.jsonl"
    assert not tiny(limit=45, out=out, facts="")  # other tests may slow a process's start
    assert {path.name for path in out.parent.iterdir()} == {"all.jsonl", "report.html", "report.md"}
    found = found_in(out)
    cases_of_it = {"right", "crash", "hang", "wrong", "peers", "setup", "late", "fails at exit"}
    assert found.keys() == cases_of_it
    left_out = {case: record["left_out"] for case, record in found.items()}
    for case in ("right", "fails at exit"):
        assert found[case]["results"].keys() == {"eager", "peer", "other", "ours"}
        assert left_out[case] == {} and records.failure(found[case]) is None
    reasons = {
        "crash": "died of SIGSEGV",
        "hang": r"did not end within the case's 45 s, having run for \d+ s",
        "wrong": re.escape("ours is off by 1.00e+00, allowed 1.00e-04"),
    }
    for case, reason in reasons.items():
        assert left_out[case].keys() == {"ours"}
        assert re.fullmatch(reason, left_out[case]["ours"])
        assert found[case]["results"].keys() == {"eager", "peer", "other"}  # they are not lost
        assert found[case]["machine"]["ceilings"]["copy_gib_s"] > 0
    # a peer takes nobody along
    assert left_out["peers"].keys() == {"peer", "other"}
    assert left_out["peers"]["peer"] == "died of SIGSEGV"
    assert found["peers"]["results"].keys() == {"eager", "ours"}
    assert left_out["setup"] == {
        "ours": "failed: MemoryError: the reference does not fit while no contestant ran"
    }
    # nor does it take ours' time
    assert {"eager", "ours"} <= found["late"]["results"].keys()
    assert "ours" not in left_out["late"]
    printed = capfd.readouterr()
    assert "peer died of SIGSEGV; once more without it" in printed.err
    # the table so far comes after every case
    for case in found:
        first = printed.out.index(f"tiny {case}\n")
        assert f"\ntiny {case} " in printed.out[first:]
    assert printed.out.count("eager ms") >= len(found)
    assert "| crash | " in (out.parent / "report.md").read_text()


def test_a_run_writes_records_and_a_report_and_says_whether_all_passed(tiny, tmp_path, capfd):
    out = tmp_path / "new/out"
    assert tiny(quick=True)
    assert {path.name for path in out.iterdir()} == {"tiny-right.json", "report.html", "report.md"}
    assert changes.load(out)["tiny", "right"]["results"].keys() >= {"eager", "ours"}
    assert "tiny right" in capfd.readouterr().out
    assert not tiny(only="wrong")
    assert "ours is off by 1.00e+00, allowed 1.00e-04" in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"no case of tiny for cpu is found by --only 'right\.\+'"):
        tiny(only="right.+")


def test_a_run_takes_from_an_earlier_one_what_is_measured(tiny, tmp_path, capfd, monkeypatch):
    first, second = tmp_path / "first.jsonl", tmp_path / "second"
    assert not tiny(only="right|wrong", out=first)
    began = found_in(first)["right"]
    capfd.readouterr()
    assert not tiny(only="right|wrong|peers", out=second, resume=first)
    printed = capfd.readouterr().out
    assert printed.count("measured before") == 1 and found_in(second)["right"] == began
    # what failed is tried again, after what was not tried yet
    order = [printed.index(f"tiny {case}\n") for case in ("right", "peers", "wrong")]
    assert order == sorted(order)
    # what this run did not ask for is taken over too, for the next one
    third = tmp_path / "third.jsonl"
    assert not tiny(only="setup", out=third, resume=second)
    assert found_in(third).keys() == {"right", "peers", "setup"}
    monkeypatch.setenv("CLIPVIP_COMMIT", "abc1235")
    assert tiny(only="right", out=third, resume=first)
    assert "measured before" not in capfd.readouterr().out


def test_too_little_time_is_said_and_no_failure(tiny, capfd):
    assert tiny(minutes=0.05)
    printed = capfd.readouterr().out
    assert "no case was done within 0.05 minutes; give more" in printed
    assert "not reached in time: 8 cases: tiny right, " in printed


def test_a_run_stops_in_time_and_names_what_it_did_not_reach(tiny, tmp_path, capfd):
    out = tmp_path / "new/out"
    started = time.monotonic()
    assert tiny(limit=600, only="hang|right|peers", minutes=0.6)
    assert time.monotonic() - started < 0.6 * 60 + 10  # the report's imports take a while
    printed = capfd.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.startswith("not reached in time"))
    assert re.search(r"\d cases: .*tiny hang", line)
    assert "hang" not in found_in(out)  # for it had no time to show that it hangs


def test_bad_calls_end_with_a_line_before_anything_is_measured(tiny, tmp_path, capsys):
    (tmp_path / "new").write_text("a file")
    with pytest.raises(ValueError, match=r"--out is .*, where nothing can be written \(.*\); give"):
        tiny(quick=True)
    folder, torn = tmp_path / "some.jsonl", tmp_path / "torn.jsonl"
    folder.mkdir()
    torn.write_text("{\n{}\n")
    here = {"out": tmp_path / "here"}
    for options, line in (
        ({"minutes": 0.0}, "--minutes is 0, expected more than 0"),
        ({"only": "("}, r"--only is '\(', no regular expression: missing \)"),
        ({"out": tmp_path / "one.json"}, r"--out is .*one\.json; give a folder, or a file \.jsonl"),
        ({"out": folder}, r"--out is .*some\.jsonl, where nothing can be written"),
        (here | {"resume": tmp_path / "none"}, "none is neither a record nor a folder of records"),
        (
            here | {"resume": folder},
            r"--resume is .*, which holds no records; `clipvip bench` makes some",
        ),
        (here | {"resume": torn}, r"torn\.jsonl line 1 is not JSON"),
    ):
        with pytest.raises(ValueError, match=line):
            tiny(**options)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"--device is cuda, but .*(no GPU|no CUDA kernels)"):
            cli.bench("ops", device="cuda")


# --- a process -----------------------------------------------------------------------------------


def test_a_process_is_killed_with_all_it_started_and_ends_with_the_run(tmp_path, monkeypatch):
    script = """
import os, subprocess, time, pathlib
def hang(file):
    child = subprocess.Popen(["sleep", "600"])
    pathlib.Path(file).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
"""
    (tmp_path / "hanging.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pids = tmp_path / "pids"

    def gone():
        states = [Path(f"/proc/{pid}/stat") for pid in pids.read_text().split()]
        return all(not p.exists() or p.read_text().split()[2] == "Z" for p in states)

    found = cases.run("hanging", "hang", {"file": str(pids)}, limit=10)
    reason = "did not end within the case's 10 s while no contestant ran"
    assert found["left_out"] == {"ours": reason}
    assert gone()
    with pytest.raises(cases.OutOfTime):
        cases.run("hanging", "hang", {"file": str(pids)}, limit=60, deadline=time.monotonic() + 8)
    # a run that is killed itself leaves nothing behind
    pids.unlink()
    call = f"import cases; cases.run('hanging', 'hang', {{'file': {str(pids)!r}}})"
    runner = subprocess.Popen([sys.executable, "-c", call], cwd=BENCH)
    while not (pids.exists() and pids.read_text()):
        time.sleep(0.05)
    runner.kill()
    runner.wait()
    time.sleep(0.5)
    main = Path(f"/proc/{pids.read_text().split()[0]}/stat")
    assert not main.exists() or main.read_text().split()[2] == "Z"


def test_a_peer_that_ends_the_process_twice_is_not_tried_for_ever(tmp_path, monkeypatch):
    script = """
import os, signal, harness
def measure():
    with harness.Diary().runs("peer"):
        os.kill(os.getpid(), signal.SIGSEGV)
"""
    (tmp_path / "dying.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = cases.run("dying", "measure", {}, limit=60)
    assert found == {"results": {}, "left_out": {"peer": "died of SIGSEGV"}}


def test_a_lost_gpu_ends_the_process_and_is_laid_to_whom_it_ran(tmp_path, monkeypatch):
    script = """
import harness, torch
def settle(device):
    if calls.count("lost"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
calls = []
harness.settle = settle
harness.elapsed = lambda run, device: harness.Took(1.0, 1.0)
harness.peak_memory = lambda run, device: 0
def lose():
    calls.append("lost")
    raise RuntimeError("CUDA error")
def measure():
    x = torch.ones(2)
    return harness.compare(
        {"eager": lambda: [x], "ours": lose}, expected=[x], tolerance=1e-3, device="cuda"
    )
"""
    (tmp_path / "losing.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = cases.run("losing", "measure", {}, limit=60)
    reason = "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert found["left_out"] == {"ours": reason} and found["results"].keys() == {"eager"}


# --- records -------------------------------------------------------------------------------------


def record(case, ms=1.0, **more):
    results = {"ours": {"median_ms": ms}}
    machine = {"commit": "abc1234", "gpu": "H100", "torch": "2.13"}
    params = {"device": "cuda", "dtype": "bfloat16"}
    return {
        "suite": "ops",
        "case": case,
        "params": params,
        "machine": machine,
        "results": results,
    } | more


def test_a_file_of_lines_outlives_a_run_that_is_killed_while_it_writes(tmp_path):
    store = tmp_path / "some.jsonl"
    for case, ms in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        records.save(store, record(case, ms))
    whole = store.read_bytes()
    for cut in range(len(whole)):
        store.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        kept = {each["case"]: each for _, each in records.stored(store)}
        assert len(kept) == min(lines, 2)
        records.save(store, record("c"))
        assert list(found_in(store)) == [*"ab"[: min(lines, 2)], "c"]
        assert store.read_bytes().count(b"\n") == lines + 1
    store.write_bytes(whole)
    assert found_in(store)["a"]["results"]["ours"]["median_ms"] == 3.0
    store.write_text("{}\n{\n{}\n")
    with pytest.raises(ValueError, match=r"some\.jsonl line 2 is not JSON"):
        records.read(store)


def test_only_what_the_same_code_gave_on_the_same_machine_is_not_measured_again():
    one, machine = record("a"), record("a")["machine"]
    assert records.is_measured(one, machine)
    assert not records.is_measured(record("a", results={}), machine)
    assert not records.is_measured(one | {"cut": True}, machine)
    for change in ({"commit": "abc1235"}, {"gpu": "A100"}, {"torch": "2.14"}):
        assert not records.is_measured(one, machine | change)
    for unknown in ("", "abc1234+changes"):
        same = machine | {"commit": unknown}
        assert not records.is_measured(one | {"machine": same}, same)
    # a sweep is measured when all its points are
    point = {"value": 1, "results": one["results"]}
    points = [point, point | {"results": {}, "left_out": {"ours": "hung"}}]
    assert records.is_measured(one | {"points": points[:1]}, machine)
    assert not records.is_measured(one | {"points": points}, machine)
    assert not records.is_measured(one | {"suite": "growth"}, machine)


# --- the kit for a GPU ---------------------------------------------------------------------------


def test_names_of_cases_are_names_of_cases():
    titles = set()
    for suite, each in records.SUITES.items():
        for name in each.modules:
            module = importlib.import_module(name)
            assert set(module.QUICK) <= set(module.CASES)
            op = f"{name.removeprefix('bench_')}-" if len(each.modules) > 1 else ""
            titles |= {f"{suite} {op}{case}" for case in module.CASES}
            for case, params in module.CASES.items():
                assert (params.get("device") == "cuda") == case.endswith("-cuda")
    assert set(records.IMPORTANT) <= titles
    named = {f"{suite} {case}" for suite, case in (row[1].split(" ") for row in tables.SHORT)}
    assert named <= titles


def test_the_command_line_offers_every_suite():
    assert get_args(cli.Suite) == (*records.SUITES, "all")


def test_ragged_and_equal_batches_are_the_same_attention_in_every_form():
    """And what all forms are held to is the op's reference."""
    from clipvip.ops.proxy_attention import proxy_attention_reference

    torch.manual_seed(0)
    for frames in ((3, 3), (1, 4, 2)):
        patches, proxies = 5, bench_proxy_attention.PROXIES
        tokens = sum(proxies + n * patches for n in frames)
        qkv = torch.randn(tokens, 3, 2, bench_proxy_attention.HEAD_DIM, dtype=torch.float64)
        grad = torch.randn_like(qkv[:, 0])
        got = bench_proxy_attention.exact(qkv, grad, frames, patches, proxies)
        offsets = bench_proxy_attention.offsets(frames, qkv.device)
        leaf = qkv.clone().requires_grad_()
        out = proxy_attention_reference(leaf, offsets, proxies, patches)
        torch.testing.assert_close(got[0], out.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1], torch.autograd.grad(out, leaf, grad)[0])
        for name in ("two SDPA", "masked SDPA"):
            form = bench_proxy_attention.FORMS[name]
            torch.testing.assert_close(form(qkv, frames, patches, proxies), out.detach())
        mask = (
            bench_proxy_attention.same_frame(patches, proxies)
            if len(set(frames)) == 1
            else bench_proxy_attention.same_frame_of_a_video(
                torch.tensor([proxies + n * patches for n in frames]), patches, proxies
            )
        )
        length = proxies + frames[0] * patches if len(set(frames)) == 1 else tokens
        index = torch.arange(length)
        seen = mask(torch.tensor(0), torch.tensor(0), index[:, None], index)
        of_video = [bench_proxy_attention.seen(n, patches, proxies, qkv.device) for n in frames]
        expected = of_video[0] if length < tokens else torch.block_diag(*of_video).bool()
        assert torch.equal(seen, expected)
    each = bench_proxy_attention.lengths(32, 12, ragged=True)
    assert (min(each), max(each), sum(each)) == (4, 20, 32 * 12)


def test_the_checks_for_a_sanitizer_find_what_is_off(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "ATTENTION", [(torch.bfloat16, 64, 9)])
    monkeypatch.setattr(kernels, "LOSSES", [(torch.float32, 30, 40)])
    monkeypatch.setattr(kernels, "ELEMENTWISE", [(torch.float16, 16)])
    kernels.main(["check", "--device", "cpu"])
    assert capsys.readouterr().out.count(": off by ") == 5
    monkeypatch.setattr(kernels, "proxy_attention", lambda x, *_: x.sum(1))
    with pytest.raises(SystemExit, match=r"attention torch.bfloat16 D=64 L=9 is off by"):
        kernels.main(["check", "--device", "cpu"])
    assert capsys.readouterr().out.count(": off by ") == 5  # of all, not up to the first
    monkeypatch.setattr(kernels, "proxy_attention", lambda x, *_: x.sum(1) * torch.nan)
    with pytest.raises(SystemExit, match="is off by inf"):
        kernels.main(["check", "--device", "cpu"])


def script(*arguments, **environment):
    return subprocess.run(
        [BENCH / "gpu.sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=cases.os.environ | {"PYTHON": sys.executable} | environment,
    )


def test_the_script_runs_its_parts_and_leaves_everything_in_one_folder(tmp_path):
    ended = script("--dry-run", "targets", "step", OUT=str(tmp_path / "kit"))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    names = {path.name for path in (tmp_path / "kit").iterdir()}
    assert names == {"gpu.jsonl", "report.md", "report.html", "traces"}
    assert found_in(tmp_path / "kit").keys() == {
        "proxy_attention-b32-bf16-both-default",
        "small-fp32-default",
    }
    assert [path.name for path in (tmp_path / "kit/traces").iterdir()] == [
        "train-small-fp32-default-ours.json.gz"
    ]
    # Eight cases of attention, three of losses and three of elementwise, these in two forms each.
    assert ended.stdout.count(": off by ") == 8 + 2 * 3 + 2 * 3
    assert "counters: skipped" in ended.stdout


def test_bad_calls_of_the_script_end_with_a_line(tmp_path):
    for arguments, line in (
        (["speed"], "no part or option 'speed'"),
        (["--out"], "--out needs a value"),
        (["--dry-run", "--resume", tmp_path], f"--resume: there is no {tmp_path}/gpu.jsonl"),
        (["wheels"], "wheels needs a folder"),
    ):
        ended = script(*arguments)
        assert ended.returncode == 2 and line in ended.stderr
    assert "bench/gpu.sh [--out DIR]" in script("--help").stdout
