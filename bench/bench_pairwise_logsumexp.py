"""Contrastive losses against what PyTorch offers: `pytest bench/bench_pairwise_logsumexp.py -s`.

Forward and backward of the symmetric loss and of vsc_fc as a whole, D = 512, scale 100.
Writes bench/results/pairwise_logsumexp-*.json.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipvip.losses import contrastive_loss, omnisource_loss

DEPTH, CHUNK = 512, 1024
CASES = {
    **{f"symmetric-fp32-{n}": dict(n=n, dtype="float32") for n in (1024, 2048, 4096, 8192, 16384)},
    **{f"symmetric-bf16-{n}": dict(n=n, dtype="bfloat16") for n in (1024, 4096, 16384)},
    **{f"vsc_fc-fp32-{n}": dict(n=n, dtype="float32") for n in (1024, 2048, 4096, 8192)},
}


def naive(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(a.dtype) * (a @ b.T)
    own = torch.arange(len(a), device=a.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def linear_cross_entropy(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    own = torch.arange(len(a), device=a.device)
    scaled = scale.to(a.dtype) * a
    return F.linear_cross_entropy(scaled, b, own) + F.linear_cross_entropy(b, scaled, own)


def chunked(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Chunks of rows whose logits are computed again in backward; columns by logaddexp."""

    def part(first: int, rows: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = (scale.to(rows.dtype) * (rows @ b.T)).float()
        own = torch.arange(first, first + len(rows), device=rows.device)[:, None]
        return logits.logsumexp(1), logits.logsumexp(0), logits.gather(1, own).squeeze(1)

    row_lse, positive, col_lse = [], [], None
    for first in range(0, len(a), CHUNK):
        rows = a[first : first + CHUNK]
        lse, columns, own = checkpoint(part, first, rows, b, scale, use_reentrant=False)
        row_lse.append(lse)
        positive.append(own)
        col_lse = columns if col_lse is None else torch.logaddexp(col_lse, columns)
    return (torch.cat(row_lse) + col_lse - 2 * torch.cat(positive)).mean()


def naive_vsc_fc(v: Tensor, s: Tensor, f: Tensor, c: Tensor, scale: Tensor) -> Tensor:
    """As the formula is written: one softmax over own subtitle and all others of both kinds."""
    own = torch.arange(len(v), device=v.device)
    subtitles, captions = scale * v @ s.T, scale * v @ c.T
    diagonal = torch.eye(len(v), dtype=torch.bool, device=v.device)
    loss = F.cross_entropy(subtitles.T, own) + F.cross_entropy(captions.T, own)
    for positive, other in ((subtitles, captions), (captions, subtitles)):
        both = torch.cat([positive, other.masked_fill(diagonal, -torch.inf)], 1)
        loss = loss + F.cross_entropy(both, own)
    return loss + naive(f, c, scale)


def measure(loss: str, n: int, dtype: str, seconds: float = 8.0) -> dict[str, Any]:
    """Times every contestant on one size, in this process."""
    torch.manual_seed(0)
    sources = 4 if loss == "vsc_fc" else 2
    features = [F.normalize(torch.randn(n, DEPTH), dim=-1) for _ in range(sources)]
    features = [x.to(getattr(torch, dtype)) for x in features]
    scale = torch.tensor(100.0)

    def step(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in given]
        value = function(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    if loss == "vsc_fc":
        functions: dict[str, Callable[..., Tensor]] = {
            "naive": naive_vsc_fc,
            "ours": omnisource_loss,
        }
    else:
        functions = {
            "naive": naive,
            "chunked": chunked,
            "linear_cross_entropy": linear_cross_entropy,
            "ours": contrastive_loss,
        }
    # The formula in the next wider type; float64 logits of the largest sizes would not fit.
    wide = torch.float64 if n <= 4096 else torch.float32
    exact = step(functions["naive"], *[x.to(wide) for x in (*features, scale)])
    results = harness.compare(
        {name: functools.partial(step, f, *features, scale) for name, f in functions.items()},
        expected=exact,
        # bf16 logits near 100 are a quarter apart, which is what the eager forms compute with.
        tolerance=1e-4 if dtype == "float32" else 0.5,
        seconds=seconds,
        min_rounds=3,
    )
    return {"machine": harness.machine(), "results": results}


@pytest.mark.parametrize("malloc", ["default", "tuned"])
@pytest.mark.parametrize("case", CASES)
def test_pairwise_logsumexp(case: str, malloc: str, benchmark) -> None:
    arguments = {"loss": case.split("-")[0], **CASES[case]}
    record = benchmark.pedantic(
        harness.in_process, args=(malloc, "bench_pairwise_logsumexp", "measure"), kwargs=arguments
    )
    record = {"case": case, **arguments, **record}
    benchmark.extra_info.update(record)
    harness.save(f"pairwise_logsumexp-{case}-{malloc}", record)
    print(f"\n{case}, {malloc} malloc\n{harness.table(record['results'])}")
