"""CLIP-ViP: CLIP whose vision tower reads videos through proxy tokens (arXiv 2209.06430).

A batch of videos is one packed sequence of T = B·M + F·L tokens: for each video its M proxies,
then the L patches of its first frame, of its second frame, and so on. `frame_offsets` int32 [B+1],
the cumulative number of frames, says where each video begins. So videos of different lengths and
images (videos of one frame) share a batch without padding.

Parameters have the names of transformers' CLIPModel. Two are added:
`vision_model.embeddings.added_cls` [M-1, C] (absent for M = 1) and
`vision_model.embeddings.temporal_embedding` [1, num_frames, C].
"""

import copy
import operator
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from clipvip.files import shown
from clipvip.losses import contrastive_loss
from clipvip.model.card import WithCard
from clipvip.model.configuration import CAPTIONING, CLIPViPConfig, CLIPViPVisionConfig
from clipvip.model.positions import interpolate_positions, with_sizes
from clipvip.model.pretrained import (
    check_finite,
    check_fit,
    draws,
    found,
    quiet_load,
    read_json,
    resolve,
    same_draws,
)
from clipvip.model.vision import (
    CLIPViPEncoder,
    CLIPViPVisionEmbeddings,
    EqualLengths,
    Offsets,
    proxy_starts,
    split_tokens,
    video_of_frame,
)

logger = logging.get_logger(__name__)


@dataclass
class CLIPViPOutput(ModelOutput):
    """Output of CLIPViPModel; without return_loss, the loss is None.

    With frame_pooling="mean", vision_model_output has each frame as a video of its own.
    """

    loss: Tensor | None = None  # 0-d, sum of the contrastive losses of both directions
    logits_per_video: Tensor | None = None  # [B, n], exp(logit_scale) · cosine
    logits_per_text: Tensor | None = None  # [n, B], its transpose
    video_embeds: Tensor | None = None  # [B, P], unit vectors
    text_embeds: Tensor | None = None  # [n, P], unit vectors
    text_model_output: BaseModelOutputWithPooling | None = None  # of transformers' CLIPTextModel
    vision_model_output: BaseModelOutputWithPooling | None = None  # of CLIPViPVisionModel

    def to_tuple(self) -> tuple[Any, ...]:
        """Return all values that are not None, those of the towers as tuples too."""
        values = self.values()
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in values)


@dataclass
class CLIPViPTokens(ModelOutput):
    """Output of `CLIPViPModel.get_video_tokens`, packed or padded.

    With frame_pooling="mean", every frame has M proxies of its own: [F, M, C] or [B, N, M, C].
    """

    proxies: Tensor | None = None  # [B, M, C]
    patches: Tensor | None = None  # packed [F, L, C]; padded [B, N, L, C], zero past a video's end
    frame_offsets: Tensor | None = None  # packed: int32 [B+1], the cumulative number of frames
    frame_mask: Tensor | None = None  # padded: bool [B, N], True where a video has a frame


class CLIPViPPreTrainedModel(CLIPPreTrainedModel):
    """Base of the vision tower and of the whole model: initialisation and transformers' flags."""

    config: CLIPViPConfig
    base_model_prefix = "clipvip"
    main_input_name = "pixel_values"
    input_modalities = ("video", "text")
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPViPEncoder"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)position_ids$"]  # noqa: RUF012
    _can_record_outputs = {}  # noqa: RUF012
    # The loss is a mean over a batch. So transformers' Trainer divides it by the batches that it
    # accumulates, whatever keywords forward takes.
    accepts_loss_kwargs = False

    @classmethod
    def is_custom_code(cls) -> bool:
        # For custom code, transformers does not initialise modules whose own parameters are all
        # set. Attention has none of its own, yet CLIP sets its children's weights there.
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
        self.patches_per_frame = patches = self.embeddings.num_patches
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPViPEncoder(config, patches)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        frame_offsets: Offsets,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode packed frames.

        pixel_values [F, 3, H, W] floating point, frame_offsets int32 [B+1] on its device.
        output_attentions, output_hidden_states: as in transformers; by default those of the
            configuration. So is return_dict, which may be given by name.

        Returns last_hidden_state [T, C] with T = B·M + F·L, before post_layernorm, and
        pooler_output [B, C], the first proxy of each video after it. If asked for, also

        - hidden_states: the tokens [T, C] before the first layer (after pre_layrnorm), and after
          each of n layers: a tuple of n + 1, the last of which is last_hidden_state.
        - attentions: a tuple of n weights [B, H, S, S], as `clipvip.ops.proxy_attention` has them
          in proxy_attention_weights: S = M + N·L tokens of the longest video, of N frames. They are
          computed beside the layers' attention, which never stores them. They take n·B·H·S² values
          of memory: for a B/32 and 12 frames, 0.2 GB per video in fp32; for a B/16, 3.2 GB.
        """
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values, frame_offsets))
        states = self._wanted("output_hidden_states", output_hidden_states)
        attentions = self._wanted("output_attentions", output_attentions)
        hidden_states = self.encoder(hidden_states, frame_offsets, None, states, attentions)
        first = proxy_starts(frame_offsets, self.config.num_proxies, self.patches_per_frame)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=self.post_layernorm(hidden_states[first]),
            hidden_states=None if states is None else (*states, hidden_states),
            attentions=None if attentions is None else tuple(attentions),
        )

    def _wanted(self, name: str, given: bool | None) -> list[Tensor] | None:
        """Return a list to collect a kind of output in, or None if it is not asked for."""
        return [] if (getattr(self.config, name) if given is None else given) else None

    def tokens(self, pixel_values: Tensor, frame_offsets: Tensor, layer: int) -> Tensor:
        """Return hidden_states[layer] of `forward`, [T, C], without computing later layers.

        Raises ValueError if there is no such layer.
        """
        layer = self.layer_index(layer)
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values, frame_offsets))
        return self.encoder(hidden_states, frame_offsets, layer)

    def layer_index(self, layer: int) -> int:
        """Return which of the hidden states `layer` means, counted from 0; -1 is the last.

        Raises ValueError if there is no such one.
        """
        count = len(self.encoder.layers)
        if not -count - 1 <= operator.index(layer) <= count:
            raise ValueError(
                f"layer is {layer}; expected 0 (before the first layer) to {count} (after the "
                f"last), or -1 (after the last) to {-count - 1}"
            )
        return layer % (count + 1)


class CLIPViPModel(WithCard, CLIPViPPreTrainedModel):  # type: ignore[misc]
    """Video and text towers that project into a common space, and a learned scale of cosines.

    Of the folder of a `CLIPViPForCaptioning`, the decoder is left out.
    """

    has_decoder = False

    def __init__(self, config: CLIPViPConfig) -> None:
        if config.decoder_config is not None and not self.has_decoder:
            config = copy.deepcopy(config)  # what is saved must not promise a decoder
            config.decoder_config = None
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        tower = CLIPTextModel._from_config(text)
        self.text_model = getattr(tower, "text_model", tower)  # wrapped once more before 5.6
        self.vision_model = CLIPViPVisionModel._from_config(vision)
        self.visual_projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def initialize_weights(self) -> None:
        # transformers calls it for a new model, and for what a checkpoint lacks.
        with draws():
            super().initialize_weights()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        image_size: int | None = None,
        text_length: int | None = None,
        strict: bool = True,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model, or raise an error that lists the weights that do not fit.

        pretrained_model_name_or_path: a folder that `save_pretrained` wrote; the folder or hub
            name of a CLIP checkpoint, of transformers or of open_clip, to which proxies and a
            temporal embedding are added, with a warning; or one file of weights (.pt, .bin,
            .safetensors) of the CLIP-ViP authors, OpenAI, open_clip or CLIP4Clip, from whose
            shapes the configuration is inferred. No code in a file is run.
        image_size, text_length: side of the frames in pixels and number of tokens that the model is
            to read, if they differ from the checkpoint's. Its positions are interpolated to them
            (see clipvip.model.positions), with a warning; train the model with them.
        strict: whether missing or unexpected weights raise ValueError; else the missing keep their
            initial values and the unexpected are ignored.
        ignore_mismatched_sizes: whether weights of another shape keep their initial values; else
            they raise ValueError.
        kwargs: any of VIDEO_OPTIONS (num_proxies=…, attention_backend=…) overrides the
            configuration. activation ("gelu" or "quick_gelu") and head_width (channels of a head
            of the vision tower) are for a file that does not say them, such as one of open_clip
            without its open_clip_config.json. All others go to transformers' `from_pretrained`.

        As in transformers, dtype= is by default that which config.json names, or else that of the
        first weight; for one file of weights, it is the widest of theirs. Missing weights are drawn
        from a fixed seed: the same files give the same model in every process, on every device and,
        up to rounding, in every dtype.
        Raises FileNotFoundError if there is no such folder, file or hub name.
        """
        source = pretrained_model_name_or_path
        subfolder = kwargs.get("subfolder") or ""
        with nullcontext() if source is None else found("the model", source, subfolder):
            location, kwargs, added = resolve(source, kwargs)
            written = {} if location is None else read_json(location, "config.json", kwargs)
            decodes = written.get("decoder_config") is not None
            with same_draws(), quiet_load(report=not strict or ignore_mismatched_sizes):
                kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
                loaded: Any = super().from_pretrained(location, *model_args, **kwargs)
        model, info = loaded
        if decodes and not cls.has_decoder:
            unknown = info["unexpected_keys"]
            info["unexpected_keys"] = {key for key in unknown if not key.startswith(CAPTIONING)}
        model.config.name_or_path = model.name_or_path = "" if source is None else str(source)
        check_fit(source, info, added, strict, ignore_mismatched_sizes)
        if source is not None:
            check_finite(source, model)
        interpolate_positions(model, with_sizes(model.config, image_size, text_length))
        if added:
            logger.warning(f"{shown(source)} is a CLIP checkpoint: {_addition(model.config)}")
        return (model, info) if output_loading_info else model

    def get_video_features(
        self, pixel_values: Tensor, frame_offsets: Tensor | None = None
    ) -> Tensor:
        """Project videos into the common space, without normalising them: [B, P].

        pixel_values: floating point, normalised: [B, N, 3, H, W], or packed [F, 3, H, W] with
            frame_offsets.
        frame_offsets: int32 [B+1], the cumulative number of frames.
        """
        return self._video_features(pixel_values, frame_offsets)[0]

    def _video_features(
        self, pixel_values: Tensor, frame_offsets: Tensor | None, **outputs: bool
    ) -> tuple[Tensor, BaseModelOutputWithPooling]:
        """Return the features of videos, [B, P], and the output of the vision tower."""
        plain = self.config.vision_config.attention_backend == "reference"
        if plain and pixel_values.ndim == 5 and torch.compiler.is_exporting():
            return self._equal_lengths_features(pixel_values, **outputs)
        if frame_offsets is not None and getattr(self, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel splits packed frames in the middle of videos; start one process "
                "per GPU (torchrun), or pass pixel_values [B, N, 3, H, W] without frame_offsets"
            )
        pixel_values, frame_offsets = pack_frames(pixel_values, frame_offsets)
        frames = pixel_values.shape[0]
        offsets = self._offsets_seen(frame_offsets, frames)
        output = self.vision_model(pixel_values, offsets, return_dict=True, **outputs)
        features = self.visual_projection(output.pooler_output)
        if self.config.vision_config.frame_pooling != "mean":
            return features, output
        features = F.normalize(features, dim=-1)
        total = features.new_zeros(frame_offsets.shape[0] - 1, features.shape[1])
        total = total.index_add(0, video_of_frame(frame_offsets, frames), features)
        return total / frame_offsets.diff().clamp(min=1)[:, None], output

    def _offsets_seen(self, frame_offsets: Tensor, frames: int) -> Tensor:
        """Return the frame_offsets that the vision tower gets: with frame_pooling="mean", those of
        one video per frame."""
        if self.config.vision_config.frame_pooling != "mean":
            return frame_offsets
        return torch.arange(frames + 1, dtype=torch.int32, device=frame_offsets.device)

    def get_video_tokens(
        self,
        pixel_values: Tensor,
        frame_offsets: Tensor | None = None,
        *,
        layer: int = -1,
        padded: bool = False,
    ) -> CLIPViPTokens:
        """Compute the tokens of videos, such as a language model takes them, with C channels.

        pixel_values, frame_offsets: see `get_video_features`.
        layer: 0 for the tokens before the first layer (after pre_layrnorm), 1 to n for those after
            each of n layers; negative ones count from the last, -1. Later layers are not computed.
        padded: return one row per video instead of packed frames. On a GPU this waits for the
            lengths of videos.

        Returns proxies [B, M, C] and patches, either packed, [F, L, C] with frame_offsets int32
        [B+1], or padded with zeros to the N frames of the longest video, [B, N, L, C] with
        frame_mask bool [B, N]. Patches are in rows from the top left. No post_layernorm is applied,
        in any layer: `model.vision_model.post_layernorm` does that.

        With frame_pooling="mean", the tower sees every frame as a video of its own. So every frame
        has M proxies: [F, M, C], or padded [B, N, M, C].

        Raises ValueError if there is no such layer; the tokens carry gradients.
        """
        pixel_values, frame_offsets = pack_frames(pixel_values, frame_offsets)
        frames, tower = len(pixel_values), self.vision_model
        offsets = self._offsets_seen(frame_offsets, frames)
        tokens = tower.tokens(pixel_values, offsets, layer)
        per_video = tower.config.num_proxies, tower.patches_per_frame
        proxies, patches = split_tokens(tokens, offsets, *per_video)
        if not padded:
            return CLIPViPTokens(proxies, patches, frame_offsets=frame_offsets)
        lengths = frame_offsets.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        frame_mask = torch.arange(longest, device=lengths.device) < lengths[:, None]

        def pad(packed: Tensor) -> Tensor:
            rows = packed.new_zeros(*frame_mask.shape, *packed.shape[1:])
            rows[frame_mask] = packed
            return rows

        if self.config.vision_config.frame_pooling == "mean":
            proxies = pad(proxies)
        return CLIPViPTokens(proxies, pad(patches), frame_mask=frame_mask)

    def _equal_lengths_features(
        self, pixel_values: Tensor, **outputs: bool
    ) -> tuple[Tensor, BaseModelOutputWithPooling]:
        """Compute `_video_features` of [B, N, 3, H, W], so that torch.export traces it for any
        number of videos and frames."""
        videos, frames = pixel_values.shape[:2]
        one_per_video = self.config.vision_config.frame_pooling == "mean"
        lengths = EqualLengths(*(videos * frames, 1) if one_per_video else (videos, frames))
        packed = pixel_values.flatten(0, 1)
        output = self.vision_model(packed, lengths, return_dict=True, **outputs)
        features = self.visual_projection(output.pooler_output)
        if not one_per_video:
            return features, output
        return F.normalize(features, dim=-1).unflatten(0, (videos, frames)).mean(1), output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Project texts into the common space, without normalising them: [n, P].

        input_ids, attention_mask: int64 [n, length], as CLIPTokenizer returns them.
        """
        return self._text_features(input_ids, attention_mask)[0]

    def _text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None, **outputs: bool
    ) -> tuple[Tensor, BaseModelOutputWithPooling]:
        """Return the features of texts, [n, P], and the output of the text tower."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        output = self.text_model(**given, return_dict=True, **outputs)
        return self.text_projection(output.pooler_output), output

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        frame_offsets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CLIPViPOutput:
        """Compare every video with every text.

        input_ids, attention_mask: int64 [n, length].
        pixel_values, frame_offsets: see `get_video_features`.
        return_loss: also compute the contrastive loss; video i belongs to text i, so B = n.
        output_attentions, output_hidden_states: as in transformers, for both towers; see
            `CLIPViPVisionModel.forward`. By default those of the configuration, or of a tower's.
            The text tower has attentions only with attn_implementation="eager".
        return_dict: may be given by name; False returns a tuple of all values that are not None.
        """
        asked = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        outputs: dict[str, bool] = {}
        for name, value in asked.items():
            if value is None:
                value = getattr(self.config, name) or None
            if value is not None:  # else each tower's own configuration decides
                outputs[name] = value
        video, vision_output = self._video_features(pixel_values, frame_offsets, **outputs)
        if self.text_model.config._attn_implementation != "eager":
            outputs.pop("output_attentions", None)  # transformers would warn that it has none
        text, text_output = self._text_features(input_ids, attention_mask, **outputs)
        video, text = F.normalize(video, dim=-1), F.normalize(text, dim=-1)
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
        return CLIPViPOutput(loss, logits, logits.T, video, text, text_output, vision_output)


def pack_frames(pixel_values: Tensor, frame_offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Convert either accepted form of a video batch to the packed form.

    pixel_values: floating point, [B, N, 3, H, W], or [F, 3, H, W] with frame_offsets.
    frame_offsets: integers [B+1], first 0, last F, never decreasing. Its values are checked only
        on the CPU, since reading them from a GPU would wait for it.
    Returns pixel_values [F, 3, H, W] and frame_offsets int32 [B+1] on the same device.
    Raises TypeError or ValueError for anything else.
    """
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"pixel_values is {pixel_values.dtype}; expected normalised floating point "
            "(clipvip.model.processing.normalize_frames converts uint8 frames)"
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
    if frame_offsets.ndim != 1 or frame_offsets.shape[0] < 1 or frame_offsets.is_floating_point():
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


def _addition(config: CLIPViPConfig) -> str:
    """Describe in a log line how plain CLIP became a video model."""
    video = config.vision_config
    if video.frame_pooling == "mean" and video.num_proxies == 1:
        return "a video's feature is the mean of its frames' (frame_pooling='mean')"
    return (
        f"added {video.num_proxies - 1} video proxies (proxy_init={video.proxy_init!r}) and a "
        f"temporal embedding of {video.num_frames} frames, zero at the start"
    )
