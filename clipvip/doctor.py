"""What was built, what runs here, and a verdict a line."""

from __future__ import annotations

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
    ):
        yield _package(package, purpose, required)
    yield _dali()


def _core() -> Iterator[Finding]:
    try:
        from clipvip import _C as native
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
        why = "none: nvcc was not found, or CLIPVIP_CUDA=0 was set, when this was built"
        yield Finding("note", "CUDA kernels built", why)
    else:
        architectures = ", ".join(f"sm_{x.split('-')[0]}" for x in info["cuda"].split(","))
        yield Finding("ok", "CUDA kernels built", f"{architectures} (nvcc {info['nvcc']})")


def _gpu() -> Iterator[Finding]:
    import torch

    threads = torch.get_num_threads()
    yield Finding("ok", "torch", f"{torch.__version__}, {threads} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
            if major >= 8:
                yield Finding("ok", f"GPU {index}", name)
            else:
                yield Finding("note", f"GPU {index}", f"{name}: the kernels need 8.0 or newer")
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


def _dali() -> Finding:
    purpose = "video decoding on the GPU (DALI)"
    for package in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        finding = _package(package, purpose, required=False)
        if finding.verdict == "ok":
            return finding
    return Finding(
        "note", "nvidia-dali", f'not installed: {purpose}; `pip install "clipvip[dali]"`'
    )


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

    from clipvip.ops import _native, pairwise_logsumexp, proxy_attention

    devices = ["cpu"]
    if torch.cuda.is_available() and _native.module().build_info()["cuda"] is not None:
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        devices = [d for d in devices if d == "cpu" or torch.cuda.get_device_capability(d)[0] >= 8]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4 * 2 + 49 * 3, 3, 2, 64, generator=generator)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    features = torch.randn(33, 64, generator=generator)
    scale = torch.tensor(1.0)
    results = []
    for device, backend in [("cpu", "reference"), *((device, "native") for device in devices)]:
        x, frames, rows, factor = (t.to(device) for t in (qkv, offsets, features, scale))
        attended = proxy_attention(x, frames, 4, 49, backend=backend)
        results.append([attended, *pairwise_logsumexp(rows, rows, factor, backend=backend)])
    expected, *others = results
    return all(
        torch.allclose(x.cpu(), y, atol=1e-4)
        for result in others
        for x, y in zip(result, expected, strict=True)
    )
