"""The compiled module clipvip._C, how tensors are handed to it, and how its ops are registered."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad

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


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where the tensor lies; None where it is off."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # it has no meta
        return None
    return torch.get_autocast_dtype(kind)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the kernels take such elements."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16; "
            "backend='reference' takes others"
        )


_LINE = 64  # bytes of a cache line
_kept = threading.local()


def workspace(needed: int) -> int:
    """Address of as many bytes, good until this thread asks again.

    Each thread keeps its largest, some 10 MB: pages mapped anew in every call would cost a tenth
    of the time.
    """
    if getattr(_kept, "workspace", None) is None or _kept.workspace.nbytes < needed + _LINE:
        # Not a tensor, to which modes such as FakeTensorMode give no memory.
        _kept.workspace = np.empty(needed + _LINE, np.uint8)
    address = int(_kept.workspace.ctypes.data)
    return -(-address // _LINE) * _LINE


def handle(tensor: Tensor) -> Any:
    """The tensor as the compiled module takes it; keep the tensor alive while that is in use.

    Raises TypeError, ValueError or NotImplementedError unless all its numbers are in memory. A view
    that negates by a flag alone is not seen here: PyTorch resolves it before it calls an op.
    """
    try:
        return module().Tensor.of(tensor, _DTYPES[tensor.dtype])
    except KeyError:
        raise TypeError(f"a tensor is {tensor.dtype}, which no kernel reads") from None


def numbers(tensor: Tensor) -> list[int]:
    """The tensor's numbers; ValueError where there are none in memory."""
    _expect_memory(tensor)
    return list(tensor.tolist())


def _expect_memory(tensor: Tensor) -> None:
    """Raise ValueError where PyTorch would read memory that was freed, and so end the process."""
    if not tensor.is_cpu or not tensor.numel():
        return
    storage, shape = tensor.untyped_storage(), tensor.shape
    steps = sum((size - 1) * step for size, step in zip(shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + steps + 1) * tensor.itemsize
    if not storage.data_ptr() or storage.nbytes() < end:
        raise ValueError(f"a tensor of size {list(shape)} has no memory; was it freed?")


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy, in another dtype where one is given."""
    _expect_memory(tensor)
    return tensor.to(dtype or tensor.dtype, memory_format=torch.contiguous_format, copy=True)


def dense(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, or a copy, that is contiguous and of a dtype."""
    whole = tensor.is_contiguous() and dtype in (None, tensor.dtype)
    return tensor if whole else copied(tensor, dtype)


def handles(*arguments: Any) -> list[Any]:
    """Handles for tensors, which must be kept alive, and everything else as it is."""
    given, device = [], None
    for argument in arguments:
        if isinstance(argument, Tensor):
            here = argument.get_device()  # -1 on the CPU
            if device is None:
                device = here
            elif here != device:
                raise ValueError("tensors lie on several devices, expected one")
            argument = handle(argument)
        given.append(argument)
    return given


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a compiled function with handles for tensors and everything else as it is."""
    return function(*handles(*arguments))


# --- ops -----------------------------------------------------------------------------------------

_library = torch.library.Library("clipvip", "IMPL")  # must live as long as what it registers


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a CPU kernel as the op clipvip::name, as torch.library.custom_op does.

    With that alone, an op takes dual tensors for constants, and derivatives in forward mode are
    silently wrong. Ours refuse them.
    """

    def register(kernel: Callable[..., Any]) -> Any:
        define = torch.library.custom_op(f"clipvip::{name}", mutates_args=(), device_types="cpu")
        op = define(kernel)
        differentiable = make_autograd_impl(getattr(torch.ops.clipvip, name).default, op)

        def checked(keys: Any, *arguments: Any) -> Any:
            refuse_tangents(name, *arguments)
            return differentiable(keys, *arguments)

        with warnings.catch_warnings():  # the override is intended
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            _library.impl(name, checked, "Autograd", with_keyset=True, allow_override=True)
        return op

    return register


def refuse_tangents(name: str, *arguments: Any) -> None:
    """Raise NotImplementedError where a tensor carries a derivative in forward mode."""
    if forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments
    ):
        raise NotImplementedError(
            f"{name} has no derivatives in forward mode (jvp, jacfwd, dual tensors); use backward, "
            "or in a single process backend='reference'"
        )
