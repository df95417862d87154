"""The parts of a CLIP layer around attention, which keep little for backward.

PyTorch's LayerNorm → linear → QuickGELU → linear keeps the input and the output of each step for
backward. Outputs of LayerNorm and QuickGELU, and weights that autocast casts, are cheap to compute
beside the matrix products that read them. So backward recomputes them here: a layer of width C
keeps 10·C values per token instead of 16·C. Results match the plain composition up to rounding.
Matrix products are our own (clipvip.ops.linear) if those are faster, else PyTorch's.

The plain composition runs under torch.compile, which chooses itself what to keep, and for modules
that have hooks or are not plain nn.Linear, such as adapters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clipvip.ops import linear
from clipvip.ops.linear import Norm, Statistics

# QuickGELU(x) = x·σ(1.702·x) = silu(1.702·x) / 1.702; the products around it apply both factors.
SLOPE = 1.702


def norm_linear(hidden_states: Tensor, norm: nn.LayerNorm, *layers: nn.Linear) -> Tensor:
    """Apply all layers to norm(hidden_states) in one product; concatenate their outputs.

    hidden_states: [T, C], fp32, bf16 or fp16. norm: LayerNorm over C. layers: weights [Kᵢ, C].
    Returns [T, ΣKᵢ] in autocast's dtype if autocast is on, else in that of hidden_states.
    """
    if not _weights_say_all(*layers):
        normed = norm(hidden_states)
        return torch.cat([layer(normed) for layer in layers], -1)
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    if _composed(hidden_states) or not _weights_say_all(norm):
        return F.linear(norm(hidden_states), weight, bias)
    return _NormLinear.apply(hidden_states, norm.weight, norm.bias, norm.eps, weight, bias, 1.0)


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
        kind = x.device.type
        enabled = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if enabled else x.dtype
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


def _norm_gradients(grad: Tensor, x: Tensor, norm: Norm, statistics: Statistics, need):
    """Return gradients of LayerNorm's input, weight and bias; None for those not needed."""
    weight, bias = norm.weight, norm.bias
    if x.device.type == "cpu":  # there PyTorch needs them in the statistics' dtype
        weight, bias = weight.to(statistics[0].dtype), bias.to(statistics[0].dtype)
    of_x, *others = torch.ops.aten.native_layer_norm_backward(
        grad, x, [x.shape[-1]], *statistics, weight, bias, list(need)
    )
    return of_x, *(each if each is None else each.to(norm.weight.dtype) for each in others)
