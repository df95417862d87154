"""Runs the benchmark suites, which lie beside this package: in bench/, installed clipvip_bench/."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = (ROOT / "setup.py").exists()
BENCH = ROOT / ("bench" if CHECKOUT else "clipvip_bench")
NO_CASES = 5  # pytest's status where nothing was selected


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
    """Measures a suite, or "all", prints tables, and writes the report beside the records.

    Args:
        device: "cuda", "cpu", or "auto": the GPU if there is one and kernels for it were built.
        quick: few small cases.
        only: a regular expression for "SUITE CASE".
        minutes: how long the run may take; what is not reached is named.
        out: a folder, or a file .jsonl; by default bench/results in a checkout, else
            ./clipvip-bench.
        resume: a store of earlier records; a case in it that this code measured on this machine is
            taken from there. On a GPU `out` is such a store, too.
        profile: a contestant whose trace to write, or "all".

    Returns whether all cases that were reached passed. ValueError: pytest or a plugin is missing,
    there is no such device or case, or nothing can be written to `out`.
    """
    started = time.monotonic()
    missing = [
        name
        for name in ("pytest", "pytest_benchmark", "psutil")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(f'{", ".join(missing)} missing: pip install "clipvip[bench]"')
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes is {minutes:g}, expected more than 0")
    try:
        re.compile(only)
    except re.error as error:
        raise ValueError(f"--only is {only!r}, no regular expression: {error}") from None
    if resume is not None and not resume.exists():
        raise ValueError(f"--resume is {resume}, which does not exist; give a folder of records")
    device = chosen(device)
    harness = load("harness")
    suites = harness.SUITES
    out = out or (BENCH / "results" if CHECKOUT else Path("clipvip-bench"))
    _check_writable(out)
    stores = [*([out] if device == "cuda" else []), *([resume] if resume else [])]
    modules = [name for each in (suites if suite == "all" else (suite,)) for name in suites[each]]
    if device == "cuda":
        modules = [name for name in modules if name not in harness.CPU_ONLY]
    files = [str(path) for path in (BENCH / f"{name}.py" for name in modules) if path.exists()]
    options = ["--bench-device", device, "--bench-out", str(out.absolute())]
    options += ["--bench-quick"] * quick
    options += [f"--bench-only={only}", *(f"--bench-resume={path.absolute()}" for path in stores)]
    options += [f"--bench-profile={profile}"] if profile else []
    options += [f"--bench-deadline={started + 60 * minutes}"] if minutes else []
    status = _pytest(options, files, out)
    if status == NO_CASES:
        raise ValueError(
            f"no case of {suite} for {device}" + f" is found by --only {only!r}" * bool(only)
        )
    return _report(out, status == 0)


def chosen(device: str) -> str:
    """ "cpu" or "cuda". ValueError: what "cuda" needs is missing."""
    import torch

    from clipvip.ops import _native

    built = _native.module().build_info()["cuda"] is not None
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if built and torch.cuda.is_available():
        return "cuda"
    lacking = f"torch {torch.__version__} sees no GPU"
    if not built:
        lacking = (
            "this build has no CUDA kernels; install the package where nvcc is found, with "
            "CLIPVIP_CUDA=1"
        )
    if device == "cuda":
        raise ValueError(f"--device is cuda, but {lacking}")
    print(f"measuring on the CPU: there is a GPU, but {lacking}")
    return "cpu"


def _check_writable(out: Path) -> None:
    """Now, rather than after minutes of measuring."""
    folder = out.parent if out.suffix == ".jsonl" else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"--out is {out}, where nothing can be written ({error.strerror}); give a folder that "
            "can be made or written to"
        ) from None


def _pytest(options: Sequence[str], files: Sequence[str], out: Path) -> int:
    # Settings of the folder that the command is called in are not for these suites.
    settings = ["-c", os.devnull, "--rootdir", str(BENCH), "-o", "python_files=bench_*.py"]
    settings += ["--import-mode=importlib", "-p", "no:cacheprovider", "--disable-warnings"]
    output = ["-q", "-s", "--no-header", "--tb=short", "--benchmark-quiet"]
    output += ["--continue-on-collection-errors"]  # a suite may lack what it compares with
    folder = out.absolute().parent if out.suffix == ".jsonl" else out.absolute()
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", *settings, *output, *options]
    return subprocess.run(
        [*command, f"--benchmark-storage=file://{folder}", *files],
        env=os.environ | {"PYTHONPATH": search},
    ).returncode


def _report(out: Path, passed: bool) -> bool:
    report = load("report")
    try:
        for path in report.write(out):
            print(path)
        if importlib.util.find_spec("matplotlib") is None:
            print(report.NO_PAGE)
    except ValueError as error:
        if passed and out.exists():
            raise
        print(f"no report: {error}", file=sys.stderr)  # as where no case passed
    return passed


def compare(before: Path, after: Path, allow: float) -> bool:
    """Prints what moved between two runs; whether nothing of ours regressed past `allow`.

    ValueError: they cannot be compared.
    """
    text, regressed = load("changes").compare(before, after, allow)
    print(text)
    return not regressed


def load(name: str) -> ModuleType:
    """A module of the suites; they import each other by bare names."""
    if not BENCH.is_dir():
        raise ValueError(f"the suites are not installed: there is no {BENCH}")
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    return importlib.import_module(name)
