"""Benchmark records: the suites' names, how records are stored, and the figures derived from them.

Measuring (harness, cases, suites) and presenting (tables, page, changes) share this module and
nothing else. A record is a dictionary:

    suite, case   its name; in the suite "ops" a case starts with the operation's name
    params        arguments of the suite's `measure`; device is "cuda" for a record of a GPU
    work          least number of operations ("flop") and bytes that the task needs; each optional
    machine       facts of the machine, with the ceilings measured in the same run
    results       figures per contestant
    left_out      reason per contestant without figures
    cut           true if time ran out before all contestants were tried; otherwise absent

A store of records is a folder with one file SUITE-CASE.json per record, or one file NAME.jsonl with
one record per line, where a later line of the same case replaces an earlier one.
"""

import collections
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clipvip.files import write_whole


class Suite(NamedTuple):
    """A suite's title, and the modules that hold its cases."""

    title: str
    modules: tuple[str, ...]


SUITES = {
    "ops": Suite(
        "Operations",
        (
            "bench_proxy_attention",
            "bench_pairwise_logsumexp",
            "bench_linear",
            "bench_elementwise",
            "bench_resize_crop",
        ),
    ),
    "model": Suite("Vision model", ("bench_model",)),
    "train": Suite("Training step", ("bench_train",)),
    "decode": Suite("Decoding", ("bench_decode",)),
    "growth": Suite("Growth", ("bench_growth",)),
}
# Cases that run first, on a GPU or on a CPU; all others follow in the order of their modules.
IMPORTANT = (
    "ops proxy_attention-b16-bf16-batch32-both-cuda",
    "ops proxy_attention-b32-bf16-batch32-both-cuda",
    "ops pairwise_logsumexp-symmetric-bf16-16384-cuda",
    "ops pairwise_logsumexp-symmetric-bf16-65536-cuda",
    "ops proxy_attention-b16-bf16-batch32-forward-cuda",
    "ops proxy_attention-b16-bf16-batch32-backward-cuda",
    "ops proxy_attention-b32-bf16-batch32-forward-cuda",
    "ops proxy_attention-b32-bf16-batch32-backward-cuda",
    "train b16-bf16-batch32-cuda",
    "ops pairwise_logsumexp-vsc_fc-bf16-16384-cuda",
    "ops proxy_attention-b16-bf16-ragged32-both-cuda",
    "ops proxy_attention-l14-bf16-batch32-both-cuda",
    "train b32-bf16-batch32-cuda",
    "model b16-bf16-batch32-forward-cuda",
    "ops proxy_attention-b16-bf16-batch1-both-cuda",
    "ops proxy_attention-b16-bf16-batch128-both-cuda",
    "growth frames-cuda",
    "ops proxy_attention-b16-fp32-both-default",
    "ops proxy_attention-b16-bf16-both-default",
    "ops proxy_attention-b32-fp32-both-default",
    "ops pairwise_logsumexp-symmetric-fp32-16384-default",
    "ops pairwise_logsumexp-vsc_fc-fp32-8192-default",
)
BASELINES, OURS = ("eager", "naive"), "ours"
GIB = 2**30
BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"  # records that are kept
# Rates that users of an H100 measure: a reference that stays the same in every run.
H100 = {"matmul_bf16_gflops": 800e3, "copy_gib_s": 3.0e12 / GIB}

Record = dict[str, Any]


# --- storing -------------------------------------------------------------------------------------


def write(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def is_file(store: Path) -> bool:
    """Return whether a store is a file with one record per line, not a folder."""
    return store.suffix == ".jsonl"


def folder_of(store: Path) -> Path:
    """Return the folder for files that belong to a store's records: the report, traces."""
    return store.parent if is_file(store) else store


def save(store: Path, record: Record) -> None:
    """Add a record to a store; it replaces an earlier one of the same case."""
    order = ("suite", "case", "params", "work", "machine", "left_out", "results")
    record = {key: record[key] for key in order if key in record} | record
    if is_file(store):
        _append(store, json.dumps(record))
    else:
        write(store / f"{record['suite']}-{record['case']}.json", record)


def _append(path: Path, line: str) -> None:
    """Append a line, after removing an incomplete one that a killed process left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def stored(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield every JSON value of a store, or of one of its files, after the place it was found at.

    Raises ValueError if `path` is neither, or if something in it is not JSON.
    """
    if path.is_dir():
        files = sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{path} is neither a record nor a folder of records")
    for file in files:
        text = file.read_text()
        whole = {str(file): text}
        if is_file(file):
            lines = text.split("\n")[:-1]  # the last one is empty, or the start of a line
            whole = {f"{file} line {i}": line for i, line in enumerate(lines, start=1)}
        for place, part in whole.items():
            try:
                yield place, json.loads(part)
            except ValueError as error:
                raise ValueError(
                    f"{place} is not JSON ({error}); delete it or measure again"
                ) from None


def is_record(value: Any) -> bool:
    return isinstance(value, dict) and {"suite", "case", "results", "machine"} <= value.keys()


def read(store: Path) -> tuple[list[Record], list[str]]:
    """Return the records of a store in display order, and the names of its other files.

    Raises ValueError if there are no records, or if something is not JSON.
    """
    found: dict[tuple[str, str, str], Record] = {}
    others = []
    for place, value in stored(store):
        file = place.split(" line ")[0]
        if is_record(value):
            found[file, value["suite"], value["case"]] = value
        else:
            others.append(Path(file).name)
    if not found:
        raise ValueError(f"{store} holds no benchmark records; `clipvip bench` makes some")
    records = list(found.values())
    order = [*SUITES, *sorted({r["suite"] for r in records} - SUITES.keys())]
    records.sort(key=lambda r: (order.index(r["suite"]), natural(r["case"]), malloc(r), on_gpu(r)))
    return records, list(dict.fromkeys(others))


def is_measured(record: Record, machine: dict[str, Any]) -> bool:
    """Return whether a record still holds: the whole case was measured by the same code, identified
    by its commit, on the same kind of machine."""
    commit, then = machine.get("commit"), record["machine"]
    facts = ("commit", "torch", *(("gpu",) if on_gpu(record) else ("cpu", "cores")))
    return (
        failure(record) is None
        and not record.get("cut")
        and bool(commit)
        and not str(commit).endswith("+changes")
        and all(then.get(fact) == machine.get(fact) for fact in facts)
    )


def failure(record: Record) -> str | None:
    """Return why ours has no figures (in a sweep, at any value), or None if it has them."""
    if is_sweep(record) and not record.get("points"):
        return next(iter(record.get("left_out", {}).values()), "no value was measured")
    for point in record.get("points", [record]):
        results, left_out = point["results"], point.get("left_out", {})
        # A variant of ours counts where ours itself does not take part, as in decoding.
        if OURS not in results and (OURS in left_out or not any(map(is_ours, results))):
            reasons = (why for each, why in left_out.items() if is_ours(each))
            return next(reasons, "ours was not tried")
    return None


# --- figures derived from a record ----------------------------------------------------------------


def natural(text: str) -> list:
    """Return a sort key that places 2 before 16."""
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.split(r"(\d+)", text)]


def malloc(record: Record) -> str:
    return record["machine"].get("malloc", "default")


def on_gpu(record: Record) -> bool:
    return bool({"cuda", "gpu"} & {str(each) for each in record.get("params", {}).values()})


def group(record: Record) -> str:
    """Return the heading of a record: its op in the suite "ops", otherwise its suite; records of a
    GPU have headings of their own."""
    return _subject(record) + (", GPU" if on_gpu(record) else "")


def _subject(record: Record) -> str:
    return record["case"].split("-")[0] if record["suite"] == "ops" else record["suite"]


def name(record: Record) -> str:
    """Return the name of a case within its group."""
    case = record["case"].removeprefix(f"{_subject(record)}-")
    return case.removesuffix("-default").removesuffix("-cuda")


def is_sweep(record: Record) -> bool:
    return "points" in record or record.get("suite") == "growth"


def is_rate(record: Record) -> bool:
    """Return whether contestants are compared by clips per second."""
    return record["suite"] == "decode"


def each_way(sizes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a suite's cases: each size on a GPU, or on a CPU with default and with tuned malloc.

    sizes: name → arguments of the suite's `measure`; device "cuda" means the GPU.
    """
    return {
        f"{name}-{way}": size
        for name, size in sizes.items()
        for way in (("cuda",) if size.get("device") == "cuda" else ("default", "tuned"))
    }


def baseline(results: dict[str, dict]) -> str | None:
    return next((each for each in BASELINES if each in results), None)


def is_ours(contestant: str) -> bool:
    """Return whether a contestant is "ours" or a variant such as "ours by DALI"."""
    return contestant.split(" ")[0] == OURS


def best_peer(results: dict[str, dict]) -> str | None:
    """Return the fastest contestant except for the baseline and ours."""
    peers = [each for each in results if each not in BASELINES and not is_ours(each)]
    return min(peers, key=lambda each: results[each]["median_ms"], default=None)


def time_ratio(result: dict, eager: dict | None) -> float | None:
    """Return the median over rounds of the time divided by eager's, or the ratio of medians where
    the rounds are not known."""
    if result.get("ratio") is not None or eager is None:
        return result.get("ratio")
    return result["median_ms"] / eager["median_ms"]


def memory_ratio(result: dict, eager: dict | None) -> float | None:
    """Return peak memory divided by eager's, or None where either is unknown or 0."""
    figures = (result.get("peak_mib"), eager.get("peak_mib") if eager else None)
    return figures[0] / figures[1] if all(figures) else None


def floors(record: Record, ceilings: dict[str, float] | None = None) -> dict[str, float]:
    """Return lower bounds of the time in ms: "product", the work's operations at the rate of a
    large matrix product, and "copy", its bytes at the rate of a large copy.

    ceilings: the rates; by default those that the record's machine reached. A bound is absent if
    the record lacks the work or the rate is unknown.
    """
    rates = record["machine"].get("ceilings", {}) if ceilings is None else ceilings
    work = record.get("work", {})
    low = {str(each) for each in record.get("params", {}).values()} & {"bfloat16", "bf16"}
    found = {}
    rate = rates.get("matmul_bf16_gflops" if low else "matmul_fp32_gflops")
    if rate and "flop" in work:
        found["product"] = work["flop"] / (rate * 1e9) * 1e3
    if rates.get("copy_gib_s") and "bytes" in work:
        found["copy"] = work["bytes"] / (rates["copy_gib_s"] * GIB) * 1e3
    return found


def shares(record: Record, result: dict[str, float]) -> dict[str, float]:
    """Return the rates that a contestant reached, as shares of those that its machine can reach."""
    return {what: ms / result["median_ms"] for what, ms in floors(record).items()}


def clips_per_second(record: Record, result: dict[str, float]) -> float | None:
    """Return clips per second of a model or a training step, or None for other suites."""
    if record["suite"] not in ("model", "train") or "videos" not in record.get("params", {}):
        return None
    return 1e3 * record["params"]["videos"] / result["median_ms"]


class Fit(NamedTuple):
    """A fitted power: figure ≈ factor · value ^ exponent over the larger half of the values."""

    exponent: float
    factor: float
    first: float  # the smallest value of the fit


def fit(values: Sequence[float], figures: Sequence[float]) -> Fit | None:
    """Fit logarithms by least squares. Return None if fewer than two figures are positive."""
    pairs = sorted((v, f) for v, f in zip(values, figures, strict=True) if f > 0)
    pairs = pairs[min(len(pairs) // 2, len(pairs) - 2) :] if len(pairs) > 1 else []
    if not pairs:
        return None
    x, y = ([math.log(each) for each in column] for column in zip(*pairs, strict=True))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    slope /= sum((a - middle_x) ** 2 for a in x)
    return Fit(slope, math.exp(middle_y - slope * middle_x), pairs[0][0])


def series(record: Record, figure: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return, per contestant of a sweep, the values that it was timed at and its figures."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for point in record["points"]:
        for each, result in point["results"].items():
            values, figures = found.setdefault(each, ([], []))
            values.append(point["value"])
            figures.append(result[figure])
    return found


def exponents(record: Record) -> dict[str, dict[str, float | None]]:
    """Return, per contestant of a sweep, the exponents by which time and memory grow."""
    found: dict[str, dict[str, float | None]] = collections.defaultdict(dict)
    for kind, figure in (("time", "median_ms"), ("memory", "peak_mib")):
        for each, line in series(record, figure).items():
            fitted = fit(*line)
            found[each][kind] = fitted.exponent if fitted else None
    return dict(found)
