"""Cost of embedding a long film: `pytest bench/bench_index.py -s`.

A film of four minutes (Big Buck Bunny's test clip in a loop, H.264, 1280 × 720) is divided into
windows of 10 s, one every 5 s, and embedded by a ViT-B/32 with random weights. The windows are read
together by embed_files, and one by one as clips by embed_clips; both give the same features. The
two take turns, with and without the model, on all cores. Prints medians of seconds, and of seconds
of processor time, which other work on the machine changes less, and writes index.json to
--bench-out, by default bench/results. "hours per hour" is the length of video embedded in an hour.
"""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import records
import torch
from machine import machine
from transformers import CLIPTokenizer

from clipvip.data.annotations import Clip
from clipvip.data.loading import Division, PartReader, moment_batches, worker_count
from clipvip.embedding import autocast, embed_clips, embed_files, precision_on, read_clips
from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

CACHE = Path(__file__).parent.parent / ".cache" / "test-clips"  # `make test` fetches the clips
ROUNDS = 2
MINUTES = 4
WINDOW, STRIDE = 10.0, 5.0
BATCH = 16
B32: dict[str, Any] = {"vision_config": {"patch_size": 32}, "projection_dim": 512}


def film(source: Path, out: Path, minutes: float) -> None:
    """Write the packets of a clip, again and again, into an MP4 of this length."""
    with av.open(str(source)) as clip:
        stream = clip.streams.video[0]
        packets = [packet for packet in clip.demux(stream) if packet.size]
        assert stream.time_base is not None and stream.average_rate is not None
        length = round(len(packets) / stream.average_rate / stream.time_base)
        times = [(packet.pts, packet.dts) for packet in packets]
        with av.open(str(out), "w") as film:
            copy = film.add_stream_from_template(stream)
            for loop in range(max(round(minutes * 60 / float(length * stream.time_base)), 1)):
                for packet, (pts, dts) in zip(packets, times, strict=True):
                    assert pts is not None and dts is not None
                    packet.pts, packet.dts = pts + loop * length, dts + loop * length
                    packet.time_base, packet.stream = stream.time_base, copy
                    film.mux(packet)


def contestants(
    model: CLIPViPModel, processor: CLIPViPProcessor, path: Path, workers: int
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return what is timed, and the length of the film in seconds."""
    options = {"batch_size": BATCH, "num_workers": workers, "decoder": "pyav"}
    divided = {"window": WINDOW, "stride": STRIDE, "scenes": False}
    reading = {name: value for name, value in processor.loading().items() if name != "text_length"}
    reader = PartReader([(path, None)], Division(**divided), **reading)
    found = [*moment_batches(reader, [0], [], BATCH, workers)]
    clips = [Clip(path, *span) for batch in found for _, span in batch.moments]
    seconds = found[-1].done[-1].duration

    def read_together() -> int:
        batches = moment_batches(reader, [0], [], BATCH, workers)
        return sum(len(batch.pixel_values) for batch in batches)

    def read_one_by_one() -> int:
        return sum(
            len(frames) for _, frames, _ in read_clips(model, processor, clips, [], **options)
        )

    def together() -> torch.Tensor:
        with autocast(model, "auto"):
            (file,) = embed_files(model, processor, [(path, None)], [], **divided, **options)
        return file.vectors

    def one_by_one() -> torch.Tensor:
        with autocast(model, "auto"):
            rows = [*embed_clips(model, processor, clips, [], **options)]
        return torch.stack([row for each in rows for row in each.values()])

    return {
        "read together": read_together,
        "read one by one": read_one_by_one,
        "embed together": together,
        "embed one by one": one_by_one,
    }, seconds


def compare(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Check that both ways give the same, and return medians of each."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            started, busy = time.perf_counter(), sum(os.times()[:4])
            results[name] = run()
            gc.collect()  # ends the workers, whose processor time then counts
            taken[name].append((time.perf_counter() - started, sum(os.times()[:4]) - busy))
    assert results["read together"] == results["read one by one"]
    torch.testing.assert_close(
        results["embed together"], results["embed one by one"], atol=1e-2, rtol=0
    )
    names = ("seconds", "processor_seconds")
    return {
        name: dict(zip(names, map(statistics.median, zip(*rows, strict=True)), strict=True))
        for name, rows in taken.items()
    }


def test_index(request: pytest.FixtureRequest) -> None:
    folder = Path(os.environ.get("CLIPVIP_TEST_CLIPS", CACHE))
    source = next(iter(sorted(folder.rglob("bigbuckbunny.mp4"))), None)
    if source is None:
        pytest.skip(f"no bigbuckbunny.mp4 in {folder}: `make test` fetches it")
    torch.manual_seed(0)
    model = CLIPViPModel(CLIPViPConfig(**B32)).eval()
    ends = {"<|startoftext|>": 0, "<|endoftext|>": 1}  # no text is read
    processor = CLIPViPProcessor(CLIPTokenizer(vocab=ends, merges=[], model_max_length=77))
    processor.image_size = model.config.vision_config.image_size
    workers = worker_count(None, BATCH)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "film.mp4"
        film(source, path, MINUTES)
        runs, seconds = contestants(model, processor, path, workers)
        results = compare(runs, ROUNDS)
    for name, row in results.items():
        row["hours_per_hour"] = seconds / row["seconds"]
        cells = "   ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"\n{name:18} {cells}", end="")
    record = {
        "rounds": ROUNDS,
        "film_seconds": seconds,
        "window": WINDOW,
        "stride": STRIDE,
        "precision": precision_on(model, "auto"),
        "workers": workers,
        "results": results,
        "machine": machine(),
    }
    records.write(request.config.getoption("--bench-out") / "index.json", record)
