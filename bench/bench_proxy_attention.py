"""proxy_attention against its alternatives: `clipvip bench ops --only attention`.

Attention of one layer of ViT-B/16, B/32 or L/14 with heads of 64, of SO400M/14 with heads of 72, or
of bigG/14 with heads of 104: forward, backward alone, or both. Videos lie in one packed batch, as
the op takes them; "ragged" ones have 4 to 20 frames, 12 on average. Records: ops-proxy_attention-*.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import harness
import peers
import pytest
import records
import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.ops.proxy_attention import proxy_attention

SO400M = dict(patches=256, heads=16, head_dim=72)
BIGG = dict(patches=256, heads=16, head_dim=104)
ON_GPU = dict(frames=12, dtype="bfloat16", device="cuda")
PLAIN = ON_GPU | {"compiled": False}  # compiling takes longer than the rest of the case
SIZES: dict[str, dict[str, Any]] = {
    "b16-fp32": dict(videos=2, frames=12, patches=196, dtype="float32"),
    "b16-bf16": dict(videos=2, frames=12, patches=196, dtype="bfloat16"),
    "b32-fp32": dict(videos=4, frames=12, patches=49, dtype="float32"),
    "b32-bf16": dict(videos=4, frames=12, patches=49, dtype="bfloat16"),
    "b16-fp32-frames1": dict(videos=2, frames=1, patches=196, dtype="float32"),
    "b16-fp32-frames4": dict(videos=2, frames=4, patches=196, dtype="float32"),
    "b16-fp32-frames32": dict(videos=2, frames=32, patches=196, dtype="float32"),
    "so400m-bf16": dict(videos=1, frames=12, dtype="bfloat16", **SO400M),
    "bigg-bf16": dict(videos=1, frames=12, dtype="bfloat16", **BIGG),
    "b32-bf16-batch1": dict(videos=1, patches=49, **PLAIN),
    "b32-bf16-batch32": dict(videos=32, patches=49, **ON_GPU),
    "b32-bf16-batch128": dict(videos=128, patches=49, **PLAIN),
    "b16-bf16-batch1": dict(videos=1, patches=196, **PLAIN),
    "b16-bf16-batch8": dict(videos=8, patches=196, **PLAIN),
    "b16-bf16-batch32": dict(videos=32, patches=196, **ON_GPU),
    "b16-bf16-batch128": dict(videos=128, patches=196, **PLAIN),
    "b16-bf16-ragged32": dict(videos=32, patches=196, ragged=True, **ON_GPU),
    "l14-bf16-batch32": dict(videos=32, patches=256, heads=16, **ON_GPU),
    "l14_336-bf16-batch16": dict(videos=16, patches=576, heads=16, **PLAIN),
    "so400m-bf16-batch16": dict(videos=16, **SO400M, **PLAIN),
    "bigg-bf16-batch16": dict(videos=16, **BIGG, **PLAIN),
}
CASES = records.each_way(
    {
        f"{name}-{way}": {**size, "way": way}
        for name, size in SIZES.items()
        for way in ("forward", *(["backward"] if "device" in size else []), "both")
    }
)
QUICK = {
    case: {"compiled": False}
    for case in ("b32-fp32-both-default", "b32-bf16-both-default", "b32-bf16-batch1-both-cuda")
}
HEADS, HEAD_DIM, PROXIES = 12, 64, 4
MASKED_TOKENS = 12 * 196  # above this, attention among all patches takes minutes on a CPU
# Products over all pairs of tokens, and tensors [T, H, D] that must be read or written.
WAYS = {"forward": (2, 4), "backward": (5, 8), "both": (7, 12)}


# --- forms of one video or several of one length: qkv [B, M + N·L, 3, H, D] → [B, M + N·L, H, D] --


def split(qkv: Tensor, frames: int, proxies: int) -> tuple[Tensor, Tensor]:
    """[B, M + N·L, 3, H, D] → proxies [3, B, H, M, D] and patches [3, B, H, N, L, D]."""
    return split_tokens(qkv.permute(2, 0, 3, 1, 4), proxies, frames)


def split_tokens(x: Tensor, proxies: int, frames: int) -> tuple[Tensor, Tensor]:
    """[…, M + N·L, D] → proxies […, M, D] and patches […, N, L, D]."""
    return x[..., :proxies, :], x[..., proxies:, :].unflatten(-2, (frames, -1))


def join(proxies: Tensor, patches: Tensor) -> Tensor:
    """[B, H, M, D] and [B, H, N, L, D] → [B, M + N·L, H, D]."""
    return torch.cat([proxies, patches.flatten(2, 3)], 2).transpose(1, 2)


def with_proxies(proxies: Tensor, patches: Tensor) -> Tensor:
    """Prepend a copy of the proxies' keys or values to those of each frame: [B, H, N, M+L, D]."""
    copies = proxies.unsqueeze(2).expand(-1, -1, patches.shape[2], -1, -1)
    return torch.cat([copies, patches], 3)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value


def eager(
    qkv: Tensor,
    frames: int,
    patches: int,
    proxies: int,
    attend: Callable = softmax_attention,
) -> Tensor:
    """Attention in the authors' form: two attentions, with the proxies' keys and values copied for
    each frame."""
    (proxy_q, proxy_k, proxy_v), (q, k, v) = split(qkv, frames, proxies)
    everything = [torch.cat([p, x.flatten(2, 3)], 2) for p, x in ((proxy_k, k), (proxy_v, v))]
    own = [with_proxies(proxy_k, k), with_proxies(proxy_v, v)]
    return join(attend(proxy_q, *everything), attend(q, *own))


def two_sdpa(qkv: Tensor, frames: int, patches: int, proxies: int) -> Tensor:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = query.shape
        if len(shape) == 5:  # merge frames into the batch
            query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value)
        if len(shape) == 5:
            out = out.unflatten(0, (shape[0], shape[2])).transpose(1, 2)
        return out

    return eager(qkv, frames, patches, proxies, attend)


@functools.cache
def seen(frames: int, patches: int, proxies: int, device: torch.device) -> Tensor:
    frame = torch.arange(frames, device=device).repeat_interleave(patches)
    frame = torch.cat([frame.new_full((proxies,), -1), frame])
    return (frame[:, None] == frame) | (frame == -1) | (frame[:, None] == -1)


def masked_sdpa(qkv: Tensor, frames: int, patches: int, proxies: int) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mask = seen(frames, patches, proxies, qkv.device)
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


@functools.cache
def flex(
    frames: tuple[int, ...], patches: int, proxies: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return FlexAttention for the given lengths: videos of one length form a batch, others one
    sequence."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if len(set(frames)) == 1:
        tokens, visible = proxies + frames[0] * patches, same_frame(patches, proxies)
    else:
        lengths = proxies + torch.tensor(frames, device=device) * patches
        tokens, visible = int(lengths.sum()), same_frame_of_a_video(lengths, patches, proxies)
    mask = create_block_mask(
        visible, None, None, tokens, tokens, device=device, _compile=device.type == "cuda"
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        parts = qkv.unflatten(0, (-1, tokens)).permute(2, 0, 3, 1, 4)
        query, key, value = (x.contiguous() for x in parts)
        return compiled(query, key, value, block_mask=mask).transpose(1, 2).flatten(0, 1)

    return attend


def same_frame(patches: int, proxies: int) -> Callable[..., Tensor]:
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (q - proxies) // patches == (k - proxies) // patches
        return (q < proxies) | (k < proxies) | same

    return visible


def same_frame_of_a_video(lengths: Tensor, patches: int, proxies: int) -> Callable[..., Tensor]:
    """Return the mask of a packed batch; lengths: tokens of each video."""
    tokens = int(lengths.sum())
    video = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    within = torch.arange(tokens, device=lengths.device) - (lengths.cumsum(0) - lengths)[video]
    frame = torch.where(within < proxies, -1, (within - proxies) // patches)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (frame[q] == frame[k]) | (frame[q] < 0) | (frame[k] < 0)
        return (video[q] == video[k]) & same

    return visible


# --- contestants: packed qkv [T, 3, H, D], frames of each video, L, M → [T, H, D] -----------------

Form = Callable[[Tensor, tuple[int, ...], int, int], Tensor]


def per_video(attend: Callable[[Tensor, int, int, int], Tensor]) -> Form:
    """Run `attend` on all videos at once if they have the same length, else one after another."""

    def run(qkv: Tensor, frames: tuple[int, ...], patches: int, proxies: int) -> Tensor:
        if len(set(frames)) == 1:
            return attend(qkv.unflatten(0, (len(frames), -1)), frames[0], patches, proxies).flatten(
                0, 1
            )
        videos = qkv.split([proxies + n * patches for n in frames])
        return torch.cat(
            [attend(v[None], n, patches, proxies)[0] for v, n in zip(videos, frames, strict=True)]
        )

    return run


def flex_attention(qkv: Tensor, frames: tuple[int, ...], patches: int, proxies: int) -> Tensor:
    return flex(frames, patches, proxies, qkv.device)(qkv)


@functools.cache
def offsets(frames: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *frames]).cumsum(0).int().to(device)


def ours(qkv: Tensor, frames: tuple[int, ...], patches: int, proxies: int) -> Tensor:
    return proxy_attention(qkv, offsets(frames, qkv.device), proxies, patches)


FORMS: dict[str, Form] = {
    "eager": per_video(eager),
    "two SDPA": per_video(two_sdpa),
    "masked SDPA": per_video(masked_sdpa),
    "FlexAttention": flex_attention,
    "compiled eager": per_video(torch.compile(eager, dynamic=False)),
}


def forms(device: str) -> dict[str, Form]:
    return FORMS | (peers.ATTENTION if device == "cuda" else {}) | {"ours": ours}


def left_out(
    frames: Sequence[int], patches: int, way: str, device: str, compiled: bool
) -> dict[str, str]:
    """Return the reason per contestant that is not tried on a size."""
    found = {}
    if device == "cpu":
        if max(frames) * patches > MASKED_TOKENS:
            found["masked SDPA"] = (
                f"quadratic in frames: takes minutes at {max(frames) * patches} patches"
            )
        if way != "forward":
            found["FlexAttention"] = "torch has its backward on a GPU only"
    if not compiled:
        found["FlexAttention"] = found["compiled eager"] = "not compiled here, to save time"
    elif len(set(frames)) > 1:
        found["compiled eager"] = "a minute of compiling for every length"
    return found


def work(
    frames: Sequence[int], patches: int, proxies: int, channels: int, dtype: str, way: str
) -> dict[str, float]:
    """Return the operations of the products, and the bytes that must be read and written once.

    channels: of all heads together.
    """
    products, tensors = WAYS[way]
    tokens = [proxies + n * patches for n in frames]
    pairs = sum(
        proxies * t + n * patches * (proxies + patches) for n, t in zip(frames, tokens, strict=True)
    )
    size = getattr(torch, dtype).itemsize
    return {
        "flop": 2.0 * products * channels * pairs,
        "bytes": tensors * sum(tokens) * channels * size,
    }


def lengths(videos: int, frames: int, ragged: bool) -> tuple[int, ...]:
    """Return the frames of each video: all `frames`, or if ragged from a third to five thirds of it
    with the same sum."""
    if not ragged:
        return (frames,) * videos
    spread = torch.linspace(-frames * 2 // 3, frames * 2 // 3, videos).round().int()
    order = torch.randperm(videos, generator=torch.Generator().manual_seed(0))
    return tuple(frames + int(n) for n in spread[order])


def exact(
    qkv: Tensor, grad: Tensor, frames: tuple[int, ...], patches: int, proxies: int
) -> tuple[Tensor, Tensor]:
    """Return the output [T, H, D] and the gradient of qkv in float64, one video at a time."""
    tokens = [proxies + n * patches for n in frames]
    found = []
    for video, of_video, n in zip(qkv.split(tokens), grad.split(tokens), frames, strict=True):
        leaf = video.double()[None].requires_grad_()
        out = eager(leaf, n, patches, proxies)
        (gradient,) = torch.autograd.grad(out, leaf, of_video.double()[None])
        found.append((out.detach()[0], gradient[0]))
    output, gradient = zip(*found, strict=True)
    return torch.cat(output), torch.cat(gradient)


def measure(
    videos: int,
    frames: int,
    patches: int,
    dtype: str,
    way: str,
    proxies: int = PROXIES,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    ragged: bool = False,
    device: str = "cpu",
    compiled: bool = True,
    budget: float = 8.0,
) -> dict[str, Any]:
    """Time every contestant on one size, in this process."""
    torch.manual_seed(0)
    torch.compiler.reset()
    each = lengths(videos, frames, ragged)
    tokens = sum(proxies + n * patches for n in each)
    qkv = torch.randn(tokens, 3, heads, head_dim)
    grad = torch.randn_like(qkv[:, 0])
    qkv, grad = (x.to(device, getattr(torch, dtype)) for x in (qkv, grad))

    def contestant(form: Form) -> Callable[[], tuple[Tensor, ...]]:
        leaf = qkv.detach().requires_grad_()
        held = functools.cache(
            lambda: form(leaf, each, patches, proxies)
        )  # used if only backward is timed

        def run() -> tuple[Tensor, ...]:
            if way == "forward":
                with torch.no_grad():
                    return (form(leaf, each, patches, proxies),)
            if way == "backward":
                return torch.autograd.grad(held(), leaf, grad, retain_graph=True)
            out = form(leaf, each, patches, proxies)
            return out.detach(), *torch.autograd.grad(out, leaf, grad)

        return run

    without = left_out(each, patches, way, device, compiled)
    output, gradient = exact(qkv, grad, each, patches, proxies)
    # Compiled code frees its buffers in backward unless it expects another backward.
    keep = torch._functorch.config.patch(donated_buffer=False)
    with keep if way == "backward" else contextlib.nullcontext():
        return harness.compare(
            {name: contestant(form) for name, form in forms(device).items() if name not in without},
            expected={"forward": [output], "backward": [gradient]}.get(way, [output, gradient]),
            tolerance=1e-5 if dtype == "float32" else 2e-2,
            work=work(each, patches, proxies, heads * head_dim, dtype, way),
            seconds=budget,
            device=device,
            left_out=without,
        )


@pytest.mark.parametrize("case", CASES)
def test_proxy_attention(case: str, run_case) -> None:
    run_case(CASES[case])
