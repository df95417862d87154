"""What ranks exchange. Every function is the identity, or nearly, in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(tensor: Tensor) -> Tensor:
    """[n, …] of every rank → [world·n, …] in the order of ranks, differentiable.

    n must be the same on every rank. The gradient of a rank's rows is the *sum* over ranks
    of what each rank's loss says about them. Where every rank computes the same loss from
    the gathered rows, that is world times the loss's gradient, and the mean that
    DistributedDataParallel takes over ranks gives exactly the gradient of the single-process
    loss, for encoders and logit_scale alike.
    """
    if world_size() == 1:
        return tensor
    if tensor.dtype == torch.bool:  # not every backend moves bools
        return all_gather(tensor.to(torch.uint8)).bool()
    return _AllGather.apply(tensor)


def all_gather_objects(value: Any) -> list[Any]:
    """Any picklable value of every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]
