"""elementwise: its references, where its kernels run, and the kernels on a GPU and as compiled.

tests/emulator/test_elementwise_kernels.py compares the kernels with float64 without a GPU.
"""

import re

import kernel_table
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipvip.ops import _native
from clipvip.ops import elementwise as op
from clipvip.ops.linear import Norm

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (FP16, FP16)]


def inputs(count, width, wide, narrow, device="cpu"):
    """Return residual, product, gradients of both results, bias, and norm."""
    generator = torch.Generator().manual_seed(0)
    of_rows = torch.randn(4, count, width, generator=generator)
    dtypes = wide, narrow, wide, narrow
    of_rows = [x.to(device, dtype) for x, dtype in zip(of_rows, dtypes, strict=True)]
    bias, weight, norm_bias = torch.randn(3, width, generator=generator).to(device)
    if wide == torch.float64:
        bias, weight, norm_bias = bias.double(), weight.double(), norm_bias.double()
    return *of_rows, bias, Norm(weight, norm_bias, 1e-5)


def everything(suffix, residual, product, grad_sum, grad_normed, bias, norm):
    """Return the results of all functions, or of those whose names end so."""

    def function(name):
        return getattr(op, name + suffix)

    dtype = product.dtype
    total, normed, statistics = function("add_norm")(residual, product, bias, norm, dtype)
    given = grad_normed, grad_sum, total, statistics, norm, dtype
    results = [total, normed, *statistics, *function("add_norm_backward")(*given)]
    results.append(function("add")(residual, product, bias))
    results += function("cast_and_sum")(grad_sum, dtype)
    results.append(function("quick_gelu")(product, bias))
    return results + list(function("quick_gelu_backward")(grad_normed, product, bias))


# --- references ----------------------------------------------------------------------------------


def test_references_have_the_gradients_that_autograd_finds():
    residual, product, grad_sum, grad_normed, bias, norm = inputs(7, 24, *[torch.float64] * 2)
    leaves = [x.clone().requires_grad_() for x in (residual, product, bias, *norm[:2])]
    total = leaves[0] + (leaves[1] + leaves[2])
    normed = F.layer_norm(total, [24], *leaves[3:], norm.eps)
    grads = torch.autograd.grad((total, normed), leaves, (grad_sum, grad_normed))
    found = op.add_norm_reference(residual, product, bias, norm, torch.float64)
    torch.testing.assert_close(found[:2], (total.detach(), normed.detach()))
    given = grad_normed, grad_sum, *found[:1], found[2], norm, torch.float64
    backward = op.add_norm_backward_reference(*given)
    of_residual, of_product, of_normed, of_weight, of_norm_bias, of_bias = backward
    expected = of_residual, of_product, of_bias, of_weight, of_norm_bias
    torch.testing.assert_close(expected, grads)
    torch.testing.assert_close(of_normed, normed.detach())

    leaves = [x.clone().requires_grad_() for x in (product, bias)]
    out = op.quick_gelu_reference(*leaves)
    grads = torch.autograd.grad(out, leaves, grad_normed)
    of_x, again, of_bias = op.quick_gelu_backward_reference(grad_normed, product, bias)
    torch.testing.assert_close((of_x, of_bias, again), (*grads, out.detach()))


# --- where the kernels run -----------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def test_nothing_but_matrices_on_a_gpu_is_taken(monkeypatch):
    """Asking never raises."""
    monkeypatch.setattr(_native, "has_kernels", lambda index: True)
    x = torch.randn(4, 64)
    strange = (torch.tensor(1.0), x[0], x[None], x.long(), x.double(), x.to("meta"), x.to_sparse())
    for each in (x, *strange, x.as_subclass(Subclass), nn.Parameter(x), x.T, x[:, :7]):
        assert not op.takes(each) and not op.takes(each, dtype=BF16)
    seen = []
    torch.vmap(lambda each: seen.append(op.takes(each)) or each)(x[None])
    assert seen == [False]


def test_what_a_gpu_takes(cuda):
    x = torch.zeros(3, 64, device=cuda)
    assert op.takes(x) and op.takes(nn.Parameter(x)) and op.takes(x[:0])
    assert op.takes(x, torch.zeros(3072, 768, device=cuda), dtype=BF16)
    assert op.takes(x.bfloat16(), dtype=BF16)
    assert not op.takes(x.bfloat16(), dtype=FP32) and not op.takes(x.bfloat16(), dtype=FP16)
    assert not op.takes(x, dtype=torch.float64) and not op.takes(x, x.cpu())
    assert not op.takes(torch.zeros(1, 2056, device=cuda))
    assert not any(map(op.takes, (x[:, :60].contiguous(), x.T, x[0], x.double(), x[:, :32])))


def test_without_kernels_for_a_gpu_nothing_is_taken(monkeypatch):
    class Module:
        @staticmethod
        def build_info():
            return {"cuda": None}

    monkeypatch.setattr(_native, "module", Module)
    _native.has_kernels.cache_clear()
    assert not _native.has_kernels(0)
    _native.has_kernels.cache_clear()


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize(("count", "width"), [(5000, 768), (33, 1664), (1, 8), (0, 64)])
def test_kernels_against_float64(cuda, count, width, pair):
    given = inputs(count, width, *pair, cuda)
    exact = everything("_reference", *(double(x) for x in given))
    for one, two in zip(everything("", *given), exact, strict=True):
        size = max(1.0, two.abs().max().item()) if two.numel() else 1.0
        # Each result is rounded, and before it the sum, on which most of them depend.
        eps = torch.finfo(one.dtype).eps + torch.finfo(pair[0]).eps
        torch.testing.assert_close(one.double(), two, rtol=0, atol=4 * eps * size)


def double(x):
    return Norm(x.weight.double(), x.bias.double(), x.eps) if isinstance(x, Norm) else x.double()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_runs_are_the_same(cuda, pair):
    given = inputs(3000, 768, *pair, cuda)
    first = everything("", *given)
    assert all(map(torch.equal, first, everything("", *given)))


def test_a_cuda_graph_replays(cuda):
    given = inputs(500, 768, FP32, BF16, cuda)
    everything("", *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = everything("", *given)
    given[0].add_(1)
    graph.replay()
    assert all(map(torch.equal, results, everything("", *given)))


# --- machine code --------------------------------------------------------------------------------

MAIN = (
    r"elementwise::(add_norm(_backward)?<\w+, \w+, \d+>|(add|cast_and_sum)<\w+, \w+>"
    r"|quick_gelu(_backward)?<\w+>|join\b)"
)


@pytest.fixture
def own_kernels(kernels) -> list[dict]:
    return [row for row in kernels if re.search(MAIN, row["kernel"])]


def test_all_instances_are_compiled_and_none_spills(own_kernels):
    # 5 pairs of dtypes, 4 lengths of rows
    assert len({row["kernel"] for row in own_kernels}) == 2 * 5 * 4 + 2 * 5 + 2 * 3 + 1
    spilling = [row for row in own_kernels if row["stack"] or row["local_memory"]]
    assert not spilling, kernel_table.table(spilling)


# What these store is 16-bit, 4 numbers per lane: rows that are normalized, and casts of fp32.
NARROW = r"add_norm(_backward)?<b?float16|cast_and_sum<float, b?float16"


def test_rows_are_read_and_written_16_bytes_at_a_time(own_kernels):
    for row in own_kernels:
        if "join" not in row["kernel"]:
            assert row["load_128"], row
            assert bool(row["store_128"]) != bool(re.search(NARROW, row["kernel"])), row


def test_enough_bytes_are_in_flight(own_kernels):
    """4.3 TB/s over 0.7 µs are 23 KB for each of an H100's 132 multiprocessors."""
    in_flight = {  # bytes that a warp loads before it uses the first
        "add_norm<float, bfloat16, 768>": 768 * (4 + 2),
        "add_norm_backward<float, bfloat16, 768>": 768 * (4 + 2),
        "add<float, bfloat16>": 2 * 32 * 4 * (4 + 2),
        "cast_and_sum<float, bfloat16>": 4 * 32 * 4 * 4,
        "quick_gelu<bfloat16>": 4 * 32 * 8 * 2,
        "quick_gelu_backward<bfloat16>": 2 * 32 * 8 * (2 + 2),
    }
    for name, of_warp in in_flight.items():
        rows = [row for row in own_kernels if row["kernel"].endswith(f"elementwise::{name}")]
        assert rows
        for row in rows:
            blocks = row["blocks"]
            if "add_norm_backward" in name:  # three sums of fp32 per column and warp
                shared = 4 * 3 * 768 * 4 + kernel_table.SYSTEM
                blocks = min(blocks, kernel_table.SHARED[row["arch"]] // shared)
            assert blocks * row["threads"] // 32 * of_warp > 23_000, row
