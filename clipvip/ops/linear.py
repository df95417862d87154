"""Products with a layer's weights, and the elementwise work next to them, in one pass each.

These are parts of other functions' forward and backward (clipvip.model.layers), not differentiable
by themselves. T rows (tokens), K inputs, N outputs; f is nothing, LayerNorm or SiLU:

    linear_forward      alpha·f(x)·Wᵀ + beta·bias + residual
    linear_grad_input   (grad·W) ∘ SiLU'(before)
    linear_grad_weight  alpha·gradᵀ·f(x), and the sum of grad's rows

Each has `…_reference` beside it, plain PyTorch for any device. The kernels run on CPUs, and only
where they were measured to be quicker than PyTorch's own products (`quicker_here`).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipvip.ops import _native

DTYPES = (torch.float32, torch.bfloat16)
UNIT = 64  # csrc: kLinearUnit
MIN_ROWS = 512  # for fewer, arranging the weights takes longer than it saves
_PLAIN, _NORMED, _SILU = range(3)  # csrc: LinearInput


class Norm(NamedTuple):
    """LayerNorm over the last dimension. weight, bias: [K]."""

    weight: Tensor
    bias: Tensor
    eps: float


Statistics = tuple[Tensor, Tensor]
"""Mean and 1/√(variance + eps) of each row, fp32 [T] each."""


# --- plain PyTorch -------------------------------------------------------------------------------


def linear_forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    operands: torch.dtype,
    *,
    norm: Norm | None = None,
    silu: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> tuple[Tensor, Statistics | None]:
    """As `linear_forward`."""
    inputs, statistics = _inputs(x, norm, silu)
    inputs, weight, bias = (each.to(operands) for each in (inputs, weight, bias))
    out = torch.addmm(bias, inputs, weight.t(), beta=beta, alpha=alpha)
    if residual is not None:
        out = out.add_(residual) if out.dtype == residual.dtype else residual + out
    return out, statistics


def linear_grad_input_reference(
    grad: Tensor,
    weight: Tensor,
    operands: torch.dtype,
    dtype: torch.dtype,
    *,
    before: Tensor | None = None,
) -> Tensor:
    """As `linear_grad_input`."""
    out = grad.to(operands) @ weight.to(operands)
    if before is not None:
        out = torch.ops.aten.silu_backward(out, before)
    return out.to(dtype)


def linear_grad_weight_reference(
    grad: Tensor,
    x: Tensor,
    operands: torch.dtype,
    *,
    norm: Norm | None = None,
    statistics: Statistics | None = None,
    silu: bool = False,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `linear_grad_weight`; LayerNorm computes its statistics again."""
    inputs, _ = _inputs(x, norm, silu)
    grad = grad.to(operands)
    product = torch.addmm(grad.new_empty(()), grad.t(), inputs.to(operands), beta=0, alpha=alpha)
    return product, grad.sum(0, dtype=torch.promote_types(operands, torch.float32))


def _inputs(x: Tensor, norm: Norm | None, silu: bool) -> tuple[Tensor, Statistics | None]:
    if norm is not None:
        normed, mean, rstd = torch.native_layer_norm(
            x, [x.shape[-1]], norm.weight, norm.bias, norm.eps
        )
        return normed, (mean, rstd)
    return (F.silu(x) if silu else x), None


# --- kernels -------------------------------------------------------------------------------------


def quicker_here(
    operands: torch.dtype, rows: Sequence[Tensor], parameters: Sequence[Tensor]
) -> bool:
    """Whether the kernels can compute with these, and are known to be quicker than PyTorch.

    They were measured on AMD's processors with AVX512-BF16; on others PyTorch's libraries use what
    the kernels do not, such as Intel's AMX.

    operands: as in `linear_forward`. rows: x [T, K] and what else has a row a token. parameters:
    weights [N, K] and vectors.
    """
    return (
        operands in DTYPES
        and all(x.ndim == 2 and x.shape[0] == rows[0].shape[0] >= MIN_ROWS for x in rows)
        and all(
            # Of no subclass: one may keep its numbers elsewhere, or none.
            type(each) in (Tensor, nn.Parameter)
            and each.device.type == "cpu"
            and each.dtype in DTYPES
            for each in (*rows, *parameters)
        )
        and all(_fits(size) for each in parameters if each.ndim == 2 for size in each.shape)
        and _measured_processor()
        and _native.module().cpu_capability() == "avx512bf16"
    )


def _fits(size: int) -> bool:
    return size > 0 and size % UNIT == 0


@functools.cache
def _measured_processor() -> bool:
    try:
        _native.module()
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except (RuntimeError, OSError):
        return False


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    operands: torch.dtype,
    *,
    norm: Norm | None = None,
    silu: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> tuple[Tensor, Statistics | None]:
    """alpha·f(x)·Wᵀ + beta·bias + residual.

    x: [T, K], weight: [N, K], fp32 or bf16 on the CPU; bias: [N]; K and N multiples of UNIT.
    operands: fp32 or bf16, to which f(x) and W are rounded (where the processor has AVX512-BF16,
        else they stay as they are); sums are fp32.
    norm, silu: f, one of them at most. residual: [T, N], fp32 or bf16.
    Returns [T, N] in `operands`, or in the wider of that and the residual's dtype; and the
    statistics of norm, None without one. Raises ValueError or TypeError for anything else.
    """
    kind = _kind(norm, silu)
    tokens, width, outer = *_size("x", x), _size("weight", weight)[0]
    _check(operands, (width, outer), weight=(weight, (outer, width)), bias=(bias, (outer,)))
    _check_norm(norm, width)
    if residual is not None:
        _check(operands, (), residual=(residual, (tokens, outer)))
    dtype = operands if residual is None else torch.promote_types(operands, residual.dtype)
    x, weight = _rows(x), _rows(weight)
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    statistics: Statistics | None = None
    if norm:
        mean, rstd = x.new_empty(2, x.shape[0], dtype=torch.float32)
        statistics = mean, rstd
    _call(
        "linear_forward",
        kind,
        x,
        weight,
        _vector(bias),
        None if residual is None else _rows(residual),
        alpha,
        beta,
        *_norm(norm),
        norm.eps if norm else 0.0,
        *(statistics or (None, None)),
        operands == torch.bfloat16,
        out,
    )
    return out, statistics


def linear_grad_input(
    grad: Tensor,
    weight: Tensor,
    operands: torch.dtype,
    dtype: torch.dtype,
    *,
    before: Tensor | None = None,
) -> Tensor:
    """grad·W, times SiLU'(before) where given.

    grad: [T, N]; weight: [N, K]; before: [T, K]. Returns [T, K] in `dtype`, fp32 or bf16.
    Raises ValueError or TypeError for anything else.
    """
    (tokens, outer), width = _size("grad", grad), _size("weight", weight)[1]
    _check(operands, (width, outer), weight=(weight, (outer, width)))
    if before is not None:
        _check(dtype, (), before=(before, (tokens, width)))
    grad, weight = _rows(grad), _rows(weight)
    out = grad.new_empty(grad.shape[0], weight.shape[1], dtype=dtype)
    before = None if before is None else _rows(before)
    _call("linear_grad_input", grad, weight, before, operands == torch.bfloat16, out)
    return out


def linear_grad_weight(
    grad: Tensor,
    x: Tensor,
    operands: torch.dtype,
    *,
    norm: Norm | None = None,
    statistics: Statistics | None = None,
    silu: bool = False,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """alpha·gradᵀ·f(x), and the sum of grad's rows.

    grad: [T, N]; x: [T, K]; statistics: of norm, as `linear_forward` returned them.
    Returns fp32 [N, K] and [N]. Raises ValueError or TypeError for anything else.
    """
    kind = _kind(norm, silu)
    (tokens, outer), width = _size("grad", grad), _size("x", x)[1]
    _check(operands, (width, outer), x=(x, (tokens, width)))
    _check_norm(norm, width)
    if (norm is None) != (statistics is None):
        raise ValueError("norm and statistics belong together: give both or neither")
    if statistics is not None:
        mean, rstd = statistics
        _check(operands, (), mean=(mean, (tokens,)), rstd=(rstd, (tokens,)))
        statistics = _vector(mean), _vector(rstd)
    if tokens == 0:
        return grad.new_zeros(outer, width).float(), grad.new_zeros(outer).float()
    grad, x = _rows(grad), _rows(x)
    product = grad.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)
    total = grad.new_empty(grad.shape[1], dtype=torch.float32)
    _call(
        "linear_grad_weight",
        kind,
        grad,
        x,
        alpha,
        *_norm(norm),
        *(statistics or (None, None)),
        operands == torch.bfloat16,
        product,
        total,
    )
    return product, total


def _kind(norm: Norm | None, silu: bool) -> int:
    if norm is not None and silu:
        raise ValueError("norm and silu are both given, expected one at most")
    return _NORMED if norm is not None else _SILU if silu else _PLAIN


def _size(name: str, x: Tensor) -> tuple[int, int]:
    if x.ndim != 2 or x.dtype not in DTYPES or x.device.type != "cpu":
        raise TypeError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device}, expected a matrix of float32 or "
            "bfloat16 on the CPU; the reference takes others"
        )
    return x.shape[0], x.shape[1]


def _check(
    operands: torch.dtype, widths: tuple[int, ...], **given: tuple[Tensor, tuple[int, ...]]
) -> None:
    """Shapes are those expected; widths and dtypes such as the kernels take."""
    if operands not in DTYPES:
        raise TypeError(f"operands is {operands}, expected torch.float32 or torch.bfloat16")
    for width in widths:
        if not _fits(width):
            raise ValueError(f"a width is {width}, expected a positive multiple of {UNIT}")
    for name, (x, shape) in given.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} is {list(x.shape)}, expected {list(shape)}")
        if x.ndim == 2:
            _size(name, x)


def _check_norm(norm: Norm | None, width: int) -> None:
    if norm is not None:
        shapes = {"norm.weight": norm.weight, "norm.bias": norm.bias}
        _check(torch.float32, (), **{name: (x, (width,)) for name, x in shapes.items()})


def _norm(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    if norm is None:
        return None, None
    return _vector(norm.weight), _vector(norm.bias)


def _rows(x: Tensor) -> Tensor:
    """The matrix, or a copy, whose rows are contiguous and hold its values."""
    x = _seen(x)
    return x if x.stride(-1) == 1 else _native.copied(x)


def _vector(x: Tensor) -> Tensor:
    """The vector as the kernels read it: contiguous, fp32."""
    return _native.dense(_seen(x), torch.float32)


def _seen(x: Tensor) -> Tensor:
    """The tensor, or a copy, whose memory holds its values: not negated or zero by a flag alone."""
    if x._is_zerotensor():
        return torch.zeros_like(x)
    return x.resolve_neg() if x.is_neg() else x


def _call(name: str, *arguments: Any) -> None:
    """Calls a compiled function with as much workspace as it asks for."""
    _native.refuse_tangents(name, *arguments)
    tensors = (x for x in arguments if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError(
            f"{name} has no derivative of its own; call {name}_reference, or under torch.no_grad()"
        )
    function = getattr(_native.module(), name)
    given = [*_native.handles(*arguments), torch.get_num_threads()]
    function(*given, _native.workspace(function(*given, None)))
