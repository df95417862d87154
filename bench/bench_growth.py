"""How time and memory grow: `clipvip bench growth`.

Attention near the sizes of ViT-B/32 over frames, patches, proxies and batch, and the symmetric loss
over rows; forward and backward, on a CPU or a GPU. Records growth-* also hold `sweep` (the
parameter and its values), `points` (the results at each value) and `exponents` (of time and memory,
see records.fit); their `results` are those of the largest value.
"""

import importlib
import os
import sys
from typing import Any

import cases
import harness
import pytest
import records
from machine import machine

ATTENTION = dict(videos=4, frames=12, patches=49, proxies=4, dtype="float32", way="both")
LOSS = dict(
    loss="symmetric",
    dtype="float32",
    min_rounds=2,
    skipped={
        "gathered": "grows as naive does",
        "linear_cross_entropy": "grows as naive does: without options it stores all logits",
    },
)
GPU = dict(device="cuda", dtype="bfloat16")


def powers(most: int, least: int = 1) -> list[int]:
    """Return the powers of two times `least`, up to `most`."""
    return [least * 2**i for i in range((most // least).bit_length())]


# name → op, the parameter, its values, fixed arguments
SWEEPS: dict[str, tuple[str, str, list[int], dict[str, Any]]] = {
    "frames": ("proxy_attention", "frames", powers(64), ATTENTION),
    "patches": ("proxy_attention", "patches", [49, 100, 196, 289, 400, 576], ATTENTION),
    "proxies": ("proxy_attention", "proxies", powers(16), ATTENTION),
    "batch": ("proxy_attention", "videos", powers(64), ATTENTION),
    "rows": ("pairwise_logsumexp", "n", powers(32768, 1024), LOSS),
    "frames-cuda": ("proxy_attention", "frames", powers(64), ATTENTION | GPU | {"videos": 32}),
    "batch-cuda": ("proxy_attention", "videos", powers(256), ATTENTION | GPU),
    "rows-cuda": ("pairwise_logsumexp", "n", powers(131072, 1024), LOSS | GPU),
}
CASES: dict[str, dict[str, Any]] = {
    name: {
        "op": op,
        "over": over,
        "values": values,
        "fixed": {key: value for key, value in fixed.items() if key not in (over, "device")},
        "device": fixed.get("device", "cpu"),
    }
    for name, (op, over, values, fixed) in SWEEPS.items()
}
QUICK = {
    "frames": {"values": [1, 2, 4]},
    "rows": {"values": [256, 512, 1024]},
    "frames-cuda": {"values": [1, 2, 4]},
    "rows-cuda": {"values": [256, 512, 1024]},
}


def measure(
    op: str, over: str, values: list[int], fixed: dict[str, Any], device: str, budget: float = 8.0
) -> dict[str, Any]:
    """Time every contestant at each value of a parameter.

    On a CPU this process measures all values. On a GPU each value has a process of its own, so that
    a failure at one value does not lose the others.
    """
    module, points, diary, facts = f"bench_{op}", [], harness.Diary(), machine()
    os.environ.pop(diary.FOLDER, None)  # the diary belongs to the sweep, not to one of its values
    for value in values:
        arguments = fixed | {over: value, "device": device, "compiled": False, "budget": budget / 4}
        if device == "cpu":
            point = importlib.import_module(module).measure(**arguments)
        else:
            point = cases.run(module, "measure", arguments, limit=cases.LIMITS[device])
        points.append({"value": value, "work": point.get("work", {})})
        points[-1] |= {key: point[key] for key in ("left_out", "results")}
        times = (f"{name} {r['median_ms']:.1f} ms" for name, r in point["results"].items())
        print(f"{over} {value}: {', '.join(times)}", file=sys.stderr, flush=True)
        found = {
            "machine": facts,
            "sweep": {"over": {"videos": "batch", "n": "rows"}.get(over, over), "values": values},
            "points": points,
            "exponents": records.exponents({"points": points}),
            "left_out": dict(points[-1]["left_out"]),
            "results": points[-1]["results"],
        }
        diary.found(found)
    return found


@pytest.mark.parametrize("case", CASES)
def test_growth(case: str, run_case) -> None:
    run_case(CASES[case], limits=len(CASES[case]["values"]))
