"""The benchmark programs that need a GPU run from end to end on tiny sizes without one."""

import json
import subprocess
from pathlib import Path

import gpu
import pytest

BENCH = Path(__file__).parents[1] / "bench"


def test_a_dry_run_checks_times_and_tabulates(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu.main(["--dry-run", "--out", str(out)])
    record = json.loads(out.read_text())
    assert {name.split(" ")[0] for name in record["cases"]} == {"tiny", "symmetric", "vsc_fc"}
    for case in record["cases"].values():
        assert case["results"]["ours"]["median_ms"] > 0 and case["flop"] > 0 and case["bytes"] > 0
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in record["cases"])
    gpu.main(["table", "--out", str(out)])
    assert capsys.readouterr().out in printed


def test_a_wrong_contestant_is_listed_and_not_timed():
    import torch

    right = torch.ones(3)
    contestants = {"eager": lambda: [right], "peer": lambda: [right + 1], "ours": lambda: [right]}
    results = gpu.Bench("cpu", 0).compare(contestants, [right])
    assert "median_ms" in results["ours"]
    assert "error" in results["peer"]["failed"] and "median_ms" not in results["peer"]
    with pytest.raises(AssertionError, match="error"):
        gpu.Bench("cpu", 0).compare(contestants | {"ours": contestants["peer"]}, [right])


def test_bad_calls_end_with_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "speed"])
    assert "no part speed; expected some of attention" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no results: run"):
        gpu.main(["table", "--out", str(tmp_path / "none.json")])
    script = subprocess.run([BENCH / "gpu.sh", "speed"], capture_output=True, text=True)
    assert script.returncode == 2 and "no part 'speed'" in script.stderr
