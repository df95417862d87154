"""One case in a process of its own, so that a crash or hang affects no other case.

The process notes its results so far and the contestant that is running (harness.Diary). If it dies,
exceeds its time limit or loses the GPU, the results so far are kept and that contestant is listed
with the reason. If it was a peer, the case is measured again without it.

    python bench/cases.py MODULE FUNCTION   runs in that process; its arguments lie in the folder
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

LIMITS = {"cuda": 90.0, "cpu": None}  # seconds per case; unlimited on a CPU
# A contestant that had run for less than this share of the limit is not what exceeded it.
LATE = 1 / 3
TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
PR_SET_PDEATHSIG = 1
SETUP = "ours"  # listed as failed if a case ends before any contestant runs


class OutOfTime(Exception):
    """The time of the whole run was up before the case was done."""


class Ended(NamedTuple):
    """How a process ended.

    reason: why it ended too soon, or None.
    running: contestant that was running, or "".
    found: results so far.
    for_seconds: how long the contestant had been running.
    """

    reason: str | None
    running: str
    found: dict[str, Any]
    in_time: bool = True
    for_seconds: float = 0.0


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
    """Return `module.function(**arguments)`, or its results before its process died.

    Arguments and result are JSON. If the process died, "left_out" of the results names the
    contestant that was running, or ours if none was yet, with the reason. If that was a peer, the
    rest is measured without it. If the limit was reached soon after ours had started, ours is
    measured again in another process, beside the baseline and the best peer.

    Args:
        malloc: "tuned" keeps freed memory, which avoids page faults in programs with many large
            tensors. A process reads this setting when it starts.
        limit: time limit of a process in seconds.
        deadline: end of the whole run, in time.monotonic(). If it is reached after ours was
            measured, the results so far are returned with "cut".
        profile: a contestant to trace, or "all"; see harness.Diary.
        trace: first part of the names of trace files.

    Raises:
        OutOfTime: the deadline was reached before ours was measured.
    """
    given: dict[str, Any] = {"arguments": arguments, "profile": profile, "without": {}}
    given |= {"settled": [], "trace": str(trace.absolute()) if trace else None}
    before: dict[str, Any] = {}  # results of contestants that do not run again
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
            return _cut(found, who)
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


def _cut(found: dict[str, Any], running: str) -> dict[str, Any]:
    """Return the results at the run's deadline. Raises OutOfTime if ours is not among them."""
    if not any(map(records.is_ours, found["results"])) and not found.get("points"):
        raise OutOfTime
    found["left_out"] |= {running: "the run's time was up"} if running else {}
    return found | {"cut": True}


def _once(
    module: str, function: str, given: dict[str, Any], malloc: str, limit: float | None
) -> Ended:
    """Run the function once, in a process that is killed when the limit is reached."""
    environment = os.environ | (TUNED_MALLOC if malloc == "tuned" else {})
    search = [str(records.BENCH.parent), str(records.BENCH), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    with tempfile.TemporaryDirectory(prefix="clipvip-bench-") as folder:
        (Path(folder) / "given.json").write_text(json.dumps(given))
        environment[harness.Diary.FOLDER] = folder
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), module, function],
            env=environment,
            start_new_session=True,  # to kill it together with the compilers it starts
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
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep it alive
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
    """Run the function in this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the run
    module, function = sys.argv[1:]
    folder = Path(os.environ[harness.Diary.FOLDER])
    given = json.loads((folder / "given.json").read_text())
    try:
        result = getattr(importlib.import_module(module), function)(**given["arguments"])
    except Exception as error:
        traceback.print_exc()
        records.write(folder / "error.json", harness.why(error))
        sys.stderr.flush()
        os._exit(1)  # loaded libraries may hang if the GPU is lost
    records.write(folder / "found.json", result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a library that fails at exit must not fail the case


if __name__ == "__main__":
    _main()
