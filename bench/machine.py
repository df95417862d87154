"""The facts of a machine that a timing means nothing without."""

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent


def machine() -> dict[str, Any]:
    """Return processor, memory, versions, date and commit, and the GPU's facts if there is one."""
    import clipvip
    from clipvip.ops import _native

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    facts = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": _native.module().cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "malloc": "tuned" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default",
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "clipvip": clipvip.__version__,
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "gpu_capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cuda": torch.version.cuda,
            "driver": subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0],
        }
    return facts


def _commit() -> str:
    """The commit of this checkout, or the one given; "" where neither is known."""
    if given := os.environ.get("CLIPVIP_COMMIT"):
        return given
    if not (BENCH.parent / ".git").exists() or shutil.which("git") is None:
        return ""
    code = ("csrc", "clipvip", "bench", ":(exclude)bench/results")
    changed = _git("status", "--porcelain", "--", *code)
    return _git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=BENCH, capture_output=True, text=True)
    return done.stdout.strip()
