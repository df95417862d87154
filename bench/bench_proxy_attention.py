"""proxy_attention against what PyTorch offers: `pytest bench/bench_proxy_attention.py -s`.

Forward and backward of one layer's attention, 12 heads of 64, as ViT-B/16 and ViT-B/32 have it.
Writes bench/results/ops-proxy_attention-*.json.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.ops.proxy_attention import proxy_attention, proxy_attention_reference

CASES = {
    "b16-fp32": dict(videos=2, frames=12, patches=196, dtype="float32"),
    "b16-bf16": dict(videos=2, frames=12, patches=196, dtype="bfloat16"),
    "b32-fp32": dict(videos=4, frames=12, patches=49, dtype="float32"),
    "b32-bf16": dict(videos=4, frames=12, patches=49, dtype="bfloat16"),
    "b16-fp32-frames1": dict(videos=2, frames=1, patches=196, dtype="float32"),
    "b16-fp32-frames4": dict(videos=2, frames=4, patches=196, dtype="float32"),
    "b16-fp32-frames32": dict(videos=2, frames=32, patches=196, dtype="float32"),
}
QUICK = ("b32-fp32-both-default", "b32-bf16-both-default")
HEADS, HEAD_DIM, PROXIES = 12, 64, 4
MASKED_TOKENS = 12 * 196  # beyond, attention among all patches takes minutes


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
    """Every frame's keys or values with a copy of the proxies' before them: [B, H, N, M+L, D]."""
    copies = proxies.unsqueeze(2).expand(-1, -1, patches.shape[2], -1, -1)
    return torch.cat([copies, patches], 3)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * HEAD_DIM**-0.5 @ key.transpose(-1, -2)).softmax(-1) @ value


def eager(
    qkv: Tensor,
    frames: int,
    patches: int,
    proxies: int = PROXIES,
    attend: Callable = softmax_attention,
) -> Tensor:
    """The authors' form: proxies' keys and values copied for each frame, two attentions."""
    (proxy_q, proxy_k, proxy_v), (q, k, v) = split(qkv, frames, proxies)
    everything = [torch.cat([p, x.flatten(2, 3)], 2) for p, x in ((proxy_k, k), (proxy_v, v))]
    own = [with_proxies(proxy_k, k), with_proxies(proxy_v, v)]
    return join(attend(proxy_q, *everything), attend(q, *own))


def two_sdpa(qkv: Tensor, frames: int, patches: int, proxies: int = PROXIES) -> Tensor:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = query.shape
        if len(shape) == 5:  # frames join the batch
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


def masked_sdpa(qkv: Tensor, frames: int, patches: int, proxies: int = PROXIES) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mask = seen(frames, patches, proxies, qkv.device)
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


@functools.cache
def flex(
    frames: int, patches: int, device: str = "cpu", proxies: int = PROXIES
) -> Callable[[Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (q - proxies) // patches == (k - proxies) // patches
        return (q < proxies) | (k < proxies) | same

    tokens = proxies + frames * patches
    mask = create_block_mask(visible, None, None, tokens, tokens, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = (x.contiguous() for x in qkv.permute(2, 0, 3, 1, 4))
        return compiled(query, key, value, block_mask=mask).transpose(1, 2)

    return attend


def flex_attention(qkv: Tensor, frames: int, patches: int, proxies: int = PROXIES) -> Tensor:
    return flex(frames, patches, str(qkv.device), proxies)(qkv)


def ours(qkv: Tensor, frames: int, patches: int, proxies: int = PROXIES) -> Tensor:
    offsets = torch.arange(qkv.shape[0] + 1, dtype=torch.int32, device=qkv.device) * frames
    return proxy_attention(qkv.flatten(0, 1), offsets, proxies, patches).view_as(qkv[:, :, 0])


FORMS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "two SDPA": two_sdpa,
    "masked SDPA": masked_sdpa,
    "FlexAttention": flex_attention,
    "compiled eager": torch.compile(eager, dynamic=False),
    "ours": ours,
}


def left_out(frames: int, patches: int, cpu_backward: bool, compiled: bool) -> dict[str, str]:
    """Contestants that are not timed on a size, and why."""
    found = {}
    if frames * patches > MASKED_TOKENS:
        found["masked SDPA"] = f"quadratic in frames: minutes at {frames * patches} patches"
    if not compiled:
        found["FlexAttention"] = found["compiled eager"] = "a minute of compiling for every size"
    elif cpu_backward:
        found["FlexAttention"] = "torch has its backward on a GPU only"
    return found


def work(
    videos: int, frames: int, patches: int, proxies: int, dtype: str, backward: bool
) -> dict[str, float]:
    """Operations of the products, and bytes of what must be read and written once."""
    tokens = proxies + frames * patches
    pairs = proxies * tokens + frames * patches * (proxies + patches)
    size = getattr(torch, dtype).itemsize
    return {
        # two products forward, five backward
        "flop": 4 * videos * HEADS * HEAD_DIM * pairs * (3.5 if backward else 1),
        # forward qkv and out; backward qkv, out and both their gradients
        "bytes": videos * tokens * HEADS * HEAD_DIM * size * (12 if backward else 4),
    }


def exact(
    qkv: Tensor, grad: Tensor, frames: int, patches: int, proxies: int
) -> tuple[Tensor, Tensor]:
    """Output and gradient by the reference in float64, a head of a video at a time: it holds the
    scores of all pairs of tokens."""
    offsets = torch.tensor([0, frames], dtype=torch.int32, device=qkv.device)
    output = torch.empty_like(grad, dtype=torch.float64)
    gradient = torch.empty_like(qkv, dtype=torch.float64)
    for video in range(len(qkv)):
        for head in range(HEADS):
            leaf = qkv[video, :, :, head, None].double().requires_grad_()
            out = proxy_attention_reference(leaf, offsets, proxies, patches)
            output[video, :, head] = out.detach()[:, 0]
            (of_leaf,) = torch.autograd.grad(out, leaf, grad[video, :, head, None].double())
            gradient[video, :, :, head] = of_leaf[:, :, 0]
    return output, gradient


def measure(
    videos: int,
    frames: int,
    patches: int,
    dtype: str,
    backward: bool,
    proxies: int = PROXIES,
    device: str = "cpu",
    compiled: bool = True,
    budget: float = 8.0,
) -> dict[str, Any]:
    """Times every contestant on one size, in this process."""
    torch.manual_seed(0)
    torch.compiler.reset()
    qkv = torch.randn(videos, proxies + frames * patches, 3, HEADS, HEAD_DIM)
    grad = torch.randn_like(qkv[:, :, 0])
    qkv, grad = (x.to(device, getattr(torch, dtype)) for x in (qkv, grad))

    def step(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (attend(qkv, frames, patches, proxies),)
        leaf = qkv.detach().requires_grad_()
        out = attend(leaf, frames, patches, proxies)
        return out.detach(), *torch.autograd.grad(out, leaf, grad)

    without = left_out(frames, patches, backward and device == "cpu", compiled)
    compared = harness.compare(
        {name: functools.partial(step, f) for name, f in FORMS.items() if name not in without},
        expected=exact(qkv, grad, frames, patches, proxies)[: 2 if backward else 1],
        tolerance=1e-5 if dtype == "float32" else 2e-2,
        seconds=budget,
        device=device,
        left_out=without,
    )
    return {
        "work": work(videos, frames, patches, proxies, dtype, backward),
        "machine": harness.machine(),
        **compared,
    }


@pytest.mark.parametrize("malloc", ["default", "tuned"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("case", CASES)
def test_proxy_attention(case: str, direction: str, malloc: str, run_case, quick: bool) -> None:
    run_case({**CASES[case], "backward": direction == "both", "compiled": not quick}, malloc)
