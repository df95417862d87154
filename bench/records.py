"""Benchmark records: how they are stored, and the figures that follow from them.

A record is a dictionary:

    suite, case   the name; a case of the operations starts with the operation's name
    params        arguments of the suite's `measure`; device is "cuda" for what ran on a GPU
    work          the least operations ("flop") and bytes that the task needs; either may be absent
    machine       what it ran on, with the ceilings measured in the same run
    results       figures per contestant
    left_out      contestants without figures, with the reason
    cut           there and true where time was up before all contestants had been tried

A store of records is a folder with a file SUITE-CASE.json per record, or one file NAME.jsonl with a
record per line, in which the last line of a case counts.
"""

import collections
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SUITES = {
    "ops": "Operations",
    "model": "Vision model",
    "train": "Training step",
    "decode": "Decoding",
    "growth": "Growth",
}
BASELINES, OURS = ("eager", "naive"), "ours"
GIB = 2**30
# An H100's rates as its users measure them: a yardstick that stays the same in every run.
H100 = {"matmul_bf16_gflops": 800e3, "copy_gib_s": 3.0e12 / GIB}

Record = dict[str, Any]


# --- storing -------------------------------------------------------------------------------------


def replace(path: Path, text: str) -> None:
    """Writes text whole, or leaves the file as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(value, indent=1) + "\n")


def is_file(store: Path) -> bool:
    """Whether a store is a file with a record per line, not a folder."""
    return store.suffix == ".jsonl"


def folder_of(store: Path) -> Path:
    """Where what belongs to a store's records lies: the report, traces."""
    return store.parent if is_file(store) else store


def save(store: Path, record: Record) -> None:
    """Adds a record to a store, in place of an earlier one of the same case."""
    order = ("suite", "case", "params", "work", "machine", "left_out", "results")
    record = {key: record[key] for key in order if key in record} | record
    if is_file(store):
        _append(store, json.dumps(record))
    else:
        write(store / f"{record['suite']}-{record['case']}.json", record)


def _append(path: Path, line: str) -> None:
    """One line at the end, in place of what a killed process left of another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def stored(path: Path) -> Iterator[tuple[str, Any]]:
    """Every JSON value of a store, or of one of its files, with the place it was found at.

    ValueError: `path` is neither, or something in it is not JSON.
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
    """The records of a store in the order they are shown, and the names of its other files.

    ValueError: there are none, or something is not JSON.
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
    """Whether there is no need to measure this case again: all of it was measured by the same code,
    known by its commit, on such a machine."""
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
    """Why ours has no figures, in a sweep at some value; None if it has."""
    if is_sweep(record) and not record.get("points"):
        return next(iter(record.get("left_out", {}).values()), "no value was measured")
    for point in record.get("points", [record]):
        results, left_out = point["results"], point.get("left_out", {})
        # A variant may stand for ours where ours itself does not take part, as in decoding.
        if OURS not in results and (OURS in left_out or not any(map(is_ours, results))):
            reasons = (why for each, why in left_out.items() if is_ours(each))
            return next(reasons, "ours was not tried")
    return None


# --- what a record says ---------------------------------------------------------------------------


def natural(text: str) -> list:
    """A key that sorts 2 before 16."""
    return [(0, int(x), "") if x.isdigit() else (1, 0, x) for x in re.split(r"(\d+)", text)]


def malloc(record: Record) -> str:
    return record["machine"].get("malloc", "default")


def on_gpu(record: Record) -> bool:
    return bool({"cuda", "gpu"} & {str(each) for each in record.get("params", {}).values()})


def group(record: Record) -> str:
    """What a record stands under: its op in the suite of the ops, otherwise its suite; those of a
    GPU apart."""
    return _subject(record) + (", GPU" if on_gpu(record) else "")


def _subject(record: Record) -> str:
    return record["case"].split("-")[0] if record["suite"] == "ops" else record["suite"]


def name(record: Record) -> str:
    """The case within its group."""
    case = record["case"].removeprefix(f"{_subject(record)}-")
    return case.removesuffix("-default").removesuffix("-cuda")


def is_sweep(record: Record) -> bool:
    return "points" in record or record.get("suite") == "growth"


def is_rate(record: Record) -> bool:
    """Whether clips a second are what is compared."""
    return record["suite"] == "decode"


def baseline(results: dict[str, dict]) -> str | None:
    return next((each for each in BASELINES if each in results), None)


def is_ours(contestant: str) -> bool:
    """ "ours", or a variant such as "ours by DALI"."""
    return contestant.split(" ")[0] == OURS


def best_peer(results: dict[str, dict]) -> str | None:
    """Who is quickest of all but the baseline and ours."""
    peers = [each for each in results if each not in BASELINES and not is_ours(each)]
    return min(peers, key=lambda each: results[each]["median_ms"], default=None)


def time_ratio(result: dict, eager: dict | None) -> float | None:
    """The median over rounds of the time over eager's; the ratio of medians where rounds were not
    kept."""
    if result.get("ratio") is not None or eager is None:
        return result.get("ratio")
    return result["median_ms"] / eager["median_ms"]


def memory_ratio(result: dict, eager: dict | None) -> float | None:
    """None where either took too little to be seen."""
    figures = (result.get("peak_mib"), eager.get("peak_mib") if eager else None)
    return figures[0] / figures[1] if all(figures) else None


def floors(record: Record, ceilings: dict[str, float] | None = None) -> dict[str, float]:
    """The least milliseconds that the work takes: its operations at the rate of a large matrix
    product ("product"), its bytes at that of a large copy ("copy").

    ceilings: the rates; by default those that the record's machine reached. What the record or the
    rates do not say is absent.
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
    """The rates that a contestant reached, as shares of those that its machine can reach."""
    return {what: ms / result["median_ms"] for what, ms in floors(record).items()}


def clips_per_second(record: Record, result: dict[str, float]) -> float | None:
    """Clips per second of a model or a training step; None for other suites."""
    if record["suite"] not in ("model", "train") or "videos" not in record.get("params", {}):
        return None
    return 1e3 * record["params"]["videos"] / result["median_ms"]


class Fit(NamedTuple):
    """figure ≈ factor · value ^ exponent, over the larger half of the values."""

    exponent: float
    factor: float
    first: float  # the least value that was fitted


def fit(values: Sequence[float], figures: Sequence[float]) -> Fit | None:
    """Fit logarithms by least squares; None where fewer than two figures are above zero."""
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
    """For each contestant of a sweep, the values it was timed at, and its figures."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for point in record["points"]:
        for each, result in point["results"].items():
            values, figures = found.setdefault(each, ([], []))
            values.append(point["value"])
            figures.append(result[figure])
    return found


def exponents(record: Record) -> dict[str, dict[str, float | None]]:
    """How time and memory of each contestant of a sweep grow."""
    found: dict[str, dict[str, float | None]] = collections.defaultdict(dict)
    for kind, figure in (("time", "median_ms"), ("memory", "peak_mib")):
        for each, line in series(record, figure).items():
            fitted = fit(*line)
            found[each][kind] = fitted.exponent if fitted else None
    return dict(found)
