"""The compiled module clipvip._C, and how tensors are handed to it."""

import functools
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}  # csrc: DType


@functools.cache
def module() -> ModuleType:
    try:
        from clipvip import _C
    except ImportError as error:
        raise RuntimeError(
            f"the compiled module clipvip._C cannot be loaded ({error}); build it with "
            "`pip install .` in the source folder, or pass backend='reference'"
        ) from error
    return _C


def check_device(*tensors: Tensor) -> None:
    """Raises RuntimeError unless there are kernels for where the tensors lie."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on {', '.join(sorted(map(str, devices)))}, expected one")
    (device,) = devices
    if device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"tensors are on {device}, but this build has no kernels for {device.type}; "
            "move them to the CPU or pass backend='reference'"
        )


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the kernels take such elements."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16; "
            "backend='reference' takes others"
        )


def handle(tensor: Tensor):
    """What the compiled module knows of a tensor; keep the tensor alive while it is in use."""
    return module().Tensor(
        tensor.data_ptr(), _DTYPES[tensor.dtype], list(tensor.shape), list(tensor.stride())
    )
