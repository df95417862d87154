"""Attention and losses on a GPU against what people would use instead.

    python bench/gpu.py [attention] [loss]    times, adds to bench/results/gpu.json, prints a table
    python bench/gpu.py --only 'B=32|n=4096'  of these the cases that a regular expression finds
    python bench/gpu.py table                 prints the table of results there are
    python bench/gpu.py check                 our kernels alone at small sizes: for a sanitizer
    python bench/gpu.py --dry-run …           tiny sizes on the CPU, to see that the program works

Contestants run in turn, one call each a round, with the second level of cache emptied before each;
medians of CUDA events. The GPU is kept busy until the host has queued the call, so that they tell
what the GPU takes; what the host takes stands beside (host_ms). Each contestant is checked first:
its distance from a wider dtype's result may be at most twice that of the first that runs, which is
the eager form where memory allows, and MOST_ERROR at most. One that cannot run at a size is listed
with the reason. If ours is among those, everything else is still measured, and the program ends
with 1.

A case that was measured at this commit, with this GPU and torch, is not measured again, so that a
run that was cut short goes on. Ceilings are measured in the same run and kept with each case.
"""

import argparse
import collections
import contextlib
import functools
import gc
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_pairwise_logsumexp as losses
import bench_proxy_attention as attention
import harness
import report
import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.ops import proxy_attention
from clipvip.ops.proxy_attention import proxy_attention_reference

RESULTS = harness.BENCH / "results" / "gpu.json"
MOST_ERROR = 0.02  # ‖x − expected‖ / ‖expected‖; eager bf16 forms are off by 0.003 to 0.01
HEAD_START = 2_000_000  # clocks of the GPU, about 1 ms, in which the host queues a call
ROUNDS = 5  # at least

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
# name → products of all pairs, and tensors [T, H, D] that are read or written at least
WAYS = {"forward": (2, 4), "backward": (5, 8), "forward+backward": (7, 12)}

# For a sanitizer, (dtype, D, L): several warps, whose rows stay in shared memory, or come and go
# through a ring in backward, in fp32 and at D=128 in forward too.
CHECKED_ATTENTION = [
    (torch.bfloat16, 64, 140),
    (torch.float32, 64, 140),
    (torch.bfloat16, 64, 576),
    (torch.float32, 64, 576),
    (torch.float16, 128, 576),
]
# (dtype, n, D): rows that stay in shared memory, and that go through a ring.
CHECKED_LOSSES = [(torch.bfloat16, 300, 512), (torch.bfloat16, 300, 40), (torch.float32, 300, 512)]

PARTS = ("attention", "loss", "table", "check")

Contestants = dict[str, Callable[[], Sequence[Tensor]]]


# --- measuring -----------------------------------------------------------------------------------


def compare(
    contestants: Contestants,
    expected: Sequence[Tensor],
    left_out: dict[str, str],
    device: str,
    seconds: float,
) -> dict[str, dict]:
    """Checks, then times: {"results": …, "left_out": …} as harness.compare has them.

    Not that function itself, since here the first contestant's error is the measure of the others',
    a call that a contestant dies of may be ours, and host and GPU are timed apart.
    """
    results: dict[str, dict] = {}
    left_out, allowed = dict(left_out), MOST_ERROR
    for name, run in contestants.items():
        try:
            error = max(itertools.starmap(distance, zip(run(), expected, strict=True)))
            if not error <= allowed:
                raise AssertionError(f"error {error:.1e}, allowed {allowed:.1e}")
            peak = harness.peak_memory(run, device) / harness.MIB
            if not results:
                allowed = min(allowed, max(2 * error, 1e-6))
            results[name] = {"error": error, "peak_mib": peak}
        except Exception as reason:  # whatever a contestant dies of is a result
            left_out[name] = harness.why(reason)
        if device == "cuda":  # what an error holds on to, too
            gc.collect()
            torch.cuda.empty_cache()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in results}
    started = time.perf_counter()
    for done in itertools.count():
        if done >= ROUNDS and time.perf_counter() - started >= seconds:
            break
        for name in list(times):
            try:
                times[name].append(once(contestants[name], device))
            except Exception as reason:  # such as memory that others now hold
                left_out[name] = harness.why(reason)
                del times[name], results[name]
    for name, each in times.items():
        ours, host = ([1e3 * x for x in column] for column in zip(*each, strict=True))
        low, median, high = statistics.quantiles(ours, n=4, method="inclusive")
        results[name] |= {"low_ms": low, "median_ms": median, "high_ms": high}
        results[name] |= {"host_ms": statistics.median(host), "rounds": len(each)}
    return {"results": results, "left_out": left_out}


def once(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds of one call from a cold cache: of the GPU, and of the host until it was queued."""
    if device == "cpu":
        took = harness.elapsed(run)
        return took, took
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush().zero_()
    torch.cuda._sleep(HEAD_START)
    first.record()
    begin = time.perf_counter()
    run()
    queued = time.perf_counter() - begin
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, queued


@functools.cache
def _flush() -> Tensor:
    return torch.empty(harness.L2_BYTES, dtype=torch.uint8, device="cuda")


def distance(got: Tensor, expected: Tensor) -> float:
    """Infinite where it is not a number, which a maximum would pass over."""
    off = float((got.to(expected) - expected).norm() / expected.norm().clamp(min=1e-30))
    return off if off == off else math.inf


# --- cases ---------------------------------------------------------------------------------------


def attention_case(
    shape: Sequence[int], way: str, device: str, seconds: float, compiled: bool
) -> dict[str, Any]:
    """One shape, one of WAYS: params, work, results and left_out."""
    videos, frames, patches, heads = shape
    generator = torch.Generator().manual_seed(0)
    each = [abs(frames)] * videos
    if frames < 0:  # a third to five thirds of the average, the sum unchanged
        spread = torch.linspace(frames * 2 // 3, -frames * 2 // 3, videos).round().int()
        spread = spread[torch.randperm(videos, generator=generator)]
        each = [-frames + int(x) for x in spread]
    proxies, dim = attention.PROXIES, attention.HEAD_DIM
    tokens = [proxies + n * patches for n in each]
    qkv = torch.randn(sum(tokens), 3, heads, dim, generator=generator).bfloat16().to(device)
    grad = torch.randn(sum(tokens), heads, dim, generator=generator).bfloat16().to(device)
    offsets = torch.tensor([0, *each]).cumsum(0).int().to(device)
    forms, left_out = attention_forms(frames, each, patches, offsets, compiled)

    def step(form: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[], tuple]:
        leaf, upstream = qkv.to(dtype).requires_grad_(), grad.to(dtype)
        held = functools.cache(form)  # for backward alone

        def run() -> tuple[Tensor, ...]:
            if way == "forward":
                with torch.no_grad():
                    return (form(leaf),)
            if way == "backward":
                return torch.autograd.grad(held(leaf), leaf, upstream, retain_graph=True)
            out = form(leaf)
            return out.detach(), *torch.autograd.grad(out, leaf, upstream)

        return run

    expected = step(forms["eager"], torch.float32)()
    contestants = {name: step(form, torch.bfloat16) for name, form in forms.items()}
    # What is compiled gives its buffers away in backward, unless told that there will be another.
    keep = torch._functorch.config.patch(donated_buffer=False)
    with keep if way == "backward" else contextlib.nullcontext():
        compared = compare(contestants, expected, left_out, device, seconds)
    pairs = sum(
        n * patches * (patches + proxies) + proxies * t for n, t in zip(each, tokens, strict=True)
    )
    products, tensors = WAYS[way]
    return {
        "params": {"shape": list(shape), "way": way, "dtype": "bfloat16", "device": device},
        "work": {
            "flop": products * 2 * dim * heads * pairs,
            "bytes": tensors * sum(tokens) * heads * dim * qkv.itemsize,
        },
        **compared,
    }


def attention_forms(
    frames: int, each: Sequence[int], patches: int, offsets: Tensor, compiled: bool
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, str]]:
    """Functions of qkv [T, 3, H, D], and why others are left out; frames < 0: a ragged batch."""
    tokens = [attention.PROXIES + n * patches for n in each]

    def per_video(attend: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        if frames > 0:
            return lambda x: attend(x.unflatten(0, (len(each), -1)), frames, patches).flatten(0, 1)
        return lambda x: torch.cat(
            [attend(v[None], n, patches)[0] for v, n in zip(x.split(tokens), each, strict=True)]
        )

    forms = {
        "eager": per_video(attention.eager),
        "two SDPA": per_video(attention.two_sdpa),
        "masked SDPA": per_video(attention.masked_sdpa),
    }
    left_out = {}
    if not compiled:
        left_out["FlexAttention"] = left_out["compiled eager"] = "nothing is compiled at tiny sizes"
    elif frames > 0:
        forms["FlexAttention"] = per_video(attention.flex_attention)
        forms["compiled eager"] = per_video(attention.FORMS["compiled eager"])
    else:
        packed = functools.cache(lambda: packed_flex(offsets, sum(tokens), patches))
        forms["FlexAttention"] = lambda x: packed()(x)
        left_out["compiled eager"] = "a minute of compiling for every length"
    forms["ours"] = lambda x: proxy_attention(x, offsets, attention.PROXIES, patches)
    return forms, left_out


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


def loss_case(kind: str, n: int, device: str, seconds: float, compiled: bool) -> dict[str, Any]:
    """One loss and size, forward and backward: params, work, results and left_out."""
    sources = 4 if kind == "vsc_fc" else 2
    features = [x.to(device) for x in unit_rows(sources, n, losses.DEPTH, torch.bfloat16)]
    scale = torch.tensor(100.0, device=device)
    # Whatever has not enough memory says so itself, so none is left out for its size.
    left_out = losses.left_out(kind, n, compiled, sys.maxsize)
    # In chunks, for logits of the largest sizes would not fit; few GPUs are quick in fp64.
    wide = torch.float64 if n <= 16384 else torch.float32
    expected = loss_step(losses.FORMS[kind]["chunked"], *[x.to(wide) for x in (*features, scale)])
    contestants = {
        name: functools.partial(loss_step, form, *features, scale)
        for name, form in losses.FORMS[kind].items()
        if name not in left_out
    }
    products = 3 if kind == "vsc_fc" else 1
    return {
        "params": {"loss": kind, "n": n, "dtype": "bfloat16", "device": device},
        "work": {
            "flop": 8 * products * n * n * losses.DEPTH,
            "bytes": 3 * sources * n * losses.DEPTH * features[0].itemsize,
        },
        **compare(contestants, expected, left_out, device, seconds),
    }


def unit_rows(count: int, n: int, depth: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, n, depth, generator=generator)
    return list(F.normalize(rows, dim=-1).to(dtype))


def loss_step(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in given]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


# --- small sizes for a sanitizer -----------------------------------------------------------------


def check(device: str) -> None:
    """Our kernels forward and backward against float64 on the CPU, which a sanitizer leaves alone.

    Raises AssertionError if they are off.
    """
    for dtype, dim, patches in CHECKED_ATTENTION:
        check_attention(dtype, dim, patches, device)
    for dtype, n, depth in CHECKED_LOSSES:
        check_loss("symmetric", 2, dtype, n, depth, device)
        check_loss("vsc_fc", 4, dtype, n, depth, device)


def check_attention(dtype: torch.dtype, dim: int, patches: int, device: str) -> None:
    """Two frames, none, and one, with 4 proxies and two heads."""
    offsets, proxies = torch.tensor([0, 2, 2, 3], dtype=torch.int32), 4
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * proxies + 3 * patches
    qkv = torch.randn(tokens, 3, 2, dim, generator=generator).to(dtype)
    grad = torch.randn(tokens, 2, dim, generator=generator).to(dtype)

    def run(form: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        out = form(leaf, offsets.to(x.device), proxies, patches)
        return out.detach(), *torch.autograd.grad(out, leaf, grad.to(x))

    expected = run(proxy_attention_reference, qkv.double())
    name = f"attention {dtype} D={dim} L={patches}"
    check_result(name, run(proxy_attention, qkv.to(device)), expected, dtype)


def check_loss(
    kind: str, sources: int, dtype: torch.dtype, n: int, depth: int, device: str
) -> None:
    given = [*unit_rows(sources, n, depth, dtype), torch.tensor(100.0)]
    expected = loss_step(losses.FORMS[kind]["chunked"], *[x.double() for x in given])
    got = loss_step(losses.FORMS[kind]["ours"], *[x.to(device) for x in given])
    check_result(f"{kind} {dtype} n={n} D={depth}", got, expected, dtype)


def check_result(
    name: str, got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype
) -> None:
    error = max(itertools.starmap(distance, zip(got, expected, strict=True)))
    allowed = 1e-4 if dtype == torch.float32 else MOST_ERROR
    print(f"{name}: off by {error:.1e}", flush=True)
    assert error <= allowed, f"{name} is off by {error:.1e}, allowed {allowed:.1e}"


# --- results -------------------------------------------------------------------------------------

HEADS = ["case", "eager ms", "best peer ms", "ours ms", "host ms", "best peer / ours", "floor ms"]
HEADS += ["ours / floor", "TFLOP/s", "TB/s", "eager MiB", "ours MiB"]


def table(cases: dict[str, dict]) -> str:
    """Ours against the best peer and the floor, a line a case; percentages are of the ceilings."""
    lines = [
        f"- {'; '.join(f'{fact} {value}' for fact, value in row.items())}"
        for row in report.machines(cases.values())
    ]
    lines += ["", f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    lines += [f"| {' | '.join(line(name, record))} |" for name, record in cases.items()]
    absent = collections.defaultdict(list)
    for name, record in cases.items():
        for contestant, reason in record["left_out"].items():
            absent[contestant, reason].append(name)
    lines += [""] * bool(absent)
    lines += [
        f"- without {who} ({why}): {', '.join(names)}" for (who, why), names in absent.items()
    ]
    return "\n".join(lines)


def line(name: str, record: dict[str, Any]) -> list[str]:
    results = record["results"]
    ours, best = results.get("ours"), report.best_peer(results)
    eager, peer = results.get(report.baseline(results)), results.get(best)
    cells = [
        name,
        report.number(eager and eager["median_ms"]),
        f"{peer['median_ms']:.3g} ({best})" if peer else "–",
        f"**{ours['median_ms']:.3g}**" if ours else "**fails**",
    ]
    if not ours:
        return cells + ["–"] * (len(HEADS) - len(cells))
    work, shares = record["work"], report.shares(record, ours)
    share, seconds = max(shares.values()), ours["median_ms"] / 1e3
    return [
        *cells,
        f"{ours['host_ms']:.3g}",
        report.number(peer and peer["median_ms"] / ours["median_ms"]),
        f"{ours['median_ms'] * share:.3g}",
        report.number(1 / share),
        f"{work['flop'] / seconds / 1e12:.3g} ({shares['product']:.0%})",
        f"{work['bytes'] / seconds / 1e12:.3g} ({shares['copy']:.0%})",
        report.number(eager and eager["peak_mib"]),
        report.number(ours["peak_mib"]),
    ]


def failures(cases: dict[str, dict]) -> None:
    """Ends the program with 1 if ours failed in any case."""
    failed = [name for name, record in cases.items() if "ours" not in record["results"]]
    if failed:
        sys.exit(f"gpu: ours failed in {', '.join(failed)}; the reasons are above")


def is_measured(record: dict[str, Any] | None, machine: dict[str, Any]) -> bool:
    """Whether a case needs no measuring: the same code, GPU and torch gave its results."""
    if record is None or "ours" not in record["results"]:
        return False
    commit = machine["commit"]
    alike = all(record["machine"].get(x) == machine.get(x) for x in ("commit", "gpu", "torch"))
    return alike and bool(commit) and not commit.endswith("+changes")


# --- the program ---------------------------------------------------------------------------------


def all_cases(
    parts: Sequence[str], tiny: bool, device: str, seconds: float
) -> dict[str, Callable[[], dict]]:
    cases: dict[str, Callable[[], dict]] = {}
    rest = (device, seconds, not tiny)
    if "attention" in parts:
        for name, shape in (TINY_SHAPES if tiny else SHAPES).items():
            for way in WAYS:
                cases[f"{name} {way}"] = functools.partial(attention_case, shape, way, *rest)
    if "loss" in parts:
        for kind in ("symmetric", "vsc_fc"):
            for n in TINY_LOSS_SIZES if tiny else LOSS_SIZES:
                cases[f"{kind} n={n}"] = functools.partial(loss_case, kind, n, *rest)
    return cases


def measure(cases: dict[str, Callable[[], dict]], out: Path, device: str) -> None:
    """Measures what is not measured yet, one case after another, and prints the table of all."""
    machine = harness.machine() | {"ceilings": harness.ceilings(device)}
    known = json.loads(out.read_text())["cases"] if out.exists() else {}
    known = {k: r for k, r in known.items() if r["machine"].get("gpu") == machine.get("gpu")}
    for name, run in cases.items():
        if is_measured(known.get(name), machine):
            print(f"{name}: measured before", flush=True)
            continue
        # After eight shapes of one function torch would run it uncompiled, with a mere warning.
        torch.compiler.reset()
        try:
            found = run()
        except Exception as reason:
            found = {"results": {}, "left_out": {"ours": harness.why(reason)}}
        known[name] = {"suite": "gpu", "case": name, "machine": machine, **found}
        harness.write(out, {"cases": known})
        ours = found["results"].get("ours")
        took = f"{ours['median_ms']:.3f} ms" if ours else f"fails: {found['left_out']['ours']}"
        print(f"{name}: ours {took}", flush=True)
    print(table(known))
    failures({name: known[name] for name in cases})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (attention loss)")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name has it")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing a case (%(default)s)")
    given = parser.parse_args(arguments)
    parts = given.parts or ["attention", "loss"]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    if parts == ["table"]:
        if not given.out.exists():
            sys.exit(f"{given.out} holds no results: run `bench/gpu.sh` where a GPU is")
        cases = json.loads(given.out.read_text())["cases"]
        print(table(cases))
        return failures(cases)
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA GPU is seen; --dry-run runs tiny sizes on the CPU")
    device = "cpu" if given.dry_run else "cuda"
    if "check" in parts:
        return check(device)
    seconds = 0 if given.dry_run else given.seconds
    cases = all_cases(parts, given.dry_run, device, seconds)
    cases = {name: run for name, run in cases.items() if re.search(given.only, name)}
    if not cases:
        parser.error(f"no case of {' and '.join(parts)} has {given.only!r} in its name")
    measure(cases, given.out, device)


if __name__ == "__main__":
    main()
