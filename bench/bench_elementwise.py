"""The work between a layer's matrix products on a GPU: `clipvip bench ops --only elementwise`.

"norm": residual, bias and LayerNorm of width 768; "gelu": QuickGELU of width 3072. Each forward and
backward, over the tokens of 32 videos of ViT-B/16; bf16 is that of autocast, beside a residual in
fp32. Eager is given products that include their biases, as PyTorch's do. Least bytes: everything
once, and nothing computed again.
Records: ops-elementwise-*.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import records
import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.ops import elementwise
from clipvip.ops.linear import Norm

WIDTHS = {"norm": 768, "gelu": 3072}
EPS = 1e-5
CASES = records.each_way(
    {
        f"{part}-b16-bf16-batch32": dict(
            part=part, tokens=32 * (4 + 12 * 196), dtype="bfloat16", device="cuda"
        )
        for part in WIDTHS
    }
)
QUICK = {case: {"tokens": 4 + 12 * 196, "compiled": False} for case in CASES}


# Bytes per number of a row that must be read or written, bf16 beside fp32.
BYTES = {"norm": 28, "gelu": 10}


def inputs(part: str, tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the arguments of a form; products and their gradients are of the dtype."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    product, grad = draw(2, tokens, width).to(dtype)
    bias = draw(width)
    if part == "gelu":
        return [product, bias, grad]
    weight, norm_bias = draw(2, width)
    return [product, bias, grad, *draw(2, tokens, width), weight, norm_bias]


def with_bias(product: Tensor, bias: Tensor, *others: Tensor) -> list[Tensor]:
    """Return the arguments for eager."""
    return [(product + bias).to(product.dtype), bias, *others]


def eager_norm(
    product: Tensor,
    _bias: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    grad_sum: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (residual, product, weight, norm_bias)]
    residual, product, *vectors = leaves
    total = residual + product
    normed = F.layer_norm(total, total.shape[-1:], *vectors, EPS).to(grad_normed.dtype)
    grads = torch.autograd.grad((total, normed), leaves, (grad_sum, grad_normed))
    return [total.detach(), normed.detach(), *grads, grads[1].sum(0)]


def our_norm(
    product: Tensor,
    bias: Tensor,
    grad_normed: Tensor,
    residual: Tensor,
    grad_sum: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
) -> list[Tensor]:
    norm, dtype = Norm(weight, norm_bias, EPS), product.dtype
    given = residual, product, bias, norm, dtype
    total, normed, statistics = function("add_norm", product)(*given)
    given = grad_normed, grad_sum, total, statistics, norm, dtype
    grad, copy, _, *of_vectors = function("add_norm_backward", product)(*given)
    return [total, normed, grad, copy, *of_vectors]


def eager_gelu(x: Tensor, _bias: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = x * torch.sigmoid(1.702 * x)
    (grad_x,) = torch.autograd.grad(out, x, grad)
    return [out.detach(), grad_x, grad_x.sum(0)]


def our_gelu(x: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    out = function("quick_gelu", x)(x, bias)
    grad_x, _, of_bias = function("quick_gelu_backward", x)(grad, x, bias)
    return [out, grad_x, of_bias]


def function(name: str, x: Tensor) -> Callable[..., Any]:
    """Return a function of elementwise; its reference on a CPU, where suites are only tried out."""
    return getattr(elementwise, name if x.is_cuda else f"{name}_reference")


EAGER = {"norm": eager_norm, "gelu": eager_gelu}
OURS = {"norm": our_norm, "gelu": our_gelu}


def measure(
    part: str,
    tokens: int,
    dtype: str,
    device: str = "cpu",
    compiled: bool = True,
    budget: float = 8.0,
) -> dict[str, Any]:
    """Time every contestant on one size, in this process."""
    width = WIDTHS[part]
    given = [x.to(device) for x in inputs(part, tokens, width, getattr(torch, dtype))]
    exact = EAGER[part](*with_bias(*[x.double() for x in given]))
    biased = with_bias(*given)
    contestants = {
        "eager": functools.partial(EAGER[part], *biased),
        "compiled eager": functools.partial(torch.compile(EAGER[part], dynamic=False), *biased),
        "ours": functools.partial(OURS[part], *given),
    }
    return harness.compare(
        {name: run for name, run in contestants.items() if compiled or name != "compiled eager"},
        expected=exact,
        tolerance=5e-2,
        work={"bytes": float(BYTES[part] * tokens * width)},
        device=device,
        seconds=budget,
        left_out={} if compiled else {"compiled eager": "not compiled here, to save time"},
    )


@pytest.mark.parametrize("case", CASES)
def test_elementwise(case: str, run_case) -> None:
    run_case(CASES[case])
