"""Losses over the features of all ranks.

They follow one rule: each rank returns the loss of the whole batch, and the gradient that reaches
a rank's features is that of the *sum* of those equal values: the number of ranks times the loss's
gradient. The mean that data parallelism takes over ranks then gives exactly the gradient of the
loss in a single process, for the encoders and logit_scale alike.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipvip.distributed import rank, world_size
from clipvip.ops import _native, pairwise_logsumexp
from clipvip.ops.pairwise_logsumexp import block_forward, block_gradients, without_autocast

# Features of all ranks up to so many bytes are brought by one collective. More of them travel a
# ring, and a rank holds two others' at a time; that takes a step for each rank, whatever it moves.
GATHERED_BYTES = 1 << 29


# Renamed in PyTorch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over ranks, differentiable by the rule above."""
    return tensor if world_size() == 1 else _AllReduce.apply(tensor)


def sharded_logsumexp(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int = 0, *, backend: str = "native"
) -> tuple[Tensor, Tensor, Tensor]:
    """`clipvip.ops.pairwise_logsumexp` where rows and columns are those of all ranks.

    The matrix has every rank's rows and every rank's columns; each rank gives its own, which may
    be of any number, and gets back its own rows' and columns' statistics:

        row_lse [n], over the columns of all ranks; col_lse [m], over the rows of all ranks;
        positive [n], where the positive of a rank's row i is its own column i + diagonal.

    A rank computes its rows against every rank's columns: n·M·D products of the N·M·D, each
    done once; M is the columns of all ranks. What other ranks' rows say about its columns comes
    back as sums.

    Bytes that a rank receives, of W ranks in rings, each times (W - 1)/W: forward M·D·itemsize, the
    features, and 16·M, two all-reduces of the columns' statistics; backward the features again,
    4·M, and M·D·4, the gradients of features, which are added on their way (in fp32; whole, not
    times (W - 1)/W, where features travel a ring). Besides, 8·W of everyone's numbers. Features
    travel while the rank's own tile is computed, in a ring also while each next one is.

    Memory of a rank is O((n + m)·D + M) and what it holds of others. Features of all up to
    GATHERED_BYTES: these, and in backward their gradients in fp32, once whole and once of the
    tile that is added; so up to 3 · GATHERED_BYTES for fp32 and 5 for bf16 features, and a copy
    more where ranks give unequal numbers. Beyond, in a ring: two other ranks' features, and in
    backward three ranks' gradients.

    Raises what pairwise_logsumexp does; a rank that is lost is a RuntimeError on the others.
    """
    if world_size() == 1:
        return pairwise_logsumexp(a, b, scale, diagonal, backend=backend)
    _native.refuse_tangents("sharded_logsumexp", a, b, scale)
    with without_autocast(a, b, scale, diagonal, backend) as (a, b):
        return _Sharded.apply(a, b, scale, diagonal, backend)


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
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, diagonal: int, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = _Layout(b)
        rows: list[Tensor] = []
        for step, (span, part) in enumerate(_parts(b, layout)):
            own = step == 0
            row, column, at = block_forward(a, part, scale, diagonal if own else len(part), backend)
            if own:
                columns = column.new_empty(layout.total)
                positive = at
            columns[span.start : span.stop] = column
            rows.append(row)
        row_lse = torch.stack(rows).logsumexp(0)
        col_lse = _logsumexp_over_ranks(columns)
        ctx.save_for_backward(a, b, scale, row_lse, col_lse)
        ctx.layout, ctx.diagonal, ctx.backend = layout, diagonal, backend
        return row_lse, col_lse[layout.own.start : layout.own.stop].clone(), positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_row: Tensor, grad_col: Tensor, grad_positive: Tensor) -> Any:
        a, b, scale, row_lse, col_lse = ctx.saved_tensors
        layout = ctx.layout
        grad_cols = torch.cat(_gather(grad_col.contiguous(), layout))
        nothing = torch.zeros_like(grad_positive)
        exact = torch.promote_types(a.dtype, torch.float32)
        grad_a, grad_scale = torch.zeros_like(a, dtype=exact), torch.zeros_like(scale)
        home = (_InRing if layout.ring else _InOne)(layout, b, exact)
        for step, (span, part) in enumerate(_parts(b, layout)):
            own, here = step == 0, slice(span.start, span.stop)
            part_a, part_b, part_scale = block_gradients(
                *(a, part, scale, ctx.diagonal if own else len(part), row_lse, col_lse[here]),
                *(grad_row, grad_cols[here], grad_positive if own else nothing, ctx.backend),
            )
            grad_a += part_a
            grad_scale += part_scale
            home.add(span, part_b.to(exact))
        return grad_a.to(a.dtype), home.total().to(b.dtype), grad_scale, None, None


class _Layout:
    """Whose columns are where, among those of all ranks."""

    def __init__(self, columns: Tensor) -> None:
        own = torch.tensor([len(columns)], device=columns.device)
        counts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(counts, own)
        self.counts: list[int] = torch.cat(counts).tolist()
        ends = list(itertools.accumulate(self.counts))
        self.spans = [range(end - n, end) for end, n in zip(ends, self.counts, strict=True)]
        self.own = self.spans[rank()]
        self.total = ends[-1]
        row = math.prod(columns.shape[1:]) * columns.element_size()
        self.ring = self.total * row > GATHERED_BYTES


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    """-inf where it is that on all."""
    most = values.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    limits = torch.finfo(most.dtype)
    finite = most.clamp(limits.min, limits.max)  # as inf - inf is NaN
    return _sum((values - finite).exp()).log() + finite


def _gather(tensor: Tensor, layout: _Layout) -> list[Tensor]:
    """Every rank's rows."""
    parts, work = _start_gather(tensor, layout)
    work.wait()
    return [part[:count] for part, count in zip(parts, layout.counts, strict=True)]


def _start_gather(tensor: Tensor, layout: _Layout) -> tuple[Tensor, Any]:
    """[world, most, …], to come; ranks that have fewer rows than others send some of no
    meaning."""
    tensor = _padded(tensor, max(layout.counts))
    parts = tensor.new_empty(len(layout.counts), *tensor.shape)
    return parts, dist.all_gather(list(parts.unbind()), tensor, async_op=True)


def _padded(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


def _parts(tensor: Tensor, layout: _Layout) -> Iterator[tuple[range, Tensor]]:
    """(where they are, columns) until all were given, one's own first."""
    if layout.ring:
        yield from _around(tensor.contiguous(), layout)
        return
    parts, work = _start_gather(tensor, layout)
    yield layout.own, tensor
    work.wait()
    if min(layout.counts) == max(layout.counts):
        whole = parts.flatten(0, 1)
    else:
        whole = torch.cat([p[:n] for p, n in zip(parts, layout.counts, strict=True)])
    for others in (range(layout.own.start), range(layout.own.stop, layout.total)):
        if others:
            yield others, whole[others.start : others.stop]


def _around(part: Tensor, layout: _Layout) -> Iterator[tuple[range, Tensor]]:
    me, world = rank(), len(layout.spans)
    for step in range(world):
        owner = (me - step) % world
        coming = None
        if step < world - 1:
            following = part.new_empty(layout.counts[owner - 1], *part.shape[1:])
            coming = _start_pass_on(part, following, tag=0)
        yield layout.spans[owner], part
        if coming is not None:
            _wait(coming)
            part = following


def _start_pass_on(given: Tensor, taken: Tensor, tag: int) -> list[Any]:
    """Sends to the next rank of the ring what is given, and receives from the one before."""
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, given, after, tag=tag),
            dist.P2POp(dist.irecv, taken, before, tag=tag),
        ]
    )


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


class _InOne:
    """Sums what all ranks say about each rank's rows, there, by one collective."""

    def __init__(self, layout: _Layout, like: Tensor, dtype: torch.dtype) -> None:
        self.layout = layout
        self.whole = like.new_empty(layout.total, *like.shape[1:], dtype=dtype)

    def add(self, span: range, part: Tensor) -> None:
        self.whole[span.start : span.stop] = part

    def total(self) -> Tensor:
        counts = self.layout.counts
        most = max(counts)
        if min(counts) < most:
            parts = [_padded(part, most) for part in self.whole.split(counts)]
            self.whole = torch.cat(parts)
        own = self.whole.new_empty(most, *self.whole.shape[1:])
        _reduce_scatter(own, self.whole)
        return own[: len(self.layout.own)]


class _InRing:
    """The same by an account of each rank's rows that follows them, one step behind, and comes
    home with the last."""

    def __init__(self, layout: _Layout, like: Tensor, dtype: torch.dtype) -> None:
        self.layout = layout
        self.like = like
        self.dtype = dtype
        self.coming: list[Any] = []
        self.account: Tensor | None = None
        self.sent: Tensor | None = None
        self.owner = rank()

    def add(self, span: range, part: Tensor) -> None:
        _wait(self.coming)
        if self.account is not None:
            part = part + self.account
        self.sent = part.contiguous()  # held until it has gone
        self.owner = (self.owner - 1) % len(self.layout.counts)
        following = self.layout.counts[self.owner], *self.like.shape[1:]
        self.account = self.like.new_empty(following, dtype=self.dtype)
        self.coming = _start_pass_on(self.sent, self.account, tag=1)

    def total(self) -> Tensor:
        _wait(self.coming)
        assert self.account is not None
        return self.account
