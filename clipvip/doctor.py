"""Report what was built and what works on this machine, with one verdict per line."""

import importlib.metadata
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report. verdict: "ok", "note" (works, but with limits) or "problem"."""

    verdict: str
    subject: str
    detail: str


def examine() -> Iterator[Finding]:
    """Yield the findings, from the compiled core to the optional packages."""
    yield from _core()
    yield from _gpu()
    yield _package("CLIP itself", "transformers")
    yield _package("training on one or many devices", "accelerate")
    yield _package("video decoding on the CPU (PyAV)", "av")
    yield _package(
        "video decoding on the GPU (DALI)",
        *("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        missing="note",
        advice='; `pip install "clipvip[dali]"`',
    )


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
        forced = "" if chosen == best else f" (set by CLIPVIP_CPU; {best} would be faster)"
        yield Finding("ok" if chosen == best else "note", "CPU kernels chosen", chosen + forced)
    if info["cuda"] is None:
        why = "none: at build time, nvcc was not found or CLIPVIP_CUDA=0 was set"
        yield Finding("note", "CUDA kernels built", why)
    else:
        architectures = ", ".join(f"sm_{x.partition('-')[0]}" for x in info["cuda"].split(","))
        yield Finding("ok", "CUDA kernels built", f"{architectures} (nvcc {info['nvcc']})")


def _gpu() -> Iterator[Finding]:
    import torch

    threads = torch.get_num_threads()
    yield Finding("ok", "torch", f"{torch.__version__}, {threads} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
            limit = "" if major >= 8 else ": the kernels need 8.0 or newer"
            yield Finding("note" if limit else "ok", f"GPU {index}", name + limit)
        driver = "version unknown (nvidia-smi did not answer)"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.CalledProcessError, IndexError):
            driver = subprocess.check_output(query, stderr=subprocess.DEVNULL, text=True).split()[0]
        yield Finding("ok", "driver", driver)
    else:
        built = torch.version.cuda
        why = f"torch has CUDA {built}, but sees no GPU" if built else "torch is a CPU build"
        yield Finding("note", "GPU", f"none: {why}")


def _package(purpose: str, *names: str, missing: str = "problem", advice: str = "") -> Finding:
    """Return a finding on the first of these packages that is installed, or on their absence."""
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return Finding("ok", name, f"{importlib.metadata.version(name)}: {purpose}")
    return Finding(missing, names[0], f"not installed: {purpose}{advice}")


def report() -> bool:
    """Print the findings, and run the ops if there is no problem. Return whether there is none."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "note": "yellow", "problem": "red"}

    def show(finding: Finding) -> bool:
        verdict, subject, detail = finding
        mark = f"[{colours[verdict]}]{verdict:<7}[/]"
        console.print(f"{mark}  {subject + ':':<22} {escape(detail)}")
        return verdict != "problem"

    return all([show(finding) for finding in examine()]) and show(_ops())


def _ops() -> Finding:
    import torch

    from clipvip.ops import _native, elementwise, pairwise_logsumexp, proxy_attention
    from clipvip.ops.linear import Norm

    start = time.perf_counter()
    devices = ["cpu"]
    if torch.cuda.is_available() and _native.module().build_info()["cuda"] is not None:
        gpus = (f"cuda:{index}" for index in range(torch.cuda.device_count()))
        devices += [gpu for gpu in gpus if torch.cuda.get_device_capability(gpu)[0] >= 8]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4 * 2 + 49 * 3, 3, 2, 64, generator=generator)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    features = torch.randn(33, 64, generator=generator)
    scale = torch.tensor(1.0)
    results = []
    for device, backend in [("cpu", "reference"), *((device, "native") for device in devices)]:
        x, frames, rows, factor = (t.to(device) for t in (qkv, offsets, features, scale))
        attended = proxy_attention(x, frames, 4, 49, backend=backend)
        on_cpu = device == "cpu"
        add_norm = elementwise.add_norm_reference if on_cpu else elementwise.add_norm
        norm = Norm(rows[0], rows[1], 1e-5)
        added, normed, _ = add_norm(rows, rows, rows[2], norm, torch.float32)
        statistics = pairwise_logsumexp(rows, rows, factor, backend=backend)
        results.append([attended, *statistics, added, normed])
    expected, *others = results
    pairs = [pair for result in others for pair in zip(result, expected, strict=True)]
    if not all(torch.allclose(x.cpu(), y, atol=1e-4) for x, y in pairs):
        return Finding("problem", "ops", "one disagrees with its reference; please report this")
    seconds = time.perf_counter() - start
    return Finding("ok", "ops", f"all ran and agree with their references ({seconds:.2f} s)")
