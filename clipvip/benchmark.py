"""Runs the benchmark suites, which lie beside this package: in bench/, installed clipvip_bench/."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = (ROOT / "setup.py").exists()
BENCH = ROOT / ("bench" if CHECKOUT else "clipvip_bench")


def run(suite: str, *, quick: bool, out: Path | None, profile: bool) -> bool:
    """Measures a suite, or "all", prints tables, and writes the report beside the records.

    out: by default bench/results in a checkout, else ./clipvip-bench.
    Returns whether all cases passed. ValueError: pytest or a plugin is missing, or nothing can be
    written to `out`.
    """
    missing = [
        name
        for name in ("pytest", "pytest_benchmark", "matplotlib")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(f'{", ".join(missing)} missing: pip install "clipvip[bench]"')
    suites = load("harness").SUITES
    out = out or (BENCH / "results" if CHECKOUT else Path("clipvip-bench"))
    try:  # now, rather than after minutes of measuring
        out.mkdir(parents=True, exist_ok=True)
        tempfile.NamedTemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(
            f"--out is {out}, where nothing can be written ({error.strerror}); give a folder that "
            "can be made or written to"
        ) from None
    chosen = suites if suite == "all" else (suite,)
    files = [BENCH / f"{module}.py" for name in chosen for module in suites[name]]
    files = [file for file in files if file.exists()]
    # Settings of the folder that the command is called in are not for these suites.
    settings = ["-c", os.devnull, "--rootdir", str(BENCH), "-o", "python_files=bench_*.py"]
    settings += ["--import-mode=importlib", "-p", "no:cacheprovider", "--disable-warnings"]
    output = ["-q", "-s", "--no-header", "--tb=short", "--benchmark-quiet"]
    options = ["--bench-out", str(out.absolute()), f"--benchmark-storage=file://{out.absolute()}"]
    options += ["--bench-quick"] * quick + ["--bench-profile"] * profile
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, *output, *options, *map(str, files)],
        env=os.environ | {"PYTHONPATH": search},
    )
    passed = done.returncode == 0
    try:
        for path in load("report").write(out):
            print(path)
    except ValueError as error:
        if passed:
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
