"""Row and column log-sum-exps of a similarity matrix that is never stored."""

import torch
from torch import Tensor


def pairwise_logsumexp_reference(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op means, in plain PyTorch; differentiable, any dtype and device."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    logits = scale.to(dtype) * (a.to(dtype) @ b.to(dtype).T)
    rows = torch.arange(a.shape[0], device=a.device)
    columns = rows + diagonal
    inside = (columns >= 0) & (columns < b.shape[0])
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[rows[inside], columns[inside]] = True
    positive = logits.new_full((a.shape[0],), float("-inf"))
    positive = positive.masked_scatter(inside, logits[own])
    others = logits.masked_fill(own, float("-inf"))
    return others.logsumexp(1), others.logsumexp(0), positive


def pairwise_logsumexp(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int = 0, *, backend: str = "native"
) -> tuple[Tensor, Tensor, Tensor]:
    """a [n, D], b [m, D] → row_lse [n], col_lse [m], positive [n]."""
    return pairwise_logsumexp_reference(a, b, scale, diagonal)
