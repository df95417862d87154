"""What the suites share: options, and a case that is measured in a process of its own and saved.

`clipvip bench` drives them; `pytest bench/` runs the same.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import harness

SUITE_OF = {module: suite for suite, modules in harness.SUITES.items() for module in modules}
RECORDS = pytest.StashKey[list[dict[str, Any]]]()  # of this session


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clipvip")
    group.addoption("--bench-quick", action="store_true", help="few small cases, few rounds")
    group.addoption(
        "--bench-out",
        type=Path,
        default=harness.BENCH / "results",
        help="where records go (%(default)s)",
    )
    group.addoption(
        "--bench-profile",
        action="store_true",
        help="also write torch.profiler traces of all contestants, to traces/ beside the records",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--bench-quick keeps the cases whose ids a module lists in QUICK."""
    if config.getoption("--bench-quick"):
        kept = [item for item in items if _id(item) in getattr(item.module, "QUICK", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if records := config.stash.get(RECORDS, []):
        terminalreporter.write_line(f"\n{harness.summary(records)}\n")


def _id(item: pytest.Item) -> str:
    return item.callspec.id if hasattr(item, "callspec") else ""


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether to leave out what takes long, such as compiling."""
    return request.config.getoption("--bench-quick")


@pytest.fixture
def run_case(
    request: pytest.FixtureRequest, benchmark: Any, quick: bool
) -> Callable[..., dict[str, Any]]:
    """A function that measures the test's case, saves its record and prints a table.

    run_case(params, malloc="default"): calls `measure(**params, budget=…)` of the test's module
    in a process of its own. It returns what harness.compare does, "machine" and perhaps "work";
    budget is for how many seconds to time. A case with device "cuda" in its params is skipped
    without a GPU. The case's name is the test's id, after that of the op in the suite of the ops.
    """
    import torch

    module = request.module.__name__.rpartition(".")[2]
    suite, case = SUITE_OF[module], request.node.callspec.id
    if len(harness.SUITES[suite]) > 1:
        case = f"{module.removeprefix('bench_')}-{case}"
    options = request.config.option
    traces = options.bench_out / "traces"
    position = request.session.items.index(request.node) + 1

    def run(params: dict[str, Any], malloc: str = "default") -> dict[str, Any]:
        if params.get("device") == "cuda" and not torch.cuda.is_available():
            pytest.skip(f"{case}: no CUDA GPU")
        print(f"\n{position}/{len(request.session.items)} {suite} {case}", flush=True)
        harness.record_path(options.bench_out, suite, case).unlink(missing_ok=True)
        measured = benchmark.pedantic(
            harness.in_process,
            args=(malloc, module, "measure"),
            kwargs={
                **params,
                "budget": 1.0 if quick else 8.0,
                "trace": traces / f"{suite}-{case}" if options.bench_profile else None,
            },
        )
        record = {"suite": suite, "case": case, "params": params, **measured}
        record = harness.save(options.bench_out, record)
        benchmark.extra_info.update(record)
        request.config.stash.setdefault(RECORDS, []).append(record)
        print(harness.table(record), flush=True)
        return record

    return run
