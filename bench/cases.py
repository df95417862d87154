"""A case in a process of its own: nothing that it dies of costs more than that case.

The process notes what it has measured so far and which contestant it is running (harness.Diary). If
it dies, is killed for taking too long, or loses the GPU, the results so far are kept and that
contestant is listed with the reason. If it was a peer, the case is measured again without it.

    python bench/cases.py MODULE FUNCTION   is that process; it finds its arguments in the folder
                                            that the variable CLIPVIP_BENCH_DIARY names
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import harness
import records

LIMITS = {"cuda": 90.0, "cpu": None}  # seconds that a case may take; one on a CPU takes its time
LATE = 1 / 3  # of the limit; who has run for less when it is reached is not what took the time
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
PR_SET_PDEATHSIG = 1
SETUP = "ours"  # who is listed as failed where a case ends before any contestant runs


class OutOfTime(Exception):
    """The whole run's time was up before the case was done."""


class Ended(NamedTuple):
    """How a process ended: why, if too soon; the contestant being run; the results so far."""

    reason: str | None
    running: str
    found: dict[str, Any]
    in_time: bool = True
    for_seconds: float = 0.0  # that the contestant had been running


def run(
    module: str,
    function: str,
    arguments: dict[str, Any],
    *,
    malloc: str = "default",
    limit: float | None = None,
    deadline: float | None = None,
    profile: str | None = None,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Returns `module.function(**arguments)`, or what was found of it before its process died.

    Arguments and result are JSON. Where the process died, "left_out" in what was found names the
    contestant that was being run, or ours where none was yet, with the reason. If that was a peer,
    the rest is measured without it. If the limit was reached soon after ours had begun, ours is
    measured in a process of its own, beside the baseline and the best peer.

    Args:
        malloc: "tuned" keeps what is freed, which spares a program of many large tensors its page
            faults. It is read when a process starts.
        limit: seconds that a process may take.
        deadline: of the whole run, by time.monotonic(). If it is reached once ours is measured,
            what was found is returned with "cut".
        profile: a contestant whose trace is wanted, or "all"; see harness.Diary.
        trace: how the names of files with traces start.

    Raises:
        OutOfTime: the deadline was reached before ours was measured.
    """
    given: dict[str, Any] = {"arguments": arguments, "profile": profile, "without": {}}
    given |= {"settled": [], "trace": str(trace.absolute()) if trace else None}
    before: dict[str, Any] = {}  # results of contestants that are not run again
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        least = min((x for x in (limit, left) if x is not None), default=None)
        ended = _once(module, function, given, malloc, least)
        found = ended.found
        if before and "results" in found:
            found["results"] = before | found["results"]
        if ended.reason is None:
            return found
        found = {"results": {}, "left_out": {}} | found
        who, apart = ended.running, [name for name in found["results"] if not records.is_ours(name)]
        if not ended.in_time and left is not None and least == left:
            if not any(map(records.is_ours, found["results"])) and not found.get("points"):
                raise OutOfTime
            found["left_out"] |= {who: "the run's time was up"} if who else {}
            return found | {"cut": True}
        known = {*found["results"], *given["without"]}
        if who and not records.is_ours(who) and who not in known:
            print(f"{who} {ended.reason}; once more without it", file=sys.stderr, flush=True)
            given["without"][who] = ended.reason
            continue
        late = not ended.in_time and ended.for_seconds < LATE * (limit or 0.0)
        if late and apart and not given["settled"]:
            print(f"{who} {ended.reason}; ours once more by itself", file=sys.stderr, flush=True)
            kept = {records.baseline(found["results"]), records.best_peer(found["results"])}
            before = {name: found["results"][name] for name in apart}
            given["settled"] = [name for name in apart if name not in kept]
            continue
        reason = ended.reason if who else f"{ended.reason} while no contestant ran"
        found["left_out"] |= given["without"] | {who or SETUP: reason}
        return found


def _once(
    module: str, function: str, given: dict[str, Any], malloc: str, limit: float | None
) -> Ended:
    environment = os.environ | (TUNED_MALLOC if malloc == "tuned" else {})
    search = [str(harness.BENCH.parent), str(harness.BENCH), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    with tempfile.TemporaryDirectory(prefix="clipvip-bench-") as folder:
        (Path(folder) / "given.json").write_text(json.dumps(given))
        environment[harness.Diary.FOLDER] = folder
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), module, function],
            env=environment,
            start_new_session=True,  # so that it and its compilers can be killed together
        )
        started, reason, in_time = time.time(), None, True
        try:
            if code := process.wait(limit):
                reason = _how(code)
        except subprocess.TimeoutExpired:
            reason, in_time = f"did not end within the case's {limit:.0f} s", False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
                process.wait(10)
        found = _read(Path(folder) / "found.json") or {}
        error = _read(Path(folder) / "error.json")
        running = Path(folder) / "running"
        who, since = "", started
        if running.exists():
            who, since = running.read_text(), running.stat().st_mtime
        seconds = time.time() - since
        if who and not in_time:
            reason = f"{reason}, having run for {seconds:.0f} s"
        return Ended(f"failed: {error}" if error else reason, who, found, in_time, seconds)


def _how(code: int) -> str:
    if code > 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name
    return f"died of {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _main() -> None:
    """The process itself."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlives the run
    module, function = sys.argv[1:]
    folder = Path(os.environ[harness.Diary.FOLDER])
    given = json.loads((folder / "given.json").read_text())
    try:
        result = getattr(importlib.import_module(module), function)(**given["arguments"])
    except Exception as error:
        traceback.print_exc()
        records.write(folder / "error.json", harness.why(error))
        sys.stderr.flush()
        os._exit(1)  # what is loaded may not end on a GPU that is lost
    records.write(folder / "found.json", result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nor shall a library that fails as the process ends make this a failure


if __name__ == "__main__":
    _main()
