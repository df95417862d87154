"""Attention and losses on a GPU against what people would use instead.

    python bench/gpu.py [attention] [loss]    times, writes bench/results/gpu.json, prints a table
    python bench/gpu.py table                 prints the table of results there are
    python bench/gpu.py check                 tiny sizes, checked and not kept: for a sanitizer
    python bench/gpu.py --dry-run …           tiny sizes on the CPU, to see that the program works

Contestants run in turn, one call each a round, with the second level of cache emptied before each;
medians of CUDA events. Each is checked first: its distance from fp32 may be at most twice that of
the eager form in the same dtype. One that cannot run at a size is listed with the reason.
"""

import argparse
import datetime
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_pairwise_logsumexp as losses
import bench_proxy_attention as attention
import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.losses import contrastive_loss, omnisource_loss
from clipvip.ops import proxy_attention

RESULTS = harness.BENCH / "results" / "gpu.json"
MIB, L2_BYTES = 2**20, 256 * 2**20

# name → (videos, frames, patches, heads); heads of 64
SHAPES = {
    **{f"B/32 B={b}": (b, 12, 49, 12) for b in (1, 32, 128)},
    **{f"B/16 B={b}": (b, 12, 196, 12) for b in (1, 8, 32, 128)},
    "B/16 ragged": (32, -12, 196, 12),  # 4 to 20 frames, 12 on average
    "L/14 B=32": (32, 12, 256, 16),
    "L/14@336 B=16": (16, 12, 576, 16),
}
LOSS_SIZES = [1024 * 2**i for i in range(8)]
TINY_SHAPES = {"tiny": (2, 3, 9, 12), "tiny ragged": (4, -3, 9, 12)}
TINY_LOSS_SIZES = [64, 96]

PARTS = ("attention", "loss", "table", "check")

Contestants = dict[str, Callable[[], Sequence[Tensor]]]


class Bench:
    """Where to run, for how long, and what is known of the machine."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.gpu = device == "cuda"
        self.flush = torch.empty(L2_BYTES if self.gpu else 1, dtype=torch.uint8, device=device)

    def once(self, run: Callable[[], Any]) -> float:
        """Seconds that one call takes, from a cold cache."""
        if not self.gpu:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def peak(self, run: Callable[[], Any]) -> float:
        """MiB that a call allocates at most beyond what was allocated before."""
        if not self.gpu:
            return harness.peak_memory(run) / MIB
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def compare(self, contestants: Contestants, expected: Sequence[Tensor]) -> dict[str, dict]:
        """Checks, then times; the first contestant's error is the measure of the others'."""
        results: dict[str, dict] = {}
        allowed = None
        for name, run in contestants.items():
            try:
                error = max(map(distance, run(), expected))
                allowed = max(2 * error, 1e-6) if allowed is None else allowed
                if not error <= allowed:
                    raise AssertionError(f"error {error:.1e}, allowed {allowed:.1e}")
                results[name] = {"error": error, "peak_mib": self.peak(run)}
            except Exception as reason:  # whatever a peer dies of is a result
                if name == "ours":
                    raise
                results[name] = {
                    "failed": f"{type(reason).__name__}: {reason}".split("\n")[0][:200]
                }
            gc.collect()
            if self.gpu:
                torch.cuda.empty_cache()
        able = {name: run for name, run in contestants.items() if "failed" not in results[name]}
        times: dict[str, list[float]] = {name: [] for name in able}
        started = time.perf_counter()
        while len(times["ours"]) < 5 or time.perf_counter() - started < self.seconds:
            for name, run in able.items():
                times[name].append(self.once(run) * 1e3)
        for name, each in times.items():
            low, median, high = statistics.quantiles(each, n=4, method="inclusive")
            rounds = {"low_ms": low, "median_ms": median, "high_ms": high, "rounds": len(each)}
            results[name] |= rounds
        return results

    def ceilings(self) -> dict[str, float]:
        """What this machine can do at best: bytes/s of a copy, operations/s of a product."""
        size = (8192, 2**29) if self.gpu else (512, 2**22)
        x = torch.randn(size[0], size[0], device=self.device).bfloat16()
        source = torch.empty(size[1], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        product = statistics.median(self.once(lambda: x @ x) for _ in range(20))
        copy = statistics.median(self.once(lambda: target.copy_(source)) for _ in range(20))
        return {"flop_per_s": 2 * size[0] ** 3 / product, "bytes_per_s": 2 * size[1] / copy}

    def machine(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "device": "CPU, a dry run",
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "commit": os.environ.get("CLIPVIP_COMMIT") or harness.machine()["commit"],
        }
        if self.gpu:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts |= {
                "device": torch.cuda.get_device_name(),
                "capability": ".".join(map(str, torch.cuda.get_device_capability())),
                "cuda": torch.version.cuda,
                "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip(),
            }
        return facts


def distance(got: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    return float((got.float() - expected).norm() / expected.norm().clamp(min=1e-30))


def attention_case(bench: Bench, shape: Sequence[int], backward: bool, compiled: bool) -> dict:
    """One shape, forward alone or with backward: results, operations and least bytes."""
    videos, frames, patches, heads = shape
    generator = torch.Generator().manual_seed(0)
    each = [abs(frames)] * videos
    if frames < 0:  # a third to five thirds of the average, the sum unchanged
        spread = torch.linspace(frames * 2 // 3, -frames * 2 // 3, videos).round().int()
        spread = spread[torch.randperm(videos, generator=generator)]
        each = [-frames + int(x) for x in spread]
    proxies, dim = attention.PROXIES, attention.HEAD_DIM
    tokens = [proxies + n * patches for n in each]
    qkv = torch.randn(sum(tokens), 3, heads, dim, generator=generator).to(bench.device)
    grad = torch.randn(sum(tokens), heads, dim, generator=generator).to(bench.device)
    offsets = torch.tensor([0, *each]).cumsum(0).int().to(bench.device)

    def per_video(attend: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        if frames > 0:
            return lambda x: attend(x.unflatten(0, (videos, -1)), frames, patches).flatten(0, 1)
        parts = functools.partial(torch.split, split_size_or_sections=tokens)
        return lambda x: torch.cat(
            [attend(v[None], n, patches)[0] for v, n in zip(parts(x), each, strict=True)]
        )

    forms = {
        "eager": per_video(attention.eager),
        "two SDPA": per_video(attention.two_sdpa),
        "masked SDPA": per_video(attention.masked_sdpa),
        "ours": lambda x: proxy_attention(x, offsets, proxies, patches),
    }
    if compiled and frames > 0:
        forms["FlexAttention"] = per_video(
            lambda x, *_: attention.flex(frames, patches, bench.device)(x)
        )
    elif compiled:
        packed = functools.cache(lambda: packed_flex(offsets, sum(tokens), patches))
        forms["FlexAttention"] = lambda x: packed()(x)

    def step(form: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (form(leaves[dtype]),)
        out = form(leaves[dtype])
        return out.detach(), *torch.autograd.grad(out, leaves[dtype], grads[dtype])

    leaves = {d: qkv.to(d).requires_grad_() for d in (torch.bfloat16, torch.float32)}
    grads = {d: grad.to(d) for d in leaves}
    leaves[torch.float32] = leaves[torch.bfloat16].detach().float().requires_grad_()
    grads[torch.float32] = grads[torch.bfloat16].float()
    expected = step(forms["eager"], torch.float32)
    del leaves[torch.float32], grads[torch.float32], qkv, grad
    contestants = {name: functools.partial(step, f, torch.bfloat16) for name, f in forms.items()}
    pairs = sum(
        n * patches * (patches + proxies) + proxies * t for n, t in zip(each, tokens, strict=True)
    )
    share = 3.5 if backward else 1  # backward is 2.5 times forward: five products for two
    return {
        "results": bench.compare(contestants, expected),
        "flop": 4 * dim * heads * pairs * share,
        "bytes": (4 + 8 * backward) * sum(tokens) * heads * dim * 2,
    }


def packed_flex(offsets: Tensor, tokens: int, patches: int) -> Callable[[Tensor], Tensor]:
    """FlexAttention over a ragged batch as one sequence."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    proxies, device = attention.PROXIES, offsets.device
    lengths = proxies + offsets.diff() * patches
    video = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    within = torch.arange(tokens, device=device) - (lengths.cumsum(0) - lengths)[video]
    frame = torch.where(within < proxies, -1, (within - proxies) // patches)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_frame = (frame[q] == frame[k]) | (frame[q] < 0) | (frame[k] < 0)
        return (video[q] == video[k]) & same_frame

    mask = create_block_mask(visible, None, None, tokens, tokens, device=device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(x: Tensor) -> Tensor:
        query, key, value = (part.contiguous()[None] for part in x.permute(1, 2, 0, 3))
        return compiled(query, key, value, block_mask=mask)[0].transpose(0, 1)

    return attend


def loss_case(bench: Bench, kind: str, n: int, compiled: bool) -> dict:
    """One loss and size, forward and backward: results, operations and least bytes."""
    generator = torch.Generator().manual_seed(0)
    sources = 4 if kind == "vsc_fc" else 2
    features = [
        F.normalize(torch.randn(n, losses.DEPTH, generator=generator), dim=-1).bfloat16()
        for _ in range(sources)
    ]
    features = [x.to(bench.device) for x in features]
    scale = torch.tensor(100.0, device=bench.device)

    def step(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in given]
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    if kind == "vsc_fc":
        forms: dict[str, Callable[..., Tensor]] = {
            "naive": losses.naive_vsc_fc,
            "ours": omnisource_loss,
        }
    else:
        forms = {"naive": losses.naive, "chunked": losses.chunked, "ours": contrastive_loss}
        if hasattr(F, "linear_cross_entropy"):
            forms["linear_cross_entropy"] = losses.linear_cross_entropy
    if compiled:
        forms["compiled naive"] = torch.compile(forms["naive"], dynamic=False)
    # Where fp32 logits of all rows would not fit, the chunked form or ours says what is expected.
    exact = forms["naive"] if n <= 16384 else forms.get("chunked", forms["ours"])
    expected = step(exact, *(x.float() for x in (*features, scale)))
    contestants = {name: functools.partial(step, f, *features, scale) for name, f in forms.items()}
    products = 3 if kind == "vsc_fc" else 1
    return {
        "results": bench.compare(contestants, expected),
        "flop": 8 * products * n * n * losses.DEPTH,
        "bytes": 2 * sources * n * losses.DEPTH * 2,
    }


def table(record: dict) -> str:
    """Ours against the best peer and the floor, a line a case."""
    top = record["ceilings"]
    lines = [
        f"{record['machine']['device']}; a product runs at {top['flop_per_s'] / 1e12:.0f} TFLOP/s, "
        f"a copy at {top['bytes_per_s'] / 1e12:.2f} TB/s.",
        "",
        "| case | eager ms | best peer ms | ours ms | best peer / ours | floor ms | ours / floor "
        "| eager MiB | ours MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, entry in record["cases"].items():
        results = entry["results"]
        ours = results["ours"]
        able = {n: r for n, r in results.items() if n != "ours" and "failed" not in r}
        eager = next(r for n, r in results.items() if n in ("eager", "naive"))
        best = min(able, key=lambda name: able[name]["median_ms"], default=None)
        floor = 1e3 * max(entry["flop"] / top["flop_per_s"], entry["bytes"] / top["bytes_per_s"])
        cells = [
            case,
            f"{eager['median_ms']:.3f}" if "failed" not in eager else "fails",
            f"{able[best]['median_ms']:.3f} ({best})" if best else "none",
            f"**{ours['median_ms']:.3f}**",
            f"{able[best]['median_ms'] / ours['median_ms']:.2f}" if best else "–",
            f"{floor:.3f}",
            f"{ours['median_ms'] / floor:.2f}",
            f"{eager['peak_mib']:.0f}" if "failed" not in eager else "–",
            f"{ours['peak_mib']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (attention loss)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing a case (%(default)s)")
    given = parser.parse_args(arguments)
    parts = given.parts or ["attention", "loss"]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    record = json.loads(given.out.read_text()) if given.out.exists() else {"cases": {}}
    if parts == ["table"]:
        if not record["cases"]:
            sys.exit(f"{given.out} holds no results: run `bench/gpu.sh` where a GPU is")
        print(table(record))
        return
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA GPU is seen; --dry-run runs tiny sizes on the CPU")
    tiny = given.dry_run or "check" in parts
    bench = Bench("cpu" if given.dry_run else "cuda", 0 if tiny else given.seconds)
    cases: dict[str, Callable[[], dict]] = {}
    if {"attention", "check"} & set(parts):
        for name, shape in (TINY_SHAPES if tiny else SHAPES).items():
            for way in ("forward", "forward+backward"):
                cases[f"{name} {way}"] = functools.partial(
                    attention_case, bench, shape, way != "forward", not tiny
                )
    if {"loss", "check"} & set(parts):
        for kind in ("symmetric", "vsc_fc"):
            for n in TINY_LOSS_SIZES if tiny else LOSS_SIZES:
                cases[f"{kind} n={n}"] = functools.partial(loss_case, bench, kind, n, not tiny)
    if "check" in parts:
        for name, run in cases.items():
            print(f"{name}: off by {run()['results']['ours']['error']:.1e}", flush=True)
        return
    facts = {"machine": bench.machine(), "ceilings": bench.ceilings()}
    same = record.get("machine", {}).get("device") == facts["machine"]["device"]
    record = {**facts, "cases": record["cases"] if same else {}}
    for name, run in cases.items():
        # After eight shapes of one function torch would run it uncompiled, with a mere warning.
        torch.compiler.reset()
        record["cases"][name] = run() | {"commit": record["machine"]["commit"]}
        partial = given.out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(given.out)
        ours = record["cases"][name]["results"]["ours"]["median_ms"]
        print(f"{name}: ours {ours:.3f} ms", flush=True)
    print(table(record))


if __name__ == "__main__":
    main()
