"""The video tower's parts: from packed frames to tokens, and the encoder.

`clipvip.model.modeling` builds CLIPViPVisionModel from these and describes the packed format.
"""

from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPVisionEmbeddings,
)

from clipvip.model.configuration import CLIPViPVisionConfig
from clipvip.model.layers import after_attention, bare, norm_linear, residual_linear
from clipvip.ops import proxy_attention
from clipvip.ops.proxy_attention import (
    equal_lengths_reference,
    proxy_attention_weights,
    takes_heads_of,
)


class EqualLengths(NamedTuple):
    """Takes the place of frame_offsets where a model with attention_backend="reference" is
    exported: all videos have the same number of frames, so shapes depend on no values."""

    videos: int
    frames: int


Offsets = Tensor | EqualLengths


class CLIPViPVisionEmbeddings(CLIPVisionEmbeddings):
    """Turn frames into packed tokens: patches and proxies, with positions in space and time."""

    image_size: int
    patch_size: int

    def __init__(self, config: CLIPViPVisionConfig) -> None:
        super().__init__(config)
        self.num_proxies = config.num_proxies
        if config.num_proxies > 1:
            self.added_cls = nn.Parameter(torch.empty(config.num_proxies - 1, self.embed_dim))
        else:
            self.register_parameter("added_cls", None)
        self.temporal_embedding = nn.Parameter(torch.empty(1, config.num_frames, self.embed_dim))

    def patches(self, pixel_values: Tensor) -> Tensor:
        """[F, 3, H, W] → [F, L, C]: the patch convolution as one matrix product."""
        side, size = self.image_size // self.patch_size, self.patch_size
        weight = self.patch_embedding.weight
        pixel_values = pixel_values[..., : side * size, : side * size].to(weight.dtype)
        columns = pixel_values.unflatten(3, (side, size)).unflatten(2, (side, size))
        columns = columns.permute(0, 2, 4, 1, 3, 5).reshape(-1, weight[0].numel())
        return F.linear(columns, weight.flatten(1)).view(-1, side * side, self.embed_dim)

    def forward(self, pixel_values: Tensor, frame_offsets: Offsets) -> Tensor:  # type: ignore[override]
        """pixel_values [F, 3, H, W], frame_offsets int32 [B+1] → tokens [B·M + F·L, C]."""
        if pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"frames are {list(pixel_values.shape[1:])}; this model reads "
                f"{[3, self.image_size, self.image_size]} (channels, height, width)"
            )
        frames = pixel_values.shape[0]
        position = self.position_embedding.weight
        time = temporal_positions(self.temporal_embedding[0], frame_offsets, frames)
        patches = (self.patches(pixel_values) + position[1:]).add_(time[:, None])
        proxies = self.class_embedding[None]
        if self.added_cls is not None:
            proxies = torch.cat([proxies, self.added_cls])
        proxies = (proxies + position[0]).to(patches.dtype)
        if isinstance(frame_offsets, EqualLengths):
            per_video = frame_offsets.videos, -1, self.embed_dim
            tokens = torch.cat([proxies.expand(per_video), patches.view(per_video)], 1)
            return tokens.flatten(0, 1)
        videos, length = frame_offsets.shape[0] - 1, patches.shape[1]
        proxies = proxies.expand(videos, -1, -1)
        proxy_rows, rows = token_rows(frame_offsets, frames, self.num_proxies, length)
        tokens = patches.new_empty(videos * self.num_proxies + frames * length, self.embed_dim)
        tokens = tokens.index_copy_(0, rows.flatten(), patches.flatten(0, 1))
        return tokens.index_copy_(0, proxy_rows.flatten(), proxies.flatten(0, 1))


class CLIPViPAttention(CLIPAttention):
    """Proxy-guided attention with CLIP's weights.

    The three projections keep separate parameters, and with them CLIP's checkpoint names. They are
    concatenated for one matrix product, whose output goes to the op without a copy. Concatenating
    copies 3·C² weights, which is little beside the product with every token.
    """

    def __init__(self, config: CLIPViPVisionConfig, patches_per_frame: int) -> None:
        super().__init__(config)
        self.patches_per_frame = patches_per_frame
        if config.attention_backend == "native" and not takes_heads_of(self.head_dim):
            raise ValueError(
                f"vision_config has heads of {self.head_dim} (hidden_size {config.hidden_size} / "
                f"num_attention_heads {config.num_attention_heads}); the compiled attention takes "
                'multiples of 8 up to 128: set attention_backend="reference" (plain PyTorch, any '
                "size) in from_pretrained or in the vision_config of config.json"
            )

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        norm: nn.LayerNorm,
        frame_offsets: Offsets,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention over normalised tokens, without out_proj, which `after_attention` applies.

        hidden_states: [T, C]. norm: the LayerNorm before the projections. frame_offsets: int32
        [B+1]. Returns hidden_states as `norm_linear` does, [T, C], and with output_attentions the
        weights that `proxy_attention_weights` computes, else None.
        """
        hidden_states, qkv = norm_linear(hidden_states, norm, self.q_proj, self.k_proj, self.v_proj)
        qkv = qkv.unflatten(1, (3, self.num_heads, self.head_dim))
        sizes = self.config.num_proxies, self.patches_per_frame, self.scale
        weights = None
        if isinstance(frame_offsets, EqualLengths):
            if output_attentions:
                raise ValueError("output_attentions=True cannot be exported; leave it out")
            attended = equal_lengths_reference(qkv, frame_offsets.frames, *sizes)
        else:
            backend = self.config.attention_backend
            attended = proxy_attention(qkv, frame_offsets, *sizes, backend=backend)
            if output_attentions:
                weights = proxy_attention_weights(qkv, frame_offsets, *sizes)
        return hidden_states, attended.flatten(1), weights


class CLIPViPEncoderLayer(CLIPEncoderLayer):
    """CLIP's pre-LayerNorm block over packed tokens."""

    def __init__(self, config: CLIPViPVisionConfig, patches_per_frame: int) -> None:
        super().__init__(config)
        self.self_attn = CLIPViPAttention(config, patches_per_frame)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, frame_offsets: Offsets, output_attentions: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens [T, C], frame_offsets int32 [B+1] → [T, C]; with output_attentions also the
        attention's weights, see `proxy_attention_weights`."""
        attention, mlp = self.self_attn, self.mlp
        hidden_states, attended, weights = attention(
            hidden_states, self.layer_norm1, frame_offsets, output_attentions
        )
        if type(mlp) is CLIPMLP and mlp.config.hidden_act == "quick_gelu" and bare(mlp):
            rest = attention.out_proj, self.layer_norm2, mlp.fc1, mlp.fc2
            hidden_states = after_attention(hidden_states, attended, *rest)
        else:
            hidden_states = residual_linear(hidden_states, attended, attention.out_proj)
            hidden_states = hidden_states + mlp(self.layer_norm2(hidden_states))
        return hidden_states if weights is None else (hidden_states, weights)


def video_of_frame(frame_offsets: Tensor, num_frames: int) -> Tensor:
    """Index of the video of each packed frame: frame_offsets [B+1] → int64 [F]."""
    frames = torch.arange(num_frames, dtype=frame_offsets.dtype, device=frame_offsets.device)
    return torch.searchsorted(frame_offsets, frames, right=True) - 1


def temporal_positions(embedding: Tensor, frame_offsets: Offsets, num_frames: int) -> Tensor:
    """Temporal embedding of each packed frame, stretched to the length of its video.

    For a video of N frames this is linear interpolation of the embedding's T rows with
    align_corners=False: frame t reads at (t + ½)·T/N - ½, clamped to [0, T-1]. For N = T, that is
    exactly row t.

    embedding: [T, C]. Returns [F, C] in its dtype.
    """
    rows = embedding.shape[0]
    if isinstance(frame_offsets, EqualLengths):
        length = torch.full((), frame_offsets.frames, device=embedding.device)
        within = torch.arange(num_frames, device=embedding.device) % length
    else:
        video = video_of_frame(frame_offsets, num_frames)
        within = torch.arange(num_frames, device=video.device) - frame_offsets[video]
        length = frame_offsets.diff()[video]
    at = ((within + 0.5) * (rows / length) - 0.5).clamp(0, rows - 1)
    before = at.long()
    after = (before + 1).clamp(max=rows - 1)
    share = (at - before).to(embedding.dtype)[:, None]
    return torch.lerp(embedding[before], embedding[after], share)


def proxy_starts(frame_offsets: Offsets, num_proxies: int, patches_per_frame: int) -> Tensor:
    """Packed row of the first proxy of each video: frame_offsets [B+1] → int64 [B]."""
    if isinstance(frame_offsets, EqualLengths):
        tokens = num_proxies + frame_offsets.frames * patches_per_frame
        return torch.arange(frame_offsets.videos) * tokens
    offsets = frame_offsets[:-1].long()
    videos = torch.arange(offsets.shape[0], device=offsets.device)
    return videos * num_proxies + offsets * patches_per_frame


def token_rows(
    frame_offsets: Tensor, num_frames: int, num_proxies: int, patches_per_frame: int
) -> tuple[Tensor, Tensor]:
    """Packed rows of each video's proxies, int64 [B, M], and of each frame's patches, [F, L]."""
    device = frame_offsets.device
    starts = proxy_starts(frame_offsets, num_proxies, patches_per_frame)
    # Before frame f of video v stand v + 1 groups of proxies and f frames.
    groups = video_of_frame(frame_offsets, num_frames) + 1
    before = torch.arange(num_frames, device=device) * patches_per_frame
    first = groups * num_proxies + before
    proxies = starts[:, None] + torch.arange(num_proxies, device=device)
    return proxies, first[:, None] + torch.arange(patches_per_frame, device=device)


def split_tokens(
    hidden_states: Tensor, frame_offsets: Tensor, num_proxies: int, patches_per_frame: int
) -> tuple[Tensor, Tensor]:
    """Split packed tokens [T, C] into proxies [B, M, C] and patches [F, L, C]."""
    proxies = (frame_offsets.shape[0] - 1) * num_proxies
    frames = (hidden_states.shape[0] - proxies) // patches_per_frame
    rows = token_rows(frame_offsets, frames, num_proxies, patches_per_frame)
    return hidden_states[rows[0]], hidden_states[rows[1]]


class CLIPViPEncoder(nn.Module):
    """The encoder layers, under the names that CLIP's checkpoints use."""

    def __init__(self, config: CLIPViPVisionConfig, patches_per_frame: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPViPEncoderLayer(config, patches_per_frame) for _ in range(config.num_hidden_layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        frame_offsets: Offsets,
        num_layers: int | None = None,
        all_hidden_states: list[Tensor] | None = None,
        all_attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """tokens [T, C], frame_offsets int32 [B+1] → tokens [T, C] after num_layers layers, by
        default all. Appends the tokens before each layer to all_hidden_states, if given, and the
        attention's weights of each layer to all_attentions."""
        for layer in islice(self.layers, num_layers):
            if all_hidden_states is not None:
                all_hidden_states.append(hidden_states)
            if all_attentions is None:
                hidden_states = layer(hidden_states, frame_offsets)
            else:
                hidden_states, weights = layer(hidden_states, frame_offsets, output_attentions=True)
                all_attentions.append(weights)
        return hidden_states
