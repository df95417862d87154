"""The CUDA kernels of pairwise_logsumexp, on the CPU, against float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from clipvip.ops import _native

op = importlib.import_module("clipvip.ops.pairwise_logsumexp")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = "row_lse", "col_lse", "positive", "grad_a", "grad_b", "grad_scale"
# Shared memory per block of an H100, where a row block of a stays there, of an A100, where it comes
# and goes through a ring of three stages, and of a GeForce, of two.
SHARED = {"H100": 232448, "A100": 166912, "GeForce": 101376}
# n, m, D, diagonal: tiles of 128×256 that are whole and not, steps of 32 or 64 numbers likewise,
# positives inside, off either end, and none.
SHAPES = [
    (1, 1, 1, 0),
    (1, 5, 8, 4),
    (5, 1, 8, -3),
    (5, 5, 40, 0),
    (127, 129, 64, 0),
    (128, 128, 130, -60),
    (129, 127, 40, 64),
    (128, 300, 8, 200),
    (300, 300, 64, 5),
    (300, 129, 1, -299),
    (129, 300, 130, 1000),
    (5, 300, 512, -1000),
    (0, 5, 8, 0),
    (300, 0, 8, 0),
    (0, 0, 1, 0),
]


def inputs(n, m, depth, dtype, scale=20.0):
    generator = torch.Generator().manual_seed(n + m + depth)
    a, b = (
        F.normalize(torch.randn(rows, depth, generator=generator), dim=-1).to(dtype)
        for rows in (n, m)
    )
    return a, b, torch.tensor(scale)


def upstream(n, m, size=1.0):
    generator = torch.Generator().manual_seed(1)
    return [size * torch.randn(length, generator=generator) for length in (n, m, n)]


def ours(a, b, scale, diagonal=0, grads=None):
    """The three outputs and the gradients by the kernels."""
    grads = grads or upstream(len(a), len(b))
    outputs = op._forward_cuda(a, b, scale, diagonal)
    return [*outputs, *op._backward_cuda(a, b, scale, diagonal, *outputs[:2], *grads)]


def expected(a, b, scale, diagonal=0, grads=None, dtype=torch.float64):
    """The same by plain PyTorch, entirely in one dtype."""
    grads = grads or upstream(len(a), len(b))
    a, b, scale = (x.to(dtype).requires_grad_() for x in (a, b, scale))
    logits = scale * (a @ b.T)
    rows = torch.arange(len(a))
    inside = (rows + diagonal >= 0) & (rows + diagonal < len(b))
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[rows[inside], rows[inside] + diagonal] = True
    positive = logits.new_full((len(a),), -torch.inf).masked_scatter(inside, logits[own])
    others = logits.masked_fill(own, -torch.inf)
    outputs = others.logsumexp(1), others.logsumexp(0), positive
    finite = [x.isfinite() for x in outputs]
    counted = sum(
        (x[f] * g[f].to(dtype)).sum() for x, g, f in zip(outputs, grads, finite, strict=True)
    )
    return [*outputs, *torch.autograd.grad(counted, (a, b, scale))]


def error(found, exact):
    finite = exact.isfinite()
    assert torch.equal(found.double()[~finite], exact[~finite])
    return (found.double() - exact)[finite].abs().max().item() if finite.any() else 0.0


def check(a, b, scale, diagonal=0, grads=None):
    """The error is at most twice that of plain PyTorch, plus a few units in the last place."""
    found = ours(a, b, scale, diagonal, grads)
    exact = expected(a, b, scale, diagonal, grads)
    eager = expected(a, b, scale, diagonal, grads, a.dtype)
    assert [x.dtype for x in found] == [torch.float32] * 3 + [a.dtype, b.dtype, torch.float32]
    for name, one, two, three in zip(NAMES, found, exact, eager, strict=True):
        finite = two[two.isfinite()]
        size = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
        if name == "grad_scale":  # numbers around 1 that cancel each other
            size = max(size, (len(a) + len(b)) ** 0.5)
        floor = 16 * torch.finfo(one.dtype).eps * size
        assert error(one, two) <= 2 * error(three, two) + floor, name
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_against_float64(emulator, shape, dtype):
    for scale in (20.0, 200.0):
        check(*inputs(*shape[:3], dtype, scale), shape[3])


@pytest.mark.parametrize("multiprocessors", [1, 3, 100])
@pytest.mark.parametrize("gpu", SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_ring_and_division(emulator, dtype, gpu, multiprocessors):
    emulator.configure(2, SHARED[gpu], multiprocessors)
    check(*inputs(270, 530, 200, dtype), 5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_row_blocks_follow_each_other(emulator, dtype, steps):
    """One block has them all; copies for the next begin during the last tile of one."""
    emulator.configure(seed=1, multiprocessors=1)
    check(*inputs(270, 5, steps * 128 // dtype.itemsize, dtype), 0)


@pytest.mark.sanitized
@pytest.mark.parametrize("gpu", SHARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_address(emulator, dtype, gpu):
    for shape in ((129, 257, 136, 70), (3, 5, 8, -1)):
        emulator.configure(seed=1, max_shared_bytes=SHARED[gpu])
        check(*inputs(*shape[:3], dtype), shape[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_schedules_do_not_change_a_bit(emulator, dtype):
    tensors = inputs(140, 270, 200, dtype)
    results = []
    for gpu in SHARED:
        for seed in range(4):
            emulator.configure(seed, SHARED[gpu], multiprocessors=1)
            results.append(ours(*tensors, 5))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def weigh(statistics, diagonal, exact, shift=0):
    """Weights of rows and columns, `shift` numbers off their alignment, and the unit."""
    n, m = map(len, statistics[:2])
    outputs = torch.empty(n + shift)[shift:], torch.empty(m + shift)[shift:], torch.empty(4)
    _native.run("pairwise_logsumexp_weigh_cuda", *statistics, diagonal, exact, *outputs)
    return outputs


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(3001, 1203, 7), (1203, 3001, -7), (2050, 1, -2049), (0, 5, 0)])
@pytest.mark.parametrize("exact", [False, True])
def test_weights_are_the_same_from_any_number_of_blocks(emulator, shape, exact):
    """At any alignment, and among infinities and NaN, which an extremum skips."""
    n, m, diagonal = shape
    lengths = n, m, n, m, n
    generator = torch.Generator().manual_seed(0)
    memory = [torch.rand(length + 16, generator=generator) for length in lengths]
    memory[0][5], memory[1][6], memory[3][7] = -torch.inf, torch.nan, torch.nan
    for shift in (0, 1, 4):
        given = [x[shift:][:length] for x, length in zip(memory, lengths, strict=True)]
        results = []
        for multiprocessors in (1, 3, 132):
            emulator.configure(2, multiprocessors=multiprocessors)
            results.append(weigh([x.clone() for x in given], diagonal, exact))
            results.append(weigh(given, diagonal, exact, shift))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.equal(one.view(torch.int32), two.view(torch.int32))


def test_extrema_are_found_wherever_they_are(emulator):
    n, m, diagonal = 1500, 1300, -100
    emulator.configure(multiprocessors=3)
    for place in (0, 1, 700, 1023, 1024, 1297, 1299):
        for side in (0, 1):
            statistics = [torch.full((length,), 3.0) for length in (n, m, n, m, n)]
            statistics[side][place] = -50.0
            assert weigh(statistics, diagonal, False)[2].tolist()[:2] == [-50.0, 1.0]
            statistics[1 - side][place] = 50.0
            assert weigh(statistics, diagonal, False)[2].tolist()[:2] == [0.0, 0.0]
        for side in (2, 3, 4):
            statistics = [torch.full((length,), 3.0) for length in (n, m, n, m, n)]
            statistics[side][place] = -1000.0
            counts = side < 4 or place >= 100  # earlier rows have no positive
            unit = 2.0 ** ((10 if counts else 2) - 14)
            assert weigh(statistics, diagonal, False)[2].tolist()[2:] == [1 / unit, unit]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 700, 40, 100), (700, 300, 40, -100)], ids=str)
def test_panels(emulator, monkeypatch, shape, dtype):
    """Gradients that pass through several panels, none of which is the whole matrix."""
    monkeypatch.setattr(op, "_PANEL_SIDE", 256)
    monkeypatch.setattr(op, "_PANEL_SIZE", 1 << 16)
    assert op._panel_shape(*shape[:2]) == (256, 256)
    check(*inputs(*shape[:3], dtype), shape[3])


def test_a_panel_is_bounded():
    sides = (1, 300, 8192, 8193, 16384, 65536, 1 << 20)
    for n in sides:
        for m in sides:
            rows, columns = op._panel_shape(n, m)
            assert rows % 256 == columns % 256 == 0
            assert rows * columns <= op._PANEL_SIZE
    assert op._panel_shape(65536, 65536) == (8192, 8192)
    assert op._panel_shape(0, 0) == (256, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_beyond_the_range_of_exp(emulator, dtype):
    """Rows that span e^±4000, near-duplicates among strangers: each sum keeps its own maximum."""
    a, b, scale = inputs(150, 300, 32, dtype, 200.0)
    a[7], b[9] = 4 * a[3], -3 * b[2]
    b[11] = a[5]
    a[20:40] *= 0.01
    check(a, b, scale)
    check(50 * a[:20], b, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 10000.0, -100.0])
def test_identical_rows(emulator, dtype, scale):
    a, _, scale = inputs(1, 1, 16, dtype, scale)
    check(a.expand(140, 16), a.expand(600, 16), scale, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_reference_that_has_to_follow(emulator, dtype):
    """Columns whose logits rise by e^100 from tile to tile, and fall again; rows likewise."""
    emulator.configure(multiprocessors=1)
    a, b = torch.ones(300, 8, dtype=dtype) / 8, torch.rand(2100, 8).to(dtype)
    a[150:] *= -1
    steps = torch.tensor([0, 1, 2, 3, 1, -3, 0, 0, 1]).repeat_interleave(256)[:2100, None]
    check(a, b + steps.to(dtype), torch.tensor(100.0), 2000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e25])
def test_gradients_of_any_size(emulator, dtype, size):
    a, b, scale = inputs(140, 150, 16, dtype)
    grads = upstream(140, 150, size)
    found = ours(a, b, scale, 0, grads)
    exact = expected(a, b, scale, 0, grads)
    coarse = 16 * torch.finfo(dtype).eps
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for one, two in zip(found[3:], exact[3:], strict=True):
        if two.abs().max() < torch.finfo(one.dtype).max:
            atol = coarse * two.abs().max().item() + subnormal
            torch.testing.assert_close(one.double(), two, rtol=0, atol=atol)


def test_infinite_statistics_pass_no_gradient(emulator):
    """Even an incoming NaN stops where there is nothing to differentiate."""
    nan = torch.full((1,), torch.nan)
    for dtype in DTYPES:
        a, b, scale = inputs(1, 1, 8, dtype)
        found = ours(a, b, scale, 5, [torch.zeros(1), torch.zeros(1), nan])
        assert found[2].item() == -torch.inf
        assert not any(x.any() for x in found[3:])
        found = ours(a, b, scale, 0, [nan, nan, torch.ones(1)])
        assert found[0].item() == found[1].item() == -torch.inf
        torch.testing.assert_close(found[3].float(), scale * b.float(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found[5], (a.float() * b.float()).sum())
        # One row without others among rows that have some.
        a, b, scale = inputs(5, 1, 8, dtype)
        grads = upstream(5, 1)
        clean = ours(a, b, scale, -2, [grads[0].index_fill(0, torch.tensor(2), 0), *grads[1:]])
        grads[0][2] = grads[2][0] = torch.nan
        assert all(map(torch.equal, clean, ours(a, b, scale, -2, grads)))


def test_a_nan_is_not_lost(emulator):
    a, b, scale = inputs(140, 300, 16, torch.bfloat16)
    a[3, 5] = torch.nan
    row_lse, col_lse, positive = op._forward_cuda(a, b, scale, 0)
    assert row_lse.isnan().nonzero().flatten().tolist() == [3]
    assert col_lse[4:].isnan().all()
    assert positive.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_rows(emulator, dtype):
    wide = torch.randn(140, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    views = {
        "aligned": (wide[:, :24], wide[:, 32:56], True),
        "every other row": (wide[::2, :16], wide[1::2, 16:32], True),
        "expanded": (wide[:1, :16].expand(30, 16), wide[:, :16], True),
        "misaligned": (wide[:, 3:30], wide[:, 30:57], False),
        "transposed": (wide[:70, :24].T, wide[70:, :24].T, False),
    }
    scale = torch.tensor(0.3)
    for name, (a, b, aligned) in views.items():
        assert (op._aligned(a) is a and op._aligned(b) is b) == aligned
        found = ours(a, b, scale)
        assert all(map(torch.equal, found, ours(a.clone(), b.clone(), scale))), name
        assert all(x.is_contiguous() for x in found), name


def test_errors_name_the_op_and_its_shapes(emulator):
    emulator.configure(max_shared_bytes=65536)
    a, b, scale = inputs(4, 6, 8, torch.float32)
    with pytest.raises(RuntimeError, match=r"forward of a \[4, 8\] and b \[6, 8\]: no GPU takes"):
        op._forward_cuda(a, b, scale, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_so_where_it_is_in_float64(emulator, dtype):
    for n, m, diagonal in ((5, 7, 0), (140, 300, -2), (5, 3, 1000), (1, 1, 1)):
        for value in (torch.nan, torch.inf, -torch.inf):
            for rows in (slice(0, 1), slice(None)):
                a, b, scale = inputs(n, m, 8, dtype)
                a[rows, 3] = value
                found = ours(a, b, scale, diagonal)
                exact = op.pairwise_logsumexp_reference(a.double(), b.double(), scale, diagonal)
                for name, one, two in zip(NAMES, found, exact, strict=False):
                    assert torch.equal(one.isnan(), two.isnan()), name
                    assert torch.equal(one.double()[two.isinf()], two[two.isinf()]), name
                if value != value:
                    assert all(x.isnan().any() for x in found[3:])
