"""Cost of loading a model: `pytest bench/bench_load.py -s`.

A CLIP of ViT-B/32's size with random weights is read by transformers' CLIPModel and by ours, from a
folder with safetensors, from one with a .bin, and, by ours alone, from an authors' file; beside it
the .bin is what transformers reads. Each load runs in a process of its own, after its imports, and
the two take turns. transformers maps a file and reads its pages when they are first used, ours
checks each weight as it loads. So all weights are read once after either has loaded, as any use of
a model does, and time and peak memory are taken both before and after that. Prints medians and
writes load.json to --bench-out, by default bench/results.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import records
import torch
from device import MIB, peak_memory
from machine import machine
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging

from clipvip.convert import convert
from clipvip.model import CLIPViPModel

ROUNDS = 7
B32 = {"vision_config": {"patch_size": 32, "image_size": 224}}
SOURCES = {"safetensors": "safetensors", "bin": "bin", "authors.pt": "bin"}  # ours and theirs


def write(folder: Path, sizes: dict[str, Any]) -> None:
    """Write the sources of a CLIP of these sizes."""
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(**sizes))
    clip.save_pretrained(folder / "safetensors")
    clip.config.save_pretrained(folder / "bin")
    torch.save(clip.state_dict(), folder / "bin" / "pytorch_model.bin")
    convert(folder / "safetensors", folder / "authors.pt", to="authors")


def load(source: str, ours: bool) -> dict[str, float]:
    """Load a model and read its weights once; return seconds and peak MiB of the load, and of both
    together."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    models: list[Any] = []
    found: dict[str, float] = {}

    def read_weights() -> None:
        for weight in models[0].parameters():
            torch.linalg.vector_norm(weight.detach())

    def timed(name: str, run: Callable[[], None]) -> None:
        def clocked() -> None:
            started = time.perf_counter()
            run()
            found[f"{name}_seconds"] = time.perf_counter() - started

        found[f"{name}_mib"] = peak_memory(clocked) / MIB

    kind = CLIPViPModel if ours else CLIPModel
    timed("load", lambda: models.append(kind.from_pretrained(source)))
    timed("read", read_weights)
    found["both_seconds"] = found["load_seconds"] + found.pop("read_seconds")
    found["both_mib"] = max(found["load_mib"], found["load_mib"] + found.pop("read_mib"))
    return found


def compare(folder: Path, source: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return medians of both, and of the ratios of our times to theirs of each round."""
    taken: dict[str, list[dict[str, float]]] = {"transformers": [], "ours": []}
    for _ in range(rounds):
        for name, path in (("transformers", SOURCES[source]), ("ours", source)):
            given = {"source": str(folder / path), "ours": name == "ours"}
            row = cases.run("bench_load", "load", given)
            assert "left_out" not in row, row["left_out"]
            taken[name].append(row)
    pairs = zip(taken["ours"], taken["transformers"], strict=True)
    seconds = ("load_seconds", "both_seconds")
    taken["ratio"] = [{key: own[key] / theirs[key] for key in seconds} for own, theirs in pairs]
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in taken.items()
    }


def test_load(request: pytest.FixtureRequest) -> None:
    results = {}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), B32)
        for source in SOURCES:
            results[source] = medians = compare(Path(name), source, ROUNDS)
            for who, row in medians.items():
                cells = "   ".join(f"{key} {value:.3g}" for key, value in row.items())
                print(f"\n{source:12} {who:12}   {cells}", end="")
    record = {"rounds": ROUNDS, "results": results, "machine": machine()}
    records.write(request.config.getoption("--bench-out") / "load.json", record)
