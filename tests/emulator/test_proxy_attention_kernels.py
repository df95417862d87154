"""The CUDA kernels of proxy_attention, on the emulator, against float64."""

import kernel_table
import pytest
import torch
from torch import Tensor

from clipvip.ops import _native
from clipvip.ops.proxy_attention import _backward_cuda, _forward_cuda, proxy_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = [0, 2, 2, 3]  # two frames, none, one
ALL, FEW = 232448, 44 * 1024  # bytes of shared memory: enough for a frame's 144 rows, or not

# (dtype, D, L, M): each value with each dtype, and every kernel with rows that fill no tile, with
# heads that fill its rows and with heads that do not
GRID = [
    (dtype, dim, patches, proxies)
    for dtype in DTYPES
    for dim, patches, proxies in [
        (32, 49, 4),
        (64, 65, 4),
        (80, 7, 1),
        (96, 20, 5),
        (128, 33, 4),
        (64, 1, 1),
        (16, 30, 20),
        (48, 16, 2),
        (112, 9, 3),
        (8, 9, 2),
        (24, 5, 3),
        (40, 17, 4),
        (56, 3, 4),
        (72, 21, 4),
        (88, 19, 1),
        (104, 13, 5),
        (120, 7, 9),
    ]
]


def make(dtype, dim, patches, proxies, offsets=RAGGED, heads=2) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, 3, H, D], frame_offsets, and the gradient of the output."""
    tokens = (len(offsets) - 1) * proxies + offsets[-1] * patches
    generator = torch.Generator().manual_seed(tokens + dim)
    qkv = torch.randn(tokens, 3, heads, dim, generator=generator).to(dtype)
    grad = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
    return qkv, torch.tensor(offsets, dtype=torch.int32), grad


def kernels(qkv, offsets, grad, proxies, patches, scale=None) -> tuple[Tensor, Tensor]:
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _forward_cuda(qkv, offsets, proxies, patches, scale)
    return out, _backward_cuda(grad, qkv, offsets, proxies, patches, scale, out, lse)


def plain(qkv, offsets, grad, proxies, patches, scale=None) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = proxy_attention_reference(leaf, offsets, proxies, patches, scale)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def assert_as_good_as_pytorch(qkv, offsets, grad, *sizes) -> None:
    """At most twice the error of plain PyTorch in the same dtype, both against float64."""
    exact = plain(qkv.double(), offsets, grad.double(), *sizes)
    theirs = plain(qkv, offsets, grad, *sizes)
    ours = kernels(qkv, offsets, grad, *sizes)
    for name, want, their, got in zip(("out", "grad"), exact, theirs, ours, strict=True):
        error, allowed = (got - want).abs().max(), 2 * (their - want).abs().max()
        floor = 4 * torch.finfo(qkv.dtype).eps * want.abs().max()
        assert error <= allowed + floor, f"{name}: {error:.2e}, plain PyTorch {allowed / 2:.2e}"


@pytest.mark.sanitized
@pytest.mark.parametrize(("dtype", "dim", "patches", "proxies"), GRID)
def test_error_against_float64(emulator, dtype, dim, patches, proxies):
    emulator.configure(seed=dim + patches)
    assert_as_good_as_pytorch(*make(dtype, dim, patches, proxies), proxies, patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frame_of_b16(emulator, dtype):
    assert_as_good_as_pytorch(*make(dtype, 64, 196, 4, [0, 1], heads=1), 4, 196)


@pytest.mark.sanitized
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [ALL, FEW])
def test_every_schedule_with_rows_resident_and_in_a_ring(emulator, seed, dtype, shared):
    emulator.configure(seed=seed, max_shared_bytes=shared)
    assert_as_good_as_pytorch(*make(dtype, 64, 140, 4, [0, 1], heads=1), 4, 140)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_do_not_fill_their_rows_in_a_ring(emulator, dtype):
    given, most = make(dtype, 72, 170, 4, [0, 1], heads=1), 54 * 1024
    resident = kernels(*given, 4, 170)
    forward, _, backward, _ = emulator.launches()
    assert min(forward[1], backward[1]) > most
    emulator.configure(seed=2, max_shared_bytes=most)
    assert all(map(torch.equal, kernels(*given, 4, 170), resident))
    assert_as_good_as_pytorch(*given, 4, 170)


@pytest.mark.sanitized
@pytest.mark.parametrize("shared", [ALL, FEW])
@pytest.mark.parametrize(
    ("patches", "proxies"),
    [
        (12, 4),  # one chunk of 16 rows, full
        (60, 4),  # one tile of 64 rows, full
        (61, 4),  # one row more
        (108, 20),  # two tiles, full; proxies in two chunks
        (94, 50),  # the last chunk of three tiles is full
        (1, 130),  # proxies in three tiles
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_end_at_borders_of_tiles(emulator, dtype, patches, proxies, shared):
    emulator.configure(seed=2, max_shared_bytes=shared)
    given = make(dtype, 48, patches, proxies, [0, 1, 1], heads=1)
    assert_as_good_as_pytorch(*given, proxies, patches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_schedule_nor_residence_changes_a_bit(emulator, dtype):
    given = make(dtype, 64, 140, 4, [0, 1], heads=1)
    results = []
    for seed, shared in ((0, ALL), (1, ALL), (2, ALL), (0, FEW), (3, FEW)):
        emulator.configure(seed=seed, max_shared_bytes=shared)
        results.append(kernels(*given, 4, 140))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("scale", [0.0, -1.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales(emulator, dtype, scale):
    assert_as_good_as_pytorch(*make(dtype, 32, 20, 4), 4, 20, scale)


def test_logits_beyond_the_range_of_exp(emulator):
    qkv, offsets, grad = make(torch.bfloat16, 64, 49, 4)
    qkv[:, :2] *= 100
    out, grad_qkv = kernels(qkv, offsets, grad, 4, 49)
    assert out.isfinite().all() and out.abs().max() <= qkv[:, 2].abs().max() * 1.01
    assert grad_qkv.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_far_below_what_rows_past_the_end_would_have(emulator, dtype):
    """Rows past the end are 0 in shared memory: exp(0 - lse) overflows unless they are skipped."""
    qkv, offsets, grad = make(dtype, 32, 20, 4)
    qkv[:, :2] *= 0.1
    qkv[:, 0] += 6
    qkv[:, 1] -= 6
    assert_as_good_as_pytorch(qkv, offsets, grad, 4, 20)


@pytest.mark.parametrize("proxies", [70, 150])
def test_more_proxies_than_a_tile_of_keys(emulator, proxies):
    assert_as_good_as_pytorch(*make(torch.bfloat16, 32, 3, proxies), proxies, 3)


@pytest.mark.sanitized
@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0, 1], [0, 1, 2, 3]])
def test_videos_of_no_and_one_frame(emulator, offsets):
    qkv, frame_offsets, grad = make(torch.bfloat16, 64, 5, 4, offsets)
    if len(offsets) > 1:
        assert_as_good_as_pytorch(qkv, frame_offsets, grad, 4, 5)
    else:
        out, grad_qkv = kernels(qkv, frame_offsets, grad, 4, 5)
        assert out.shape == (0, 2, 64) and grad_qkv.shape == qkv.shape


@pytest.mark.sanitized
def test_strides_are_honoured_and_what_is_not_aligned_is_copied(emulator):
    whole, offsets, grad = make(torch.bfloat16, 128, 7, 4, heads=6)
    views = [
        whole[:, :, 1:5:2],
        whole[..., 64:],
        whole[..., ::2],
        whole[..., 3:67],
        whole.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for view in views:
        upstream = grad[:, : view.shape[2], : view.shape[3]]
        got = kernels(view, offsets, upstream, 4, 7)
        want = kernels(view.contiguous(), offsets, upstream.contiguous(), 4, 7)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def beside_nan(x: Tensor) -> Tensor:
    """A copy of x with 8 NaN after each row, which starts on 16 bytes."""
    whole = torch.full((*x.shape[:-1], x.shape[-1] + 8), torch.nan, dtype=x.dtype)
    whole[..., :-8] = x
    return whole[..., :-8]


@pytest.mark.parametrize("dim", [8, 56, 72, 88, 104, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_beside_a_row_is_read_or_written(emulator, dtype, dim):
    emulator.configure(seed=dim)
    qkv, offsets, grad = make(dtype, dim, 13, 5)
    out, lse = _forward_cuda(qkv, offsets, 5, 13, 0.1)
    grad_qkv = _backward_cuda(grad, qkv, offsets, 5, 13, 0.1, out, lse)
    given, got, got_grad = (beside_nan(x) for x in (qkv, out * 0, qkv * 0))
    _native.run("proxy_attention_forward_cuda", given, offsets, 5, 13, 0.1, got, lse)
    given = beside_nan(grad), given, offsets, 5, 13, 0.1, got, lse, got_grad
    _native.run("proxy_attention_backward_cuda", *given)
    for written, want in ((got, out), (got_grad, grad_qkv)):
        assert torch.equal(written, want)
        beside = written.as_strided((*want.shape[:-1], 8), written.stride(), dim)
        assert beside.isnan().all()


@pytest.mark.sanitized
def test_wrong_frame_offsets_stay_inside_the_tensors(emulator):
    """The values of frame_offsets are not checked on a GPU."""
    qkv, _, grad = make(torch.bfloat16, 32, 9, 4)
    for offsets in ([0, 9, -5, 3], [5, 2, 100, 7], [-(2**31), 2**31 - 1, 0, 2]):
        wrong = torch.tensor(offsets, dtype=torch.int32)
        out, grad_qkv = kernels(qkv, wrong, grad, 4, 9)
        assert out.shape == grad.shape and grad_qkv.shape == qkv.shape


def test_sizes_that_do_not_fit_are_refused(emulator):
    qkv, offsets, grad = make(torch.bfloat16, 32, 9, 4)
    with pytest.raises(ValueError, match=r"holds 38 tokens, which are not 3 videos' proxies"):
        _forward_cuda(qkv[:-1], offsets, 4, 9, 1.0)
    out, lse = _forward_cuda(qkv, offsets, 4, 9, 1.0)
    with pytest.raises(ValueError, match=r"grad_out is torch.float32 \[39, 2, 32\], expected"):
        _backward_cuda(grad.float(), qkv, offsets, 4, 9, 1.0, out, lse)


@pytest.mark.parametrize("arch", kernel_table.SHARED)
@pytest.mark.parametrize("model", kernel_table.PATCHES)
def test_launches_are_those_that_the_kernels_table_counts_with(emulator, model, arch):
    most, patches = kernel_table.SHARED[arch] - 1024, kernel_table.PATCHES[model]
    emulator.configure(max_shared_bytes=most)
    qkv, offsets, grad = make(torch.bfloat16, 64, patches, 4, [0, 1], heads=1)
    kernels(qkv, offsets, grad, 4, patches)
    forward, _, backward, _ = emulator.launches()
    for direction, launch in (("forward", forward), ("backward", backward)):
        plan = kernel_table.plan(direction, patches, most)
        assert launch == (plan.warps * 32, plan.shared)


@pytest.mark.parametrize("kibibytes", [50, 99, 163, 227])
@pytest.mark.parametrize("seed", [2, 3])
def test_every_number_of_warps_gives_the_same_bits(emulator, kibibytes, seed):
    """A block that is alone on a multiprocessor has more warps, which share the turns otherwise."""
    given = make(torch.bfloat16, 64, 196, 4, [0, 1], heads=1)
    emulator.configure()
    want = kernels(*given, 4, 196)
    emulator.configure(seed=seed, max_shared_bytes=kibibytes * 1024)
    got = kernels(*given, 4, 196)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_a_gpu_without_enough_shared_memory_says_so(emulator):
    emulator.configure(max_shared_bytes=8192)
    qkv, offsets, _ = make(torch.bfloat16, 64, 49, 4)
    with pytest.raises(RuntimeError, match=r"proxy_attention forward of qkv \[159, 3, 2, 64\]"):
        _forward_cuda(qkv, offsets, 4, 49, 1.0)
