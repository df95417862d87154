"""pairwise_logsumexp against float64, and as a PyTorch op."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from clipvip.ops import pairwise_logsumexp
from clipvip.ops._native import module
from clipvip.ops.pairwise_logsumexp import block_gradients, pairwise_logsumexp_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# n, m, D, diagonal: blocks that are whole and not, positives inside and off either end.
SHAPES = [
    (1, 1, 5, 0),
    (2, 2, 3, 0),
    (63, 63, 64, 0),
    (250, 250, 48, 0),
    (129, 300, 33, 5),
    (300, 129, 64, -7),
    (130, 410, 24, 100),
    (5, 3, 16, 99),
    (3, 5, 17, -99),
    (1, 300, 7, 299),
    (300, 1, 7, -299),
    (0, 4, 3, 0),
    (4, 0, 3, 0),
    (0, 0, 3, 0),
]
NAMES = "row_lse", "col_lse", "positive", "grad_a", "grad_b", "grad_scale"


def inputs(n, m, depth, dtype=torch.float32, scale=20.0, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        F.normalize(torch.randn(rows, depth, generator=generator), dim=-1).to(device, dtype)
        for rows in (n, m)
    )
    scale = torch.tensor(scale, device=device)
    return a.requires_grad_(), b.requires_grad_(), scale.requires_grad_()


def outputs_and_gradients(function, a, b, scale, *arguments):
    """The three outputs and the gradients under fixed upstream gradients."""
    a, b, scale = (x.detach().clone().requires_grad_() for x in (a, b, scale))
    outputs = function(a, b, scale, *arguments)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(len(x), generator=generator).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, (a, b, scale), upstream)]


def plain(a, b, scale, diagonal=0):
    """The reference computed entirely in the dtype of a and b."""
    logits = scale.to(a.dtype) * (a @ b.T)
    own = torch.zeros_like(logits, dtype=torch.bool)
    rows = torch.arange(len(a), device=a.device)
    inside = (rows + diagonal >= 0) & (rows + diagonal < len(b))
    own[rows[inside], rows[inside] + diagonal] = True
    positive = logits.new_full((len(a),), -torch.inf).masked_scatter(inside, logits[own])
    others = logits.masked_fill(own, -torch.inf)
    return others.logsumexp(1), others.logsumexp(0), positive


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    finite = expected.isfinite()
    assert torch.equal(found.double()[~finite], expected[~finite])
    return (found.double() - expected)[finite].abs().max().item() if finite.any() else 0.0


def assert_close_to_float64(ours, exact, eager) -> None:
    """The error is at most twice that of plain PyTorch, plus a few units in the last place."""
    for name, found, expected, other in zip(NAMES, ours, exact, eager, strict=True):
        finite = expected[expected.isfinite()]
        size = finite.abs().max().item() if len(finite.flatten()) else 0.0
        floor = 8 * torch.finfo(found.dtype).eps * max(size, 1.0)
        assert error(found, expected) <= 2 * error(other, expected) + floor, name


@pytest.fixture(params=[*module().cpu_capabilities(), "cuda"])
def kernel(request):
    """The kernel's device: the CPU with each instruction set in turn, then a GPU."""
    if request.param == "cuda":
        yield request.getfixturevalue("cuda")
        return
    before = module().cpu_capability()
    module().set_cpu_capability(request.param)
    yield "cpu"
    module().set_cpu_capability(before)


@functools.cache
def sample(n, m, depth, diagonal, dtype, scale, device):
    """Inputs, and outputs and gradients in float64 and by plain PyTorch in their own dtype."""
    tensors = inputs(n, m, depth, dtype, scale, device=device)
    doubles = [x.double() for x in tensors]
    exact = outputs_and_gradients(pairwise_logsumexp_reference, *doubles, diagonal)
    return tensors, exact, outputs_and_gradients(plain, *tensors, diagonal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_against_float64(kernel, shape, dtype):
    for scale in (0.0, 20.0, 200.0):
        tensors, exact, eager = sample(*shape, dtype, scale, kernel)
        ours = outputs_and_gradients(pairwise_logsumexp, *tensors, shape[3])
        assert [x.dtype for x in ours] == [torch.float32] * 3 + [x.dtype for x in tensors]
        assert_close_to_float64(ours, exact, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_beyond_the_range_of_exp(kernel, dtype):
    """Rows that span e^±4000, near-duplicates among strangers: each sum keeps its own maximum."""
    a, b, scale = inputs(150, 140, 32, dtype, 200.0, device=kernel)
    with torch.no_grad():
        a[7], b[9] = 4 * a[3], -3 * b[2]
        b[11] = a[5]
        a[20:40] *= 0.01
    doubles = [x.double() for x in (a, b, scale)]
    exact = outputs_and_gradients(pairwise_logsumexp_reference, *doubles)
    eager = outputs_and_gradients(plain, a, b, scale)
    assert_close_to_float64(outputs_and_gradients(pairwise_logsumexp, a, b, scale), exact, eager)


def test_every_part_of_the_upstream_gradient_counts_alone(device):
    tensors = inputs(70, 90, 16, device=device)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    for part in range(3):
        ours = pairwise_logsumexp(*tensors, 3)[part].square().sum()
        exact = pairwise_logsumexp_reference(*doubles, 3)[part].square().sum()
        found = torch.autograd.grad(ours, tensors)
        expected = torch.autograd.grad(exact, doubles)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


def test_infinite_statistics_pass_no_gradient(device):
    """Even an incoming NaN stops where there is nothing to differentiate."""
    a, b, scale = inputs(1, 1, 4, device=device)
    zero, nan = torch.zeros(1, device=device), torch.full((1,), torch.nan, device=device)
    outputs = pairwise_logsumexp(a, b, scale, 5)
    assert outputs[2].item() == -torch.inf
    for gradient in torch.autograd.grad(outputs, (a, b, scale), (zero, zero, nan)):
        assert not gradient.any()
    outputs = pairwise_logsumexp(a, b, scale)
    assert outputs[0].item() == outputs[1].item() == -torch.inf
    grad_a, _, grad_scale = torch.autograd.grad(outputs, (a, b, scale), (nan, nan, zero + 1))
    torch.testing.assert_close(grad_a, scale * b)
    torch.testing.assert_close(grad_scale, (a * b).sum())


def test_reference_passes_gradcheck():
    tensors = [x.detach().double().requires_grad_() for x in inputs(5, 7, 3, scale=3.0)]
    for diagonal in (-2, 0, 3):
        assert torch.autograd.gradcheck(
            lambda a, b, scale, d=diagonal: [
                x[x.isfinite()] for x in pairwise_logsumexp_reference(a, b, scale, d)
            ],
            tensors,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(dtype):
    tensors = inputs(700, 900, 24, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(outputs_and_gradients(pairwise_logsumexp, *tensors, 50))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_strided_inputs(device):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(100, 60, generator=generator).to(device)
    views = {
        "rows apart": (wide[:, 3:30], wide[:, 30:57]),
        "transposed": (wide[:50, :27].T, wide[50:, :27].T),
        "expanded": (wide[:1, :20].expand(30, 20), wide[:, :20]),
    }
    scale = torch.tensor(0.3, device=device)
    for name, (a, b) in views.items():
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        found = pairwise_logsumexp(a, b, scale)
        expected = pairwise_logsumexp(a.contiguous(), b.contiguous(), scale)
        assert all(map(torch.equal, found, expected)), name
        found = torch.autograd.grad(found[0].sum() + found[2].sum(), (a, b))
        expected = torch.autograd.grad(expected[0].sum() + expected[2].sum(), (a, b))
        assert all(map(torch.equal, found, expected)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(device, dtype):
    a, b, scale = inputs(9, 12, 8, dtype, device=device)
    torch.library.opcheck(torch.ops.clipvip.pairwise_logsumexp.default, (a, b, scale, 2))
    with torch.no_grad():
        row_lse, col_lse, positive = torch.ops.clipvip.pairwise_logsumexp(a, b, scale, 2)
        backward = torch.ops.clipvip.pairwise_logsumexp_backward.default
        statistics = (row_lse, col_lse, row_lse, col_lse, torch.ones_like(positive))
        torch.library.opcheck(backward, (a.detach(), b.detach(), scale.detach(), 2, *statistics))


def test_compiles_whole(device):
    tensors = inputs(40, 50, 16, device=device)

    def statistics(a, b, scale):
        row_lse, col_lse, positive = pairwise_logsumexp(2 * a, b, scale, 4)
        return row_lse + 1, col_lse, positive

    compiled = torch.compile(statistics, fullgraph=True, backend="aot_eager")
    found = outputs_and_gradients(compiled, *tensors)
    expected = outputs_and_gradients(statistics, *tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_casts_features_but_not_the_scale(device, backend):
    a, b, scale = inputs(40, 50, 16, scale=99.7, device=device)
    with torch.autocast(device, torch.bfloat16):
        found = pairwise_logsumexp(a, b, scale, backend=backend)
    expected = pairwise_logsumexp(a.bfloat16(), b.bfloat16(), scale, backend=backend)
    assert all(map(torch.equal, found, expected))
    assert found[0].dtype == torch.float32
    gradients = torch.autograd.grad(sum(x.sum() for x in found), (a, b, scale))
    assert all(x.dtype == torch.float32 for x in gradients)


def test_checkpointing(device):
    tensors = inputs(40, 50, 16, device=device)
    checkpoint = torch.utils.checkpoint.checkpoint
    found = outputs_and_gradients(
        lambda *x: checkpoint(pairwise_logsumexp, *x, use_reentrant=False), *tensors
    )
    assert all(map(torch.equal, found, outputs_and_gradients(pairwise_logsumexp, *tensors)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_replays(dtype, cuda):
    """The graph is captured with one batch and replayed with another."""
    tensors = inputs(300, 300, 64, dtype, device=cuda)
    others = inputs(300, 300, 64, dtype, scale=30.0, seed=1, device="cuda")
    expected = [outputs_and_gradients(pairwise_logsumexp, *x) for x in (tensors, others)]
    static = [x.detach().clone().requires_grad_() for x in tensors]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(300, generator=generator).cuda() for _ in range(3)]

    def step():
        outputs = pairwise_logsumexp(*static)
        return [*outputs, *torch.autograd.grad(outputs, static, upstream)]

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        results = step()
    for batch, wanted in zip((tensors, others), expected, strict=True):
        with torch.no_grad():
            for to, value in zip(static, batch, strict=True):
                to.copy_(value)
        graph.replay()
        assert all(map(torch.equal, results, wanted))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_and_columns(dtype, device):
    """Several panels on a GPU, against fp32 in blocks of rows."""
    n, block = (20000, 1000) if device == "cuda" else (700, 200)
    tensors = inputs(n, n + 3, 64, dtype, device=device)
    wide = [x.detach().float() for x in tensors]
    ours = outputs_and_gradients(pairwise_logsumexp, *tensors, 5)
    parts = [
        pairwise_logsumexp_reference(wide[0][i : i + block], *wide[1:], 5 + i)
        for i in range(0, n, block)
    ]
    rows, columns, positive = zip(*parts, strict=True)
    exact = [torch.cat(rows), torch.stack(columns).logsumexp(0), torch.cat(positive)]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(len(x), generator=generator).to(device) for x in exact]
    grads = []
    for i in range(0, n, block):
        of_rows, of_columns, of_positive = upstream
        rows = slice(i, i + block)
        given = wide[0][rows], *wide[1:], 5 + i, exact[0][rows], exact[1]
        own = of_rows[rows], of_columns, of_positive[rows]
        grads.append(block_gradients(*given, *own, backend="reference"))
    of_a, of_b, of_scale = zip(*grads, strict=True)
    exact += [torch.cat(of_a), torch.stack(of_b).sum(0), torch.stack(of_scale).sum()]
    for name, found, expected in zip(NAMES, ours, exact, strict=True):
        finite = expected.isfinite()
        assert torch.equal(found.float()[~finite], expected[~finite]), name
        off = (found.float() - expected)[finite].norm() / expected[finite].norm()
        assert off <= 4 * torch.finfo(dtype).eps + 1e-4, f"{name} is off by {off:.1e}"


def test_runs_are_the_same(device):
    tensors = inputs(700, 900, 24, torch.bfloat16, device=device)
    results = [outputs_and_gradients(pairwise_logsumexp, *tensors, 50) for _ in range(3)]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_errors_say_what_was_given():
    a, b, scale = inputs(4, 6, 8)
    with pytest.raises(ValueError, match=r"a is \[4, 8\] and b is \[6, 5\], expected"):
        pairwise_logsumexp(a, b[:, :5], scale)
    with pytest.raises(ValueError, match=r"a is \[8\]"):
        pairwise_logsumexp(a[0], b, scale)
    with pytest.raises(ValueError, match=r"scale is \[1\], expected a 0-d tensor"):
        pairwise_logsumexp(a, b, scale[None])
    with pytest.raises(TypeError, match="scale is float, expected a tensor"):
        pairwise_logsumexp(a, b, 20.0)
    with pytest.raises(TypeError, match=r"b is torch.int64, expected a tensor of floating dtype"):
        pairwise_logsumexp(a, b.long(), scale)
    with pytest.raises(TypeError, match=r"a is torch.float32 but b is torch.bfloat16"):
        pairwise_logsumexp(a, b.bfloat16(), scale)
    with pytest.raises(TypeError, match=r"a is torch.float64, expected float32.*reference"):
        pairwise_logsumexp(a.double(), b.double(), scale)
    with pytest.raises(TypeError, match="diagonal is float, expected int"):
        pairwise_logsumexp(a, b, scale, 1.0)
    with pytest.raises(ValueError, match="backend is 'fast', expected 'native' or 'reference'"):
        pairwise_logsumexp(a, b, scale, backend="fast")


def test_environment_chooses_the_instruction_set():
    program = "from clipvip.ops._native import module; print(module().cpu_capability())"
    environment = {**os.environ, "CLIPVIP_CPU": "plain"}
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, env=environment, text=True).strip() == "plain"
    with pytest.raises(ValueError, match="'sse9' cannot be used here"):
        module().set_cpu_capability("sse9")


NOT_FINITE = {
    "nan": lambda a, b: a[3, 5].fill_(torch.nan),
    "row of nan": lambda a, b: b[2].fill_(torch.nan),
    "nan alone": lambda a, b: a.fill_(torch.nan),
    "inf": lambda a, b: a[3, 5].fill_(torch.inf),
    "-inf": lambda a, b: b[2, 5].fill_(-torch.inf),
    "all": lambda a, b: (a[:, 0].fill_(torch.nan), b[:, 1].fill_(torch.inf)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_what_is_not_finite_is_so_where_it_is_in_float64(kernel, kind, dtype):
    """Also beside positives, in a matrix of one row, and in incoming gradients."""
    for n, m, diagonal in ((5, 7, 0), (5, 7, 3), (150, 130, -2), (4, 3, 500), (5, 3, -3)):
        a, b, scale = (x.detach() for x in inputs(n, m, 8, dtype, device=kernel))
        NOT_FINITE[kind](a, b)
        check_not_finite(a, b, scale, diagonal)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 1, 1), (1, 4, 0), (5, 7, 1)], ids=str)
def test_a_scale_that_is_not_finite(kernel, shape, scale):
    n, m, diagonal = shape
    for dtype in DTYPES:
        a, b, _ = (x.detach() for x in inputs(n, m, 8, dtype, device=kernel))
        check_not_finite(a, b, torch.tensor(scale, device=kernel), diagonal)


def check_not_finite(a, b, scale, diagonal):
    ours = outputs_and_gradients(pairwise_logsumexp, a, b, scale, diagonal)
    doubles = [x.double() for x in (a, b, scale)]
    exact = outputs_and_gradients(pairwise_logsumexp_reference, *doubles, diagonal)
    for name, found, expected in zip(NAMES, ours, exact, strict=True):
        if scale.isfinite():
            assert torch.equal(found.isnan(), expected.isnan()), name
        assert found[expected.isnan()].isnan().all(), name
        infinite = expected.isinf() & ~found.isnan()
        assert torch.equal(found.double()[infinite], expected[infinite]), name


@pytest.mark.parametrize("diagonal", [2**63 - 1, -(2**63), 2**62, 2**31, -(2**31)])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_diagonal_far_outside_has_no_positives(backend, diagonal, device):
    tensors = inputs(40, 30, 8, device=device)
    function = functools.partial(pairwise_logsumexp, backend=backend)
    found = outputs_and_gradients(function, *tensors, diagonal)
    assert found[2].isneginf().all()
    assert all(map(torch.equal, found, outputs_and_gradients(function, *tensors, 40)))
    a, b, scale = (x.detach() for x in tensors)
    statistics = found[0], found[1], found[0], found[1], torch.ones_like(found[2])
    given = [x.detach() for x in statistics]
    far, near = (
        block_gradients(a, b, scale, each, *given, backend=backend) for each in (diagonal, 40)
    )
    assert all(map(torch.equal, far, near))


def test_a_diagonal_beyond_64_bits_is_refused():
    with pytest.raises((ValueError, RuntimeError, OverflowError)):
        pairwise_logsumexp(*inputs(4, 3, 8), 2**63)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_meta_tensors_give_shapes(backend):
    a, b, scale = (x.to("meta") for x in inputs(4, 6, 8, torch.bfloat16))
    outputs = pairwise_logsumexp(a, b, scale, 2, backend=backend)
    assert [x.shape for x in outputs] == [(4,), (6,), (4,)]
    assert all(x.dtype == torch.float32 and x.is_meta for x in outputs)
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), (a, b, scale))
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]
