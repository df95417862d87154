"""Row and column log-sum-exps of a similarity matrix that is never stored."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from clipvip.ops import _native


def pairwise_logsumexp(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int = 0, *, backend: str = "native"
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of a similarity matrix's rows and columns without their positives.

    Equivalent, in O((n + m)·D) memory instead of O(n·m), to

        logits = scale * a @ b.T
        own = torch.ones(n, m, dtype=torch.bool).triu(diagonal).tril(diagonal)  # the positives
        others = logits.masked_fill(own, -torch.inf)
        positive = logits[i, i + diagonal] for each row i, -torch.inf outside the matrix
        return others.logsumexp(1), others.logsumexp(0), positive

    Args:
        a: [n, D], fp32, bf16 or fp16, on the CPU or a CUDA GPU; n may be 0.
        b: [m, D], of a's dtype and on its device; m may be 0.
        scale: 0-d floating tensor, the multiplier itself, not its logarithm.
        diagonal: the positive of row i is in column i + diagonal, which may lie outside.
        backend: "native", the compiled kernel, or "reference", plain PyTorch for any device
            and floating dtype.

    Returns:
        row_lse [n], col_lse [m], positive [n], in fp32 (fp64 where a is). A row or column with no
        entry except its positive gives -inf, and so does a positive outside the matrix; these have
        no gradient. All three are differentiable once in a, b and scale. Results do not depend on
        the number of threads and are the same in every run. Autocast casts a and b, never scale.

    On a GPU nothing waits for the device, and CUDA graphs can capture the call. Backward computes
    gradients of the logits in panels of a's dtype, at most 2^26 numbers at a time whatever n and
    m, and multiplies each with b and a by torch.mm. In fp32 that product follows PyTorch's setting
    of TF32; everything else is exact fp32. Under torch.use_deterministic_algorithms it needs
    CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment from the start, or PyTorch raises.

    Raises:
        ValueError: shapes do not fit, or backend is unknown.
        TypeError: dtypes are not those above, or not equal.
        RuntimeError: the compiled module, or its kernels for this device, are missing.
        NotImplementedError: a derivative in forward mode is requested, which only the reference
            has.
    """
    with without_autocast(a, b, scale, diagonal, backend) as (a, b):
        return block_forward(a, b, scale, diagonal, backend)


def pairwise_logsumexp_reference(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `pairwise_logsumexp` in plain PyTorch; differentiable, any dtype and device."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    logits = scale.to(dtype) * (a.to(dtype) @ b.to(dtype).T)
    diagonal = _within(diagonal, a, b)
    own = torch.ones_like(logits, dtype=torch.bool).triu(diagonal).tril(diagonal)
    others = logits.masked_fill(own, float("-inf"))
    positive = logits.diagonal(diagonal)
    before = max(0, -diagonal)  # rows without a positive
    after = a.shape[0] - before - positive.shape[0]
    positive = torch.nn.functional.pad(positive, (before, after), value=float("-inf"))
    return others.logsumexp(1), others.logsumexp(0), positive


def without_autocast(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int, backend: str
) -> AbstractContextManager[tuple[Tensor, ...]]:
    """Check the arguments; the context gives a and b in autocast's dtype, and switches it off."""
    _native.check_arguments(backend, a=a, b=b, scale=scale)
    if not isinstance(diagonal, int | torch.SymInt):
        raise TypeError(f"diagonal is {type(diagonal).__name__}, expected int")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(
            f"a is {list(a.shape)} and b is {list(b.shape)}, expected [n, D] and [m, D] with D ≥ 1"
        )
    if scale.ndim != 0:
        raise ValueError(f"scale is {list(scale.shape)}, expected a 0-d tensor")
    if a.dtype != b.dtype:
        raise TypeError(f"a is {a.dtype} but b is {b.dtype}, expected one dtype")
    return _native.without_autocast(a, b)


def block_forward(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `pairwise_logsumexp` of what `without_autocast` yields."""
    if backend == "reference":
        return pairwise_logsumexp_reference(a, b, scale, diagonal)
    _native.check_kernels("a", a, b, scale)
    return _forward(a, b, scale, diagonal)


def block_gradients(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int, *statistics: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a, b and scale through scale·a·bᵀ, a block of a larger matrix.

    statistics: row_lse [n] and col_lse [m], log-sum-exps over the larger matrix's rows and columns,
    and the gradients of row_lse, col_lse and positive. The gradient of a logit x off the diagonal
    is exp(x − row_lse)·grad_row_lse + exp(x − col_lse)·grad_col_lse.
    """
    if backend == "native":
        return _backward(a, b, scale, diagonal, *statistics)
    row_lse, col_lse, grad_row_lse, grad_col_lse, grad_positive = statistics
    x, y, factor = a.to(row_lse.dtype), b.to(row_lse.dtype), scale.to(row_lse.dtype)
    products = x @ y.T
    logits = factor * products
    weights = (logits - row_lse[:, None]).exp() * grad_row_lse[:, None]
    weights += (logits - col_lse).exp() * grad_col_lse
    own = weights.diagonal(_within(diagonal, a, b))
    own.copy_(grad_positive[max(0, -diagonal) :][: len(own)])
    grad_a, grad_b = factor * (weights @ y), factor * (weights.T @ x)
    return grad_a.to(a.dtype), grad_b.to(b.dtype), (weights * products).sum().to(scale.dtype)


def _within(diagonal: int, a: Tensor, b: Tensor) -> int:
    """Return the diagonal, limited to the first one outside the matrix on either side."""
    return max(-a.shape[0], min(diagonal, b.shape[0]))


def _aligned(x: Tensor) -> Tensor:
    """Return x, or a copy with zero columns added, whose rows start and end on 16 bytes."""
    missing = -x.shape[1] % (16 // x.element_size())
    if missing:
        return torch.nn.functional.pad(x, (0, missing)).contiguous()
    return _native.aligned(x)


@_native.custom_op("pairwise_logsumexp")
def _forward(a: Tensor, b: Tensor, scale: Tensor, diagonal: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _forward_like(a, b)
    given = _native.rows(a), _native.rows(b), _native.dense(scale, torch.float32), diagonal
    _native.run("pairwise_logsumexp_forward", *given, *outputs)
    return outputs


@_forward.register_fake
def _forward_like(a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, m = a.shape[0], b.shape[0]
    row_lse, col_lse, positive = (a.new_empty(size, dtype=torch.float32) for size in (n, m, n))
    return row_lse, col_lse, positive


@_native.custom_op("pairwise_logsumexp_backward")
def _backward(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    diagonal: int,
    row_lse: Tensor,
    col_lse: Tensor,
    grad_row_lse: Tensor,
    grad_col_lse: Tensor,
    grad_positive: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = (row_lse, col_lse, grad_row_lse, grad_col_lse, grad_positive)
    grads = [x.new_zeros(x.shape, dtype=torch.float32) for x in (a, b, scale)]
    given = _native.rows(a), _native.rows(b), _native.dense(scale, torch.float32), diagonal
    _native.run("pairwise_logsumexp_backward", *given, *map(_native.dense, statistics), *grads)
    grad_a, grad_b, grad_scale = grads
    return grad_a.to(a.dtype), grad_b.to(b.dtype), grad_scale.to(scale.dtype)


@_backward.register_fake
def _backward_like(a, b, scale, diagonal, row_lse, col_lse, *grads):
    return tuple(x.new_empty(x.shape) for x in (a, b, scale))


@_forward.register_kernel("cuda")
def _forward_cuda(a: Tensor, b: Tensor, scale: Tensor, diagonal: int) -> tuple[Tensor, ...]:
    outputs = _forward_like(a, b)
    given = _aligned(a), _aligned(b), scale.to(torch.float32), diagonal
    _native.run("pairwise_logsumexp_forward_cuda", *given, *outputs)
    return outputs


@_backward.register_kernel("cuda")
def _backward_cuda(
    a: Tensor, b: Tensor, scale: Tensor, diagonal: int, *statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    row_lse, col_lse, *grads = map(_native.dense, statistics)
    diagonal = _within(diagonal, a, b)
    x, y, factor = _aligned(a), _aligned(b), scale.to(torch.float32)
    row_weight, col_weight = torch.empty_like(row_lse), torch.empty_like(col_lse)
    unit = row_lse.new_empty(4)
    grad_x, grad_y = (z.new_zeros(z.shape, dtype=torch.float32) for z in (x, y))
    grad_scale = row_lse.new_zeros(8 * _MAX_BLOCKS, dtype=torch.float64)

    rows, columns = _panel_shape(len(a), len(b))
    panel = a.new_empty(rows, columns)
    given = row_lse, col_lse, *grads, diagonal, a.dtype == torch.float32
    _native.run("pairwise_logsumexp_weigh_cuda", *given, row_weight, col_weight, unit)
    for i in range(0, len(a), rows):
        for j in range(0, len(b), columns):
            x_part, y_part = x[i : i + rows], y[j : j + columns]
            part = panel[: len(x_part), : len(y_part)]
            statistics = row_lse[i:], col_lse[j:], row_weight[i:], col_weight[j:]
            given = x_part, y_part, factor, diagonal + i - j, *statistics, grads[2][i:], unit
            _native.run(
                "pairwise_logsumexp_panel_cuda", *given, part, grad_scale.view(torch.float32)
            )
            _add_product(grad_x[i : i + rows], part, y_part)
            _add_product(grad_y[j : j + columns], part.T, x_part)
    # All gradients so far are in units of unit[3]; a logit is the scale times a product.
    factor = factor * unit[3]
    grad_a, grad_b = (
        z.mul_(factor)[:, : a.shape[1]].to(a.dtype).contiguous() for z in (grad_x, grad_y)
    )
    return grad_a, grad_b, (grad_scale.sum() * unit[3]).to(scale.dtype)


# Rows or columns of a panel of a long matrix, and the logits in it.
_PANEL_SIDE, _PANEL_SIZE = 1 << 13, 1 << 26
_MAX_BLOCKS = 1 << 10  # thread blocks that each sum a part of scale's gradient; no GPU runs more


def _panel_shape(n: int, m: int) -> tuple[int, int]:
    """Return a panel's rows and columns: square for a matrix long in both, and all of one size."""

    def evenly(length: int, most: int) -> int:
        parts = max(1, -(-length // max(256, most // 256 * 256)))
        return max(1, -(-length // (parts * 256))) * 256

    rows = evenly(n, max(_PANEL_SIDE, _PANEL_SIZE // max(m, 256)))
    return rows, evenly(m, _PANEL_SIZE // rows)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def _setup_context(ctx, inputs, output) -> None:
    a, b, scale, ctx.diagonal = inputs
    row_lse, col_lse, _ = output
    ctx.save_for_backward(a, b, scale, row_lse, col_lse)


def _differentiate(ctx, *grads):
    a, b, scale, row_lse, col_lse = ctx.saved_tensors
    return *_backward(a, b, scale, ctx.diagonal, row_lse, col_lse, *grads), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
