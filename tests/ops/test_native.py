"""What the ops' CUDA functions do where the compiled module has no CUDA part."""

import importlib
import types

import pytest
import torch

from clipvip.ops import _native

loss = importlib.import_module("clipvip.ops.pairwise_logsumexp")
attention = importlib.import_module("clipvip.ops.proxy_attention")


def calls():
    """Name → a call of each CUDA function, with tensors that need no GPU."""
    qkv, out, lse = torch.zeros(6, 3, 1, 16), torch.zeros(6, 1, 16), torch.zeros(1, 6)
    offsets = torch.tensor([0, 1], dtype=torch.int32)
    a, scale, row = torch.zeros(2, 4), torch.tensor(1.0), torch.zeros(2)
    return {
        "attention forward": lambda: attention._forward_cuda(qkv, offsets, 2, 4, 1.0),
        "attention backward": lambda: attention._backward_cuda(
            out, qkv, offsets, 2, 4, 1.0, out, lse
        ),
        "loss forward": lambda: loss._forward_cuda(a, a, scale, 0),
        "loss backward": lambda: loss._backward_cuda(a, a, scale, 0, row, row, row, row, row),
    }


@pytest.mark.parametrize("name", calls())
def test_without_cuda_kernels_the_line_comes_before_any_of_their_names(name, monkeypatch):
    """Under torch.compile nothing asks before the op runs, so the op itself must."""
    without = types.SimpleNamespace(build_info=lambda: {"cuda": None})
    monkeypatch.setattr(_native, "module", lambda: without)
    _native._check_gpu.cache_clear()
    with pytest.raises(RuntimeError, match="built without CUDA kernels; install it again"):
        calls()[name]()
