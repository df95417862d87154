"""The work between a layer's matrix products on a GPU.

It is limited by memory, so each kernel does much work on a row that it reads once.
clipvip.model.layers builds its forward and backward from these functions, which are not
differentiable themselves:

    add_norm            residual + (product + bias), and its LayerNorm
    add_norm_backward   the gradient of that sum, and what else backward reads of it
    add                 residual + (product + bias)
    cast_and_sum        a gradient in another dtype, and the sum of its rows
    quick_gelu          QuickGELU of x + bias
    quick_gelu_backward the gradient of x, and QuickGELU of x + bias once more

Sums of a gradient's rows are gradients of biases. All arithmetic is fp32, and each result is
rounded once. Each function has a `…_reference` in plain PyTorch for any device. On a CPU,
clipvip.ops.linear does the same work inside its products.
"""

import torch
from torch import Tensor, nn

from clipvip.ops import _native
from clipvip.ops.linear import Norm, Statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = 8  # columns are a multiple of it, so that every row starts on 16 bytes
WIDEST = 2048  # columns of a row that is normalized, all of which a warp holds in registers
SLOPE = 1.702  # QuickGELU(y) = y·σ(1.702·y)


def takes(residual: Tensor, *others: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether the kernels run on these tensors; never raises.

    They must be plain contiguous matrices on a CUDA GPU that clipvip was built for, with a multiple
    of UNIT columns, in fp32, bf16 or fp16.

    residual: [T, C], the rows to be normalized; C is at most WIDEST.
    others: further rows, or weights, whose columns are those of rows that do not exist yet.
    dtype: of the products; fp32, bf16 or fp16 if the residual is fp32, otherwise the residual's.
    """
    return (
        residual.shape[-1:] <= (WIDEST,)
        and dtype in (None, residual.dtype, *(DTYPES if residual.dtype == torch.float32 else ()))
        and all(
            # A subclass may keep its values elsewhere, or have none.
            type(x) in (Tensor, nn.Parameter)
            and x.is_cuda
            and x.dtype in DTYPES
            and x.ndim == 2
            and x.shape[1] > 0
            and x.shape[1] % UNIT == 0
            and x.is_contiguous()
            for x in (residual, *others)
        )
        and _native.has_kernels(residual.get_device())
    )


# --- references ----------------------------------------------------------------------------------


def add_norm_reference(
    residual: Tensor, product: Tensor | None, bias: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Statistics]:
    """Compute `add_norm` in plain PyTorch, for any device and floating dtype."""
    total = residual if product is None else add_reference(residual, product, bias)
    rows = _wide(total)
    weight, norm_bias = norm.weight.to(rows.dtype), norm.bias.to(rows.dtype)
    normed, mean, rstd = torch.native_layer_norm(
        rows, [rows.shape[-1]], weight, norm_bias, norm.eps
    )
    return total, normed.to(dtype), (mean.flatten(), rstd.flatten())


def add_norm_backward_reference(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    statistics: Statistics,
    norm: Norm,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute `add_norm_backward` in plain PyTorch."""
    rows = _wide(total)
    weight, bias = norm.weight.to(rows.dtype), norm.bias.to(rows.dtype)
    mean, rstd = (x[:, None] for x in statistics)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(rows.dtype), rows, [rows.shape[-1]], mean, rstd, weight, bias, [True] * 3
    )
    if grad_sum is not None:
        grad = grad + grad_sum
    normed = ((rows - mean) * rstd * weight + bias).to(grad_normed.dtype)
    copy, column_sums = (None, None) if dtype is None else cast_and_sum_reference(grad, dtype)
    return grad.to(total.dtype), copy, normed, grad_weight, grad_bias, column_sums


def add_reference(residual: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `add` in plain PyTorch."""
    rows = _wide(product)
    rows = rows if bias is None else rows + bias
    return (residual + rows).to(residual.dtype)


def cast_and_sum_reference(grad: Tensor, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor]:
    """Compute `cast_and_sum` in plain PyTorch."""
    return None if dtype is None else grad.to(dtype), _wide(grad).sum(0)


def quick_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """Compute `quick_gelu` in plain PyTorch."""
    y = _wide(x) + bias
    return (y * torch.sigmoid(SLOPE * y)).to(x.dtype)


def quick_gelu_backward_reference(
    grad: Tensor, x: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `quick_gelu_backward` in plain PyTorch."""
    y = _wide(x) + bias
    sigmoid = torch.sigmoid(SLOPE * y)
    grad_x = grad * sigmoid * (1 + SLOPE * y * (1 - sigmoid))
    return grad_x.to(x.dtype), (y * sigmoid).to(x.dtype), grad_x.sum(0)


def _wide(x: Tensor) -> Tensor:
    """Return x in the dtype of the arithmetic: fp32, or fp64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
