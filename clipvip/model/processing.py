"""From videos and texts to what CLIPViPModel takes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, CLIPTokenizer, ProcessorMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import cached_file

from clipvip.transfer import send

# A video: a path, frames as one uint8 array [N, H, W, 3] or [N, 3, H, W], or a list of frames,
# each a PIL image or an array [H, W, 3] or [3, H, W]. A lone frame is a video of one.
Video = Any


def normalize_frames(
    frames: Tensor,
    mean: Sequence[float] = OPENAI_CLIP_MEAN,
    std: Sequence[float] = OPENAI_CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 [..., 3, H, W] → (frames/255 - mean)/std in `dtype`, on the frames' own device."""
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames are {frames.dtype}; expected uint8")
    scale = 1 / (255 * torch.tensor(std))
    shift = 255 * torch.tensor(mean) * scale
    scale, shift = (send(x[:, None, None], frames.device) for x in (scale, shift))
    return (frames * scale - shift).to(dtype)


def resize_and_crop(frames: Tensor, size: int) -> Tensor:
    """uint8 [N, 3, H, W] → uint8 [N, 3, size, size] as CLIP does it.

    The shorter side becomes `size` (bicubic, antialiased), then the centre is cut out.
    """
    height, width = frames.shape[-2:]
    if len(frames) == 0:
        return frames.new_empty(0, 3, size, size)
    short = min(height, width)
    shape = [height * size // short, width * size // short]
    if shape != [height, width]:
        frames = F.interpolate(frames.float(), shape, mode="bicubic", antialias=True)
        frames = frames.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return frames[..., top : top + size, left : left + size]


class CLIPViPProcessor(ProcessorMixin):
    """CLIP's tokenizer, and frames resized, cropped and normalised as CLIP wants them.

    tokenizer: a CLIPTokenizer.
    image_size: pixels, the side of a frame. image_mean, image_std: per channel, of [0, 1].
    num_frames: frames read of a video given as a path.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 224,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        num_frames: int = 12,
    ) -> None:
        super().__init__(tokenizer)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_frames = num_frames

    def __call__(  # type: ignore[override]
        self,
        text: str | Sequence[str] | None = None,
        videos: Video | Sequence[Video] | None = None,
        *,
        text_length: int | None = None,
    ) -> BatchFeature:
        """Make a batch of texts, of videos, or of both.

        text: one or more; HTML entities are resolved. text_length: tokens to truncate at, the
        end-of-text token kept; by default what the tokenizer allows.
        videos: one or more, of any lengths; see `Video`.
        Returns input_ids and attention_mask int64 [n, longest], and pixel_values fp32
        [F, 3, image_size, image_size] with frame_offsets int32 [B+1].
        """
        if text is None and videos is None:
            raise ValueError("neither text nor videos was given; pass at least one of them")
        batch: dict[str, Tensor] = {}
        if text is not None:
            from clipvip.data.loader import tokenize

            texts = [text] if isinstance(text, str) else text
            length = text_length or min(self.tokenizer.model_max_length, 77)
            batch["input_ids"], batch["attention_mask"] = tokenize(self.tokenizer, texts, length)
        if videos is not None:
            clips = [self._frames(video) for video in _as_list_of_videos(videos)]
            lengths = torch.tensor([0, *(len(frames) for frames in clips)])
            packed = torch.cat(clips) if clips else self._frames([])
            batch["pixel_values"] = normalize_frames(packed, self.image_mean, self.image_std)
            batch["frame_offsets"] = lengths.cumsum(0).to(torch.int32)
        return BatchFeature(batch)

    def _frames(self, video: Video) -> Tensor:
        """One video in any of its forms → uint8 [N, 3, image_size, image_size]."""
        if isinstance(video, str | os.PathLike):
            from clipvip.data.decode import read_frames

            return read_frames(Path(video), self.num_frames, size=self.image_size)
        if isinstance(video, list | tuple):
            if not video:
                return torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
            return torch.cat([self._frames(frame) for frame in video])
        if isinstance(video, Image.Image):
            video = np.array(video.convert("RGB"))
        frames = torch.as_tensor(video)
        if frames.dtype != torch.uint8:
            raise TypeError(f"frames are {frames.dtype}; expected uint8 of 0 to 255")
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.ndim == 4 and frames.shape[1] != 3 and frames.shape[3] == 3:
            frames = frames.permute(0, 3, 1, 2)
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(
                f"frames have shape {list(frames.shape)}; expected [N, H, W, 3] or [N, 3, H, W]"
            )
        return resize_and_crop(frames, self.image_size)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "CLIPViPProcessor":
        """Load from a folder or hub name, our own or a plain CLIP checkpoint's.

        kwargs: transformers' hub options (revision, cache_dir, local_files_only, …).
        """
        if os.path.isfile(pretrained_model_name_or_path):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a file of weights and holds no tokenizer; "
                "load the processor of the CLIP it was made of"
            )
        for name in ("trust_remote_code", "_from_auto"):
            kwargs.pop(name, None)
        tokenizer = CLIPTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        settings: dict[str, Any] = {}
        for name in ("processor_config.json", "preprocessor_config.json"):
            file = cached_file(
                pretrained_model_name_or_path,
                name,
                _raise_exceptions_for_missing_entries=False,
                **kwargs,
            )
            if file is not None:
                settings = json.loads(Path(file).read_text())
                break
        if "crop_size" in (clip := settings.get("image_processor", settings)):
            crop = clip["crop_size"]
            settings = {
                "image_size": crop if isinstance(crop, int) else crop["height"],
                "image_mean": clip.get("image_mean", OPENAI_CLIP_MEAN),
                "image_std": clip.get("image_std", OPENAI_CLIP_STD),
            }
        known = ("image_size", "image_mean", "image_std", "num_frames")
        return cls(tokenizer, **{name: settings[name] for name in known if name in settings})


def _as_list_of_videos(videos: Any) -> Sequence[Video]:
    lone = isinstance(videos, str | os.PathLike | Image.Image)
    if lone or (isinstance(videos, np.ndarray | Tensor) and videos.ndim < 5):
        return [videos]
    return videos
