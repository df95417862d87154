"""Runs the benchmark suites beside this package: bench/ in a checkout, else clipvip_bench/."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = (ROOT / "setup.py").exists()
BENCH = ROOT / ("bench" if CHECKOUT else "clipvip_bench")
NO_CASES = 5  # status of pytest if no case was selected


def run(
    suite: str,
    *,
    device: str = "auto",
    quick: bool = False,
    only: str = "",
    minutes: float | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    profile: str | None = None,
) -> bool:
    """Measure a suite, or "all", print tables, and write the report beside the records.

    Args:
        device: "cuda", "cpu", or "auto", which is the GPU if there is one and kernels were built.
        quick: run few small cases.
        only: a regular expression for "SUITE CASE".
        minutes: time limit of the run; cases that are not reached are named.
        out: a folder, or a file .jsonl; by default bench/results in a checkout, else
            ./clipvip-bench.
        resume: a store of earlier records; a case that the same code measured on the same machine
            is taken from there. On a GPU, records in `out` are used in the same way.
        profile: a contestant to trace, or "all".

    Returns whether all cases that were reached passed. Raises ValueError if pytest or a plugin is
    missing, if the device or case does not exist, or if `out` is not writable.
    """
    started = time.monotonic()
    _check_options(only, minutes)
    device = chosen(device)
    suites = load("records").SUITES
    out = out or (BENCH / "results" if CHECKOUT else Path("clipvip-bench"))
    _check_writable(out)
    if resume is not None and not _holds_records(resume):
        raise ValueError(
            f"--resume is {resume}, which holds no records; `clipvip bench` makes some"
        )
    again = device == "cuda" and out.exists() and _holds_records(out)
    stores = [*([out] if again else []), *([resume] if resume else [])]
    chosen_suites = suites.values() if suite == "all" else [suites[suite]]
    files = [BENCH / f"{name}.py" for each in chosen_suites for name in each.modules]
    options = ["--bench-device", device, "--bench-out", str(out.absolute())]
    options += ["--bench-quick"] * quick
    options += [f"--bench-only={only}", *(f"--bench-resume={path.absolute()}" for path in stores)]
    options += [f"--bench-profile={profile}"] if profile else []
    options += [f"--bench-deadline={started + 60 * minutes}"] if minutes else []
    status = _pytest(*options, *(str(path) for path in files if path.exists()))
    if status == NO_CASES:
        found_by = f" is found by --only {only!r}" if only else ""
        raise ValueError(f"no case of {suite} for {device}{found_by}")
    passed = status == 0
    if passed and not (out.exists() and _holds_records(out)):
        print(f"no case was done within {minutes:g} minutes; give more")
        return True
    try:
        load("report").publish(out)
    except ValueError as error:
        if passed and out.exists():
            raise
        print(f"no report: {error}", file=sys.stderr)  # for example, if no case passed
    return passed


def _check_options(only: str, minutes: float | None) -> None:
    needed = ("pytest", "pytest_benchmark", "psutil")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(f'{", ".join(missing)} missing: pip install "clipvip[bench]"')
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes is {minutes:g}, expected more than 0")
    try:
        re.compile(only)
    except re.error as error:
        raise ValueError(f"--only is {only!r}, no regular expression: {error}") from None


def chosen(device: str) -> str:
    """Return "cpu" or "cuda"; raise ValueError if "cuda" lacks something."""
    import torch

    from clipvip.ops import _native

    built = _native.module().build_info()["cuda"] is not None
    seen = torch.cuda.is_available()
    if device == "cpu" or (device == "auto" and not seen):
        return "cpu"
    if built and seen:
        return "cuda"
    lacking = f"torch {torch.__version__} sees no GPU"
    if not built:
        lacking = "this build has no CUDA kernels; install the package where nvcc is found, with "
        lacking += "CLIPVIP_CUDA=1"
    if device == "cuda":
        raise ValueError(f"--device is cuda, but {lacking}")
    print(f"measuring on the CPU: there is a GPU, but {lacking}")
    return "cpu"


def _check_writable(out: Path) -> None:
    """Raise ValueError now rather than after minutes of measuring."""
    records = load("records")
    if out.suffix == ".json":
        raise ValueError(f"--out is {out}; give a folder, or a file .jsonl")
    try:
        folder = records.folder_of(out)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()
        if records.is_file(out) and out.exists():
            out.open("ab").close()
    except OSError as error:
        raise ValueError(
            f"--out is {out}, where nothing can be written ({error.strerror}); give a folder, or a "
            "file .jsonl, that can be made or written to"
        ) from None


def _holds_records(store: Path) -> bool:
    """Raises ValueError if there is no such store, or if something in it is not JSON."""
    records = load("records")
    return any(records.is_record(value) for _, value in records.stored(store))


def _pytest(*options: str) -> int:
    # Ignore pytest settings of the current folder.
    settings = ["-c", os.devnull, "--rootdir", str(BENCH), "-o", "python_files=bench_*.py"]
    settings += ["--import-mode=importlib", "-p", "no:cacheprovider", "--disable-warnings"]
    settings += ["--continue-on-collection-errors"]  # a suite may lack an optional dependency
    settings += ["-q", "-s", "--no-header", "--tb=short", "--benchmark-quiet"]
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    parent = {"PYTHONPATH": search, "CLIPVIP_BENCH_PARENT": str(os.getpid())}
    command = [sys.executable, "-m", "pytest", *settings, *options]
    return subprocess.run(command, env=os.environ | parent).returncode


def compare(before: Path, after: Path, allow: float) -> bool:
    """Print what moved between two runs; return whether nothing of ours regressed past `allow`."""
    text, regressed = load("changes").compare(before, after, allow)
    print(text)
    return not regressed


def load(name: str) -> ModuleType:
    """Import a module of the suites, which import each other by bare names."""
    if not BENCH.is_dir():
        raise ValueError(f"the suites are not installed: there is no {BENCH}")
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    return importlib.import_module(name)
