"""The products of a layer against float64, on every instruction set, and when they are chosen."""

import pytest
import torch

from clipvip.ops import _native, linear
from clipvip.ops._native import module
from clipvip.ops.linear import Norm

SHAPES = [(1, 64, 64), (97, 192, 64), (515, 64, 320), (2, 768, 128)]  # T, K, N
FORMS = {
    "plain": {},
    "normed": {"norm": True},
    "silu": {"silu": True, "alpha": 0.7},
}


@pytest.fixture(params=module().cpu_capabilities(), autouse=True)
def capability(request):
    before = module().cpu_capability()
    module().set_cpu_capability(request.param)
    yield request.param
    module().set_cpu_capability(before)


def inputs(tokens, width, outer, dtype):
    torch.manual_seed(0)
    sizes = {"x": (tokens, width), "weight": (outer, width), "bias": (outer,)}
    sizes |= {"grad": (tokens, outer), "residual": (tokens, outer), "before": (tokens, width)}
    sizes |= {"norm_weight": (width,), "norm_bias": (width,)}
    return {name: torch.randn(size).to(dtype) for name, size in sizes.items()}


def results(given, form, operands, dtype, ours):
    """All results of the three functions."""
    suffix = "" if ours else "_reference"
    forward, grad_input, grad_weight = (
        getattr(linear, f"linear_{name}{suffix}")
        for name in ("forward", "grad_input", "grad_weight")
    )
    options = dict(FORMS[form])
    if options.get("norm"):
        options["norm"] = Norm(given["norm_weight"], given["norm_bias"], 1e-5)
    x, weight, bias, grad = (given[name] for name in ("x", "weight", "bias", "grad"))
    out, statistics = forward(x, weight, bias, operands, **options)
    added, _ = forward(x, weight, bias, operands, beta=2.0, residual=given["residual"], **options)
    kept = {"statistics": statistics} if ours else {}
    of_weight, of_bias = grad_weight(grad, x, operands, **options, **kept)
    return {
        "out": out,
        "with residual": added,
        "grad_input": grad_input(grad, weight, operands, dtype),
        "before": grad_input(grad, weight, operands, dtype, before=given["before"]),
        "grad_weight": of_weight,
        "grad_bias": of_bias,
    }


def error(got, want):
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_less_exact_than_plain_pytorch(dtype, shape, form):
    given = inputs(*shape, dtype)
    wide = {name: each.double() for name, each in given.items()}
    want = results(wide, form, torch.float64, torch.float64, ours=False)
    plain, ours = (results(given, form, dtype, dtype, ours=each) for each in (False, True))
    for name, value in ours.items():
        assert value.shape == want[name].shape, name
        floor = torch.finfo(dtype).eps
        assert error(value, want[name]) <= 2 * error(plain[name], want[name]) + floor, name


def test_operands_are_rounded_and_rows_may_lie_apart(capability):
    """fp32 activations and weights with bf16 operands, as under autocast."""
    given = inputs(130, 128, 64, torch.float32)
    apart = {
        name: torch.stack([each, torch.full_like(each, torch.nan)], -2).flatten(0, -2)[::2]
        if each.ndim == 2
        else each
        for name, each in given.items()
    }
    for operands in (torch.float32, torch.bfloat16):
        got = results(given, "normed", operands, torch.float32, ours=True)
        again = results(apart, "normed", operands, torch.float32, ours=True)
        for name, value in got.items():
            assert torch.equal(value, again[name]), name
    assert got["out"].dtype == torch.bfloat16 and got["with residual"].dtype == torch.float32
    assert got["grad_weight"].dtype == torch.float32


def test_results_depend_on_no_number_of_threads():
    given = inputs(700, 192, 128, torch.float32)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(given, "normed", torch.float32, torch.float32, ours=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def test_what_is_not_finite_stays_so():
    given = inputs(70, 64, 64, torch.float32)
    given["x"][3, 5] = torch.nan
    out, _ = linear.linear_forward(given["x"], given["weight"], given["bias"], torch.float32)
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()
    extreme = torch.tensor([[-1e30, 1e30]]).repeat(1, 32)
    silu, _ = linear.linear_forward(
        extreme, torch.eye(64), torch.zeros(64), torch.float32, silu=True
    )
    assert torch.equal(silu, extreme.clamp(min=0))


def test_a_residual_of_another_dtype_widens_the_result():
    given = inputs(70, 64, 64, torch.bfloat16)
    x, weight, bias = (given[name] for name in ("x", "weight", "bias"))
    for residual, operands in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        added = given["residual"].to(residual)
        got, want = (
            form(x, weight, bias, operands, residual=added)[0]
            for form in (linear.linear_forward, linear.linear_forward_reference)
        )
        assert got.dtype == want.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_gradients_may_be_expanded_negated_or_of_no_rows():
    given = inputs(70, 64, 128, torch.float32)
    x, weight = given["x"], given["weight"]
    grad = torch.ones(1, 1).expand(70, 128)
    for each in (grad, -grad, torch._neg_view(grad), torch._efficientzerotensor((70, 128))):
        of_x = linear.linear_grad_input(each, weight, torch.float32, torch.float32)
        of_weight, of_bias = linear.linear_grad_weight(each, x, torch.float32)
        torch.testing.assert_close(of_x, each @ weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_weight, each.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_bias, each.sum(0))
    nothing = linear.linear_grad_weight(grad[:0], x[:0], torch.float32)
    assert all(each.eq(0).all() for each in nothing)


def test_workspace_lies_on_the_cpu_whatever_the_default_device():
    given = inputs(70, 64, 64, torch.float32)
    want, _ = linear.linear_forward(given["x"], given["weight"], given["bias"], torch.float32)
    _native._kept.workspace = None
    with torch.device("meta"):
        got, _ = linear.linear_forward(given["x"], given["weight"], given["bias"], torch.float32)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(70, 128)}, r"weight is \[64, 64\], expected \[64, 128\]"),
        ({"x": torch.zeros(70, 64).half()}, "x is torch.float16 .* expected a matrix of float32"),
        ({"x": torch.zeros(2, 35, 64)}, r"x is torch.float32 \[2, 35, 64\]"),
        ({"weight": torch.zeros(100, 64)}, "a width is 100, expected a positive multiple of 64"),
        ({"bias": torch.zeros(63)}, r"bias is \[63\], expected \[64\]"),
        ({"residual": torch.zeros(1, 64)}, r"residual is \[1, 64\], expected \[70, 64\]"),
        ({"operands": torch.float16}, "operands is torch.float16, expected torch.float32 or"),
        ({"norm": Norm(torch.ones(3), torch.ones(64), 1e-5)}, r"norm.weight is \[3\]"),
        ({"norm": Norm(torch.ones(64), torch.ones(64), 1e-5), "silu": True}, "one at most"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_in_a_line(changed, message):
    given = inputs(70, 64, 64, torch.float32)
    arguments = {name: given[name] for name in ("x", "weight", "bias")}
    arguments |= {"operands": torch.float32} | changed
    with pytest.raises((TypeError, ValueError), match=message):
        linear.linear_forward(**arguments)


def test_norm_and_statistics_belong_together():
    given = inputs(70, 64, 64, torch.float32)
    norm = Norm(given["norm_weight"], given["norm_bias"], 1e-5)
    with pytest.raises(ValueError, match="belong together"):
        linear.linear_grad_weight(given["grad"], given["x"], torch.float32, norm=norm)


def test_chosen_only_for_what_the_kernels_can_do(monkeypatch, capability):
    monkeypatch.setattr(linear, "_measured_processor", lambda: True)
    x, weight, bias = torch.empty(513, 64), torch.empty(128, 64), torch.empty(128)
    here = capability == "avx512bf16"
    assert linear.quicker_here(torch.bfloat16, [x, x], [weight, bias]) == here
    assert not linear.quicker_here(torch.float16, [x], [weight])
    assert not linear.quicker_here(torch.float32, [x[:511]], [weight])
    assert not linear.quicker_here(torch.float32, [x, x[:1]], [weight])
    assert not linear.quicker_here(torch.float32, [x.double()], [weight])
    assert not linear.quicker_here(torch.float32, [x], [weight, bias.half()])
    assert not linear.quicker_here(torch.float32, [x], [weight[:100]])
    assert not linear.quicker_here(torch.float32, [x], [weight.to("meta")])
    assert not linear.quicker_here(torch.float32, [x], [weight.as_subclass(Elsewhere)])
    monkeypatch.setattr(linear, "_measured_processor", lambda: False)
    assert not linear.quicker_here(torch.bfloat16, [x], [weight])


class Elsewhere(torch.Tensor):
    """A stand-in for tensors that are sharded over ranks or quantised."""


def test_vectors_are_read_as_they_look():
    """Strided, negated and in bf16: statistics, bias and LayerNorm's own."""
    given = inputs(70, 64, 64, torch.float32)
    norm = Norm(given["norm_weight"], given["norm_bias"], 1e-5)
    x, weight, bias, grad = (given[name] for name in ("x", "weight", "bias", "grad"))
    out, statistics = linear.linear_forward(x, weight, bias, torch.float32, norm=norm)
    want = linear.linear_grad_weight(grad, x, torch.float32, norm=norm, statistics=statistics)
    for view in (
        lambda v: torch.stack([v, torch.full_like(v, torch.nan)], 1)[:, 0],
        lambda v: torch._neg_view(-v),
        lambda v: v.double(),
    ):
        seen = Norm(view(norm.weight), view(norm.bias), 1e-5)
        again, _ = linear.linear_forward(x, weight, view(bias), torch.float32, norm=seen)
        assert torch.equal(again, out)
        options = {"norm": seen, "statistics": tuple(map(view, statistics))}
        got = linear.linear_grad_weight(grad, x, torch.float32, **options)
        assert all(map(torch.equal, got, want))
    rounded = tuple(each.bfloat16() for each in statistics)
    got, wanted = (
        linear.linear_grad_weight(grad, x, torch.float32, norm=norm, statistics=each)
        for each in (rounded, tuple(each.float() for each in rounded))
    )
    assert all(map(torch.equal, got, wanted))


def test_derivatives_are_refused_and_not_forgotten():
    given = inputs(70, 64, 64, torch.float32)
    x, weight, bias = (given[name] for name in ("x", "weight", "bias"))
    with pytest.raises(NotImplementedError, match="linear_forward has no derivative of its own"):
        linear.linear_forward(x, weight, bias.requires_grad_(), torch.float32)
    with torch.autograd.forward_ad.dual_level():
        double = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="derivatives in forward mode"):
            linear.linear_forward(double, weight, bias.detach(), torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_nan_is_lost(dtype, form):
    for name in ("x", "weight", "bias", "grad", "residual", "before", "norm_weight"):
        given = inputs(70, 64, 64, dtype)
        given[name].view(-1)[3] = torch.nan
        wide = {each: tensor.double() for each, tensor in given.items()}
        want = results(wide, form, torch.float64, torch.float64, ours=False)
        for each, got in results(given, form, dtype, dtype, ours=True).items():
            assert torch.equal(got.isnan(), want[each].isnan()), f"{each} of {name}"
