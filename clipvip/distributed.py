"""What ranks exchange. Every function is the identity, or nearly, in a single process.

Losses of several ranks follow one rule: each rank returns the loss of the whole batch, and the
gradient that reaches a rank's features is that of the *sum* of those equal values: world times
the loss's gradient. The mean that data parallelism takes over ranks then gives exactly the
gradient of the single-process loss, for encoders and logit_scale alike.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipvip.ops import pairwise_logsumexp
from clipvip.ops.pairwise_logsumexp import block_forward, block_gradients, without_autocast

# Up to so many ranks each holds the features of all, which one collective brings. Beyond, they
# travel a ring and a rank holds two others' at a time.
GATHERED_RANKS = 8


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_objects(value: Any) -> list[Any]:
    """Any picklable value of every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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
    done once. What other ranks' rows say about its columns comes back as sums. A rank's memory
    is O((n + m)·D + M), M being the columns of all ranks.

    Bytes that a rank sends, m·D·itemsize being its features': forward (world - 1) times that,
    and 8·M for the columns' statistics; backward the same again, and (world - 1)·m·D·4 for the
    gradients on their way home. In a ring (more than GATHERED_RANKS ranks) and with all-gather
    alike the features travel while the tile at hand is computed.

    Raises what pairwise_logsumexp does; a rank that is lost is a RuntimeError on the others.
    """
    if world_size() == 1:
        return pairwise_logsumexp(a, b, scale, diagonal, backend=backend)
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
        counts = _counts(b)
        me = rank()
        columns: list[Any] = [None] * len(counts)
        rows: list[Tensor] = []
        for owner, part in _shards(b, counts):
            row, columns[owner], own = block_forward(
                a, part, scale, diagonal if owner == me else len(part), backend
            )
            rows.append(row)
            if owner == me:
                positive = own
        row_lse = torch.stack(rows).logsumexp(0)
        col_lse = _logsumexp_over_ranks(torch.cat(columns))
        ctx.save_for_backward(a, b, scale, row_lse, col_lse)
        ctx.counts, ctx.diagonal, ctx.backend = counts, diagonal, backend
        return row_lse, col_lse.split(counts)[me].clone(), positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_row: Tensor, grad_col: Tensor, grad_positive: Tensor) -> Any:
        a, b, scale, row_lse, col_lse = ctx.saved_tensors
        counts, me = ctx.counts, rank()
        col_lses = col_lse.split(counts)
        grad_cols = _gather(grad_col.contiguous(), counts)
        nothing = torch.zeros_like(grad_positive)
        exact = torch.promote_types(a.dtype, torch.float32)
        grad_a, grad_scale = torch.zeros_like(a, dtype=exact), torch.zeros_like(scale)
        home = _Homeward(counts, b, exact)
        for owner, part in _shards(b, counts):
            own = owner == me
            part_a, part_b, part_scale = block_gradients(
                *(a, part, scale, ctx.diagonal if own else len(part), row_lse, col_lses[owner]),
                *(grad_row, grad_cols[owner], grad_positive if own else nothing, ctx.backend),
            )
            grad_a += part_a
            grad_scale += part_scale
            home.add(owner, part_b.to(exact))
        return grad_a.to(a.dtype), home.total().to(b.dtype), grad_scale, None, None


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _counts(tensor: Tensor) -> list[int]:
    """Every rank's number of rows."""
    own = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    return torch.cat(counts).tolist()


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    """-inf where it is that on all."""
    most = values.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    finite = most.clamp(min=torch.finfo(most.dtype).min)
    return _sum((values - finite).exp()).log() + finite


def _gather(tensor: Tensor, counts: list[int]) -> list[Tensor]:
    """Every rank's rows. Ranks that have fewer than others send some of no meaning."""
    parts, work = _start_gather(tensor, counts)
    work.wait()
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def _start_gather(tensor: Tensor, counts: list[int]) -> tuple[list[Tensor], Any]:
    most = max(counts)
    if len(tensor) < most:
        tensor = torch.cat([tensor, tensor.new_zeros(most - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(tensor) for _ in counts]
    return parts, dist.all_gather(parts, tensor, async_op=True)


def _shards(tensor: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """(rank, its rows) of all ranks, one's own first; others travel while one is worked at."""
    tensor, me, world = tensor.contiguous(), rank(), len(counts)
    if world <= GATHERED_RANKS:
        parts, work = _start_gather(tensor, counts)
        yield me, tensor
        work.wait()
        for owner in [*range(me + 1, world), *range(me)]:
            yield owner, parts[owner][: counts[owner]]
        return
    part = tensor
    for step in range(world):
        owner = (me - step) % world
        coming = None
        if step < world - 1:
            following = tensor.new_empty(counts[owner - 1], *tensor.shape[1:])
            coming = _start_pass_on(part, following, tag=0)
        yield owner, part
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


class _Homeward:
    """Sums what all ranks say about each rank's rows, there: in the ring, an account of them
    follows the rows themselves, one step behind, and comes home with the last."""

    def __init__(self, counts: list[int], like: Tensor, dtype: torch.dtype) -> None:
        self.counts = counts
        self.like = like
        self.dtype = dtype
        self.ring = len(counts) > GATHERED_RANKS
        self.parts: list[Any] = [None] * len(counts)
        self.coming: list[Any] = []
        self.account: Tensor | None = None
        self.sent: Tensor | None = None

    def add(self, owner: int, part: Tensor) -> None:
        if not self.ring:
            self.parts[owner] = part
            return
        _wait(self.coming)
        if self.account is not None:
            part = part + self.account
        self.sent = part.contiguous()  # held until it has gone
        self.account = self.like.new_empty(
            self.counts[owner - 1], *self.like.shape[1:], dtype=self.dtype
        )
        self.coming = _start_pass_on(self.sent, self.account, tag=1)

    def total(self) -> Tensor:
        if self.ring:
            _wait(self.coming)
            assert self.account is not None
            return self.account
        parts = [part.contiguous() for part in self.parts]
        works = [dist.reduce(part, to, async_op=True) for to, part in enumerate(parts)]
        _wait(works)
        return parts[rank()]
