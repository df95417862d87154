"""The CUDA kernels of elementwise, on the CPU, against float64."""

import pytest
import torch
import torch.nn.functional as F

from clipvip.ops import elementwise as op
from clipvip.ops.linear import Norm

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Dtypes of the residual and of the products that are added to it.
PAIRS = [(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (FP16, FP16)]
WIDTHS = [8, 64, 512, 520, 768, 1024, 1280, 1664, 2048]
ROWS = [0, 1, 5, 33, 300]
SHARED = {"H100": 232448, "A100": 166912, "GeForce": 101376}


def names(value):
    """Return a short name of a parameter of a test."""
    if isinstance(value, tuple):
        return "-".join(map(names, value))
    return str(value).removeprefix("torch.")


def rows(count, width, dtype, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(count, width, generator=generator)).to(dtype)


def vector(width, seed=0):
    return rows(1, width, FP32, seed).flatten()


def norm_of(width):
    return Norm(1 + 0.3 * vector(width, 5), vector(width, 6), 1e-5)


def double(x):
    if isinstance(x, torch.Tensor):
        return x.double()
    return type(x)(*map(double, x)) if isinstance(x, Norm) else x


def check(found, exact, eager):
    """Check that errors are at most twice those of plain PyTorch, plus a few units of rounding."""
    for one, two, three in zip(found, exact, eager, strict=True):
        assert one.shape == two.shape
        if not one.numel():
            continue
        size = max(1.0, two.abs().max().item())
        error, other = ((x.double() - two).abs().max().item() for x in (one, three))
        assert error <= 2 * other + 2 * torch.finfo(one.dtype).eps * size, (error, other, size)


def plain_add_norm(residual, product, bias, norm, dtype):
    total = residual if product is None else residual + (product + bias.to(product.dtype))
    weight, norm_bias = norm.weight.to(total.dtype), norm.bias.to(total.dtype)
    normed = F.layer_norm(total, total.shape[-1:], weight, norm_bias, norm.eps).to(dtype)
    return total, normed


def plain_statistics(total, eps):
    variance = total.var(1, correction=0) if len(total) else total.sum(1)
    return total.mean(1), (variance + eps).rsqrt()


def plain_backward(grad_normed, grad_sum, total, norm, dtype):
    """Gradients of plain_add_norm by autograd, and what else backward needs."""
    leaf, weight, bias = (
        x.to(total.dtype).detach().clone().requires_grad_() for x in (total, norm.weight, norm.bias)
    )
    normed = F.layer_norm(leaf, leaf.shape[-1:], weight, bias, norm.eps).to(grad_normed.dtype)
    grad, of_weight, of_bias = torch.autograd.grad(normed, (leaf, weight, bias), grad_normed)
    grad = grad if grad_sum is None else grad + grad_sum
    return grad, grad.to(dtype), normed.detach(), of_weight, of_bias, grad.to(dtype).sum(0)


def plain_quick_gelu_backward(grad, x, bias):
    leaf, bias = (each.detach().to(x.dtype).clone().requires_grad_() for each in (x, bias))
    y = leaf + bias
    out = y * torch.sigmoid(1.702 * y)
    grad_x, of_bias = torch.autograd.grad(out, (leaf, bias), grad)
    return grad_x, out.detach(), of_bias


def check_add_norm(residual, product, bias, norm, dtype):
    total, normed, statistics = op.add_norm(residual, product, bias, norm, dtype)
    assert (total.dtype, normed.dtype) == (residual.dtype, dtype)
    exact = plain_add_norm(*map(double, (residual, product, bias, norm)), torch.float64)
    eager = plain_add_norm(residual, product, bias, norm, dtype)
    check([total, normed], exact, eager)
    exact = plain_statistics(total.double(), norm.eps)
    check(statistics, exact, plain_statistics(total.float(), norm.eps))
    return total, normed, statistics


def check_backward(grad_normed, grad_sum, total, norm, dtype):
    _, _, statistics = op.add_norm(total, None, None, norm, grad_normed.dtype)
    found = op.add_norm_backward(grad_normed, grad_sum, total, statistics, norm, dtype)
    assert found[0].dtype == total.dtype
    assert (found[1].dtype, found[2].dtype) == (dtype, grad_normed.dtype)
    exact = plain_backward(*map(double, (grad_normed, grad_sum, total, norm)), torch.float64)
    check(found, exact, plain_backward(grad_normed, grad_sum, total, norm, dtype))
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_sum_and_norm_against_float64(emulator, pair, width):
    wide, narrow = pair
    norm = norm_of(width)
    for count in ROWS:
        residual, product = rows(count, width, wide, 1), rows(count, width, narrow, 2)
        total, *_ = check_add_norm(residual, product, vector(width), norm, narrow)
        sums = op.add(residual, product, vector(width))
        assert torch.equal(sums, total)
        first, *_ = check_add_norm(residual, None, None, norm, narrow)
        assert first is residual


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_backward_of_sum_and_norm_against_float64(emulator, pair, width):
    wide, narrow = pair
    for count in ROWS:
        grad_normed, grad_sum = rows(count, width, narrow, 3), rows(count, width, wide, 4)
        check_backward(grad_normed, grad_sum, rows(count, width, wide, 1), norm_of(width), narrow)


@pytest.mark.parametrize("width", [*WIDTHS, 3072])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=names)
def test_quick_gelu_against_float64(emulator, dtype, width):
    bias = vector(width)
    for count in ROWS:
        x, grad = rows(count, width, dtype, 1, 3.0), rows(count, width, dtype, 2)
        found = op.quick_gelu_backward(grad, x, bias)
        assert [each.dtype for each in found] == [dtype, dtype, FP32]
        exact = plain_quick_gelu_backward(*map(double, (grad, x, bias)))
        check(found, exact, plain_quick_gelu_backward(grad, x, bias))
        assert torch.equal(op.quick_gelu(x, bias), found[1])


@pytest.mark.parametrize("width", [*WIDTHS, 3072])
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_casts_and_column_sums_against_float64(emulator, pair, width):
    wide, narrow = pair
    for count in ROWS:
        grad = rows(count, width, wide)
        copy, sums = op.cast_and_sum(grad, narrow)
        assert torch.equal(copy, grad.to(narrow)) and sums.dtype == FP32
        assert copy is grad or wide != narrow
        check([sums], [grad.double().sum(0)], [grad.sum(0)])
        none, same = op.cast_and_sum(grad, None)
        assert none is None and torch.equal(same, sums)


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_what_may_be_left_out(emulator, pair):
    wide, narrow = pair
    total, grad_sum = rows(37, 768, wide, 1), rows(37, 768, wide, 2)
    grad_normed, norm = rows(37, 768, narrow, 3), norm_of(768)
    zero = torch.zeros(768)
    with_zero = op.add_norm(total, grad_normed, zero, norm, narrow)
    without = op.add_norm(total, grad_normed, None, norm, narrow)
    for one, two in zip((*with_zero[:2], *with_zero[2]), (*without[:2], *without[2]), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(op.add(total, grad_normed, None), without[0])

    check_backward(grad_normed, None, total, norm, narrow)
    statistics = op.add_norm(total, None, None, norm, narrow)[2]
    given = grad_normed, grad_sum, total, statistics, norm
    whole = op.add_norm_backward(*given, narrow)
    same = op.add_norm_backward(*given, wide)
    assert same[1] is same[0] and (whole[1] is whole[0]) == (wide == narrow)
    first = op.add_norm_backward(*given, None)
    assert first[1] is None and first[5] is None
    for other in (same, first):
        assert torch.equal(other[0], whole[0])
        assert all(map(torch.equal, other[2:5], whole[2:5]))


def everything(pair, count, width):
    """Results of all ops on one shape."""
    wide, narrow = pair
    residual, product = rows(count, width, wide, 1), rows(count, width, narrow, 2)
    norm, bias = norm_of(width), vector(width)
    total, normed, statistics = op.add_norm(residual, product, bias, norm, narrow)
    grads = op.add_norm_backward(product, residual, total, statistics, norm, narrow)
    activation = op.quick_gelu_backward(normed, product, bias)
    copy, sums = op.cast_and_sum(residual, narrow)
    of_rows = total, normed, *statistics, *grads[:3], *activation[:2], copy
    return of_rows, (*grads[3:], activation[2], sums)


@pytest.mark.sanitized
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_rows_of_every_width_and_grid(emulator, pair):
    """No schedule changes a bit; another grid only adds up columns in another order."""
    for count, width in ((0, 64), (1, 8), (9, 2048), (70, 776), (41, 512)):
        expected = None
        for gpu, processors in zip(SHARED.values(), (100, 3, 1), strict=True):
            emulator.configure(0, gpu, processors)
            of_rows, sums = everything(pair, count, width)
            if expected is None:
                expected = of_rows, sums
            assert all(map(torch.equal, of_rows, expected[0]))
            torch.testing.assert_close(sums, expected[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_schedules_do_not_change_a_bit(emulator, pair, seed):
    for processors in (1, 5):
        emulator.configure(0, multiprocessors=processors)
        of_rows, sums = everything(pair, 150, 776)
        emulator.configure(seed, multiprocessors=processors)
        others = everything(pair, 150, 776)
        assert all(map(torch.equal, (*of_rows, *sums), (*others[0], *others[1])))


@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_rows_of_large_mean_and_small_variance(emulator, pair):
    wide, narrow = pair
    for mean, deviation in ((1e4, 30.0), (-1e4, 1.0), (1e4, 0.0), (3e-6, 1e-6)):
        total = (mean + deviation * rows(20, 768, FP32)).to(wide)
        check_add_norm(total, None, None, norm_of(768), narrow)
        check_backward(rows(20, 768, narrow, 2), rows(20, 768, wide, 3), total, norm_of(768), wide)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=names)
def test_quick_gelu_beyond_the_range_of_exp(emulator, dtype):
    most = min(1e30, torch.finfo(dtype).max)
    sizes = torch.tensor([0, 1e-30, 1e-3, 40, 52, 60, 88, 100, 1e4, most])
    x = torch.cat([sizes, -sizes]).to(dtype).repeat_interleave(8)[None].contiguous()
    bias, grad = torch.zeros(x.shape[1]), torch.ones_like(x)
    found = op.quick_gelu_backward(grad, x, bias)
    assert all(each.isfinite().all() for each in found)
    exact = plain_quick_gelu_backward(*map(double, (grad, x, bias)))
    for one, two in zip(found, exact, strict=True):
        coarse = 4 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one.double(), two, rtol=coarse, atol=coarse)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_what_is_not_finite_is_so_where_it_is_in_plain_pytorch(emulator, pair, value):
    wide, narrow = pair
    for place in range(3):
        residual, product, grad = (rows(6, 64, x, i) for i, x in enumerate((wide, narrow, narrow)))
        (residual, product, grad)[place][2, 9] = value
        bias, norm = vector(64), norm_of(64)
        total, normed, statistics = op.add_norm(residual, product, bias, norm, narrow)
        found = [total, normed, *op.quick_gelu_backward(grad, product, bias)]
        found += op.add_norm_backward(grad, residual, total, statistics, norm, narrow)
        found += op.cast_and_sum(residual, narrow)
        exact = list(op.add_norm_reference(residual, product, bias, norm, narrow))
        statistics = exact.pop()
        exact += op.quick_gelu_backward_reference(grad, product, bias)
        given = grad, residual, exact[0], statistics, norm, narrow
        exact += op.add_norm_backward_reference(*given)
        exact += op.cast_and_sum_reference(residual, narrow)
        for one, two in zip(found, exact, strict=True):
            assert torch.equal(one.isfinite(), two.isfinite())
            # Where infinities meet in LayerNorm's gradient, its formula decides what is NaN.
            if place < 2 or value != value:
                assert torch.equal(one.isnan(), two.isnan())
                assert torch.equal(one[two.isinf()], two[two.isinf()])


@pytest.mark.sanitized
@pytest.mark.parametrize("pair", PAIRS, ids=names)
def test_strided_and_misaligned_rows(emulator, pair):
    wide, narrow = pair
    base, other = rows(42, 160, wide, 1), rows(42, 160, narrow, 2)
    views = {
        "part of the columns": lambda x: x[:, 8:72],
        "every other row": lambda x: x[::2, :64],
        "misaligned": lambda x: x.flatten()[1 : 1 + 40 * 64].view(40, 64),
        "transposed": lambda x: x[:40].T[:, :40],
        "expanded": lambda x: x[:1, :64].expand(30, 64),
    }
    for name, view in views.items():
        residual, product = view(base), view(other)
        norm = norm_of(residual.shape[1])
        results = []
        for x, y in ((residual, product), (residual.clone(), product.clone())):
            total, normed, statistics = op.add_norm(x, y, None, norm, narrow)
            grads = op.add_norm_backward(y, x, total, statistics, norm, narrow)
            gelu = op.quick_gelu_backward(y, y, norm.bias)
            results.append((total, normed, *statistics, *grads, *gelu, op.cast_and_sum(x, None)[1]))
        assert all(map(torch.equal, *results)), name


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_gradient_may_be_written_over_the_one_it_is_made_of(emulator, dtype):
    for count in (1, 33, 300):
        grad, x, bias = rows(count, 136, dtype), rows(count, 136, dtype, 1), vector(136)
        apart = op.quick_gelu_backward(grad, x, bias)
        over = op.quick_gelu_backward(grad, x, bias, into=grad)
        assert over[0] is grad and all(map(torch.equal, apart, over))


def test_vectors_may_start_anywhere(emulator):
    """The kernels read 16 bytes at a time, yet parameters may be views of one flat tensor."""
    x = rows(20, 64, FP32)
    results = []
    for first in range(4):
        flat = torch.zeros(3 * 64 + first)[first:].unflatten(0, (3, 64))
        weight, norm_bias, bias = flat.copy_(rows(3, 64, FP32, 1))
        norm = Norm(weight, norm_bias, 1e-5)
        total, normed, statistics = op.add_norm(x, x, bias, norm, FP32)
        grads = op.add_norm_backward(x, x, total, statistics, norm, FP32)
        gelu = op.quick_gelu(x, bias), *op.quick_gelu_backward(x, x, bias)
        results.append((total, normed, *statistics, *grads, *gelu, op.add(x, x, bias)))
    assert all(all(map(torch.equal, results[0], each)) for each in results[1:])


def test_vectors_of_other_dtypes(emulator):
    """They are given to the kernels as fp32."""
    x, bias, norm = rows(20, 64, BF16), vector(64).bfloat16(), norm_of(64)
    norm = Norm(norm.weight.bfloat16(), norm.bias.bfloat16(), norm.eps)
    wide = Norm(norm.weight.float(), norm.bias.float(), norm.eps)
    found = op.add_norm(x, x, bias, norm, BF16)
    expected = op.add_norm(x, x, bias.float(), wide, BF16)
    assert all(map(torch.equal, (*found[:2], *found[2]), (*expected[:2], *expected[2])))


def test_errors_say_what_was_given(emulator):
    x, norm = rows(5, 64, FP32), norm_of(64)
    with pytest.raises(TypeError, match=r"residual is torch\.float64, expected"):
        op.add(x.double(), x, None)
    with pytest.raises(TypeError, match=r"product is torch\.float32, expected"):
        op.add(x.bfloat16(), x, None)
    with pytest.raises(ValueError, match=r"product is \[4, 64\], expected \[5, 64\]"):
        op.add(x, x[:4], None)
    with pytest.raises(ValueError, match=r"grad is \[5, 60\], expected \[T, a multiple of 8\]"):
        op.cast_and_sum(x[:, :60], None)
    with pytest.raises(ValueError, match=r"bias is \[8\], expected \[64\]"):
        op.quick_gelu(x, x[0, :8])
    with pytest.raises(ValueError, match="rows of 2056 are normalized, expected at most 2048"):
        op.add_norm(rows(1, 2056, FP32), None, None, norm_of(2056), FP32)
    with pytest.raises(ValueError, match="a bias is given without the product"):
        op.add_norm(x, None, norm.bias, norm, FP32)
    with pytest.raises(TypeError, match=r"dtype is torch\.float16, which does not fit"):
        op.add_norm(x.bfloat16(), None, None, norm, FP16)
    with pytest.raises(NotImplementedError, match="add_cuda has no derivative of its own"):
        op.add(x, x.clone().requires_grad_(), None)
