"""Access to the compiled module clipvip._C: calls of its functions and registration of its ops."""

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad

# csrc/common/tensor.h: DType
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3}
_ARRAY_DTYPES = {np.dtype(name): i for name, i in (("f4", 0), ("i4", 3), ("u1", 4), ("u2", 5))}


@functools.cache
def module() -> ModuleType:
    """Return clipvip._C; raise RuntimeError with what to do where it cannot be loaded."""
    try:
        from clipvip import _C
    except ImportError as error:
        raise RuntimeError(
            f"the compiled module clipvip._C cannot be loaded ({error}); build it with "
            "`pip install .` in the source folder; ops that take backend='reference' run without"
        ) from error
    return _C


# --- checks --------------------------------------------------------------------------------------


def check_arguments(backend: str, **tensors: Any) -> None:
    """Check the name of the backend, and that tensors have a floating dtype."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} is {type_of(tensor)}, expected a tensor of floating dtype")
    if backend not in ("native", "reference"):
        raise ValueError(f"backend is {backend!r}, expected 'native' or 'reference'")


def type_of(x: Any) -> torch.dtype | str:
    return x.dtype if isinstance(x, Tensor) else type(x).__name__


def check_kernels(name: str, tensor: Tensor, *others: Tensor) -> None:
    """Raise ValueError for tensors on several devices, RuntimeError if there are no kernels for the
    device, and TypeError, which calls the tensor by its name, if there are none for its dtype."""
    device = tensor.device
    if any(other.device != device for other in others):
        devices = {str(each.device) for each in (tensor, *others)}
        raise ValueError(f"tensors lie on {', '.join(sorted(devices))}, expected one")
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"tensors are on {device}, but there are no kernels for {device.type}; "
            "move them to the CPU or a CUDA GPU, or pass backend='reference'"
        )
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _check_gpu(device.index)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16; "
            "backend='reference' takes others"
        )


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


@functools.cache
def has_kernels(index: int) -> bool:
    """Return whether there are kernels for a GPU."""
    try:
        _check_gpu(index)
    except RuntimeError:
        return False
    return True


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives a tensor (fp64 stays), or None where it is off."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # autocast has no meta device
        return None
    return tensor.dtype if tensor.dtype == torch.float64 else torch.get_autocast_dtype(kind)


@contextlib.contextmanager
def without_autocast(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of one dtype in autocast's dtype, and switch autocast off within."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        yield tensors
        return
    with torch.autocast(tensors[0].device.type, enabled=False):
        yield tuple(tensor.to(dtype) for tensor in tensors)


# --- tensors as the kernels read them ------------------------------------------------------------


def handle(tensor: Tensor) -> Any:
    """Return a tensor in the form that clipvip._C takes; keep the tensor alive while it is used.

    Raises TypeError, ValueError or NotImplementedError unless all of its values are in memory. The
    flag of a negated view is ignored: PyTorch resolves it before it calls an op.
    """
    try:
        return module().Tensor.of(tensor, _DTYPES[tensor.dtype])
    except KeyError:
        raise TypeError(f"a tensor is {tensor.dtype}, which no kernel reads") from None


def array_handle(array: NDArray[Any]) -> Any:
    """Return a NumPy array (fp32, int32, uint8, uint16) as `handle` returns a tensor."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    # NumPy guarantees that the array lies in its memory, so no size is given to check against.
    place = array.__array_interface__["data"][0], sys.maxsize, 0
    return module().Tensor(*place, _ARRAY_DTYPES[array.dtype], array.shape, strides)


def check_memory(tensor: Tensor) -> None:
    """Raise ValueError where PyTorch would read freed memory, which ends the process."""
    if not tensor.is_cpu or not tensor.numel():
        return
    storage, shape = tensor.untyped_storage(), tensor.shape
    steps = sum((size - 1) * step for size, step in zip(shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + steps + 1) * tensor.itemsize
    if not storage.data_ptr() or storage.nbytes() < end:
        raise ValueError(f"a tensor of size {list(shape)} has no memory; was it freed?")


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a contiguous copy, in another dtype where one is given."""
    check_memory(tensor)
    return tensor.to(dtype or tensor.dtype, memory_format=torch.contiguous_format, copy=True)


def dense(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor, or a copy, that is contiguous and of the dtype, where one is given."""
    whole = tensor.is_contiguous() and dtype in (None, tensor.dtype)
    return tensor if whole else copied(tensor, dtype)


def resolved(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if a flag alone makes it negated or zero."""
    if tensor._is_zerotensor():
        return torch.zeros_like(tensor)
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy, whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else copied(tensor)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy, whose rows along the last dimension start on 16 bytes."""
    unit = 16 // tensor.element_size()
    whole = tensor.stride(-1) == 1 and all(step % unit == 0 for step in tensor.stride()[:-1])
    return tensor if whole and tensor.data_ptr() % 16 == 0 else copied(tensor)


# --- calls ---------------------------------------------------------------------------------------


def run(name: str, *arguments: Any) -> None:
    """Call a function of clipvip._C, on the GPU of the first argument if its name ends in "_cuda".

    arguments: tensors, all on one device, and whatever else the function takes, except for the last
    ones of every function (csrc/module.h): the number of threads, or the GPU and its current
    stream; and a workspace if the function asks for one.
    Raises ValueError for tensors on several devices; RuntimeError where there are no kernels for
    the GPU, which check_kernels does not find out during tracing; and the errors of `handle`.
    """
    if not name.endswith("_cuda"):
        _run(name, arguments, (torch.get_num_threads(),), _cpu_workspace)
        return
    with launch_context(arguments[0]) as where:
        _run(name, arguments, where, functools.partial(_gpu_workspace, arguments[0]))


def run_constant(name: str, *arguments: Any) -> None:
    """`run` a function that has no derivative, such as one that is called inside another's.

    Raises NotImplementedError where a derivative would be lost.
    """
    refuse_tangents(name, *arguments)
    tensors = (x for x in arguments if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError(
            f"{name} has no derivative of its own; call its reference, or call it under "
            "torch.no_grad()"
        )
    run(name, *arguments)


def _run(
    name: str, arguments: tuple[Any, ...], where: tuple[int, ...], allocate: Callable[[int], Any]
) -> None:
    function, device, given = getattr(module(), name), None, []
    for argument in arguments:
        if isinstance(argument, Tensor):
            here = argument.get_device()  # -1 on the CPU
            if device is not None and here != device:
                raise ValueError("tensors lie on several devices, expected one")
            device, argument = here, handle(argument)
        given.append(argument)
    given += where
    if needed := function(*given, 0):
        _memory, address = allocate(needed)  # the memory must live until the call returns
        function(*given, address)


@contextlib.contextmanager
def launch_context(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Make a tensor's GPU the current one; yields its index and the handle of its current stream.

    Raises RuntimeError where there are no kernels for it.
    """
    _check_gpu(tensor.device.index)
    with torch.cuda.device(tensor.device):
        yield tensor.device.index, torch.cuda.current_stream().cuda_stream


_LINE = 64  # bytes of a cache line
_MOST_KEPT = 32 << 20  # bytes
_kept = threading.local()


def _cpu_workspace(needed: int) -> tuple[Any, int]:
    """Return memory and the address in it from which on `needed` bytes are free, cache-aligned.

    Each thread keeps the largest so far, up to _MOST_KEPT: mapping its pages again in every call
    took a tenth of the time.
    """
    kept = getattr(_kept, "workspace", None)
    if kept is not None and kept[0].nbytes >= needed + _LINE:
        return kept
    # Not a tensor, because modes such as FakeTensorMode give those no memory.
    memory = np.empty(needed + _LINE, np.uint8)
    workspace = memory, -(-int(memory.ctypes.data) // _LINE) * _LINE
    if needed <= _MOST_KEPT:
        _kept.workspace = workspace
    return workspace


def _gpu_workspace(like: Tensor, needed: int) -> tuple[Tensor, int]:
    memory = like.new_empty(needed, dtype=torch.uint8)
    return memory, memory.data_ptr()


# --- ops -----------------------------------------------------------------------------------------

_library = torch.library.Library("clipvip", "IMPL")  # must live as long as what it registers


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a CPU kernel as the op clipvip::name, as torch.library.custom_op does.

    An op registered by that alone treats dual tensors as constants, so that derivatives in forward
    mode are silently wrong. An op registered here refuses dual tensors.
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
