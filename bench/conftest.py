"""Runs the suites: options, order of cases, and how one case is measured and saved.

`clipvip bench` calls pytest on this folder; `pytest bench/` does the same. A module of a suite has

    CASES     case → arguments of `measure`; device "cuda" marks a case for a GPU
    QUICK     case → arguments that --bench-quick changes; it leaves out all other cases
    measure   measures one case in this process; `budget` is the number of seconds to time for

A case has the same name in CASES and in its record, where in the suite "ops" the name of the
operation stands before it.
"""

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cases
import records
import tables
from records import Record

SUITE_OF = {name: suite for suite, each in records.SUITES.items() for name in each.modules}
LEAST_SECONDS = 15.0  # with less time left no case starts; the report takes a few seconds
BUDGETS = {"cpu": 8.0, "cuda": 1.5}  # seconds to time for


class Run:
    """One run of the suites: its options and its results so far."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.out: Path = option.bench_out
        self.device: str = option.bench_device
        self.quick: bool = option.bench_quick
        self.profile: str | None = option.bench_profile
        self.deadline: float | None = option.bench_deadline
        self.facts: dict[str, Any] = {}  # of the machine
        self.records: list[Record] = []  # of the cases of this run
        self.not_reached: list[str] = []
        self.earlier: dict[str, Record] = {}
        self.elsewhere: set[str] = set()  # titles of earlier records that `out` does not hold
        for store in option.bench_resume:
            for _, record in records.stored(store):
                if not records.is_record(record):
                    continue
                title = f"{record['suite']} {record['case']}"
                if records.failure(record) is None or title not in self.earlier:
                    self.earlier[title] = record
                    (self.elsewhere.discard if store == self.out else self.elsewhere.add)(title)

    def begin(self) -> None:
        """Measure the rates that the machine reaches, in a process of its own, and copy earlier
        records that still hold."""
        limit = None if self.deadline is None else max(self.deadline - time.monotonic(), 1.0)
        limit = min(limit or 120.0, 120.0)
        self.facts = cases.run("machine", "facts", {"device": self.device}, limit=limit)
        if "ceilings" not in self.facts:
            reason = self.facts["left_out"][cases.SETUP]
            print(f"rates of this machine are unknown, since measuring them failed: {reason}")
            self.facts = {}
        if self.earlier and self.facts.get("commit", "") == "":
            print(
                "no earlier record is used, since the commit is unknown; set CLIPVIP_COMMIT where "
                "git is absent"
            )
        for title in sorted(self.elsewhere):
            if records.is_measured(self.earlier[title], self.facts):
                records.save(self.out, self.earlier[title])

    def measured(self, title: str, params: dict[str, Any]) -> Record | None:
        """Return an earlier record that still holds for a case, or None."""
        record = self.earlier.get(title)
        if record and record["params"] == params and records.is_measured(record, self.facts):
            return record
        return None

    def seconds_left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def trace(self, title: str) -> Path:
        return records.folder_of(self.out) / "traces" / title.replace(" ", "-")


RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clipvip")
    group.addoption(
        "--bench-device", choices=("cpu", "cuda"), default="cpu", help="device of the cases to run"
    )
    group.addoption(
        "--bench-quick", action="store_true", help="run few small cases with few rounds"
    )
    group.addoption(
        "--bench-only", default="", help="run cases whose 'SUITE CASE' matches this regex"
    )
    group.addoption("--bench-deadline", type=float, help="when to end, in time.monotonic()")
    group.addoption(
        "--bench-resume", type=Path, action="append", default=[], help="a store of earlier records"
    )
    group.addoption(
        "--bench-out",
        type=Path,
        default=records.RESULTS,
        help="a folder or a file .jsonl for the records (%(default)s)",
    )
    group.addoption(
        "--bench-profile",
        metavar="CONTESTANT",
        help="also write torch.profiler traces of a contestant, or of all, to traces/ beside the "
        "records",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CLIPVIP_BENCH_PARENT") == str(os.getppid()):  # end with that process
        ctypes.CDLL(None).prctl(cases.PR_SET_PDEATHSIG, signal.SIGTERM)
    config.stash[RUN] = Run(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select and sort the cases: the most important first, those that failed before last.

    A case that failed may take its whole time limit again.
    """
    run, wanted = config.stash[RUN], re.compile(config.option.bench_only)
    titles = {item: _title(item) for item in items}

    def is_kept(item: pytest.Item) -> bool:
        module, case = item.module, _id(item)
        if run.quick and case not in getattr(module, "QUICK", ()):
            return False
        cuda = bool(case) and records.on_gpu({"params": module.CASES[case]})
        return cuda == (run.device == "cuda") and bool(wanted.search(titles[item]))

    def rank(item: pytest.Item) -> tuple[bool, int]:
        title, first = titles[item], records.IMPORTANT
        earlier = run.earlier.get(title)
        failed = earlier is not None and records.failure(earlier) is not None
        return failed, first.index(title) if title in first else len(first)

    kept = [item for item in items if is_kept(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(kept, key=rank)


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(_id(item) for item in session.items):
        session.config.stash[RUN].begin()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if run.not_reached:
        names = ", ".join(run.not_reached)
        terminalreporter.write_line(f"\nnot reached in time: {len(run.not_reached)} cases: {names}")


def _id(item: pytest.Item) -> str:
    return item.callspec.id if hasattr(item, "callspec") else ""


def _title(item: pytest.Item) -> str:
    return " ".join(_name(item.module.__name__, _id(item)))


def _name(module: str, case: str) -> tuple[str, str]:
    """Return suite and case as they stand in a record."""
    module = module.rpartition(".")[2]
    suite = SUITE_OF.get(module, "")
    several = suite in records.SUITES and len(records.SUITES[suite].modules) > 1
    return suite, f"{module.removeprefix('bench_')}-{case}" if several else case


@pytest.fixture
def run_case(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Record]:
    """Return a function that measures the test's case, saves its record and prints all tables.

    run_case(params, limits=1) calls `measure(**params, budget=…)` of the test's module in a process
    of its own, with a tuned malloc if the case's name ends in "-tuned". `limits` multiplies the
    usual time limit of a case. The record holds the results of that process, even if it ended too
    soon. The test fails if ours has no figures, and is skipped if the run's time is up.
    """
    run = request.config.stash[RUN]
    module = request.module.__name__.rpartition(".")[2]
    suite, case = _name(module, request.node.callspec.id)
    title = f"{suite} {case}"
    position = request.session.items.index(request.node) + 1
    limit = cases.LIMITS[run.device]
    malloc = "tuned" if case.endswith("-tuned") else "default"

    def new(params: dict[str, Any], limits: int) -> Record:
        arguments = params | {"budget": 1.0 if run.quick else BUDGETS[run.device]}
        found = benchmark.pedantic(
            cases.run,
            args=(module, "measure", arguments),
            kwargs={
                "malloc": malloc,
                "limit": limit and limit * limits,
                "deadline": run.deadline and run.deadline - LEAST_SECONDS / 2,
                "profile": run.profile,
                "trace": run.trace(title),
            },
        )
        machine = run.facts | {"malloc": malloc} | found.get("machine", {})
        record = {"suite": suite, "case": case, "params": params, **found, "machine": machine}
        records.save(run.out, record)
        return record

    def measure(params: dict[str, Any], limits: int = 1) -> Record:
        params = params | (request.module.QUICK[request.node.callspec.id] if run.quick else {})
        print(f"\n{position}/{len(request.session.items)} {title}", flush=True)
        record = run.measured(title, params)
        try:
            if record:
                print("measured before", flush=True)
            elif run.seconds_left() < LEAST_SECONDS:
                raise cases.OutOfTime
            else:
                record = new(params, limits)
        except cases.OutOfTime:
            run.not_reached.append(title)
            pytest.skip("the run's time is up")
        benchmark.extra_info.update(record)
        run.records.append(record)
        if run.profile not in (None, "all", *record["results"], *record["left_out"]):
            print(f"no trace: {title} has no contestant {run.profile!r}")
        print(f"{tables.contestants(record)}\n\n{tables.summary(run.records)}", flush=True)
        if reason := records.failure(record):
            pytest.fail(f"{title}: {reason}", pytrace=False)
        return record

    return measure
