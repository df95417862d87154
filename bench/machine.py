"""Facts of the machine that every record holds, and the rates that it reaches."""

import datetime
import functools
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device import MIB, elapsed
from records import BENCH, GIB


def machine() -> dict[str, Any]:
    """Return processor, memory, versions, date and commit, and facts of the GPU if there is one."""
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
    """Return the commit that CLIPVIP_COMMIT gives, else that of the checkout, else ""."""
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


def ceilings(device: str = "cpu") -> dict[str, float]:
    """Measure the rates that this machine reaches in large products and copies.

    Returns matmul_fp32_gflops and matmul_bf16_gflops of square matrices (10⁹ operations per second;
    a multiplication and an addition are two), and copy_gib_s (bytes read plus bytes written).
    """
    side, copied = (8192, 2 * GIB) if device == "cuda" else (2048, 256 * MIB)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, y = torch.randn(2, side, side, device=device).to(dtype)
        out = torch.empty_like(x)
        best = _best(functools.partial(torch.mm, x, y, out=out), device)
        found[f"matmul_{name}_gflops"] = 2 * side**3 / best / 1e9
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    best = _best(functools.partial(torch.empty_like(source).copy_, source), device)
    found["copy_gib_s"] = 2 * copied / best / GIB
    return found


def _best(run: Callable[[], Any], device: str) -> float:
    """Return the shortest of ten times, in seconds."""
    elapsed(run, device)
    return min(elapsed(run, device).seconds for _ in range(10))


def facts(device: str) -> dict[str, Any]:
    """Return machine() with its ceilings."""
    return machine() | {"ceilings": ceilings(device)}
