"""The parts of a CLIP layer around attention, which keep little for backward.

PyTorch's LayerNorm → linear → QuickGELU → linear keeps the input and the output of each step for
backward. Outputs of LayerNorm and QuickGELU, and weights that autocast casts, are cheap to compute
beside the matrix products that read them. So backward recomputes them here: a layer of width C
keeps 10·C values per token instead of 16·C. Results match the plain composition up to rounding.
On a CPU, matrix products are our own (clipvip.ops.linear) if those are faster, else PyTorch's. On a
GPU they are PyTorch's, and what stands between them runs in kernels of ours
(clipvip.ops.elementwise), each in one pass over memory.

The plain composition runs under torch.compile, which chooses itself what to keep, and for modules
that have hooks or are not plain nn.Linear, such as adapters.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clipvip.ops import elementwise, linear
from clipvip.ops.elementwise import SLOPE
from clipvip.ops.linear import Norm, Statistics


def norm_linear(
    hidden_states: Tensor, norm: nn.LayerNorm, *layers: nn.Linear
) -> tuple[Tensor, Tensor]:
    """Apply all layers to norm(hidden_states) in one product; concatenate their outputs.

    hidden_states: [T, C], fp32, bf16 or fp16. norm: LayerNorm over C. layers: weights [Kᵢ, C].
    Returns hidden_states, for the residual connection, and the product [T, ΣKᵢ] in autocast's dtype
    if autocast is on, else in that of hidden_states. On a GPU the gradient of the first is added in
    the kernel that computes LayerNorm's.
    """
    if not _weights_say_all(*layers):
        normed = norm(hidden_states)
        return hidden_states, torch.cat([layer(normed) for layer in layers], -1)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    if _composed(hidden_states) or not _weights_say_all(norm):
        return hidden_states, F.linear(norm(hidden_states), weight, bias)
    parameters = norm.weight, norm.bias, norm.eps, weight, bias
    dtype = _product_dtype(hidden_states)
    # Backward sums up columns of the product's gradient too.
    if elementwise.takes(hidden_states, dtype=dtype) and len(bias) % elementwise.UNIT == 0:
        return _PassedNormLinear.apply(hidden_states, *parameters, dtype)
    return hidden_states, _NormLinear.apply(hidden_states, *parameters, 1.0)


def after_attention(
    hidden_states: Tensor,
    attended: Tensor,
    out_proj: nn.Linear,
    norm: nn.LayerNorm,
    fc1: nn.Linear,
    fc2: nn.Linear,
) -> Tensor:
    """Compute what a layer does with attention's result: with h = hidden_states +
    out_proj(attended), return h + fc2(QuickGELU(fc1(norm(h)))).

    hidden_states, attended: [T, C], fp32, bf16 or fp16. Returns [T, C] in the wider of the dtypes
    of hidden_states and of the products.
    """
    modules = out_proj, norm, fc1, fc2
    dtype = _product_dtype(attended)
    if (
        not _composed(hidden_states)
        and _weights_say_all(*modules)
        and elementwise.takes(hidden_states, attended, fc2.weight, dtype=dtype)
    ):
        parameters = (each for module in modules for each in (module.weight, module.bias))
        return _AfterAttention.apply(hidden_states, attended, *parameters, norm.eps, dtype)
    return residual_mlp(residual_linear(hidden_states, attended, out_proj), norm, fc1, fc2)


def residual_linear(residual: Tensor, x: Tensor, layer: nn.Linear) -> Tensor:
    """Compute residual + layer(x).

    residual: [T, K], x: [T, C], fp32, bf16 or fp16. Returns [T, K] in the wider of the residual's
    dtype and the layer's.
    """
    if _composed(x) or not _weights_say_all(layer) or residual.shape[:-1] != x.shape[:-1]:
        return residual + layer(x)
    return _ResidualLinear.apply(residual, x, layer.weight, layer.bias, False)


def residual_mlp(
    hidden_states: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear
) -> Tensor:
    """Compute hidden_states + fc2(QuickGELU(fc1(norm(hidden_states)))).

    hidden_states: [T, C], fp32, bf16 or fp16. Returns [T, C] in its dtype.
    """
    if _composed(hidden_states) or not _weights_say_all(norm, fc1, fc2):
        inner = F.silu(fc1(norm(hidden_states)) * SLOPE) * (1 / SLOPE)
        return hidden_states + fc2(inner)
    before = _NormLinear.apply(
        hidden_states, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, SLOPE
    )
    return _ResidualLinear.apply(hidden_states, before, fc2.weight, fc2.bias, True)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of products with x: autocast's if autocast is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _composed(x: Tensor) -> bool:
    """Whether to run the plain composition: under torch.compile, or for meta tensors."""
    return torch.compiler.is_compiling() or x.device.type == "meta"


def bare(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor a forward of its own."""
    return "forward" not in vars(module) and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
    )


def _weights_say_all(*modules: nn.Module) -> bool:
    """Whether modules compute exactly what their weights and biases define."""
    return all(
        type(module) in (nn.Linear, nn.LayerNorm)
        and module.weight is not None
        and module.bias is not None
        and bare(module)
        for module in modules
    )


class _Products:
    """Products of forward and of both gradients, by our kernels or by PyTorch."""

    def __init__(self, x: Tensor, *parameters: Tensor, residual: Tensor | None = None) -> None:
        self.dtype = _product_dtype(x)
        rows = (x,) if residual is None else (x, residual)
        self.ours = linear.quicker_here(self.dtype, rows, parameters)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, **options: Any):
        function = linear.linear_forward if self.ours else linear.linear_forward_reference
        return function(x, weight, bias, self.dtype, **options)

    def grad_input(self, grad: Tensor, weight: Tensor, dtype: torch.dtype, **options: Any):
        function = linear.linear_grad_input if self.ours else linear.linear_grad_input_reference
        return function(grad, weight, self.dtype, dtype, **options)

    def grad_weights(
        self, need: Any, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, **options: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return gradients of weight and bias in their dtypes; None for those not needed."""
        if not any(need):
            return None, None
        if not need[0]:
            return None, grad.sum(0, dtype=bias.dtype)
        function = linear.linear_grad_weight if self.ours else linear.linear_grad_weight_reference
        of_weight, of_bias = function(grad, x, self.dtype, **options)
        return of_weight.to(weight.dtype), of_bias.to(bias.dtype) if need[1] else None


class _NormLinear(torch.autograd.Function):
    """scale · linear(norm(x)); backward takes the gradient of the unscaled output.

    QuickGELU(x) = x·σ(1.702·x) = silu(1.702·x) / 1.702; the products around it apply both factors.
    `_ResidualLinear` returns that gradient, as its factor 1/SLOPE and the scale SLOPE cancel.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias, scale):
        ctx.products, ctx.eps = _Products(x, weight, bias, norm_weight, norm_bias), eps
        norm = Norm(norm_weight, norm_bias, eps)
        with torch.autocast(x.device.type, enabled=False):
            out, statistics = ctx.products.forward(
                x, weight, bias, norm=norm, alpha=scale, beta=scale
            )
        ctx.save_for_backward(x, norm_weight, norm_bias, *statistics, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, mean, rstd, weight, bias = ctx.saved_tensors
        need, norm = ctx.needs_input_grad, Norm(norm_weight, norm_bias, ctx.eps)
        of_norm = None, None, None
        with torch.autocast(x.device.type, enabled=False):
            of_weights = ctx.products.grad_weights(
                need[4:6], grad, x, weight, bias, norm=norm, statistics=(mean, rstd)
            )
            if any(need[:3]):
                inner = ctx.products.grad_input(grad, weight, x.dtype)
                of_norm = _norm_gradients(inner, x, norm, (mean, rstd), need[:3])
        return *of_norm, None, *of_weights, None


class _ResidualLinear(torch.autograd.Function):
    """residual + linear(x); if silu, residual + linear(silu(x) / SLOPE), see `_NormLinear`."""

    @staticmethod
    def forward(ctx, residual, x, weight, bias, silu):
        ctx.products = _Products(x, weight, bias, residual=residual)
        ctx.options = {"silu": True, "alpha": 1 / SLOPE} if silu else {}
        with torch.autocast(x.device.type, enabled=False):
            out, _ = ctx.products.forward(x, weight, bias, residual=residual, **ctx.options)
        ctx.save_for_backward(x, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        need, before = ctx.needs_input_grad, x if ctx.options else None
        of_x = None
        with torch.autocast(x.device.type, enabled=False):
            if need[1]:
                of_x = ctx.products.grad_input(grad, weight, x.dtype, before=before)
            of_weights = ctx.products.grad_weights(need[2:4], grad, x, weight, bias, **ctx.options)
        return grad if need[0] else None, of_x, *of_weights, None


# --- on a GPU ------------------------------------------------------------------------------------
#
# Biases that an elementwise kernel can add are left out of the products, so that the kernel's
# backward sums up their gradients too.


class _PassedNormLinear(torch.autograd.Function):
    """x itself, and linear(norm(x))."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias, dtype):
        norm = Norm(norm_weight, norm_bias, eps)
        with torch.autocast(x.device.type, enabled=False):
            _, normed, statistics = elementwise.add_norm(x, None, None, norm, dtype)
            out = torch.addmm(bias.to(dtype), normed, weight.to(dtype).t())
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, norm_weight, norm_bias, *statistics, weight, bias)
        return x, out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_passed, grad):
        x, norm_weight, norm_bias, mean, rstd, weight, bias = ctx.saved_tensors
        if grad is None:
            return grad_passed, *[None] * 6
        need, norm = ctx.needs_input_grad, Norm(norm_weight, norm_bias, ctx.eps)
        with torch.autocast(x.device.type, enabled=False):
            of_normed = grad @ weight.to(grad.dtype)
            of_x, _, normed, *of_norm, _ = elementwise.add_norm_backward(
                of_normed, grad_passed, x, (mean, rstd), norm, None
            )
            of_weight = _weight_gradient(need[4], grad, normed, weight)
            of_bias = elementwise.cast_and_sum(grad, None)[1].to(bias.dtype) if need[5] else None
        return of_x, *_of_norm(of_norm, norm), None, of_weight, of_bias, None


class _AfterAttention(torch.autograd.Function):
    """See `after_attention`."""

    @staticmethod
    def forward(ctx, x, attended, wo, bo, norm_weight, norm_bias, w1, b1, w2, b2, eps, dtype):
        norm = Norm(norm_weight, norm_bias, eps)
        with torch.autocast(x.device.type, enabled=False):
            attended = attended.to(dtype)
            product = attended @ wo.to(dtype).t()
            middle, normed, statistics = elementwise.add_norm(x, product, bo, norm, dtype)
            before = normed @ w1.to(dtype).t()
            del product, normed
            product = elementwise.quick_gelu(before, b1) @ w2.to(dtype).t()
            out = elementwise.add(middle, product, b2)
        ctx.eps = eps
        ctx.save_for_backward(
            attended, wo, bo, norm_weight, norm_bias, w1, b1, w2, b2, middle, *statistics, before
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        attended, wo, bo, norm_weight, norm_bias, w1, b1, w2, b2, *kept = ctx.saved_tensors
        middle, mean, rstd, before = kept
        need, norm = ctx.needs_input_grad[2:], Norm(norm_weight, norm_bias, ctx.eps)
        dtype = before.dtype
        with torch.autocast(grad.device.type, enabled=False):
            outer, of_b2 = elementwise.cast_and_sum(grad, dtype)
            assert outer is not None
            of_inner = outer @ w2.to(dtype)
            of_before, inner, of_b1 = elementwise.quick_gelu_backward(
                of_inner, before, b1, into=of_inner
            )
            of_w2 = _weight_gradient(need[6], outer, inner, w2)
            del outer, inner
            of_normed = of_before @ w1.to(dtype)
            of_x, copy, normed, *of_norm, of_bo = elementwise.add_norm_backward(
                of_normed, grad, middle, (mean, rstd), norm, dtype
            )
            assert copy is not None and of_bo is not None
            of_w1 = _weight_gradient(need[4], of_before, normed, w1)
            of_wo = _weight_gradient(need[0], copy, attended, wo)
            of_attended = copy @ wo.to(dtype)
        of_out_proj = of_wo, of_bo.to(bo.dtype)
        of_mlp = of_w1, of_b1.to(b1.dtype), of_w2, of_b2.to(b2.dtype)
        return of_x, of_attended, *of_out_proj, *_of_norm(of_norm, norm), *of_mlp, None, None


def _weight_gradient(needed: bool, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    return (grad.t() @ x).to(weight.dtype) if needed else None


def _of_norm(sums: list[Tensor], norm: Norm) -> Iterator[Tensor]:
    return (each.to(norm.weight.dtype) for each in sums)


# --- LayerNorm in PyTorch ------------------------------------------------------------------------


def _norm_gradients(grad: Tensor, x: Tensor, norm: Norm, statistics: Statistics, need):
    """Return gradients of LayerNorm's input, weight and bias; None for those not needed."""
    weight, bias = norm.weight, norm.bias
    if x.device.type == "cpu":  # there PyTorch needs them in the statistics' dtype
        weight, bias = weight.to(statistics[0].dtype), bias.to(statistics[0].dtype)
    of_x, *others = torch.ops.aten.native_layer_norm_backward(
        grad, x, [x.shape[-1]], *statistics, weight, bias, list(need)
    )
    return of_x, *(each if each is None else each.to(norm.weight.dtype) for each in others)
