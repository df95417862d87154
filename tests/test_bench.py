"""The benchmark programs that need a GPU run from end to end on tiny sizes without one."""

import json
import subprocess
from pathlib import Path

import gpu
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


def test_a_dry_run_checks_times_and_tabulates(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu.main(["--dry-run", "--out", str(out)])
    record = json.loads(out.read_text())
    assert {name.split(" ")[0] for name in record["cases"]} == {"tiny", "symmetric", "vsc_fc"}
    for case in record["cases"].values():
        ours = case["results"]["ours"]
        assert ours["median_ms"] > 0 and ours["host_ms"] > 0
        assert case["work"]["flop"] > 0 and case["work"]["bytes"] > 0
        assert case["machine"]["ceilings"]["copy_gib_s"] > 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in record["cases"])
    assert "without compiled naive (" in printed
    gpu.main(["table", "--out", str(out)])
    assert capsys.readouterr().out in printed


def test_a_contestant_that_is_wrong_or_dies_is_listed_and_not_timed():
    right = torch.ones(3)

    def die():
        raise MemoryError("too large")

    calls = iter([[right], [right], [right]])  # then it dies, while it is timed
    contestants = {
        "eager": lambda: [right],
        "tired": lambda: next(calls),
        "wrong": lambda: [right + 1],
        "nan": lambda: [right * torch.nan],
        "dead": die,
        "ours": lambda: [right],
    }
    found = gpu.compare(contestants, [right], {"absent": "not installed"}, "cpu", 0)
    assert set(found["results"]) == {"eager", "ours"}
    assert found["left_out"].keys() == {"tired", "wrong", "nan", "dead", "absent"}
    assert "error 1.0e+00, allowed" in found["left_out"]["wrong"]
    assert found["left_out"]["dead"] == "MemoryError: too large"


def test_ours_is_not_excused_by_a_baseline_that_is_far_off_or_absent():
    right = torch.ones(3)
    far = {"eager": lambda: [1.1 * right], "ours": lambda: [1.1 * right]}
    assert not gpu.compare(far, [right], {}, "cpu", 0)["results"]
    near = {"eager": lambda: [1.001 * right], "ours": lambda: [1.01 * right]}
    assert set(gpu.compare(near, [right], {}, "cpu", 0)["results"]) == {"eager"}
    alone = {"ours": lambda: [1.1 * right]}
    assert "allowed 2.0e-02" in gpu.compare(alone, [right], {}, "cpu", 0)["left_out"]["ours"]


def test_where_ours_fails_the_table_is_printed_and_the_program_fails(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu, "proxy_attention", fail)
    only = ["--only", "tiny forward$", "--out", str(tmp_path / "gpu.json")]
    with pytest.raises(SystemExit, match="ours failed in tiny forward;"):
        gpu.main(["--dry-run", *only])
    printed = capsys.readouterr().out
    assert "| **fails** |" in printed
    assert "- without ours (RuntimeError: an illegal memory access): tiny forward\n" in printed


def test_only_what_the_same_code_gave_on_the_same_gpu_is_not_measured_again():
    machine = {"commit": "abc1234", "gpu": "H100", "torch": "2.13"}
    record = {"machine": machine, "results": {"ours": {}}}
    assert gpu.is_measured(record, machine)
    assert not gpu.is_measured(None, machine)
    assert not gpu.is_measured(record | {"results": {}}, machine)
    for change in ({"commit": "abc1235"}, {"gpu": "A100"}, {"torch": "2.14"}):
        assert not gpu.is_measured(record, machine | change)
    for unknown in ("", "abc1234+changes"):
        same = machine | {"commit": unknown}
        assert not gpu.is_measured(record | {"machine": same}, same)


def test_the_checks_for_a_sanitizer_find_what_is_off(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "CHECKED_ATTENTION", [(torch.bfloat16, 64, 9)])
    monkeypatch.setattr(gpu, "CHECKED_LOSSES", [(torch.float32, 30, 40)])
    gpu.main(["--dry-run", "check"])
    assert capsys.readouterr().out.count(": off by ") == 3
    monkeypatch.setattr(gpu, "proxy_attention", lambda x, *_: x.sum(1))
    with pytest.raises(AssertionError, match=r"attention torch.bfloat16 D=64 L=9 is off by"):
        gpu.main(["--dry-run", "check"])


def test_bad_calls_end_with_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "speed"])
    assert "no part speed; expected some of attention" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "loss", "--only", "tiny"])
    assert "no case of loss has 'tiny' in its name" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no results: run"):
        gpu.main(["table", "--out", str(tmp_path / "none.json")])
    script = subprocess.run([BENCH / "gpu.sh", "speed"], capture_output=True, text=True)
    assert script.returncode == 2 and "no part 'speed'" in script.stderr
