"""Losses over the features of all ranks; `clipvip.losses` calls this with sharded=True.

One rule holds throughout: each rank returns the loss of the whole batch, and the gradient that
reaches a rank's features is that of the *sum* of those equal values, so the number of ranks times
the gradient of the loss. The mean that data parallelism takes over ranks is then exactly the
gradient of the loss in a single process, for the encoders and logit_scale alike.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipvip.distributed import rank, world_size
from clipvip.inputs import send
from clipvip.ops import _native, pairwise_logsumexp
from clipvip.ops.pairwise_logsumexp import block_forward, block_gradients, without_autocast

# Renamed in PyTorch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks, differentiable by the rule above."""
    return tensor if world_size() == 1 else _AllReduce.apply(tensor)


def gather_counts(counts: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return, for each of the numbers that this rank passes, those that all ranks pass.

    The host waits until `device`, through which they travel, has finished all earlier work.
    """
    if world_size() == 1:
        return [[count] for count in counts]
    own = send(torch.tensor(counts), device)
    every = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(every, own)
    return torch.stack(every, 1).tolist()


def sharded_logsumexp(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    diagonal: int = 0,
    *,
    counts: Sequence[int],
    backend: str = "native",
) -> tuple[Tensor, Tensor, Tensor]:
    """`clipvip.ops.pairwise_logsumexp` over the rows and columns of all ranks.

    Each rank passes its own rows a [n, D] and columns b [m, D], any number of them, and gets the
    statistics of these in the matrix of all N rows and M columns:

        row_lse [n], over the columns of all ranks; col_lse [m], over the rows of all ranks;
        positive [n], where the positive of a rank's row i is its own column i + diagonal.

    counts: the number of columns of each rank, see `gather_counts`.

    A rank computes its rows against every rank's columns: n·M·D products of the N·M·D, each
    computed once. What other ranks' rows contribute to its columns arrives as sums.

    Bytes that a rank receives, among W ranks whose collectives run in rings, each times (W - 1)/W:
    forward M·D·itemsize for the features and 16·M for two all-reduces of the columns' statistics,
    after 8·W for each count; backward the features again, 4·M, and M·D·4 for the gradients of
    features, summed in fp32. Features travel while the rank computes its own tile.

    Memory of a rank is O(M·D): the features of all ranks and, in backward, their gradients in
    fp32, twice while a tile is added, and a copy if ranks pass unequal numbers. For 32,768 clips
    at D = 512, all of it is below 0.3 GB.
    Raises what pairwise_logsumexp raises, and ValueError if this rank's count is not m. If a rank
    dies, the others raise RuntimeError.
    """
    if world_size() == 1:
        return pairwise_logsumexp(a, b, scale, diagonal, backend=backend)
    _native.refuse_tangents("sharded_logsumexp", a, b, scale)
    with without_autocast(a, b, scale, diagonal, backend) as (a, b):
        return _Sharded.apply(a, b, scale, diagonal, counts, backend)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _sum(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum(gradient)


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        diagonal: int,
        counts: Sequence[int],
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = _Layout(b, counts)
        rows: list[Tensor] = []
        for span, part in _parts(b, layout):
            own = span == layout.own
            row, column, at = block_forward(a, part, scale, diagonal if own else len(part), backend)
            if own:
                columns = column.new_empty(layout.total)
                positive = at
            columns[span] = column
            rows.append(row)
        row_lse = torch.stack(rows).logsumexp(0)
        col_lse = _logsumexp_over_ranks(columns)
        ctx.save_for_backward(a, b, scale, row_lse, col_lse)
        ctx.layout, ctx.diagonal, ctx.backend = layout, diagonal, backend
        return row_lse, col_lse[layout.own].clone(), positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_row: Tensor, grad_col: Tensor, grad_positive: Tensor) -> Any:
        a, b, scale, row_lse, col_lse = ctx.saved_tensors
        layout = ctx.layout
        grad_cols = _start_gather(grad_col, layout)()
        no_positive = torch.zeros_like(grad_positive)
        exact = torch.promote_types(a.dtype, torch.float32)
        grad_a, grad_scale = torch.zeros_like(a, dtype=exact), torch.zeros_like(scale)
        grad_b = b.new_empty(layout.total, *b.shape[1:], dtype=exact)
        for span, part in _parts(b, layout):
            own = span == layout.own
            part_a, part_b, part_scale = block_gradients(
                *(a, part, scale, ctx.diagonal if own else len(part), row_lse, col_lse[span]),
                *(grad_row, grad_cols[span], grad_positive if own else no_positive),
                backend=ctx.backend,
            )
            grad_a += part_a
            grad_scale += part_scale
            grad_b[span] = part_b
        own_b = _sum_to_owners(grad_b, layout)
        return grad_a.to(a.dtype), own_b.to(b.dtype), grad_scale, None, None, None


class _Layout:
    """Where each rank's columns are among those of all ranks."""

    def __init__(self, columns: Tensor, counts: Sequence[int]) -> None:
        if counts[rank()] != len(columns):
            raise ValueError(f"rank {rank()} has {len(columns)} columns, but counts are {counts}")
        self.counts = list(counts)
        self.total, self.most = sum(counts), max(counts)
        before = sum(counts[: rank()])
        self.own = slice(before, before + len(columns))


def _parts(tensor: Tensor, layout: _Layout) -> Iterator[tuple[slice, Tensor]]:
    """Yield all ranks' columns and where they are: the rank's own first, while others travel."""
    gathered = _start_gather(tensor, layout)
    yield layout.own, tensor
    whole = gathered()
    for others in (slice(0, layout.own.start), slice(layout.own.stop, layout.total)):
        if others.start < others.stop:
            yield others, whole[others]


def _start_gather(tensor: Tensor, layout: _Layout) -> Callable[[], Tensor]:
    """Start to gather every rank's rows; return a function that waits for them: [total, …]."""
    tensor = _padded(tensor, layout.most)
    parts = tensor.new_empty(len(layout.counts), *tensor.shape)
    work: Any = dist.all_gather(list(parts.unbind()), tensor, async_op=True)

    def gathered() -> Tensor:
        work.wait()
        if min(layout.counts) == layout.most:
            return parts.flatten(0, 1)
        return torch.cat([part[:n] for part, n in zip(parts, layout.counts, strict=True)])

    return gathered


def _sum_to_owners(whole: Tensor, layout: _Layout) -> Tensor:
    """Sum [total, …] over ranks and return the rank's own rows of the sum."""
    if min(layout.counts) < layout.most:
        whole = torch.cat([_padded(part, layout.most) for part in whole.split(layout.counts)])
    own = whole.new_empty(layout.most, *whole.shape[1:])
    _reduce_scatter(own, whole)
    return own[: layout.counts[rank()]]


def _padded(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    """Log-sum-exp over ranks, elementwise; -inf where all ranks have -inf."""
    most = values.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    limits = torch.finfo(most.dtype)
    finite = most.clamp(limits.min, limits.max)  # as inf - inf is NaN
    return _sum((values - finite).exp()).log() + finite
