import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from clipvip.ops import _native, proxy_attention
from clipvip.ops.proxy_attention import (
    _backward,
    _forward,
    equal_lengths_reference,
    proxy_attention_reference,
    proxy_attention_weights,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [32, 64, 80, 96, 128]
PATCHES = [1, 7, 49, 196, 257]
PROXIES = [1, 4, 5, 16]
RAGGED = [0, 3, 3, 4, 6]  # three frames, none, one, two

# Each value of each parameter with each dtype; all combinations would be 300.
GRID = [
    (dtype, HEAD_DIMS[i % 5], PATCHES[(i * 2 + i // 5) % 5], PROXIES[i % 4])
    for dtype in DTYPES
    for i in range(10)
]


@pytest.fixture(params=[*_native.module().cpu_capabilities(), "cuda"])
def kernel(request):
    """The kernel's device: the CPU with each instruction set in turn, then a GPU."""
    if request.param == "cuda":
        yield request.getfixturevalue("cuda")
        return
    before = _native.module().cpu_capability()
    _native.module().set_cpu_capability(request.param)
    yield "cpu"
    _native.module().set_cpu_capability(before)


def make(
    offsets: list[int],
    patches: int,
    proxies: int,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, H, D] and frame_offsets."""
    tokens = (len(offsets) - 1) * proxies + offsets[-1] * patches
    generator = torch.Generator().manual_seed(tokens + head_dim)
    qkv = torch.randn(tokens, 3, heads, head_dim, generator=generator)
    return qkv.to(device, dtype), torch.tensor(offsets, dtype=torch.int32, device=device)


def run(attend, qkv: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """Output and gradient, as float64."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv, *arguments)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).to(out)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
    return out.detach().double(), grad_qkv.double()


def assert_as_good_as_pytorch(qkv: Tensor, *arguments) -> None:
    """At most twice the error of plain PyTorch in the same dtype, both against float64."""
    exact = run(proxy_attention_reference, qkv.double(), *arguments)
    plain = run(proxy_attention_reference, qkv, *arguments)
    ours = run(proxy_attention, qkv, *arguments)
    for name, want, theirs, got in zip(("out", "grad"), exact, plain, ours, strict=True):
        error, allowed = (got - want).abs().max(), 2 * (theirs - want).abs().max()
        floor = 4 * torch.finfo(qkv.dtype).eps * want.abs().max()
        assert error <= allowed + floor, f"{name}: {error:.2e}, plain PyTorch {allowed / 2:.2e}"


@pytest.mark.parametrize(("dtype", "head_dim", "patches", "proxies"), GRID)
def test_error_against_float64(dtype, head_dim, patches, proxies, device):
    frames = RAGGED if patches < 100 else [0, 2, 2, 3]
    qkv, offsets = make(frames, patches, proxies, head_dim=head_dim, dtype=dtype, device=device)
    assert_as_good_as_pytorch(qkv, offsets, proxies, patches)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "patches", "proxies"), [(64, 49, 4), (80, 7, 5), (32, 1, 1)])
def test_every_instruction_set(kernel, dtype, head_dim, patches, proxies):
    qkv, offsets = make(RAGGED, patches, proxies, head_dim=head_dim, dtype=dtype, device=kernel)
    assert_as_good_as_pytorch(qkv, offsets, proxies, patches)


@pytest.mark.parametrize("head_dim", range(8, 129, 8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_size_of_head(dtype, head_dim, kernel):
    qkv, offsets = make(RAGGED, 7, 5, heads=3, head_dim=head_dim, dtype=dtype, device=kernel)
    assert_as_good_as_pytorch(qkv, offsets, 5, 7)


def beside_nan(x: Tensor) -> Tensor:
    """A copy of x with 8 NaN after each row, which starts on 16 bytes."""
    whole = torch.full((*x.shape[:-1], x.shape[-1] + 8), torch.nan, dtype=x.dtype, device=x.device)
    whole[..., :-8] = x
    return whole[..., :-8]


@pytest.mark.parametrize("head_dim", [8, 40, 72, 88, 104, 120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_a_row_is_read_or_written(dtype, head_dim, kernel):
    qkv, offsets = make(RAGGED, 7, 5, heads=3, head_dim=head_dim, dtype=dtype, device=kernel)
    batch = offsets, 5, 7, head_dim**-0.5
    out, lse = _forward(qkv, *batch)
    grad = _backward(out, qkv, *batch, out, lse)
    given, got, got_grad = (beside_nan(x) for x in (qkv, out * 0, qkv * 0))
    suffix = "_cuda" if kernel == "cuda" else ""
    _native.run(f"proxy_attention_forward{suffix}", given, *batch, got, lse)
    given = beside_nan(out), given, *batch, got, lse, got_grad
    _native.run(f"proxy_attention_backward{suffix}", *given)
    for written, want in ((got, out), (got_grad, grad)):
        assert torch.equal(written, want)
        beside = written.as_strided((*want.shape[:-1], 8), written.stride(), head_dim)
        assert beside.isnan().all()


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0, 200.0])
def test_scales(scale, kernel):
    qkv, offsets = make(RAGGED, 49, 4, device=kernel)
    assert_as_good_as_pytorch(qkv, offsets, 4, 49, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_beyond_the_range_of_exp(dtype, device):
    qkv, offsets = make([0, 2], 49, 4, dtype=dtype, device=device)
    qkv[:, :2] *= 12  # logits up to about ±700
    assert_as_good_as_pytorch(qkv, offsets, 4, 49)
    qkv[:, :2] *= 100
    out = proxy_attention(qkv, offsets, 4, 49)
    assert out.isfinite().all() and out.abs().max() <= qkv[:, 2].abs().max() * 1.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_larger_than_a_cache(dtype, kernel):
    """These are written past the caches, and equal the results of parts of the batch."""
    qkv, offsets = make(list(range(65)), 49, 4, heads=12, dtype=dtype, device=kernel)
    out, grad = run(proxy_attention, qkv, offsets, 4, 49)
    tokens = 8 * 53
    for start in (0, 56 * 53):
        part = qkv[start : start + tokens].detach().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator)[start : start + tokens].to(qkv)
        small = proxy_attention(part, offsets[:9], 4, 49)
        (small_grad,) = torch.autograd.grad(small, part, upstream)
        assert torch.equal(small.double(), out[start : start + tokens])
        assert torch.equal(small_grad.double(), grad[start : start + tokens])


def test_more_proxies_than_a_block_of_rows(device):
    qkv, offsets = make([0, 2, 2], 3, 150, device=device)
    assert_as_good_as_pytorch(qkv, offsets, 150, 3)


def test_reads_qkv_in_place_whatever_its_strides(device):
    whole, offsets = make(RAGGED, 7, 4, heads=6, head_dim=128, device=device)
    views = [
        whole[:, :, 1:5:2],
        whole[..., 64:],
        whole[..., ::2],
        whole.transpose(1, 2).contiguous().transpose(1, 2),
        whole[:1].expand_as(whole),
    ]
    for view in views:
        got = run(proxy_attention, view, offsets, 4, 7)
        want = run(proxy_attention, view.contiguous(), offsets, 4, 7)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_takes_any_strides_of_the_gradient(device):
    qkv, offsets = make(RAGGED, 7, 4, device=device)
    qkv.requires_grad_()
    out = proxy_attention(qkv, offsets, 4, 7)
    for grad in (
        out.new_ones(()).expand_as(out),
        torch.randn(*reversed(out.shape)).to(out).permute(2, 1, 0),
    ):
        (got,) = torch.autograd.grad(out, qkv, grad, retain_graph=True)
        (want,) = torch.autograd.grad(out, qkv, grad.contiguous(), retain_graph=True)
        assert torch.equal(got, want)


def test_batches_without_frames_or_videos(device):
    qkv, offsets = make([0, 0, 0], 7, 4, device=device)
    assert_as_good_as_pytorch(qkv, offsets, 4, 7)
    qkv, offsets = make([0], 7, 4, device=device)
    out, grad = run(proxy_attention, qkv, offsets, 4, 7)
    assert out.shape == (0, 2, 64) and grad.shape == qkv.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_equals_its_videos_one_by_one(dtype, device):
    qkv, offsets = make(RAGGED, 7, 4, dtype=dtype, device=device)
    out, _ = run(proxy_attention, qkv, offsets, 4, 7)
    alone = []
    for video, (first, last) in enumerate(itertools.pairwise(RAGGED)):
        rows = slice(video * 4 + first * 7, (video + 1) * 4 + last * 7)
        one = torch.tensor([0, last - first], dtype=torch.int32, device=device)
        alone.append(proxy_attention(qkv[rows], one, 4, 7).double())
    assert torch.equal(out, torch.cat(alone))


def test_masking(device):
    """A patch's row depends on its own frame and the proxies only; a proxy's on everything."""
    patches, proxies = 49, 4
    qkv, offsets = make([0, 3], patches, proxies, device=device)
    out = proxy_attention(qkv, offsets, proxies, patches)
    changed = qkv.clone()
    second = slice(proxies + patches, proxies + 2 * patches)
    changed[second] = torch.randn_like(changed[second])
    now = proxy_attention(changed, offsets, proxies, patches)
    others = torch.ones(len(qkv), dtype=torch.bool, device=device)
    others[:proxies] = others[second] = False
    assert torch.equal(now[others], out[others])
    assert (now[:proxies] != out[:proxies]).any(-1).all()


def test_permuting_patches_of_a_frame_permutes_their_rows(device):
    qkv, offsets = make([0, 2], 49, 4, device=device)
    order = torch.cat([torch.arange(53), 53 + torch.randperm(49)])
    out = proxy_attention(qkv, offsets, 4, 49)
    torch.testing.assert_close(proxy_attention(qkv[order], offsets, 4, 49), out[order])


def test_gradient_by_finite_differences(device):
    qkv, offsets = make([0, 2, 3], 3, 2, heads=1, head_dim=32, device=device)
    direction = torch.randn_like(qkv)
    weights = torch.randn(len(qkv), 1, 32).to(device)

    def loss(step: float) -> Tensor:
        exact = (qkv + step * direction).double()
        return (proxy_attention_reference(exact, offsets, 2, 3) * weights).sum()

    leaf = qkv.clone().requires_grad_()
    (proxy_attention(leaf, offsets, 2, 3) * weights).sum().backward()
    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    torch.testing.assert_close((leaf.grad * direction).sum().double(), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    qkv, offsets = make([0, 5, 5, 6], 49, 4, heads=3, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(proxy_attention, qkv, offsets, 4, 49))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    qkv, offsets = make([0, 2, 3], 7, 4, heads=1, head_dim=32, dtype=dtype, device=device)
    qkv.requires_grad_()
    torch.library.opcheck(_forward, (qkv, offsets, 4, 7, 0.2))
    out, lse = _forward(qkv.detach(), offsets, 4, 7, 0.2)
    torch.library.opcheck(_backward, (out, qkv.detach(), offsets, 4, 7, 0.2, out, lse))


def test_compile(device):
    compiled = torch.compile(proxy_attention, fullgraph=True, backend="aot_eager")
    for offsets in ([0, 2, 3], [0, 1, 4, 4]):
        qkv, offsets = make(offsets, 7, 4, device=device)
        got, want = (run(f, qkv, offsets, 4, 7) for f in (compiled, proxy_attention))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast(backend, device):
    qkv, offsets = make([0, 2, 3], 7, 4, device=device)
    qkv.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = proxy_attention(qkv, offsets, 4, 7, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, proxy_attention(qkv.bfloat16(), offsets, 4, 7, backend=backend))
    out.sum().backward()
    assert qkv.grad.dtype == torch.float32


def test_activation_checkpointing(device):
    qkv, offsets = make([0, 2, 3], 7, 4, device=device)

    def attend(qkv: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            proxy_attention, qkv, offsets, 4, 7, use_reentrant=False
        )

    got, want = run(attend, qkv), run(proxy_attention, qkv, offsets, 4, 7)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_backends_agree(device):
    qkv, offsets = make(RAGGED, 7, 4, device=device)
    got = proxy_attention(qkv, offsets, 4, 7, backend="reference")
    torch.testing.assert_close(got, proxy_attention(qkv, offsets, 4, 7))


@pytest.mark.parametrize(("videos", "frames"), [(1, 1), (3, 1), (2, 5), (2, 0)])
@pytest.mark.parametrize(("patches", "proxies"), [(7, 4), (1, 1), (9, 5)])
def test_equal_lengths_are_the_reference(videos, frames, patches, proxies):
    offsets = [i * frames for i in range(videos + 1)]
    qkv, offsets = make(offsets, patches, proxies, dtype=torch.float64)
    want = run(proxy_attention_reference, qkv, offsets, proxies, patches, 0.3)
    got = run(equal_lengths_reference, qkv, frames, proxies, patches, 0.3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_is_traced_without_values_of_frame_offsets():
    """For any batch, and under autograd."""

    class Attend(torch.nn.Module):
        def forward(self, qkv: Tensor, offsets: Tensor) -> Tensor:
            return proxy_attention(qkv, offsets, 4, 7, backend="reference")

    dynamic = {0: torch.export.Dim.DYNAMIC}
    given = make([0, 2, 3], 7, 4, dtype=torch.float64)
    program = torch.export.export(Attend(), given, dynamic_shapes=(dynamic,) * 2)
    for frames in (RAGGED, [0, 0, 1], [0, 1], [0]):
        qkv, offsets = make(frames, 7, 4, dtype=torch.float64)
        got, want = run(program.module(), qkv, offsets), run(Attend(), qkv, offsets)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_the_reference_on_fake_tensors_gives_shapes():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        qkv, offsets = (mode.from_tensor(x) for x in make(RAGGED, 7, 4, dtype=torch.bfloat16))
        out = proxy_attention(qkv, offsets, 4, 7, backend="reference")
    assert out.shape == qkv[:, 0].shape and out.dtype == qkv.dtype


@pytest.mark.usefixtures("cuda")
class TestCuda:
    def test_a_captured_graph_replays_on_new_input(self):
        qkv, offsets = make(RAGGED, 49, 4, dtype=torch.bfloat16, device="cuda")
        other = torch.randn_like(qkv)
        want = run(proxy_attention, other, offsets, 4, 49)
        leaf = qkv.clone().requires_grad_()
        grad = torch.randn(qkv[:, 0].shape, generator=torch.Generator().manual_seed(1)).to(qkv)

        def step() -> tuple[Tensor, Tensor]:
            out = proxy_attention(leaf, offsets, 4, 49)
            return out.detach(), *torch.autograd.grad(out, leaf, grad)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        with torch.no_grad():
            leaf.copy_(other)
        graph.replay()
        assert all(torch.equal(x.double(), y) for x, y in zip(got, want, strict=True))

    def test_the_current_stream_is_used(self):
        qkv, offsets = make(RAGGED, 49, 4, dtype=torch.bfloat16, device="cuda")
        want = proxy_attention(qkv, offsets, 4, 49)
        late = torch.zeros_like(qkv)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**8)
            late.copy_(qkv)
            got = proxy_attention(late, offsets, 4, 49)
            torch.cuda.current_stream().synchronize()
        assert torch.equal(got, want)

    def test_the_last_of_more_numbers_than_32_bits_count(self):
        """The last video of a batch of more than 2^31 numbers equals its result alone."""
        patches, proxies, frames, heads, dim = 196, 4, 12, 12, 64
        tokens = proxies + frames * patches
        videos = 2**31 // (tokens * 3 * heads * dim) + 1
        size = videos * tokens * heads * dim * torch.bfloat16.itemsize
        if torch.cuda.mem_get_info()[0] < 10 * size:  # qkv and its gradient, output and its
            pytest.skip(f"{10 * size / 2**30:.0f} GiB of GPU memory are not free")
        qkv = torch.randn(videos * tokens, 3, heads, dim, dtype=torch.bfloat16, device="cuda")
        grad = torch.randn(videos * tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
        assert qkv.numel() > 2**31

        def both(qkv: Tensor, grad: Tensor, videos: int) -> tuple[Tensor, Tensor]:
            leaf = qkv.detach().requires_grad_()
            offsets = torch.arange(videos + 1, dtype=torch.int32, device="cuda") * frames
            out = proxy_attention(leaf, offsets, proxies, patches)
            return out.detach()[-tokens:], torch.autograd.grad(out, leaf, grad)[0][-tokens:]

        got = both(qkv, grad, videos)
        want = both(qkv[-tokens:].clone(), grad[-tokens:].clone(), 1)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))

    def test_runs_are_equal_to_the_bit(self):
        qkv, offsets = make(RAGGED, 196, 4, heads=12, dtype=torch.bfloat16, device="cuda")
        first, second = (run(proxy_attention, qkv, offsets, 4, 196) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


QKV, OFFSETS = make([0, 23], 49, 4)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 24], r"frame_offsets\[-1\] is 24 but qkv holds 23 frames \(T=1131, B=1, M=4, L=49\)"),
        ([0, 11], r"frame_offsets\[-1\] is 11 but qkv holds 23 frames"),
        ([0, 10, 23], r"qkv holds 22\.92 frames \(T=1131, B=2, M=4, L=49\)"),
        ([0, 30, 23], r"frame_offsets decreases: \[1\] is 30 and \[2\] is 23"),
        ([1, 24], r"frame_offsets\[0\] is 1, expected 0"),
        ([0, -1], r"frame_offsets decreases: \[0\] is 0 and \[1\] is -1"),
    ],
)
def test_offsets_that_do_not_add_up(offsets, message, backend):
    offsets = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        proxy_attention(QKV, offsets, 4, 49, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((QKV[0], OFFSETS, 4, 49), ValueError, r"qkv is \[3, 2, 64\], expected \[T, 3, H, D\]"),
        ((QKV[:, :2], OFFSETS, 4, 49), ValueError, r"qkv is \[1131, 2, 2, 64\]"),
        ((QKV[..., :36], OFFSETS, 4, 49), ValueError, "D=36, expected a multiple of 8 up to 128"),
        ((QKV.double(), OFFSETS, 4, 49), TypeError, "float64, expected float32, bfloat16 or"),
        ((QKV.int(), OFFSETS, 4, 49), TypeError, "qkv is torch.int32, expected"),
        ((None, OFFSETS, 4, 49), TypeError, "qkv is NoneType"),
        ((QKV, OFFSETS.long(), 4, 49), TypeError, "frame_offsets is torch.int64, expected an"),
        ((QKV, OFFSETS.float().requires_grad_(), 4, 49), TypeError, "torch.float32, expected an"),
        ((QKV, [0, 23], 4, 49), TypeError, "frame_offsets is list"),
        ((QKV, OFFSETS[:0], 4, 49), ValueError, r"frame_offsets is \[0\], expected \[B \+ 1\]"),
        ((QKV, OFFSETS[None], 4, 49), ValueError, r"frame_offsets is \[1, 2\]"),
        ((QKV, OFFSETS, 0, 49), ValueError, "num_proxies is 0, expected at least 1"),
        ((QKV, OFFSETS, 4, -1), ValueError, "patches_per_frame is -1"),
        ((QKV, OFFSETS, 4.0, 49), TypeError, "num_proxies is float, expected int"),
        ((QKV.to("meta"), OFFSETS, 4, 49), ValueError, "tensors lie on"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        proxy_attention(*arguments)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cuda', expected 'native' or 'reference'"):
        proxy_attention(QKV, OFFSETS, 4, 49, backend="cuda")


def test_the_backward_op_checks_what_it_is_given():
    out, lse = _forward(QKV, OFFSETS, 4, 49, 0.125)
    with pytest.raises(ValueError, match=r"grad_out is torch.float32 \[1130, 2, 64\]"):
        _backward(out[1:], QKV, OFFSETS, 4, 49, 0.125, out, lse)
    with pytest.raises(ValueError, match=r"frame_offsets\[-1\] is 46"):
        _backward(out, QKV, OFFSETS * 2, 4, 49, 0.125, out, lse)
    with pytest.raises(ValueError, match=r"lse is torch.float32 \[1, 1131\]"):
        _backward(out, QKV, OFFSETS, 4, 49, 0.125, out, lse[:1])


def attend_to_what_is_seen(qkv: Tensor, offsets: Tensor, proxies: int, patches: int) -> Tensor:
    """The reference token by token, over only the keys that a token sees."""
    out = []
    for video, (first, last) in enumerate(itertools.pairwise(offsets.tolist())):
        start = video * proxies + first * patches
        tokens = proxies + (last - first) * patches
        query, key, value = qkv[start : start + tokens].permute(1, 2, 0, 3)
        frame = torch.arange(tokens).sub(proxies).div(patches, rounding_mode="floor")
        frame[:proxies] = -1
        for token in range(tokens):
            seen = (frame == frame[token]) | (frame == -1) | (frame[token] == -1)
            logits = query[:, token, None] @ key[:, seen].mT * qkv.shape[-1] ** -0.5
            out.append((logits.softmax(-1) @ value[:, seen])[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_no_nan_is_lost(part, value, dtype, kernel):
    """NaN appears wherever attention over the visible keys gives it, and in no other frame."""
    for token in (0, 5, 12, 24):
        qkv, offsets = make([0, 3, 3, 4], 5, 2, heads=1, head_dim=16, dtype=dtype)
        qkv[token, part, 0, 3] = value
        want, want_grad = run(attend_to_what_is_seen, qkv.double(), offsets, 2, 5)
        got, got_grad = run(proxy_attention, qkv.to(kernel), offsets.to(kernel), 2, 5)
        got, got_grad = got.cpu(), got_grad.cpu()
        assert got[want.isnan()].isnan().all() and got_grad[want_grad.isnan()].isnan().all()
        if value != value:
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_meta_tensors_give_shapes(backend):
    qkv, offsets = make(RAGGED, 7, 4, dtype=torch.bfloat16)
    leaf = qkv.to("meta").requires_grad_()
    out = proxy_attention(leaf, offsets.to("meta"), 4, 7, backend=backend)
    assert out.is_meta and out.shape == qkv[:, 0].shape and out.dtype == qkv.dtype
    assert torch.autograd.grad(out.sum(), leaf)[0].shape == qkv.shape


def test_sizes_of_what_a_batch_has_none_of_ask_for_no_memory(device):
    """Patches without frames, and proxies without videos."""
    qkv, offsets = make([0, 0, 0], 1, 4, device=device)
    want = run(proxy_attention, qkv, offsets, 4, 1)
    for patches in (2**31, 2**62):
        got = run(proxy_attention, qkv, offsets, 4, patches)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    out, grad = run(proxy_attention, qkv[:0], offsets[:1], 2**62, 2**62)
    assert out.numel() == grad.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize(("patches", "proxies"), [(7, 4), (1, 1), (49, 16)])
def test_weights_of_values_are_the_ops(dtype, patches, proxies, device):
    head_dim = 40 if dtype == torch.float64 else 64  # no kernel is involved
    qkv, offsets = make(RAGGED, patches, proxies, head_dim=head_dim, dtype=dtype, device=device)
    qkv.requires_grad_()
    weights = proxy_attention_weights(qkv, offsets, proxies, patches, 0.2)
    near = {} if dtype in (torch.float64, torch.float32) else {"atol": 0.02, "rtol": 0.02}
    longest = proxies + 3 * patches
    assert weights.dtype == dtype and weights.shape == (len(RAGGED) - 1, 2, longest, longest)
    tokens = [proxies + (b - a) * patches for a, b in itertools.pairwise(RAGGED)]
    frame = (torch.arange(longest, device=device) - proxies).div(patches, rounding_mode="floor")
    outputs = []
    for own, values, length in zip(weights, qkv[:, 2].split(tokens), tokens, strict=True):
        assert not own[:, length:].any() and not own[:, :, length:].any()
        own = own[:, :length, :length]
        torch.testing.assert_close(own.sum(-1), torch.ones_like(own[..., 0]), **near)
        other = (frame[:, None] != frame)[:length, :length]
        other[:proxies] = other[:, :proxies] = False
        assert not own[:, other].any() and (own[:, ~other] > 0).all()
        outputs.append((own @ values.transpose(0, 1)).transpose(0, 1))
    found = torch.cat(outputs)
    wanted = proxy_attention_reference(qkv, offsets, proxies, patches, 0.2)
    torch.testing.assert_close(found, wanted, **near)
    upstream = torch.randn(found.shape).to(found)
    gradients = (torch.autograd.grad(x, qkv, upstream)[0] for x in (found, wanted))
    torch.testing.assert_close(*gradients, **near)


def test_weights_of_no_video_are_empty():
    qkv, offsets = make([0], 7, 4)
    assert proxy_attention_weights(qkv, offsets, 4, 7).shape == (0, 2, 4, 4)
