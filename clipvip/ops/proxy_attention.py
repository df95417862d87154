"""Proxy-guided masked attention (CLIP-ViP, section 3.2)."""

import torch
from torch import Tensor


def proxy_attention_reference(
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches_per_frame: int,
    scale: float | None = None,
) -> Tensor:
    """What the op means, in plain PyTorch; differentiable, any dtype and device."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    offsets = frame_offsets.tolist()
    for video, (first, last) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        start = video * num_proxies + first * patches_per_frame
        tokens = num_proxies + (last - first) * patches_per_frame
        query, key, value = qkv[start : start + tokens].permute(1, 2, 0, 3)  # [H, tokens, D]
        # A proxy belongs to frame -1, which everyone sees and which sees everyone.
        frame = torch.arange(last - first, device=qkv.device).repeat_interleave(patches_per_frame)
        frame = torch.cat([frame.new_full((num_proxies,), -1), frame])
        seen = (frame[:, None] == frame) | (frame == -1) | (frame[:, None] == -1)
        logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
        outputs.append((logits.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs) if outputs else qkv[:, 0]


def proxy_attention(
    qkv: Tensor,
    frame_offsets: Tensor,
    num_proxies: int,
    patches_per_frame: int,
    scale: float | None = None,
    *,
    backend: str = "native",
) -> Tensor:
    """[T, 3, H, D] → [T, H, D]."""
    return proxy_attention_reference(qkv, frame_offsets, num_proxies, patches_per_frame, scale)
