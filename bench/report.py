"""Markdown table of bench/results: `python bench/report.py`.

One row a result file. "ratio" is the median over rounds of our time over the eager form's.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
EAGER = ("eager", "naive")


def row(record: dict[str, Any]) -> list[str]:
    """The cells of one result: the eager form, the best other one, and ours."""
    results = record["results"]
    eager = next(name for name in EAGER if name in results)
    peers = [name for name in results if name not in (eager, "ours")]
    best = min(peers, key=lambda name: results[name]["median_ms"], default=None)
    ours = results["ours"]
    peer = f"{results[best]['median_ms']:.1f} ({best})" if best else "–"
    return [
        record["case"],
        record["machine"]["malloc"],
        f"{results[eager]['median_ms']:.1f}",
        peer,
        f"**{ours['median_ms']:.1f}**",
        f"{ours['ratio']:.2f}",
        f"{results[eager]['peak_mib']:.0f}",
        f"{ours['peak_mib']:.0f}",
    ]


def main() -> None:
    """Prints the table and the machines that the figures come from."""
    files = sorted(RESULTS.glob("ops-*.json"))
    records = [json.loads(path.read_text()) for path in files]
    heads = ["case", "malloc", "eager ms", "best other ms", "ours ms", "ratio", "eager MiB", "MiB"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for record in records:
        print(f"| {' | '.join(row(record))} |")
    keys = ("cpu", "cores", "capability", "torch", "commit", "date")
    for machine in sorted({tuple(record["machine"][key] for key in keys) for record in records}):
        cpu, cores, capability, torch, commit, date = machine
        print(f"\n{cpu}, {cores} cores, {capability}, torch {torch}, commit {commit}, {date}.")


if __name__ == "__main__":
    main()
