"""The memory-saving parts of a layer match the plain composition, in each dtype, by both kinds of
products, and in the form that a GPU runs."""

import pytest
import torch
from torch import nn

from clipvip.model.layers import after_attention, norm_linear, residual_linear, residual_mlp
from clipvip.ops import _native, elementwise, linear

WIDTH, INNER, TOKENS = 64, 128, 37


ON_GPU = ("add_norm", "add_norm_backward", "add", "cast_and_sum", "quick_gelu")


@pytest.fixture(params=["our products", "pytorch's products", "as on a GPU"], autouse=True)
def products(request, monkeypatch):
    """Choose the products, or the form of a GPU, whose kernels' references stand for them; return
    whether the products are ours on this CPU."""
    ours = request.param == "our products"
    if request.param == "as on a GPU":
        monkeypatch.setattr(elementwise, "takes", lambda *rows, dtype: True)
        for name in (*ON_GPU, "quick_gelu_backward"):
            reference = getattr(elementwise, f"{name}_reference")
            monkeypatch.setattr(elementwise, name, reference)
    monkeypatch.setattr(linear, "_measured_processor", lambda: ours)
    monkeypatch.setattr(linear, "MIN_ROWS", 1)
    return ours and _native.module().cpu_capability() == "avx512bf16"


def parts(dtype):
    torch.manual_seed(0)
    modules = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(WIDTH),
            "fc1": nn.Linear(WIDTH, INNER),
            "fc2": nn.Linear(INNER, WIDTH),
            "out_proj": nn.Linear(WIDTH, WIDTH),
        }
    )
    for parameter in modules.parameters():
        nn.init.normal_(parameter, std=0.3)
    return modules.to(dtype), torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)


def plain_linear(x, modules):
    return modules["fc1"](modules["norm"](x))


def plain_mlp(x, modules):
    inner = plain_linear(x, modules)
    return x + modules["fc2"](inner * torch.sigmoid(1.702 * inner))


def plain_residual(x, modules):
    return x + modules["fc2"](modules["fc1"](x))


def lean_residual(x, modules):
    return residual_linear(x, modules["fc1"](x), modules["fc2"])


def plain_passed(x, modules):
    return torch.cat([x, plain_linear(x, modules)], 1)


def lean_passed(x, modules):
    return torch.cat(norm_linear(x, modules["norm"], modules["fc1"]), 1)


def plain_after(x, modules):
    return plain_mlp(x + modules["out_proj"](x), modules)


def lean_after(x, modules):
    names = "out_proj", "norm", "fc1", "fc2"
    return after_attention(x, x, *(modules[name] for name in names))


def lean_linear(x, modules):
    return norm_linear(x, modules["norm"], modules["fc1"])[1]


def lean_mlp(x, modules):
    return residual_mlp(x, modules["norm"], modules["fc1"], modules["fc2"])


PARTS = pytest.mark.parametrize(
    ("lean", "plain"),
    [
        (lean_linear, plain_linear),
        (lean_passed, plain_passed),
        (lean_residual, plain_residual),
        (lean_mlp, plain_mlp),
        (lean_after, plain_after),
    ],
    ids=["linear", "passed", "residual", "mlp", "after"],
)


def gradients(run, x, modules, autocast=None):
    """Output, and gradients of all leaves that require one, by name."""
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        out = run(x, modules)
    torch.manual_seed(1)
    wanted = {"x": x, **dict(modules.named_parameters())}
    wanted = {name: leaf for name, leaf in wanted.items() if leaf.requires_grad}
    found = torch.autograd.grad(
        out, list(wanted.values()), torch.randn(out.shape).to(out), allow_unused=True
    )
    return {"out": out.detach()} | {
        name: grad for name, grad in zip(wanted, found, strict=True) if grad is not None
    }


def error(got, want):
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@PARTS
def test_gradients_are_those_of_finite_differences(lean, plain):
    modules, x = parts(torch.float64)
    names, leaves = zip(*modules.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(modules, dict(zip(names, values, strict=True)), (x,))

    modules.forward = lambda x: lean(x, modules)
    assert torch.autograd.gradcheck(run, (x[:3].detach().requires_grad_(), *leaves), fast_mode=True)


@PARTS
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.bfloat16, True),
        (torch.float16, True),
    ],
)
def test_no_less_exact_than_the_plain_composition(lean, plain, dtype, autocast):
    modules, x = parts(torch.float32 if autocast else dtype)
    cast = dtype if autocast else None
    exact_modules, exact_x = parts(torch.float32 if autocast else dtype)
    exact_modules, exact_x = exact_modules.double(), exact_x.detach().double().requires_grad_()
    want = gradients(plain, exact_x, exact_modules)
    of_plain, of_lean = (gradients(run, x, modules, cast) for run in (plain, lean))
    assert of_lean.keys() == of_plain.keys()
    for name, value in of_lean.items():
        assert value.dtype == of_plain[name].dtype, name
        floor = torch.finfo(dtype).eps
        assert error(value, want[name]) <= 2 * error(of_plain[name], want[name]) + floor, name


@PARTS
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_gpu_is_no_less_exact_than_in_the_plain_composition(lean, plain, autocast, cuda):
    modules, x = parts(torch.float32)
    want = gradients(plain, x.detach().double().requires_grad_(), parts(torch.float32)[0].double())
    modules, x = modules.to(cuda), x.detach().to(cuda).requires_grad_()
    of_plain, of_lean = (gradients(run, x, modules, autocast) for run in (plain, lean))
    assert of_lean.keys() == of_plain.keys()
    for name, value in of_lean.items():
        floor = torch.finfo(autocast or torch.float32).eps
        found, other = (error(each.cpu(), want[name]) for each in (value, of_plain[name]))
        assert found <= 2 * other + floor, name


@PARTS
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_products_are_those_that_were_chosen(lean, plain, autocast, products, monkeypatch):
    called = set()
    for name in ("linear_forward", "linear_grad_input", "linear_grad_weight"):
        run = getattr(linear, name)
        monkeypatch.setattr(
            linear, name, lambda *x, name=name, run=run, **y: called.add(name) or run(*x, **y)
        )
    modules, x = parts(torch.float32)
    gradients(lean, x, modules, autocast)
    assert len(called) == (3 if products else 0)


@PARTS
def test_a_frozen_parameter_costs_the_others_nothing(lean, plain):
    for frozen in ("x", "norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight"):
        modules, x = parts(torch.float32)
        {"x": x, **dict(modules.named_parameters())}[frozen].requires_grad_(False)
        got, want = gradients(lean, x, modules), gradients(plain, x, modules)
        assert got.keys() == want.keys() and frozen not in got
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


@PARTS
def test_compiles_without_a_break(lean, plain):
    modules, x = parts(torch.float32)
    got = gradients(torch.compile(lean, fullgraph=True, backend="aot_eager"), x, modules)
    for name, value in gradients(plain, x, modules).items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lean", "values"),
    [
        (lean_linear, WIDTH + 2),  # x, mean and deviation
        (lean_mlp, WIDTH + INNER + 2),  # and what fc1 gives
        (lean_after, WIDTH + WIDTH + INNER + 2),  # and the sum of x and out_proj's product
    ],
    ids=["linear", "mlp", "after"],
)
def test_keeps_inputs_and_what_precedes_the_activation(lean, values):
    modules, x = parts(torch.float32)
    kept = {}

    def count(tensor):
        if tensor.shape[0] == TOKENS:
            kept[tensor.data_ptr()] = tensor[0].numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = lean(x, modules)
    assert out.requires_grad
    assert sum(kept.values()) == values


class Doubled(nn.Linear):
    """A layer that computes more than its weights define, like an adapter."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("changed", ["fc1", "fc2"])
def test_what_takes_a_layers_place_or_listens_to_it_is_called(changed):
    modules, x = parts(torch.float32)
    heard = []
    modules[changed].register_forward_hook(lambda *_: heard.append(changed))
    lean_mlp(x, modules)
    assert heard
    other = Doubled(*reversed(modules[changed].weight.shape))
    other.load_state_dict(modules[changed].state_dict())
    modules[changed] = other
    for lean, plain in ((lean_linear, plain_linear), (lean_mlp, plain_mlp)):
        torch.testing.assert_close(lean(x, modules), plain(x, modules))
    modules[changed].forward = lambda x: torch.full((len(x), other.out_features), 0.5)
    torch.testing.assert_close(lean_mlp(x, modules), plain_mlp(x, modules))


def test_a_residual_may_be_wider_or_broadcast():
    _, x = parts(torch.float32)
    layer = nn.Linear(WIDTH, WIDTH)
    for residual in (torch.randn(WIDTH), torch.randn(TOKENS, WIDTH).half().double()):
        got, want = residual_linear(residual, x, layer), residual + layer(x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_what_is_passed_on_alone_has_the_gradient_of_the_input():
    modules, x = parts(torch.float32)
    passed, _ = norm_linear(x, modules["norm"], modules["fc1"])
    leaves = x, *modules["norm"].parameters(), *modules["fc1"].parameters()
    of_x, *others = torch.autograd.grad(passed.square().sum(), leaves, allow_unused=True)
    assert torch.equal(of_x, 2 * x) and others == [None] * 4


def test_layers_side_by_side_are_one_product():
    modules, x = parts(torch.float32)
    layers = [nn.Linear(WIDTH, size) for size in (64, 128, 64)]
    want = torch.cat([layer(modules["norm"](x)) for layer in layers], 1)
    torch.testing.assert_close(norm_linear(x, modules["norm"], *layers)[1], want)
    layers[1].register_forward_hook(lambda module, given, out: 0 * out)
    assert norm_linear(x, modules["norm"], *layers)[1][:, 64:192].eq(0).all()
