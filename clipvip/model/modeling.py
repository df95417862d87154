"""CLIP-ViP: CLIP whose vision tower reads videos through proxy tokens (arXiv 2209.06430).

A batch of videos is one packed sequence of T = B·M + F·L tokens: for each video its M proxies,
then the L patches of its first frame, of its second, and so on. `frame_offsets` int32 [B+1],
the running sum of frames, says where each begins, so videos of different lengths and images
(videos of one frame) share a batch and nothing is ever padded.

Parameters have the names of transformers' CLIPModel, and beside them
`vision_model.embeddings.added_cls` [M-1, C] (absent where M = 1) and
`vision_model.embeddings.temporal_embedding` [1, num_frames, C].
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPVisionEmbeddings,
)
from transformers.utils import ModelOutput, logging

from clipvip.files import shown
from clipvip.losses import contrastive_loss
from clipvip.model.authors import AUTHORS_SUFFIXES, infer_config, read_authors_checkpoint
from clipvip.model.configuration import VIDEO_OPTIONS, CLIPViPConfig, CLIPViPVisionConfig
from clipvip.model.layers import bare, norm_linear, residual_linear, residual_mlp
from clipvip.model.pretrained import (
    check_size,
    found,
    hub_options,
    is_plain_clip,
    read_config,
    refuse_adapter,
)
from clipvip.ops import proxy_attention
from clipvip.ops.proxy_attention import takes_heads_of

logger = logging.get_logger(__name__)

ADDED_TO_CLIP = (
    "vision_model.embeddings.added_cls",
    "vision_model.embeddings.temporal_embedding",
)


@dataclass
class CLIPViPOutput(ModelOutput):
    """
    loss: 0-d, both directions' contrastive loss summed; None unless asked for.
    logits_per_video: [B, n], exp(logit_scale) · cosine.
    logits_per_text: [n, B], its transpose.
    video_embeds: [B, P], unit vectors.
    text_embeds: [n, P], unit vectors.
    """

    loss: Tensor | None = None
    logits_per_video: Tensor | None = None
    logits_per_text: Tensor | None = None
    video_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


def pack_frames(pixel_values: Tensor, frame_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring both accepted forms of a video batch to the packed one.

    pixel_values: floating point, [B, N, 3, H, W], or [F, 3, H, W] with frame_offsets.
    frame_offsets: integers [B+1], 0 first, F last, never decreasing. Its values are checked
        where they can be read without waiting for a GPU.
    Returns pixel_values [F, 3, H, W] and frame_offsets int32 [B+1] on the same device.
    Raises TypeError or ValueError for anything else.
    """
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"pixel_values is {pixel_values.dtype}; expected normalised floating point "
            "(clipvip.model.processing.normalize_frames makes it of uint8 frames)"
        )
    if pixel_values.ndim == 5:
        if frame_offsets is not None:
            raise ValueError(
                f"pixel_values {list(pixel_values.shape)} is [B, N, 3, H, W] and needs no "
                "frame_offsets; leave them out, or pass packed frames [F, 3, H, W]"
            )
        videos, frames = pixel_values.shape[:2]
        steps = torch.arange(videos + 1, dtype=torch.int32, device=pixel_values.device)
        return pixel_values.flatten(0, 1), steps * frames
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}; expected [B, N, 3, H, W], or "
            "[F, 3, H, W] with frame_offsets"
        )
    if frame_offsets is None:
        raise ValueError(
            f"pixel_values {list(pixel_values.shape)} are packed frames and need frame_offsets "
            "[B+1]; for one video of these frames pass pixel_values[None]"
        )
    if frame_offsets.ndim != 1 or len(frame_offsets) < 1 or frame_offsets.is_floating_point():
        raise ValueError(
            f"frame_offsets is {frame_offsets.dtype} {list(frame_offsets.shape)}; expected "
            "int32 [B+1]"
        )
    if frame_offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        values = frame_offsets.tolist()
        if values[0] != 0 or values[-1] != len(pixel_values) or sorted(values) != values:
            raise ValueError(
                f"frame_offsets is {values}; expected to rise from 0 to {len(pixel_values)}, "
                "the number of frames in pixel_values"
            )
    return pixel_values, frame_offsets.to(pixel_values.device, torch.int32)


def video_of_frame(frame_offsets: Tensor, num_frames: int) -> Tensor:
    """frame_offsets [B+1] → int64 [F], the video each packed frame belongs to."""
    frames = torch.arange(num_frames, dtype=frame_offsets.dtype, device=frame_offsets.device)
    return torch.searchsorted(frame_offsets, frames, right=True) - 1


def temporal_positions(embedding: Tensor, frame_offsets: Tensor, num_frames: int) -> Tensor:
    """Each packed frame's temporal embedding, stretched to the length of its own video.

    For a video of N frames this is linear interpolation of the embedding's T rows with
    align_corners=False: frame t reads at (t + ½)·T/N - ½, clamped to [0, T-1]. Exactly row t
    where N = T.

    embedding: [T, C]. Returns [F, C] in its dtype.
    """
    rows = embedding.shape[0]
    video = video_of_frame(frame_offsets, num_frames)
    within = torch.arange(num_frames, device=video.device) - frame_offsets[video]
    length = frame_offsets.diff()[video]
    at = ((within + 0.5) * (rows / length) - 0.5).clamp(0, rows - 1)
    before = at.long()
    after = (before + 1).clamp(max=rows - 1)
    share = (at - before).to(embedding.dtype)[:, None]
    return torch.lerp(embedding[before], embedding[after], share)


class CLIPViPVisionEmbeddings(CLIPVisionEmbeddings):
    """Frames to packed tokens: patches, proxies, positions in the frame and in time."""

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
        """[F, 3, H, W] → [F, L, C]: the convolution, as the one matrix product it is."""
        side, size = self.image_size // self.patch_size, self.patch_size
        weight = self.patch_embedding.weight
        pixel_values = pixel_values[..., : side * size, : side * size].to(weight.dtype)
        columns = pixel_values.unflatten(3, (side, size)).unflatten(2, (side, size))
        columns = columns.permute(0, 2, 4, 1, 3, 5).reshape(-1, weight[0].numel())
        return F.linear(columns, weight.flatten(1)).view(-1, side * side, self.embed_dim)

    def forward(self, pixel_values: Tensor, frame_offsets: Tensor) -> Tensor:  # type: ignore[override]
        """pixel_values [F, 3, H, W], frame_offsets int32 [B+1] → tokens [B·M + F·L, C]."""
        if pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"frames are {list(pixel_values.shape[1:])}; this model reads "
                f"{[3, self.image_size, self.image_size]} (channels, height, width)"
            )
        frames, videos = len(pixel_values), len(frame_offsets) - 1
        position = self.position_embedding.weight
        time = temporal_positions(self.temporal_embedding[0], frame_offsets, frames)
        patches = (self.patches(pixel_values) + position[1:]).add_(time[:, None])
        proxies = self.class_embedding[None]
        if self.added_cls is not None:
            proxies = torch.cat([proxies, self.added_cls])
        proxies = (proxies + position[0]).to(patches.dtype).expand(videos, -1, -1)

        # Frame f of video v follows v + 1 groups of proxies and f frames.
        length = patches.shape[1]
        video = video_of_frame(frame_offsets, frames)
        first = (video + 1) * self.num_proxies + torch.arange(
            0, frames * length, length, device=video.device
        )
        rows = first[:, None] + torch.arange(length, device=video.device)
        proxy_rows = proxy_starts(frame_offsets, self.num_proxies, length)[:, None] + torch.arange(
            self.num_proxies, device=video.device
        )
        tokens = patches.new_empty(videos * self.num_proxies + frames * length, self.embed_dim)
        tokens = tokens.index_copy_(0, rows.flatten(), patches.flatten(0, 1))
        return tokens.index_copy_(0, proxy_rows.flatten(), proxies.flatten(0, 1))


def proxy_starts(frame_offsets: Tensor, num_proxies: int, patches_per_frame: int) -> Tensor:
    """int64 [B], the packed row of each video's token 0."""
    offsets = frame_offsets[:-1].long()
    videos = torch.arange(len(offsets), device=offsets.device)
    return videos * num_proxies + offsets * patches_per_frame


class CLIPViPAttention(CLIPAttention):
    """Proxy-guided attention with CLIP's weights.

    The three projections keep their own parameters, and so CLIP's checkpoint names; they are
    joined for one matrix product whose output is handed to the op as it lies. Joining copies
    3·C² weights, the product multiplies each of them with every token.
    """

    def __init__(self, config: CLIPViPVisionConfig, patches_per_frame: int) -> None:
        super().__init__(config)
        self.patches_per_frame = patches_per_frame
        if config.attention_backend == "native" and not takes_heads_of(self.head_dim):
            raise ValueError(
                f"vision_config has heads of {self.head_dim} (hidden_size {config.hidden_size} / "
                f"num_attention_heads {config.num_attention_heads}); the compiled attention takes "
                'multiples of 16 up to 128: set attention_backend="reference", plain PyTorch that '
                "takes any, in from_pretrained or in the vision_config of its config.json"
            )

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, norm: nn.LayerNorm, frame_offsets: Tensor
    ) -> Tensor:
        """tokens [T, C], LayerNorm before the projections, frame_offsets int32 [B+1] → [T, C],
        the tokens and what attention adds to them."""
        qkv = norm_linear(hidden_states, norm, self.q_proj, self.k_proj, self.v_proj)
        attended = proxy_attention(
            qkv.unflatten(1, (3, self.num_heads, self.head_dim)),
            frame_offsets,
            self.config.num_proxies,
            self.patches_per_frame,
            self.scale,
            backend=self.config.attention_backend,
        )
        return residual_linear(hidden_states, attended.flatten(1), self.out_proj)


class CLIPViPEncoderLayer(CLIPEncoderLayer):
    """CLIP's pre-LayerNorm block over packed tokens."""

    def __init__(self, config: CLIPViPVisionConfig, patches_per_frame: int) -> None:
        super().__init__(config)
        self.self_attn = CLIPViPAttention(config, patches_per_frame)

    def forward(self, hidden_states: Tensor, frame_offsets: Tensor) -> Tensor:  # type: ignore[override]
        """tokens [T, C], frame_offsets int32 [B+1] → [T, C]."""
        hidden_states = self.self_attn(hidden_states, self.layer_norm1, frame_offsets)
        mlp = self.mlp
        if type(mlp) is CLIPMLP and mlp.config.hidden_act == "quick_gelu" and bare(mlp):
            return residual_mlp(hidden_states, self.layer_norm2, mlp.fc1, mlp.fc2)
        return hidden_states + mlp(self.layer_norm2(hidden_states))


class CLIPViPEncoder(nn.Module):
    """The layers, under the names that CLIP's checkpoints use."""

    def __init__(self, config: CLIPViPVisionConfig, patches_per_frame: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPViPEncoderLayer(config, patches_per_frame) for _ in range(config.num_hidden_layers)
        )

    def forward(self, hidden_states: Tensor, frame_offsets: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, frame_offsets)
        return hidden_states


class _DrawnAlike(TorchDispatchMode):
    """Within it normal_ gives the same numbers at each entry, and leaves the global generators
    alone. They are drawn in double precision on the CPU, so that rounding hides what differs
    between processors; a tensor's dtype and device do not matter either."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.normal_.default:
            return func(*args, **(kwargs or {}))

        def draw(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
            shape, generator = tensor.shape, self.generator
            numbers = torch.randn(shape, generator=generator, dtype=torch.double, device="cpu")
            return tensor.copy_((numbers * std + mean).float())

        return draw(*args, **(kwargs or {}))


class CLIPViPPreTrainedModel(CLIPPreTrainedModel):
    """What the vision tower and the whole model share: initialisation and transformers' flags."""

    config: CLIPViPConfig
    base_model_prefix = "clipvip"
    main_input_name = "pixel_values"
    input_modalities = ("video", "text")
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPViPEncoderLayer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)position_ids$"]  # noqa: RUF012
    _can_record_outputs = {}  # noqa: RUF012

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers leaves out modules of custom code whose own parameters are all set, and
        # so those that have none, such as attention, where CLIP sets its children's weights.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CLIPViPVisionEmbeddings):
            init.zeros_(module.temporal_embedding)
            added = module.added_cls
            if added is not None and not getattr(added, "_is_hf_initialized", False):
                if module.config.proxy_init == "normal":
                    init.normal_(added)
                else:
                    init.normal_(added, std=module.config.initializer_range)
                    added.add_(module.class_embedding)
        elif isinstance(module, CLIPViPModel):
            factor = module.config.initializer_factor
            for projection in (module.visual_projection, module.text_projection):
                init.normal_(projection.weight, std=projection.in_features**-0.5 * factor)


class CLIPViPVisionModel(CLIPViPPreTrainedModel):
    """The vision tower over packed frames."""

    config: CLIPViPVisionConfig  # type: ignore[assignment]
    input_modalities = ("video",)  # type: ignore[assignment]

    def __init__(self, config: CLIPViPVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = CLIPViPVisionEmbeddings(config)
        self.patches_per_frame = self.embeddings.num_patches
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPViPEncoder(config, self.patches_per_frame)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: Tensor, frame_offsets: Tensor) -> BaseModelOutputWithPooling:
        """Read packed frames.

        pixel_values [F, 3, H, W] floating point, frame_offsets int32 [B+1] on its device.
        Returns last_hidden_state [B·M + F·L, C] and pooler_output [B, C], the layer-normed
        first proxy of each video.
        """
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values, frame_offsets))
        hidden_states = self.encoder(hidden_states, frame_offsets)
        first = proxy_starts(frame_offsets, self.config.num_proxies, self.patches_per_frame)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=self.post_layernorm(hidden_states[first]),
        )


class CLIPViPModel(CLIPViPPreTrainedModel):
    """Video and text towers with a common space and a learned scale of their cosine."""

    def __init__(self, config: CLIPViPConfig) -> None:
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        tower = CLIPTextModel._from_config(text)
        self.text_model = getattr(tower, "text_model", tower)  # wrapped once more before 5.6
        self.vision_model = CLIPViPVisionModel._from_config(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load weights and say what did not fit.

        pretrained_model_name_or_path: a folder that `save_pretrained` wrote; a CLIP checkpoint's
            folder or hub name, which gets proxies and a temporal embedding added, and that is
            logged; or one of the authors' files (.pt), whose shapes give the configuration.
        strict: False lets weights be missing (they stay at their initialisation) or unexpected
            (they are left out); otherwise both are a ValueError that lists them.
        ignore_mismatched_sizes: True lets weights of another shape stay at their
            initialisation; otherwise they are a ValueError that lists them.
        Any of VIDEO_OPTIONS (num_proxies=…, attention_backend=…) overrides the configuration;
        the rest is transformers' `from_pretrained`.

        What a checkpoint lacks is drawn from a fixed seed: the same files give the same model.
        Raises FileNotFoundError where there is no such folder, file or name on the hub.
        """
        source = pretrained_model_name_or_path
        subfolder = kwargs.get("subfolder") or ""
        with contextlib.nullcontext() if source is None else found("the model", source, subfolder):
            location, kwargs, added = _resolved(source, kwargs)
            with _DrawnAlike(), _table_of_keys(logged=not strict or ignore_mismatched_sizes):
                loaded: Any = super().from_pretrained(
                    location,
                    *model_args,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **kwargs,
                )
        model, info = loaded
        model.config.name_or_path = model.name_or_path = "" if source is None else str(source)
        _check_fit(source, info, added, strict, ignore_mismatched_sizes)
        if source is not None:
            _check_finite(source, model)
        if added:
            logger.warning(f"{shown(source)} is a CLIP checkpoint: {_addition(model.config)}")
        return (model, info) if output_loading_info else model

    def get_video_features(
        self, pixel_values: Tensor, frame_offsets: Tensor | None = None
    ) -> Tensor:
        """Project videos into the common space (not normalised).

        pixel_values: floating point, normalised: [B, N, 3, H, W], or packed [F, 3, H, W] with
            frame_offsets.
        frame_offsets: int32 [B+1], the running sum of frames.
        Returns [B, P].
        """
        pixel_values, frame_offsets = pack_frames(pixel_values, frame_offsets)
        if self.config.vision_config.frame_pooling == "proxy":
            return self.visual_projection(
                self.vision_model(pixel_values, frame_offsets).pooler_output
            )
        frames = len(pixel_values)
        one_each = torch.arange(frames + 1, dtype=torch.int32, device=pixel_values.device)
        features = self.visual_projection(self.vision_model(pixel_values, one_each).pooler_output)
        features = F.normalize(features, dim=-1)
        total = features.new_zeros(len(frame_offsets) - 1, features.shape[1])
        total = total.index_add(0, video_of_frame(frame_offsets, frames), features)
        return total / frame_offsets.diff().clamp(min=1)[:, None]

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Project texts into the common space (not normalised).

        input_ids, attention_mask: int64 [n, length], as CLIPTokenizer gives them.
        Returns [n, P].
        """
        pooled = self.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return self.text_projection(pooled)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        frame_offsets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
    ) -> CLIPViPOutput:
        """Compare every video with every text.

        input_ids, attention_mask: int64 [n, length]; pixel_values, frame_offsets: as in
        `get_video_features`. return_loss: video i belongs to text i (so B = n), and their
        contrastive loss is wanted.
        """
        video = F.normalize(self.get_video_features(pixel_values, frame_offsets), dim=-1)
        text = F.normalize(self.get_text_features(input_ids, attention_mask), dim=-1)
        scale = self.logit_scale.exp()
        loss = None
        if return_loss:
            if len(video) != len(text):
                raise ValueError(
                    f"return_loss=True with {len(video)} videos and {len(text)} texts; expected "
                    "one text for each video"
                )
            backend = self.config.vision_config.attention_backend
            loss = contrastive_loss(video, text, scale, backend=backend)
        logits = scale * video @ text.T
        return CLIPViPOutput(
            loss=loss,
            logits_per_video=logits,
            logits_per_text=logits.T,
            video_embeds=video,
            text_embeds=text,
        )


def _resolved(
    source: str | os.PathLike | None, options: dict[str, Any]
) -> tuple[str | os.PathLike | None, dict[str, Any], frozenset[str]]:
    """How transformers' `from_pretrained` is to be called for a source: its location and options,
    and the names of the weights that the source lacks and may lack."""
    if source is None:
        return None, options, frozenset()
    if os.path.isfile(source) or Path(source).suffix in AUTHORS_SUFFIXES:
        options = {**options, "state_dict": read_authors_checkpoint(source)}
        if options.get("config") is None:
            video = {name: options.pop(name) for name in VIDEO_OPTIONS if name in options}
            options["config"] = infer_config(options["state_dict"], source, **video)
            check_size(options["config"], source, options)
        return None, options, frozenset()
    plain = is_plain_clip(read_config(source, options))
    refuse_adapter(source, options)
    if options.get("config") is None:
        video = {name: options[name] for name in VIDEO_OPTIONS if name in options}
        shapes = CLIPViPConfig.from_pretrained(source, **hub_options(options), **video)
        check_size(shapes, source, options)
    return source, options, frozenset(ADDED_TO_CLIP if plain else ())


@contextlib.contextmanager
def _table_of_keys(*, logged: bool) -> Iterator[None]:
    """Around a load: whether transformers logs its table of keys that do not fit. It would repeat
    what an error lists, and name the weights that plain CLIP lacks as if they were a fault."""

    def wanted(record: LogRecord) -> bool:
        return logged or "LOAD REPORT" not in record.getMessage()

    source = getLogger("transformers.modeling_utils")
    source.addFilter(wanted)
    try:
        yield
    finally:
        source.removeFilter(wanted)


def _addition(config: CLIPViPConfig) -> str:
    """What makes a video model of plain CLIP, for the log."""
    video = config.vision_config
    if video.frame_pooling == "mean" and video.num_proxies == 1:
        return "a video's feature is the mean of its frames' (frame_pooling='mean')"
    return (
        f"added {video.num_proxies - 1} video proxies (proxy_init={video.proxy_init!r}) and a "
        f"temporal embedding of {video.num_frames} frames, zero at the start"
    )


def _check_finite(source: Any, model: nn.Module) -> None:
    """Raise a ValueError where weights are NaN or infinite, as those of damaged files are."""
    wrong = [
        name
        for name, weight in model.named_parameters()
        if not weight.is_meta and not weight.isfinite().all()
    ]
    if wrong:
        raise ValueError(
            f"the model is {str(source)!r}, of which a file is damaged (weights are not finite: "
            f"{len(wrong)}, first {wrong[0]}); save or fetch it again"
        )


def _check_fit(
    source: Any, info: dict, added: frozenset[str], strict: bool, ignore_mismatched_sizes: bool
) -> None:
    """Raise a ValueError that lists the keys of a checkpoint which do not fit the model."""
    problems = []
    if strict:
        for word in ("missing", "unexpected"):
            keys = sorted(set(info[f"{word}_keys"]) - added)
            problems += [f"{word}: {key}" for key in keys]
    if not ignore_mismatched_sizes:
        problems += [
            f"shape: {key} is {list(given)} in the checkpoint, {list(expected)} in the model"
            for key, given, expected in sorted(info["mismatched_keys"])
        ]
    if problems:
        raise ValueError(
            f"{source} does not fit this model (strict=False allows missing and unexpected keys, "
            "ignore_mismatched_sizes=True other shapes):\n  " + "\n  ".join(problems)
        )
