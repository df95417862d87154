"""The MLP of a layer: `clipvip bench ops --only linear`.

LayerNorm, two products with QuickGELU between them, and the residual: the larger half of a layer of
width 768, forward and backward, over the tokens of 2 videos of ViT-B/16 or 4 of ViT-B/32; bf16 is
autocast over fp32 weights. "lean PyTorch" saves as little for backward as ours does, but uses
PyTorch's products.
Records: ops-linear-*.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import harness
import pytest
import records
import torch
from torch import Tensor, nn

from clipvip.model.layers import residual_mlp
from clipvip.ops import linear

WIDTH, INNER = 768, 3072
SIZES = {
    "b16-fp32": dict(tokens=2 * (4 + 12 * 196), dtype="float32"),
    "b16-bf16": dict(tokens=2 * (4 + 12 * 196), dtype="bfloat16"),
    "b32-fp32": dict(tokens=4 * (4 + 12 * 49), dtype="float32"),
    "b32-bf16": dict(tokens=4 * (4 + 12 * 49), dtype="bfloat16"),
}
CASES = records.each_way(SIZES)
QUICK = {"b32-fp32-default": {"compiled": False}}

Layer = nn.ModuleList  # norm, fc1, fc2


def eager(x: Tensor, layer: Layer) -> Tensor:
    norm, fc1, fc2 = layer
    inner = fc1(norm(x))
    return x + fc2(inner * torch.sigmoid(1.702 * inner))


def lean_pytorch(x: Tensor, layer: Layer) -> Tensor:
    with mock.patch.object(linear, "quicker_here", return_value=False):
        return residual_mlp(x, *layer)


def ours(x: Tensor, layer: Layer) -> Tensor:
    return residual_mlp(x, *layer)


FORMS: dict[str, Callable[[Tensor, Layer], Tensor]] = {
    "eager": eager,
    "compiled eager": torch.compile(eager, dynamic=False),
    "lean PyTorch": lean_pytorch,
    "ours": ours,
}


def measure(tokens: int, dtype: str, compiled: bool = True, budget: float = 8.0) -> dict[str, Any]:
    """Time every contestant on one size, in this process."""
    torch.manual_seed(0)
    layer = nn.ModuleList([nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)])
    x, grad = torch.randn(2, tokens, WIDTH)

    def step(form: Callable[..., Tensor], layer: Layer, x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        narrow = dtype == "bfloat16" and x.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            out = form(leaf, layer)
        return [out.detach(), *torch.autograd.grad(out, [leaf, *layer.parameters()], grad)]

    exact = step(eager, nn.ModuleList(layer).double(), x.double(), grad.double())
    layer = layer.float()
    return harness.compare(
        {
            name: functools.partial(step, form, layer, x, grad)
            for name, form in FORMS.items()
            if compiled or name != "compiled eager"
        },
        expected=exact,
        tolerance=1e-5 if dtype == "float32" else 5e-2,
        work={"flop": 12.0 * tokens * WIDTH * INNER},  # two products forward, four backward
        seconds=budget,
        left_out={} if compiled else {"compiled eager": "not compiled here, to save time"},
    )


@pytest.mark.parametrize("case", CASES)
def test_linear(case: str, run_case) -> None:
    run_case(CASES[case])
