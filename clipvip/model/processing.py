"""From video frames and texts to what CLIPViPModel takes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def normalize_frames(
    frames: Tensor,
    mean: Sequence[float] = OPENAI_CLIP_MEAN,
    std: Sequence[float] = OPENAI_CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 [..., 3, H, W] → (frames/255 - mean)/std in `dtype`, on the frames' own device."""
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames are {frames.dtype}; expected uint8")
    scale = frames.new_tensor(std, dtype=torch.float32).mul(255).reciprocal()[:, None, None]
    shift = frames.new_tensor(mean, dtype=torch.float32)[:, None, None] * 255 * scale
    return (frames * scale - shift).to(dtype)
