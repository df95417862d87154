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
        dtype in (None, *_beside(residual))
        and all(
            # A subclass may keep its values elsewhere, or have none.
            type(x) in (Tensor, nn.Parameter)
            and x.is_cuda
            and x.dtype in DTYPES
            and x.ndim == 2
            and x.shape[1] > 0
            and x.shape[1] % UNIT == 0
            and x.layout == torch.strided
            and x.is_contiguous()
            for x in (residual, *others)
        )
        and residual.shape[1] <= WIDEST
        and _native.has_kernels(residual.get_device())
    )


# --- kernels -------------------------------------------------------------------------------------

# All raise TypeError or ValueError for dtypes or shapes other than those that they name,
# RuntimeError where there are no kernels, and NotImplementedError if a derivative would be lost.


def add_norm(
    residual: Tensor, product: Tensor | None, bias: Tensor | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Statistics]:
    """Return residual + (product + bias), its LayerNorm, and the statistics of that.

    Equivalent to

        total = residual if product is None else residual + (product + bias)
        normed = F.layer_norm(total.float(), [C], *norm).to(dtype)

    Args:
        residual: [T, C], fp32, bf16 or fp16; see `takes`.
        product: [T, C] of `dtype`, or None.
        bias: [C], or None; without a product it must be None.
        dtype: fp32, bf16 or fp16 if the residual is fp32, otherwise the residual's.

    Returns:
        The sum in the residual's dtype, which is the residual itself without a product; its
        LayerNorm in `dtype`; and mean and 1/√(variance + eps) of the sum's rows.
    """
    rows, vectors = _rows("residual", residual), _norm_vectors(norm, residual)
    if product is None and bias is not None:
        raise ValueError("a bias is given without the product that it belongs to")
    if dtype not in _beside(residual):
        raise TypeError(f"dtype is {dtype}, which does not fit to a residual of {residual.dtype}")
    total = residual if product is None else torch.empty_like(rows)
    if product is not None:
        product = _rows("product", product, (dtype,), residual)
    normed = rows.new_empty(rows.shape, dtype=dtype)
    mean, rstd = rows.new_empty(2, len(rows), dtype=torch.float32)
    given = rows, product, _vector("bias", bias, residual), *vectors, norm.eps
    written = None if product is None else total, normed, mean, rstd
    _native.run_constant("elementwise_add_norm_cuda", *given, *written)
    return total, normed, (mean, rstd)


def add_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    statistics: Statistics,
    norm: Norm,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradient of `add_norm`'s sum, and what else backward needs of those rows.

    Args:
        grad_normed: [T, C] in the dtype of the normed rows: their gradient.
        grad_sum: [T, C] in the sum's dtype: its gradient from elsewhere, or None.
        total: [T, C], the sum.
        statistics: those that `add_norm` returned.
        dtype: of the product that was added: grad_normed's dtype or the sum's; None if there was
            no product.

    Returns:
        grad: [T, C] in the sum's dtype, the gradient of the sum and of the residual.
        copy: the same in `dtype`, the gradient of the product; grad itself if that has the dtype.
        normed: [T, C] in grad_normed's dtype, the normed rows again.
        grad_norm_weight, grad_norm_bias: fp32 [C].
        grad_bias: fp32 [C], the sum of grad's rows; None without `dtype`, as copy is.
    """
    rows, vectors = _rows("the sum", total), _norm_vectors(norm, total)
    grad_normed = _rows("grad_normed", grad_normed, _beside(total), total)
    if grad_sum is not None:
        grad_sum = _rows("grad_sum", grad_sum, (total.dtype,), total)
    if dtype not in (None, total.dtype, grad_normed.dtype):
        raise TypeError(
            f"dtype is {dtype}, expected that of grad_normed ({grad_normed.dtype}), that of the "
            f"sum ({total.dtype}) or None"
        )
    grad, normed = torch.empty_like(rows), torch.empty_like(grad_normed)
    copy = None if dtype in (None, grad.dtype) else torch.empty_like(grad_normed)
    sums = rows.new_empty(3, rows.shape[1], dtype=torch.float32)
    of_rows = [_native.dense(x, torch.float32) for x in statistics]
    given = grad_normed, grad_sum, rows, *of_rows, *vectors
    _native.run_constant("elementwise_add_norm_backward_cuda", *given, grad, copy, normed, sums)
    of_weight, of_norm_bias, of_bias = sums
    if dtype is None:
        return grad, None, normed, of_weight, of_norm_bias, None
    return grad, grad if copy is None else copy, normed, of_weight, of_norm_bias, of_bias


def add(residual: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
    """Return residual + (product + bias), [T, C] in the residual's dtype.

    residual: [T, C]; product: [T, C] in fp32, bf16 or fp16 if the residual is fp32, otherwise in
    its dtype; bias: [C] or None.
    """
    rows = _rows("residual", residual)
    product = _rows("product", product, _beside(residual), residual)
    total = torch.empty_like(rows)
    bias = _vector("bias", bias, residual)
    _native.run_constant("elementwise_add_cuda", rows, product, bias, total)
    return total


def cast_and_sum(grad: Tensor, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor]:
    """Return a gradient [T, K] in another dtype, and the sum of its rows, fp32 [K].

    dtype: grad's, for which grad itself is returned; bf16 or fp16 if grad is fp32; or None, for
    which None is returned.
    """
    rows = _rows("grad", grad)
    if dtype not in (None, *_beside(grad)):
        raise TypeError(f"dtype is {dtype}, which does not fit to a gradient of {grad.dtype}")
    copy = None if dtype in (None, rows.dtype) else torch.empty_like(rows, dtype=dtype)
    sums = rows.new_empty(rows.shape[1], dtype=torch.float32)
    _native.run_constant("elementwise_cast_and_sum_cuda", rows, copy, sums)
    return grad if dtype == grad.dtype else copy, sums


def quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return QuickGELU of x + bias, y·σ(1.702·y), in x's dtype. x: [T, K]; bias: [K]."""
    rows = _rows("x", x)
    out = torch.empty_like(rows)
    _native.run_constant("elementwise_quick_gelu_cuda", rows, _vector("bias", bias, x), out)
    return out


def quick_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor, *, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of x through `quick_gelu`, its result again, and the bias' gradient.

    grad: [T, K] in x's dtype. into: a contiguous [T, K] of that dtype to write the gradient of x
    to, which may be grad itself. Returns two [T, K] in x's dtype, and the sum of the gradient's
    rows, fp32 [K].
    """
    rows, grad = _rows("x", x), _rows("grad", grad, (x.dtype,), x)
    grad_x, out = torch.empty_like(rows) if into is None else into, torch.empty_like(rows)
    sums = rows.new_empty(rows.shape[1], dtype=torch.float32)
    given = grad, rows, _vector("bias", bias, x)
    _native.run_constant("elementwise_quick_gelu_backward_cuda", *given, grad_x, out, sums)
    return grad_x, out, sums


def _beside(residual: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that products may have."""
    return DTYPES if residual.dtype == torch.float32 else (residual.dtype,)


def _rows(
    name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES, like: Tensor | None = None
) -> Tensor:
    """Check a matrix, and return it as the kernels read it: contiguous, aligned to 16 bytes."""
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}, expected {' or '.join(map(str, dtypes))}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name} is {list(x.shape)}, expected {list(like.shape)}")
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] % UNIT:
        raise ValueError(f"{name} is {list(x.shape)}, expected [T, a multiple of {UNIT}]")
    return _native.aligned(_native.resolved(x).contiguous())


def _vector(name: str, x: Tensor | None, like: Tensor) -> Tensor | None:
    """Check a vector, and return it as the kernels read it: contiguous, aligned, fp32."""
    if x is None:
        return None
    if x.shape != like.shape[1:]:
        raise ValueError(f"{name} is {list(x.shape)}, expected {list(like.shape[1:])}")
    return _native.aligned(_native.dense(_native.resolved(x), torch.float32))


def _norm_vectors(norm: Norm, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if like.shape[1] > WIDEST:
        raise ValueError(f"rows of {like.shape[1]} are normalized, expected at most {WIDEST}")
    return _vector("norm.weight", norm.weight, like), _vector("norm.bias", norm.bias, like)


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
    grad: Tensor, x: Tensor, bias: Tensor, *, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `quick_gelu_backward` in plain PyTorch."""
    y = _wide(x) + bias
    sigmoid = torch.sigmoid(SLOPE * y)
    grad_x = grad * sigmoid * (1 + SLOPE * y * (1 - sigmoid))
    rounded = grad_x.to(x.dtype) if into is None else into.copy_(grad_x)
    return rounded, (y * sigmoid).to(x.dtype), grad_x.sum(0)


def _wide(x: Tensor) -> Tensor:
    """Return x in the dtype of the arithmetic: fp32, or fp64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
