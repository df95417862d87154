"""What was built, what runs here, and a verdict a line."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report: `verdict` is "ok", "note" (works, with less) or "problem"."""

    verdict: str
    subject: str
    detail: str


def examine() -> Iterator[Finding]:
    """Yields the findings from the compiled core up to the optional packages."""
    yield from _core()
    yield from _gpu()
    for package, purpose, required in (
        ("transformers", "CLIP itself", True),
        ("accelerate", "training on one or many devices", True),
        ("av", "video decoding on the CPU (PyAV)", True),
        ("nvidia-dali-cuda130", "video decoding on the GPU (DALI)", False),
    ):
        yield _package(package, purpose, required)


def _core() -> Iterator[Finding]:
    try:
        native = importlib.import_module("clipvip._C")
    except ImportError as error:
        yield Finding("problem", "compiled core", f"{error}; build it with `pip install .`")
        return
    info = native.build_info()
    yield Finding("ok", "compiled core", f"{info['compiler']}, OpenMP {info['openmp']}")
    yield Finding("ok", "CPU kernels built", info["cpu"].replace(",", ", "))
    try:
        chosen = native.cpu_capability()
    except ValueError as error:
        yield Finding("problem", "CPU kernels chosen", str(error))
    else:
        best = native.cpu_capabilities()[-1]
        forced = "" if chosen == best else f" (CLIPVIP_CPU; {best} would be faster)"
        yield Finding("ok" if chosen == best else "note", "CPU kernels chosen", chosen + forced)
    if info["cuda"] is None:
        yield Finding("note", "CUDA kernels built", "none: this version has CPU kernels only")
    else:
        yield Finding("ok", "CUDA kernels built", info["cuda"])


def _gpu() -> Iterator[Finding]:
    import torch

    threads = torch.get_num_threads()
    yield Finding("ok", "torch", f"{torch.__version__}, {threads} threads")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield Finding("ok", "GPU", f"{torch.cuda.device_count()} × {', '.join(sorted(names))}")
        yield Finding("ok", "driver", _driver())
    else:
        built = torch.version.cuda
        why = "torch is a CPU build" if built is None else f"torch has CUDA {built}, no GPU is seen"
        yield Finding("note", "GPU", f"none: {why}")


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "version unknown (nvidia-smi did not answer)"


def _package(name: str, purpose: str, required: bool) -> Finding:
    try:
        return Finding("ok", name, f"{importlib.metadata.version(name)}: {purpose}")
    except importlib.metadata.PackageNotFoundError:
        verdict = "problem" if required else "note"
        return Finding(verdict, name, f"not installed: {purpose}")


def report() -> bool:
    """Prints the findings; returns whether there was no problem."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    marks = {
        "ok": "[green]ok     [/]",
        "note": "[yellow]note   [/]",
        "problem": "[red]problem[/]",
    }
    findings = list(examine())
    for finding in findings:
        detail = escape(finding.detail)
        console.print(f"{marks[finding.verdict]}  {finding.subject + ':':<22} {detail}")
    problems = sum(finding.verdict == "problem" for finding in findings)
    start = time.perf_counter()
    works = problems == 0 and _ops_agree()
    if works:
        elapsed = time.perf_counter() - start
        console.print(
            f"{marks['ok']}  both ops ran and agree with their references ({elapsed:.2f} s)"
        )
    elif problems == 0:
        console.print(f"{marks['problem']}  an op disagrees with its reference; please report this")
    return works


def _ops_agree() -> bool:
    import torch

    from clipvip.ops import pairwise_logsumexp, proxy_attention

    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4 * 2 + 49 * 3, 3, 2, 64, generator=generator)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    features = torch.randn(33, 64, generator=generator)
    scale = torch.tensor(1.0)
    pairs = [
        (proxy_attention(qkv, offsets, 4, 49, backend=backend),)
        + pairwise_logsumexp(features, features, scale, backend=backend)
        for backend in ("native", "reference")
    ]
    return all(torch.allclose(x, y, atol=1e-4) for x, y in zip(*pairs, strict=True))
