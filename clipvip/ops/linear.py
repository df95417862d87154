"""A linear layer's products, each in one pass with the elementwise operations next to it.

clipvip.model.layers builds its forward and backward from these functions, which are not
differentiable themselves. For T rows (tokens), K inputs and N outputs they compute, where f is the
identity, LayerNorm or SiLU,

    linear_forward      alpha·f(x)·Wᵀ + beta·bias + residual
    linear_grad_input   (grad·W) ∘ SiLU'(before)
    linear_grad_weight  alpha·gradᵀ·f(x), and the sum of grad's rows

Each has a `…_reference` in plain PyTorch for any device. The kernels run only where they were
measured to be faster than PyTorch (`quicker_here`). They stay for those machines: a layer's forward
and backward take 0.66 to 0.76 of eager PyTorch's time in fp32, 0.84 to 0.86 in bf16
(`clipvip bench ops --only linear`).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipvip.ops import _native

DTYPES = (torch.float32, torch.bfloat16)
UNIT = 64  # csrc: kLinearUnit
MIN_ROWS = 512  # with fewer rows, packing the weights takes longer than it saves
_PLAIN, _NORMED, _SILU = range(3)  # csrc: LinearInput


class Norm(NamedTuple):
    """LayerNorm over the last dimension. weight, bias: [K]."""

    weight: Tensor
    bias: Tensor
    eps: float


Statistics = tuple[Tensor, Tensor]
"""Mean and 1/√(variance + eps) of each row, fp32 [T] each."""


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
    """Compute `linear_forward` in plain PyTorch, for any device and floating dtype."""
    inputs, statistics = _inputs(x, norm, silu)
    # Given a beta, PyTorch on a GPU would copy the bias to every row before the product.
    bias = bias if beta == 1 else bias * beta
    inputs, weight, bias = (each.to(operands) for each in (inputs, weight, bias))
    out = torch.addmm(bias, inputs, weight.t(), alpha=alpha)
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
    """Compute `linear_grad_input` in plain PyTorch."""
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
    """Compute `linear_grad_weight` in plain PyTorch; LayerNorm computes its statistics again."""
    inputs, _ = _inputs(x, norm, silu)
    grad = grad.to(operands)
    product = torch.addmm(grad.new_empty(()), grad.t(), inputs.to(operands), beta=0, alpha=alpha)
    return product, grad.sum(0, dtype=torch.promote_types(operands, torch.float32))


def _inputs(x: Tensor, norm: Norm | None, silu: bool) -> tuple[Tensor, Statistics | None]:
    if norm is not None:
        normed, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], *norm)
        return normed, (mean, rstd)
    return (F.silu(x) if silu else x), None


def quicker_here(
    operands: torch.dtype, rows: Sequence[Tensor], parameters: Sequence[Tensor]
) -> bool:
    """Return whether the kernels take these tensors and are known to be faster than PyTorch here.

    They were measured on AMD processors with AVX512-BF16. Elsewhere PyTorch's libraries may use
    instructions that the kernels do not, such as Intel's AMX.

    operands: as in `linear_forward`.
    rows: x [T, K] and the other tensors with one row per token.
    parameters: weights [N, K] and vectors.
    """
    return (
        operands in DTYPES
        and all(x.ndim == 2 and x.shape[0] == rows[0].shape[0] >= MIN_ROWS for x in rows)
        and all(
            # A subclass may keep its values elsewhere, or have none.
            type(each) in (Tensor, nn.Parameter)
            and each.device.type == "cpu"
            and each.dtype in DTYPES
            for each in (*rows, *parameters)
        )
        and all(size and size % UNIT == 0 for x in parameters if x.ndim == 2 for size in x.shape)
        and _measured_processor()
        and _native.module().cpu_capability() == "avx512bf16"
    )


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
    """Return alpha·f(x)·Wᵀ + beta·bias + residual, and the statistics of norm.

    Equivalent to

        inputs = F.layer_norm(x, [K], *norm) if norm else F.silu(x) if silu else x
        inputs, weight, bias = (each.to(operands) for each in (inputs, weight, bias))
        out = alpha * inputs @ weight.t() + beta * bias
        return out if residual is None else residual + out

    Args:
        x: [T, K], fp32 or bf16, on the CPU.
        weight: [N, K], fp32 or bf16; K and N are multiples of UNIT.
        bias: [N].
        operands: fp32 or bf16, to which f(x) and W are rounded. Without AVX512-BF16 they are not
            rounded. Sums are fp32.
        norm, silu: what f is; at most one of the two.
        residual: [T, N], fp32 or bf16.

    Returns:
        [T, N] in `operands`, or in the wider of that and the residual's dtype; and the statistics,
        None without norm.

    Raises:
        ValueError, TypeError: shapes, dtypes or device are not those above.
        NotImplementedError: a tensor requires a gradient.
    """
    kind, x = _kind(norm, silu), _matrix("x", x)
    tokens, width = x.shape
    weight = _matrix("weight", weight, columns=width)
    outer = weight.shape[0]
    _check(operands, width, outer)
    norm_vectors, eps = _norm(norm, width), norm.eps if norm else 0.0
    dtype = operands
    if residual is not None:
        residual = _matrix("residual", residual, tokens, outer)
        dtype = torch.promote_types(operands, residual.dtype)
    out = x.new_empty(tokens, outer, dtype=dtype)
    statistics: Statistics | None = None
    if norm:
        mean, rstd = x.new_empty(2, tokens, dtype=torch.float32)
        statistics = mean, rstd
    given = x, weight, _vector("bias", bias, outer), residual, alpha, beta, *norm_vectors, eps
    results = *(statistics or (None, None)), operands == torch.bfloat16, out
    _native.run_constant("linear_forward", kind, *given, *results)
    return out, statistics


def linear_grad_input(
    grad: Tensor,
    weight: Tensor,
    operands: torch.dtype,
    dtype: torch.dtype,
    *,
    before: Tensor | None = None,
) -> Tensor:
    """Return grad·W, times SiLU'(before) where that is given.

    grad: [T, N]; weight: [N, K]; before: [T, K]; operands as in `linear_forward`.
    Returns [T, K] in `dtype`, fp32 or bf16. Raises as `linear_forward` does.
    """
    grad = _matrix("grad", grad)
    tokens, outer = grad.shape
    weight = _matrix("weight", weight, rows=outer)
    width = weight.shape[1]
    _check(operands, width, outer)
    if before is not None:
        _check(dtype)
        before = _matrix("before", before, tokens, width)
    out = grad.new_empty(tokens, width, dtype=dtype)
    _native.run_constant("linear_grad_input", grad, weight, before, operands == torch.bfloat16, out)
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
    """Return alpha·gradᵀ·f(x), and the sum of grad's rows.

    grad: [T, N]; x: [T, K]; statistics: those of norm that `linear_forward` returned; operands as
    in `linear_forward`. Returns fp32 [N, K] and [N]. Raises as `linear_forward` does.
    """
    kind, grad = _kind(norm, silu), _matrix("grad", grad)
    tokens, outer = grad.shape
    x = _matrix("x", x, rows=tokens)
    width = x.shape[1]
    _check(operands, width, outer)
    norm_vectors = _norm(norm, width)
    if (norm is None) != (statistics is None):
        raise ValueError("norm and statistics belong together: give both or neither")
    mean, rstd = statistics or (None, None)
    vectors = *norm_vectors, _vector("mean", mean, tokens), _vector("rstd", rstd, tokens)
    sizes = (outer, width), (outer,)
    if tokens == 0:
        product, total = (grad.new_zeros(size, dtype=torch.float32) for size in sizes)
        return product, total
    product, total = (grad.new_empty(size, dtype=torch.float32) for size in sizes)
    given = kind, grad, x, alpha, *vectors, operands == torch.bfloat16
    _native.run_constant("linear_grad_weight", *given, product, total)
    return product, total


def _kind(norm: Norm | None, silu: bool) -> int:
    if norm is not None and silu:
        raise ValueError("norm and silu are both given, expected one at most")
    return _NORMED if norm is not None else _SILU if silu else _PLAIN


def _check(operands: torch.dtype, *widths: int) -> None:
    if operands not in DTYPES:
        raise TypeError(f"operands is {operands}, expected torch.float32 or torch.bfloat16")
    for width in widths:
        if width == 0 or width % UNIT:
            raise ValueError(f"a width is {width}, expected a positive multiple of {UNIT}")


def _norm(norm: Norm | None, width: int) -> tuple[Tensor | None, Tensor | None]:
    weight, bias, _ = norm or (None, None, 0.0)
    return _vector("norm.weight", weight, width), _vector("norm.bias", bias, width)


def _matrix(name: str, x: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
    """Check a matrix, and return it as the kernels read it: in memory, contiguous rows."""
    if x.ndim != 2 or x.dtype not in DTYPES or x.device.type != "cpu":
        raise TypeError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device}, expected a matrix of float32 or "
            "bfloat16 on the CPU; the reference takes others"
        )
    height, width = x.shape
    if rows not in (None, height) or columns not in (None, width):
        expected = [height if rows is None else rows, width if columns is None else columns]
        raise ValueError(f"{name} is {[height, width]}, expected {expected}")
    return _native.rows(_native.resolved(x))


def _vector(name: str, x: Tensor | None, size: int) -> Tensor | None:
    """Check a vector, and return it as the kernels read it: contiguous, fp32."""
    if x is None:
        return None
    if x.shape != (size,):
        raise ValueError(f"{name} is {list(x.shape)}, expected {[size]}")
    return _native.dense(_native.resolved(x), torch.float32)
