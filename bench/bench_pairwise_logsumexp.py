"""Contrastive losses against their alternatives: `clipvip bench ops --only logsumexp`.

Forward and backward of the whole symmetric loss and of the whole vsc_fc, D = 512, scale 100.
Records: ops-pairwise_logsumexp-*.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import peers
import psutil
import pytest
import records
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipvip.losses import contrastive_loss, omnisource_loss

DEPTH, CHUNK = 512, 1024
SIZES: dict[str, dict[str, Any]] = {
    **{f"symmetric-fp32-{n}": dict(n=n, dtype="float32") for n in (1024, 2048, 4096, 8192, 16384)},
    **{f"symmetric-bf16-{n}": dict(n=n, dtype="bfloat16") for n in (1024, 4096, 16384)},
    **{f"vsc_fc-fp32-{n}": dict(n=n, dtype="float32") for n in (1024, 2048, 4096, 8192)},
}
ON_GPU = {
    f"{loss}-bf16-{n}": dict(n=n, dtype="bfloat16", device="cuda", compiled=n in (16384, 65536))
    for loss in ("symmetric", "vsc_fc")
    for n in (1024 * 2**i for i in range(8))
}
CASES = {
    case: {"loss": case.split("-")[0], **size}
    for sizes in (SIZES, ON_GPU)
    for case, size in records.each_way(sizes).items()
}
QUICK = {
    case: {"compiled": False}
    for case in ("symmetric-fp32-1024-default", "vsc_fc-fp32-1024-default")
} | {f"{loss}-bf16-1024-cuda": {"compiled": False} for loss in ("symmetric", "vsc_fc")}


def naive(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(a.dtype) * (a @ b.T)
    own = torch.arange(len(a), device=a.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)


def gathered(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Loss of open_clip with local_loss and gather_with_grad, here on a single rank.

    Each direction computes its own product: local rows with all features of the other kind.
    """
    own, scale = torch.arange(len(a), device=a.device), scale.to(a.dtype)
    return F.cross_entropy(scale * a @ b.T, own) + F.cross_entropy(scale * b @ a.T, own)


def linear_cross_entropy(a: Tensor, b: Tensor, scale: Tensor, chunked: bool = False) -> Tensor:
    own = torch.arange(len(a), device=a.device)
    scaled = scale.to(a.dtype) * a
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    loss = functools.partial(F.linear_cross_entropy, **options)
    return loss(scaled, b, own) + loss(b, scaled, own)


def chunked(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Loss in chunks of rows whose logits are recomputed in backward; columns use logaddexp."""

    def part(first: int, rows: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = widened(scale.to(rows.dtype) * (rows @ b.T))
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


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def naive_vsc_fc(v: Tensor, s: Tensor, f: Tensor, c: Tensor, scale: Tensor) -> Tensor:
    """Loss as its formula is written: one softmax over the own subtitle and all others of both
    kinds."""
    own = torch.arange(len(v), device=v.device)
    subtitles, captions = scale * v @ s.T, scale * v @ c.T
    diagonal = torch.eye(len(v), dtype=torch.bool, device=v.device)
    loss = F.cross_entropy(subtitles.T, own) + F.cross_entropy(captions.T, own)
    for positive, other in ((subtitles, captions), (captions, subtitles)):
        both = torch.cat([positive, other.masked_fill(diagonal, -torch.inf)], 1)
        loss = loss + F.cross_entropy(both, own)
    return loss + naive(f, c, scale)


def chunked_vsc_fc(v: Tensor, s: Tensor, f: Tensor, c: Tensor, scale: Tensor) -> Tensor:
    """Loss of `naive_vsc_fc`, computed for one chunk of the videos' rows at a time."""

    def part(first: int, rows: Tensor, s: Tensor, c: Tensor, scale: Tensor) -> list[Tensor]:
        own = torch.arange(first, first + len(rows), device=rows.device)[:, None]
        scale = scale.to(rows.dtype)
        logits = [widened(scale * (rows @ texts.T)) for texts in (s, c)]
        found = []
        for positive, other in (logits, logits[::-1]):
            both = torch.cat([positive, other.scatter(1, own, -torch.inf)], 1)
            loss = both.logsumexp(1) - 2 * positive.gather(1, own).squeeze(1)
            found += [loss.sum(), positive.logsumexp(0)]
        return found

    total, columns = v.new_zeros((), dtype=torch.float32), []
    for first in range(0, len(v), CHUNK):
        rows = v[first : first + CHUNK]
        with_s, s_lse, with_c, c_lse = checkpoint(
            part, first, rows, s, c, scale, use_reentrant=False
        )
        total = total + with_s + with_c
        columns = (
            [s_lse, c_lse] if not columns else list(map(torch.logaddexp, columns, (s_lse, c_lse)))
        )
    return (total + columns[0].sum() + columns[1].sum()) / len(v) + chunked(f, c, scale)


FORMS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "symmetric": {
        "naive": naive,
        "chunked": chunked,
        "gathered": gathered,
        "linear_cross_entropy": linear_cross_entropy,
        "chunked linear_cross_entropy": functools.partial(linear_cross_entropy, chunked=True),
        "compiled naive": torch.compile(naive, dynamic=False),
        "ours": contrastive_loss,
    },
    "vsc_fc": {
        "naive": naive_vsc_fc,
        "chunked": chunked_vsc_fc,
        "compiled naive": torch.compile(naive_vsc_fc, dynamic=False),
        "ours": omnisource_loss,
    },
}
# Number of n × n fp32 matrices in memory at the peak of a form.
ALIVE = {
    "symmetric": {"naive": 5, "gathered": 5, "linear_cross_entropy": 5, "compiled naive": 3},
    "vsc_fc": {"naive": 16, "compiled naive": 9},
}


def left_out(loss: str, n: int, device: str, compiled: bool) -> dict[str, str]:
    """Return the reason per contestant that is not tried on a size."""
    found = {}
    if loss == "symmetric" and not hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = f"torch {torch.__version__} lacks it"
    if loss == "symmetric" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["chunked linear_cross_entropy"] = f"torch {torch.__version__} lacks it"
    if not compiled:
        found["compiled naive"] = "not compiled here, to save time"
    # On a GPU a lack of memory is an error; on a CPU the system would kill the process.
    free = psutil.virtual_memory().available / records.GIB
    for name, matrices in ALIVE[loss].items() if device == "cpu" else ():
        gib = matrices * n * n * 4 / records.GIB
        if gib > 0.9 * free:
            found[name] = f"would need {gib:.0f} of the {free:.0f} GiB that are free"
    return found


def measure(
    loss: str,
    n: int,
    dtype: str,
    device: str = "cpu",
    compiled: bool = True,
    skipped: dict[str, str] | None = None,
    min_rounds: int = 3,
    budget: float = 8.0,
) -> dict[str, Any]:
    """Time every contestant on one size, in this process.

    skipped: reason per contestant that is left out.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    sources = 4 if loss == "vsc_fc" else 2
    features = [F.normalize(torch.randn(n, DEPTH), dim=-1) for _ in range(sources)]
    features = [x.to(device, getattr(torch, dtype)) for x in features]
    scale = torch.tensor(100.0, device=device)
    without = left_out(loss, n, device, compiled) | (skipped or {})
    # The largest sizes do not fit in float64, in which few GPUs are fast.
    wide = torch.float64 if device == "cpu" or n <= 16384 else torch.float32
    widely = [x.to(wide) for x in (*features, scale)]
    forms, others = FORMS[loss], {}
    if loss == "symmetric" and device == "cuda":
        others = {name: step(exact, *widely) for name, (_, exact) in peers.OTHER_LOSSES.items()}
        forms = forms | peers.LOSSES | {name: f for name, (f, _) in peers.OTHER_LOSSES.items()}
    products = 3 if loss == "vsc_fc" else 1
    size = getattr(torch, dtype).itemsize
    return harness.compare(
        {
            name: functools.partial(step, form, *features, scale)
            for name, form in forms.items()
            if name not in without
        },
        expected=step(FORMS[loss]["chunked"], *widely),
        expected_of=others,
        # bf16 logits near 100, with which the eager forms compute, are a quarter apart.
        tolerance=1e-4 if dtype == "float32" else 0.5,
        # one product forward, three backward; features are read and gradients written
        work={"flop": 8.0 * products * n * n * DEPTH, "bytes": 3 * sources * n * DEPTH * size},
        seconds=budget,
        min_rounds=min_rounds,
        device=device,
        left_out=without,
    )


def step(function: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    """Return the loss, and the gradients of all arguments."""
    leaves = [x.detach().requires_grad_() for x in given]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("case", CASES)
def test_pairwise_logsumexp(case: str, run_case) -> None:
    run_case(CASES[case])
