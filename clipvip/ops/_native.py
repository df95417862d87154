"""The compiled module clipvip._C, and how tensors are handed to it."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

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
            "`pip install .` in the source folder; ops that take backend='reference' run without"
        ) from error
    return _C


def check_device(*tensors: Tensor) -> None:
    """Raises RuntimeError unless there are kernels for where the tensors lie."""
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        devices = {str(tensor.device) for tensor in tensors}
        raise ValueError(f"tensors lie on {', '.join(sorted(devices))}, expected one")
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"tensors are on {device}, but there are no kernels for {device.type}; "
            "move them to the CPU or a CUDA GPU, or pass backend='reference'"
        )
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _check_gpu(device.index)


@functools.cache
def _check_gpu(index: int) -> None:
    if module().build_info()["cuda"] is None:
        raise RuntimeError(
            "tensors are on a GPU, but clipvip was built without CUDA kernels; install it again "
            "where nvcc is found (CLIPVIP_CUDA=1 insists), or pass backend='reference'"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(index)
        raise RuntimeError(
            f"{name} has compute capability {capability[0]}.{capability[1]}, but clipvip's kernels "
            "need 8.0 (A100) or newer; pass backend='reference'"
        )


@contextlib.contextmanager
def launch_context(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Makes the tensor's GPU the current one: (its index, the handle of its current stream).

    Raises RuntimeError where there are no kernels for it, which tracing does not ask.
    """
    _check_gpu(tensor.device.index)
    with torch.cuda.device(tensor.device):
        yield tensor.device.index, torch.cuda.current_stream().cuda_stream


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the kernels take such elements."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16; "
            "backend='reference' takes others"
        )


_kept = threading.local()


def workspace(needed: int) -> int:
    """Address of as many bytes, good until this thread asks again.

    Each thread keeps its largest, some 10 MB: pages mapped anew in every call would cost a tenth
    of the time.
    """
    if getattr(_kept, "workspace", None) is None or _kept.workspace.numel() < needed:
        _kept.workspace = torch.empty(needed, dtype=torch.uint8, device="cpu")
    return int(_kept.workspace.data_ptr())


def handle(tensor: Tensor) -> Any:
    """What the compiled module knows of a tensor; keep the tensor alive while it is in use."""
    return module().Tensor(tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape, tensor.stride())


def handles(*arguments: Any) -> list[Any]:
    """Handles for tensors, which must be kept alive, and everything else as it is."""
    return [handle(x) if isinstance(x, Tensor) else x for x in arguments]


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a compiled function with handles for tensors and everything else as it is."""
    return function(*handles(*arguments))
