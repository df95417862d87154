"""What ranks do for one another, so that they end alike."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from clipvip import distributed

Result = TypeVar("Result")


def first_does(work: Callable[[], Result]) -> Result:
    """What `work` returns on the first rank, or the error it raises there, on every rank."""
    result: Result | None = None
    error: Exception | None = None
    if distributed.rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, error = distributed.all_gather_objects((result, error))[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def on_any(flags: Tensor) -> list[bool]:
    """Bools [n], each True where it is so on any rank."""
    if distributed.world_size() > 1:
        flags = flags.int()
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
