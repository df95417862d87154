"""A layer with products by PyTorch and all other work in the CUDA kernels, on the CPU."""

import copy

import pytest
import torch

from clipvip.model.configuration import CLIPViPVisionConfig
from clipvip.model.layers import norm_linear
from clipvip.model.vision import CLIPViPEncoderLayer
from clipvip.ops import elementwise

FRAMES, PATCHES, PROXIES, WIDTH = (2, 0, 1), 4, 3, 64
TOKENS = sum(PROXIES + frames * PATCHES for frames in FRAMES)
OFFSETS = torch.tensor((0, *FRAMES)).cumsum(0).int()


def step(layer, x, grad, autocast=None):
    """The output, and gradients of x and of all weights."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        out = layer(x, OFFSETS)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], grad.to(out))]


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, None),
    ],
    ids=str,
)
def test_a_layer_is_as_exact_as_in_plain_pytorch(emulator, monkeypatch, dtype, autocast):
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=4)
    config = CLIPViPVisionConfig(**sizes, num_proxies=PROXIES, attention_backend="reference")
    layer = CLIPViPEncoderLayer(config, PATCHES)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = layer.to(dtype)
    x, grad = torch.randn(2, TOKENS, WIDTH).to(dtype)
    exact = step(copy.deepcopy(layer).double(), x.double(), grad.double())
    plain = step(layer, x, grad, autocast)
    calls = []
    monkeypatch.setattr(elementwise, "takes", lambda *rows, dtype: calls.append(dtype) or True)
    found = step(layer, x, grad, autocast)
    assert calls == [autocast or dtype] * 2
    floor = torch.finfo(autocast or dtype).eps
    names = "out", "x", *(name for name, _ in layer.named_parameters())
    for name, one, other, wanted in zip(names, found, plain, exact, strict=True):
        assert one.dtype == other.dtype
        if name == "self_attn.k_proj.bias":  # 0, the sum of numbers that cancel each other
            continue
        size = wanted.abs().max()
        errors = [(each.double() - wanted).abs().max() / size for each in (one, other)]
        assert errors[0] <= 2 * errors[1] + floor, name


@pytest.mark.parametrize("outputs", [12, 16])
def test_a_product_of_any_width_has_gradients(emulator, monkeypatch, outputs):
    torch.manual_seed(0)
    norm, layer = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, outputs)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    leaves = x, *norm.parameters(), *layer.parameters()
    wanted = torch.autograd.grad(layer(norm(x)).square().sum() + x.sin().sum(), leaves)
    monkeypatch.setattr(elementwise, "takes", lambda *rows, dtype: True)
    passed, out = norm_linear(x, norm, layer)
    found = torch.autograd.grad(out.square().sum() + passed.sin().sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
