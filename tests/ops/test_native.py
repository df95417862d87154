"""The compiled module's names, and refusals by all ops: derivatives that they would get wrong, and
tensors without their memory.
"""

import ast
import importlib
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from clipvip.losses import contrastive_loss, omnisource_loss
from clipvip.ops import _native, linear, pairwise_logsumexp, proxy_attention

loss = importlib.import_module("clipvip.ops.pairwise_logsumexp")
attention = importlib.import_module("clipvip.ops.proxy_attention")

OFFSETS = torch.tensor([0, 1, 3], dtype=torch.int32)
QKV = torch.randn(2 * 2 + 3 * 3, 3, 2, 32, generator=torch.Generator().manual_seed(0))
A, B = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()
SCALE = torch.tensor(2.0)
SCALARS = {
    "attention": (lambda x, backend: proxy_attention(x, OFFSETS, 2, 3, backend=backend).sum(), QKV),
    "logsumexp": (lambda x, backend: pairwise_logsumexp(x, B, SCALE, backend=backend)[0].sum(), A),
    "of scale": (lambda x, backend: pairwise_logsumexp(A, B, x, backend=backend)[1].sum(), SCALE),
    "contrastive": (lambda x, backend: contrastive_loss(B, x, SCALE, backend=backend), A),
    "omnisource": (lambda x, backend: omnisource_loss(x, A, B, B, SCALE, backend=backend), A),
}


def dual(function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def jvp(function, x: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


def compiled(function, x: Tensor) -> Tensor:
    return torch.compile(lambda y: jvp(function, y), backend="eager", dynamic=False)(x)


def without_grad(function, x: Tensor) -> Tensor:
    with torch.no_grad():
        return jvp(function, x)


FORWARD_MODES = {
    "jvp": jvp,
    "dual": dual,
    "dual leaf": lambda function, x: dual(function, x.clone().requires_grad_()),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "jvp of vmap": lambda function, x: jvp(torch.func.vmap(function), torch.stack([x, x])),
    "vmap of jvp": lambda function, x: torch.func.vmap(lambda y: jvp(function, y))(x[None]),
    "grad of jvp": lambda function, x: torch.func.grad(lambda y: jvp(function, y))(x),
    "no_grad": without_grad,
}
SECOND_DERIVATIVES = {
    "hessian": lambda function, x: torch.func.hessian(function)(x),
    "reverse over reverse": lambda function, x: torch.autograd.functional.hessian(function, x),
    "double backward": lambda function, x: torch.autograd.functional.vhp(function, x, x)[1],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", FORWARD_MODES)
@pytest.mark.parametrize("name", SCALARS)
def test_forward_mode_is_refused_and_never_zero(name, way):
    function, x = SCALARS[name]
    line = "has no derivatives in forward mode .*backend='reference'"
    with pytest.raises(NotImplementedError, match=line):
        FORWARD_MODES[way](lambda y: function(y, "native"), x)


@pytest.mark.parametrize("name", SCALARS)
def test_forward_mode_is_refused_under_the_compiler(name):
    function, x = SCALARS[name]
    with pytest.raises(Exception, match="has no derivatives in forward mode"):
        compiled(lambda y: function(y, "native"), x)


@pytest.mark.parametrize("name", SCALARS)
def test_the_reference_has_forward_mode(name):
    function, x = SCALARS[name]
    exact = x.double().requires_grad_()
    double = (lambda y: function(y.float(), "reference").double())(exact)
    (slope,) = torch.autograd.grad(double, exact)
    found = jvp(lambda y: function(y, "reference"), x)
    torch.testing.assert_close(found.double(), slope.sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
@pytest.mark.parametrize("name", SCALARS)
def test_second_derivatives_are_refused(name, way):
    function, x = SCALARS[name]
    with pytest.raises(RuntimeError):
        SECOND_DERIVATIVES[way](lambda y: function(y, "native"), x)


def test_a_tangent_of_the_incoming_gradient_is_refused():
    x = A.clone().requires_grad_()
    out = pairwise_logsumexp(x, B, SCALE)[0]
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones(5), torch.ones(5))
        with pytest.raises(NotImplementedError, match="pairwise_logsumexp_backward has no"):
            torch.autograd.grad(out, x, upstream)


def test_forward_mode_passes_by_what_does_not_depend_on_it():
    def function(x: Tensor) -> Tensor:
        return contrastive_loss(A, B, SCALE) + x.square().sum()

    torch.testing.assert_close(jvp(function, SCALE), 2 * SCALE)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", SCALARS)
def test_vmap_is_one_call_after_another(name):
    function, x = SCALARS[name]
    both = torch.stack([x, -x]).requires_grad_()
    found = torch.func.vmap(lambda y: function(y, "native"))(both)
    expected = torch.stack([function(y, "native") for y in both])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each.sum(), both)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


def freed(like: Tensor) -> Tensor:
    tensor = torch.zeros(2, *like.shape, dtype=like.dtype)[1]  # not at the start of its storage
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk(like: Tensor) -> Tensor:
    tensor = torch.zeros_like(like)
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


def meta(like: Tensor) -> Tensor:
    return torch.zeros(2, *like.shape, dtype=like.dtype, device="meta")[1]


def fake(like: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.zeros(2, *like.shape, dtype=like.dtype)[1]


def sparse(like: Tensor) -> Tensor:
    return like.to_sparse()


LIN = {
    "x": torch.zeros(70, 64),
    "weight": torch.zeros(64, 64),
    "bias": torch.zeros(64),
    "residual": torch.zeros(70, 64),
    "norm.weight": torch.zeros(64),
    "norm.bias": torch.zeros(64),
}


def linear_forward(tensors: dict[str, Tensor]) -> object:
    norm = linear.Norm(tensors["norm.weight"], tensors["norm.bias"], 1e-5)
    three = (tensors[name] for name in ("x", "weight", "bias"))
    return linear.linear_forward(*three, torch.float32, norm=norm, residual=tensors["residual"])


ENTRIES = {
    "attention": (
        lambda tensors: proxy_attention(*tensors.values(), 2, 3),
        {"qkv": QKV, "frame_offsets": OFFSETS},
    ),
    "attention, copied": (
        lambda tensors: proxy_attention(tensors["qkv"].transpose(2, 3), OFFSETS, 2, 3),
        {"qkv": torch.zeros(13, 3, 32, 16)},
    ),
    "logsumexp": (
        lambda tensors: pairwise_logsumexp(*tensors.values()),
        {"a": A, "b": B, "scale": SCALE},
    ),
    "logsumexp, copied": (
        lambda tensors: pairwise_logsumexp(tensors["a"].T, B.T, tensors["scale"]),
        {"a": A, "scale": SCALE.double()},
    ),
    "linear": (linear_forward, LIN),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("loss_of_memory", [freed, shrunk, meta, fake, sparse])
@pytest.mark.parametrize(
    ("entry", "name"), [(entry, name) for entry, (_, given) in ENTRIES.items() for name in given]
)
def test_a_tensor_without_its_memory_is_refused(entry, name, loss_of_memory):
    """A kernel that got such an address crashed the process or returned garbage."""
    function, given = ENTRIES[entry]
    if loss_of_memory is fake and entry != "linear":
        pytest.skip("ops give fake tensors for fake ones")
    if loss_of_memory is sparse and given[name].ndim < 2:
        pytest.skip("a sparse vector is nothing anyone has")
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        function({**given, name: loss_of_memory(given[name])})


def test_backward_ops_refuse_what_forward_did_not_save():
    out, lse = attention._forward(QKV, OFFSETS, 2, 3, 1.0)
    saved = [x.detach() for x in loss._forward(A, B, SCALE, 0)[:2]]
    for wrong in (freed(lse), lse.bfloat16(), lse.double(), lse[:, 1:]):
        with pytest.raises((RuntimeError, ValueError)):
            attention._backward(out, QKV, OFFSETS, 2, 3, 1.0, out, wrong)
    for wrong in (freed(A[:, 0]), A[:, 0].bfloat16(), A[:4, 0].contiguous()):
        for at in range(5):
            statistics = [*saved, A[:, 0], A[:, 0], A[:, 0]]
            statistics[at] = wrong
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                loss._backward(A, B, SCALE, 0, *statistics)
    with pytest.raises((RuntimeError, ValueError)):
        loss._forward(A, B.bfloat16(), SCALE, 0)
    for wrong in (OFFSETS.float(), OFFSETS.long()):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            attention._forward(QKV, wrong, 2, 3, 1.0)


def test_views_that_negate_or_are_zero_by_a_mark_alone_are_read_as_they_look():
    negative, zero = torch._neg_view(A), torch._efficientzerotensor((5, 8))
    for view, plain in ((negative, -A), (zero, torch.zeros(5, 8))):
        found = pairwise_logsumexp(view, B, torch._neg_view(-SCALE))
        assert all(map(torch.equal, found, pairwise_logsumexp(plain, B, SCALE)))


def declared_names() -> set[str]:
    """Names that _C.pyi declares, without those it imports."""
    stub = Path(_native.__file__).parents[1] / "_C.pyi"
    nodes = ast.parse(stub.read_text(encoding="utf-8")).body
    return {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_the_stub_declares_what_the_compiled_module_exports():
    """The CUDA functions of a module built without them are compared in tests/emulator."""
    module = _native.module()
    cuda = module.build_info()["cuda"] is not None
    exported = {name for name in vars(module) if not name.startswith("_")}
    assert exported == {x for x in declared_names() if cuda or not x.endswith("_cuda")}


def test_a_large_workspace_is_not_kept():
    kept, _ = _native._cpu_workspace(1)
    large, address = _native._cpu_workspace(_native._MOST_KEPT + 1)
    assert large.nbytes > _native._MOST_KEPT and address % 64 == 0
    assert _native._cpu_workspace(1)[0] is kept


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
    """Under torch.compile nothing checks before the op runs, so the op itself must."""
    without = types.SimpleNamespace(build_info=lambda: {"cuda": None})
    monkeypatch.setattr(_native, "module", lambda: without)
    _native._check_gpu.cache_clear()
    with pytest.raises(RuntimeError, match="built without CUDA kernels; install it again"):
        calls()[name]()
