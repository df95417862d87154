"""Predicts time and cost of the four jobs on a cluster: `python bench/cluster.py --clips 1e8`.

A job takes, besides a fixed part, the longest of three times:

    processor   clips × processor seconds per clip / (cores × EFFICIENCY)
    GPU         clips / (clips per second of a GPU × GPUs), for the jobs with a model
    storage     clips × (bytes read + bytes written) / bandwidth of the shared storage

`python bench/cluster.py --measure` measures processor seconds and bytes per clip on this machine
with one worker, on real H.264 clips of two kinds. It then predicts two other runs of each job, and
measures them: two Ray workers on another number of clips, and local processes on all cores on a
mix of both kinds. Writes bench/results/cluster.json, and exits with an error if a prediction is off
by more than TOLERANCE. Models have random weights; rates of GPUs are assumed, see GPU. The tables
in docs/cluster.md are written by `python bench/report.py --pages`.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
import torch
from tables import markdown_table

RESULT = records.BENCH / "results" / "cluster.json"
CLIPS = records.BENCH.parent / ".cache" / "test-clips"  # `make test` fetches the clips
KINDS = {"small": "bikes.mp4", "large": "bigbuckbunny.mp4"}
JOBS = ("verify", "shard", "caption", "embed")
# Clips of the two calibrating runs of a job, and of the runs that are predicted.
FEW = {"verify": (20, 100), "shard": (4, 16), "caption": (2, 6), "embed": (4, 24)}
MANY = {"verify": 400, "shard": 40, "caption": 16, "embed": 60}
TOLERANCE = 0.25
EFFICIENCY = 0.9  # of many workers: the end of a run, and stragglers. Assumed.
# Clips per second of one data-center GPU in bf16. Assumed, not measured.
GPU = {"embed": 1000.0, "caption": 100.0}
CAPTION_LENGTH = 20
LEAST_WRITTEN = {"embed": 1024.0, "caption": 100.0}  # bytes per clip: a vector; a sentence


# --- the model ------------------------------------------------------------------------------------


def predict(
    clips: float,
    seconds: float,
    moved: float,
    cores: float,
    bandwidth: float,
    gpu_rate: float = 0.0,
    gpus: int = 0,
    efficiency: float = EFFICIENCY,
) -> dict[str, float]:
    """Return the seconds of each resource that a job needs; the longest is the job's time.

    seconds: of one core, per clip. moved: bytes per clip. bandwidth: bytes per second. gpu_rate:
    clips per second of one GPU, which then does what the model computes.
    """
    times = {
        "processor": clips * seconds / (cores * efficiency),
        "storage": clips * moved / bandwidth,
    }
    if gpu_rate and gpus:
        times["GPU"] = clips / (gpu_rate * gpus)
    return times


def documented() -> str:
    """Return the tables of docs/cluster.md: predictions and measured runs, and the four jobs."""
    record = json.loads(RESULT.read_text())
    check = markdown_table(
        ["run", "predicted", "measured", "predicted / measured"],
        [
            (
                case,
                f"{row['predicted']:.1f} s",
                f"{row['measured']:.1f} s",
                f"{row['predicted'] / row['measured']:.2f}",
            )
            for case, row in record["check"].items()
        ],
    )
    machine = record["machine"]
    return (
        f"Measured on {machine['cores']} cores of {machine['cpu']} ({machine['capability']}), "
        f"{machine['date']}:\n\n{check}\n\n"
        f"What the command above prints:\n\n{table(record, parser().parse_args([]))}"
    )


def table(record: dict[str, Any], given: argparse.Namespace) -> str:
    """Return what the four jobs take, as a table."""
    rows = []
    for job in JOBS:
        measured = record["calibration"][given.kind][job]
        with_gpu = job in GPU and given.gpus > 0
        seconds = measured["reading_seconds" if with_gpu else "seconds"]
        moved = measured["bytes_read"] + measured["bytes_written"]
        rate = getattr(given, f"gpu_{job}", 0.0) if with_gpu else 0.0
        cores, bandwidth = given.cores, given.bandwidth * 1e9
        times = predict(given.clips, seconds, moved, cores, bandwidth, rate, given.gpus)
        bottleneck = max(times, key=lambda name: times[name])
        hours = times[bottleneck] / 3600 + given.fixed / 60
        price = given.price_core * cores + given.price_gpu * given.gpus * with_gpu
        written = given.clips * measured["bytes_written"]
        rows.append(
            (
                job,
                f"{hours:,.1f} h",
                bottleneck,
                f"{hours * price:,.0f}",
                f"{given.clips * measured['bytes_read'] / 1e12:,.2f} TB",
                f"{written / 1e12:,.2f} TB",
            )
        )
    return markdown_table(["job", "time", "limited by", "cost", "read", "written"], rows)


# --- measuring ------------------------------------------------------------------------------------


class Bench:
    """The clips and models that are measured, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0
        self.model, self.captioner = folder / "model", folder / "captioner"
        _save_models(self.model, self.captioner)

    def clips(self, kinds: dict[str, int]) -> Path:
        """Write files of these numbers, each of its own content, and their annotations."""
        self.runs += 1
        folder = self.folder / f"clips-{self.runs}"
        folder.mkdir()
        lines = []
        for kind, count in kinds.items():
            source = next(CLIPS.rglob(KINDS[kind])).read_bytes()
            for number in range(count):
                name = f"{kind}-{number}.mp4"
                # A "free" box of its own: else the index would take the files for copies.
                box = b"\0\0\0\x10free" + f"{self.runs:04d}{number:04d}".encode()
                (folder / name).write_bytes(source + box)
                lines.append(json.dumps({"video": name, "text": "a clip"}) + "\n")
        path = folder / "clips.jsonl"
        path.write_text("".join(lines))
        return path

    def run(self, job: str, clips: Path, workers: int | None, on: str) -> Path:
        """Do a job on clips; return what it has written."""
        self.runs += 1
        out = self.folder / f"out-{self.runs}"
        options: dict[str, Any] = {"num_workers": workers, "on": on}
        if job == "verify":
            from clipvip.data.shards import verify_files

            out = out.with_suffix(".jsonl")
            verify_files(clips, out, **options)
        elif job == "shard":
            from clipvip.data.shards import write_shards

            write_shards(clips, out, clips_per_shard=4, size=256, **options)
        elif job == "caption":
            from clipvip.captions import Asking, caption

            out = out.with_suffix(".jsonl")
            asking = Asking(length=CAPTION_LENGTH)
            caption(str(self.captioner), clips, out, asking=asking, batch_size=2, **options)
        else:
            from clipvip.index.build import build

            build(out, self.model, sorted(clips.parent.glob("*.mp4")), **options)
        return out


def _save_models(model: Path, captioner: Path) -> None:
    """Save a ViT-B/32 and a BLIP of the usual size, with random weights."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipProcessor,
        CLIPTokenizer,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())  # no text is read, but a model has a tokenizer
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    text = {"vocab_size": len(words), "bos_token_id": len(words) - 2}
    text |= {"eos_token_id": len(words) - 1}
    vision = {"patch_size": 32}
    config = CLIPViPConfig(text_config=text, vision_config=vision, projection_dim=512)
    CLIPViPModel(config).save_pretrained(model)
    CLIPViPProcessor(tokenizer).save_pretrained(model)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = [*special, *(f"w{number}" for number in range(30_524 - len(special)))]
    BlipForConditionalGeneration(BlipConfig()).save_pretrained(captioner)
    images = BlipImageProcessorPil(size={"height": 384, "width": 384})
    tokens = BertTokenizer(vocab={word: number for number, word in enumerate(known)})
    BlipProcessor(images, tokens).save_pretrained(captioner)


def reading_seconds(job: str, bench: Bench, clips: Path) -> float:
    """Seconds of one core that it takes to read a clip for the model of a job."""
    from clipvip.captions import Asking, Captioner
    from clipvip.captions.work import Reader, given_of
    from clipvip.data.annotations import load_annotations
    from clipvip.data.loading import Division, PartReader, moment_batches
    from clipvip.model import CLIPViPProcessor

    found = load_annotations(clips)
    if job == "embed":
        reading = CLIPViPProcessor.from_pretrained(bench.model).loading()
        reading.pop("text_length")
        files = [(clip.video, None) for clip in found]
        reader = PartReader(files, Division(10.0, 5.0, False), **reading)
        read: Callable[[], Any] = lambda: [*moment_batches(reader, range(len(files)), [], 16, 0)]  # noqa: E731
    else:
        captioner = Captioner(str(bench.captioner), Asking(length=CAPTION_LENGTH), "cpu")
        given = [given_of(place, clip) for place, clip in enumerate(found)]
        read = lambda: Reader(captioner.prepare, 1)(given)  # noqa: E731
    read()
    return timed(read)[2] / len(found)


def timed(work: Callable[..., Any], *given: Any) -> tuple[Any, float, float]:
    """Call `work`. Return its result, the seconds that it takes, and the processor's seconds in
    this process and in those that it started and ended."""
    started, busy = time.perf_counter(), sum(os.times()[:4])
    result = work(*given)
    gc.collect()  # ends workers
    return result, time.perf_counter() - started, sum(os.times()[:4]) - busy


def calibrate(bench: Bench, job: str, kind: str) -> dict[str, float]:
    """Measure what a clip takes of one core, by two runs of one worker each."""
    few, some = FEW[job]
    bench.run(job, bench.clips({kind: 1}), 1, "local")  # imports, and reads the model
    found = []
    for count in (few, some):
        clips = bench.clips({kind: count})
        out, wall, busy = timed(bench.run, job, clips, 1, "local")
        found.append((wall, busy, _bytes(out)))
    (_, busy_few, out_few), (wall, busy, out) = found
    seconds = (busy - busy_few) / (some - few)
    size = next(clips.parent.glob("*.mp4")).stat().st_size
    written = 0.0 if job == "verify" else (out - out_few) / (some - few)
    result = {"seconds": seconds, "fixed": max(busy - some * seconds, 0.0), "wall": wall}
    result |= {"bytes_read": size, "bytes_written": max(written, LEAST_WRITTEN.get(job, 0))}
    if job in GPU:
        result["reading_seconds"] = reading_seconds(job, bench, clips)
    return result


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)


def held_against(bench: Bench, calibration: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Predict two runs of each job, measure them, and return both, in seconds."""
    check = {}
    cores = len(os.sched_getaffinity(0))
    for job in JOBS:
        few, _ = FEW[job]
        many = MANY[job]
        small, large = (calibration[kind][job]["seconds"] for kind in ("small", "large"))
        # The start of Ray and its workers is the fixed part, as a run of a few clips shows.
        _, start, _ = timed(bench.run, job, bench.clips({"small": few}), 2, "ray")
        fixed = start - few * small / min(cores, 2)
        _, wall, _ = timed(bench.run, job, bench.clips({"small": many}), 2, "ray")
        predicted = fixed + max(predict(many, small, 0, min(cores, 2), 1, efficiency=1.0).values())
        check[f"{job}, two Ray workers, {many} clips"] = {
            "predicted": predicted, "measured": wall, "fixed": fixed,
        }  # fmt: skip
        mix = {"small": many, "large": many // 2}
        torch.set_num_threads(cores)
        _, wall, _ = timed(bench.run, job, bench.clips(mix), None, "local")
        torch.set_num_threads(1)
        fixed = calibration["small"][job]["fixed"]
        predicted = fixed + (mix["small"] * small + mix["large"] * large) / cores
        check[f"{job}, all cores, {sum(mix.values())} clips of two kinds"] = {
            "predicted": predicted, "measured": wall, "fixed": fixed,
        }  # fmt: skip
    return check


def misses(check: dict[str, dict[str, float]]) -> list[str]:
    """Return one line per prediction that is off by more than TOLERANCE."""
    return [
        f"{case}: {row['predicted']:.1f} s predicted, {row['measured']:.1f} s measured"
        for case, row in check.items()
        if abs(row["predicted"] - row["measured"]) > TOLERANCE * row["measured"]
    ]


def measure(out: Path) -> None:
    """Calibrate, hold predictions against measured runs, and write the record."""
    from machine import machine

    torch.set_num_threads(1)
    os.environ["RAY_ADDRESS"] = "local"  # no cluster that happens to be there
    os.environ["XDG_CACHE_HOME"] = tempfile.gettempdir()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        calibration = {kind: {job: calibrate(bench, job, kind) for job in JOBS} for kind in KINDS}
        for kind, jobs in calibration.items():
            for job, row in jobs.items():
                print(kind, job, {name: round(value, 4) for name, value in row.items()})
        check = held_against(bench, calibration)
    for case, row in check.items():
        print(f"{case}: " + ", ".join(f"{name} {value:.1f} s" for name, value in row.items()))
    found = misses(check)
    record = {"calibration": calibration, "check": check, "misses": found, "machine": machine()}
    records.write(out, record)
    if found:
        sys.exit("; ".join(found))


def parser() -> argparse.ArgumentParser:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure on this machine first")
    parser.add_argument("--record", type=Path, default=RESULT, help="record to write or read")
    parser.add_argument("--clips", type=float, default=1e8)
    parser.add_argument("--kind", choices=[*KINDS], default="small", help="kind of clips")
    parser.add_argument("--cores", type=float, default=1000)
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--bandwidth", type=float, default=10.0, help="of the storage, in GB/s")
    parser.add_argument(
        "--fixed", type=float, default=10.0, help="minutes that a job takes to start"
    )
    parser.add_argument("--price-core", type=float, default=0.04, help="per core and hour")
    parser.add_argument("--price-gpu", type=float, default=2.5, help="per GPU and hour")
    for job, rate in GPU.items():
        text = f"clips per second of a GPU in {job}; assumed {rate:g}"
        parser.add_argument(f"--gpu-{job}", type=float, default=rate, help=text)
    return parser


def main() -> None:
    """Print the table, after measuring if asked to."""
    given = parser().parse_args()
    if given.measure:
        measure(given.record)
    if not given.record.exists():
        sys.exit(f"{given.record} does not exist; run: python bench/cluster.py --measure")
    print(table(json.loads(given.record.read_text()), given))


if __name__ == "__main__":
    main()
