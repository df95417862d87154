"""The two halves of a CLIP layer that keep only what backward cannot cheaply make again.

Backward of LayerNorm → linear → QuickGELU → linear, as PyTorch composes it, keeps the input and the
output of each. Outputs of LayerNorm and QuickGELU, and weights cast by autocast, are elementwise
work next to the matrix products that read them, so here backward makes them again: a layer of
width C keeps 10·C values a token, not 16·C. The result is that of the plain composition up to
rounding.

Under torch.compile the plain composition is taken: the compiler chooses by itself what to keep.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# QuickGELU(x) = x·σ(1.702·x) = silu(1.702·x) / 1.702: both factors ride on the products around it.
SLOPE = 1.702


def norm_linear(hidden_states: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(norm(hidden_states), weight, bias).

    hidden_states: [T, C], fp32, bf16 or fp16; norm over C; weight: [K, C]; bias: [K].
    Returns [T, K] in autocast's dtype where autocast is on, else in that of hidden_states.
    """
    if torch.compiler.is_compiling():
        return F.linear(norm(hidden_states), weight, bias)
    return _NormLinear.apply(hidden_states, norm.weight, norm.bias, norm.eps, weight, bias)


def residual_mlp(
    hidden_states: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear
) -> Tensor:
    """hidden_states + fc2(QuickGELU(fc1(norm(hidden_states)))).

    hidden_states: [T, C], fp32, bf16 or fp16. Returns [T, C] in its dtype.
    """
    if torch.compiler.is_compiling():
        inner = F.silu(fc1(norm(hidden_states)) * SLOPE) * (1 / SLOPE)
        return hidden_states + fc2(inner)
    return _ResidualMLP.apply(
        hidden_states, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias
    )


def _dtype_of_products(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)


def _scaled_product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha·a @ b, the factor at no cost."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=alpha)


def _norm_gradients(ctx, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats):
    """Gradients of LayerNorm's input, weight and bias, as far as they are asked for."""
    return torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype), x, [x.shape[-1]], *stats, weight, bias, ctx.needs_input_grad[:3]
    )


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias):
        ctx.eps, ctx.dtype = eps, _dtype_of_products(x)
        with torch.autocast(x.device.type, enabled=False):
            normed, mean, rstd = _normed(x, norm_weight, norm_bias, eps)
            out = F.linear(normed.to(ctx.dtype), weight.to(ctx.dtype), bias.to(ctx.dtype))
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, mean, rstd, weight, bias = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_x = grad_norm_weight = grad_norm_bias = grad_weight = grad_bias = None
        with torch.autocast(x.device.type, enabled=False):
            if need[5]:
                grad_bias = grad.sum(0, dtype=bias.dtype)
            if need[4]:
                normed = _normed(x, norm_weight, norm_bias, ctx.eps)[0].to(ctx.dtype)
                grad_weight = (grad.t() @ normed).to(weight.dtype)
                del normed
            if any(need[:3]):
                grad_x, grad_norm_weight, grad_norm_bias = _norm_gradients(
                    ctx, grad @ weight.to(ctx.dtype), x, norm_weight, norm_bias, (mean, rstd)
                )
        return grad_x, grad_norm_weight, grad_norm_bias, None, grad_weight, grad_bias


class _ResidualMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2):
        ctx.eps, ctx.dtype = eps, _dtype_of_products(x)
        with torch.autocast(x.device.type, enabled=False):
            normed, mean, rstd = _normed(x, norm_weight, norm_bias, eps)
            before = torch.addmm(
                bias1.to(ctx.dtype),
                normed.to(ctx.dtype),
                weight1.to(ctx.dtype).t(),
                beta=SLOPE,
                alpha=SLOPE,
            )
            del normed
            out = torch.addmm(
                bias2.to(ctx.dtype), F.silu(before), weight2.to(ctx.dtype).t(), alpha=1 / SLOPE
            )
            out = out.add_(x) if out.dtype == x.dtype else x + out
        ctx.save_for_backward(
            x, norm_weight, norm_bias, mean, rstd, before, weight1, bias1, weight2, bias2
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, mean, rstd, before, weight1, bias1, weight2, bias2 = (
            ctx.saved_tensors
        )
        need = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 8
        with torch.autocast(x.device.type, enabled=False):
            last = grad.to(ctx.dtype)
            if need[7]:
                grads[7] = grad.sum(0, dtype=bias2.dtype)
            if need[6]:
                product = _scaled_product(last.t(), F.silu(before), 1 / SLOPE)
                grads[6] = product.to(weight2.dtype)
            inner = last @ weight2.to(ctx.dtype)  # the factors 1/SLOPE and SLOPE cancel below
            del last
            inner = torch.ops.aten.silu_backward(inner, before)
            if need[5]:
                grads[5] = inner.sum(0, dtype=bias1.dtype)
            if need[4]:
                normed = _normed(x, norm_weight, norm_bias, ctx.eps)[0].to(ctx.dtype)
                grads[4] = (inner.t() @ normed).to(weight1.dtype)
                del normed
            if any(need[:3]):
                inner = inner @ weight1.to(ctx.dtype)
                grads[:3] = _norm_gradients(ctx, inner, x, norm_weight, norm_bias, (mean, rstd))
                if grads[0] is not None:
                    grads[0] = grads[0].add_(grad)
        return tuple(grads)
