"""Products with a layer's weights, and the elementwise work next to them, in one pass each.

These are parts of other functions' forward and backward (clipvip.model.lean), not differentiable
by themselves. T rows (tokens), K inputs, N outputs; f is nothing, LayerNorm or SiLU:

    linear_forward      alpha·f(x)·Wᵀ + beta·bias + residual
    linear_grad_input   (grad·W) ∘ SiLU'(before)
    linear_grad_weight  alpha·gradᵀ·f(x), and the sum of grad's rows

Each has `…_reference` beside it, plain PyTorch for any device. The kernels run on CPUs, and only
where they were measured to be quicker than PyTorch's own products (`quicker_here`).
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.ops import _native

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
    silu: bool = False,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `linear_grad_weight`; LayerNorm's statistics are computed again."""
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


def quicker_here(x: Tensor, *weights: Tensor, operands: torch.dtype) -> bool:
    """Whether the kernels can compute with these, and are known to be quicker than PyTorch.

    They were measured on AMD's processors with AVX512-BF16; on others PyTorch's libraries use what
    the kernels do not, such as Intel's AMX.
    """
    return (
        x.device.type == "cpu"
        and operands in (torch.float32, torch.bfloat16)
        and x.ndim == 2
        and x.shape[0] >= MIN_ROWS
        and all(each.dtype in (torch.float32, torch.bfloat16) for each in (x, *weights))
        and all(size % UNIT == 0 for weight in weights for size in weight.shape)
        and _measured_processor()
    )


@functools.cache
def _measured_processor() -> bool:
    try:
        able = _native.module().cpu_capabilities()
        return "avx512bf16" in able and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
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

    x: [T, K], fp32 or bf16; weight: [N, K], bias: [N], of any dtype; K and N multiples of UNIT.
    operands: fp32 or bf16, to which f(x) and W are rounded; sums are fp32.
    norm, silu: f, one of them at most. residual: [T, N].
    Returns [T, N] in the residual's dtype, or in `operands` without one; and the statistics of
    norm, None without one.
    """
    kind = _NORMED if norm else _SILU if silu else _PLAIN
    dtype = operands if residual is None else residual.dtype
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
        bias.float().contiguous(),
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
    """
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
    Returns fp32 [N, K] and [N].
    """
    kind = _NORMED if norm else _SILU if silu else _PLAIN
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


def _norm(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    if norm is None:
        return None, None
    return norm.weight.float().contiguous(), norm.bias.float().contiguous()


def _rows(x: Tensor) -> Tensor:
    """With the elements of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(name: str, *arguments: Any) -> None:
    function = getattr(_native.module(), name)
    given = (*arguments, torch.get_num_threads())
    workspace = torch.empty(_native.call(function, *given, None), dtype=torch.uint8)
    _native.call(function, *given, workspace.data_ptr())
