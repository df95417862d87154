"""Configuration of CLIP-ViP: that of CLIP, and settings that make an image tower a video tower.

Only settings that are named here are read from a config.json. transformers accepts any, and some
of them make it import packages, fetch code or weights, or patch itself. No model folder, whoever
made it, may cause that.
"""

import math
from typing import Any, ClassVar

import transformers.configuration_utils
from huggingface_hub.dataclasses import strict
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    GPT2Config,
    PretrainedConfig,
)
from transformers.utils import is_flash_attn_2_available, logging

from clipvip.files import shown

logger = logging.get_logger(__name__)


@strict
class CLIPViPVisionConfig(CLIPVisionConfig):
    """CLIP's vision tower with video proxy tokens (CLIP-ViP, section 3.2).

    num_proxies: number M of proxies: CLIP's class token and M - 1 added tokens.
    num_frames: length T of the temporal embedding. For a video of another number of frames it is
        linearly interpolated.
    proxy_init: initial values of added proxies that a checkpoint lacks: "class_token" (CLIP's
        class token plus small noise) or "normal" (unit normal, as in the authors' code).
    frame_pooling: "proxy" (the method) or "mean" (the mean-pooling baseline: every frame is a
        one-frame video, and a video's feature is the mean of its frames' unit features).
    attention_backend: "native" (the compiled op) or "reference" (plain PyTorch), also for the loss
        in the model's forward.
    """

    model_type = "clipvip_vision_model"

    image_size: int = 224
    patch_size: int = 32
    num_proxies: int = 4
    num_frames: int = 12
    proxy_init: str = "class_token"
    frame_pooling: str = "proxy"
    attention_backend: str = "native"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("num_proxies", "num_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name, known in (
            ("proxy_init", ("class_token", "normal")),
            ("frame_pooling", ("proxy", "mean")),
            ("attention_backend", ("native", "reference")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {known}")
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.attention_dropout}; proxy-guided attention has no "
                "dropout: set it to 0"
            )


VIDEO_OPTIONS = ("num_proxies", "num_frames", "proxy_init", "frame_pooling", "attention_backend")
"""Settings of CLIPViPVisionConfig that users may override when they load a model."""

DECODERS: dict[str, type[PretrainedConfig]] = {
    config.model_type: config for config in (GPT2Config, BertConfig)
}
"""Configurations of the decoders that can write captions: those with cross-attention.

RoBERTa is not among them: transformers generates with other positions than it trains with.
"""
DECODER_TOKENS = ("proxies", "all")
CAPTIONING = ("decoder.", "bridge.")
"""Begins of the names of weights that `CLIPViPForCaptioning` adds to `CLIPViPModel`."""

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "image_size", "patch_size", "num_channels", "projection_dim",
    "num_proxies", "num_frames", "n_embd", "n_head", "n_layer", "n_positions", "type_vocab_size",
)  # fmt: skip
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Those with "_dict" are from before transformers 4.24 and override those without it.
_TOWERS = ("text_config", "vision_config", "text_config_dict", "vision_config_dict")
_NOT_OURS = ("auto_map", "quantization_config", "fusion_config", "transformers_weights")


@strict
class CLIPViPConfig(CLIPConfig):
    """Configuration of `CLIPViPModel`.

    VIDEO_OPTIONS of `CLIPViPVisionConfig` may also be given here and in `from_pretrained`; they
    are kept in `vision_config`. `from_pretrained` also reads the config of a plain CLIP.

    decoder_config: configuration of the decoder of `CLIPViPForCaptioning`, one of DECODERS, or a
        dict of its settings with its model_type; None for a model without a decoder.
    decoder_tokens: tokens of a video that the decoder attends to: "proxies", or "all" for proxies
        and patches.
    """

    model_type = "clipvip"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": CLIPTextConfig,
        "vision_config": CLIPViPVisionConfig,
    }
    # transformers 5.20 uses this name and wants the classes wrapped.
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        name: getattr(transformers.configuration_utils, "SubConfigSpec", lambda x: x)(config)
        for name, config in sub_configs.items()
    }

    # Packed tokens of batches of different sizes, which transformers' Trainer could not gather.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["text_model_output", "vision_model_output"]
    # Dicts or None become configs in transformers' __post_init__.
    text_config: Any = None
    vision_config: Any = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    decoder_config: Any = None
    decoder_tokens: str = "proxies"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.decoder_tokens not in DECODER_TOKENS:
            raise ValueError(
                f"decoder_tokens is {self.decoder_tokens!r}; expected one of {DECODER_TOKENS}"
            )
        if self.decoder_config is not None:
            self.decoder_config = decoder_config(self.decoder_config)
        given = {name: kwargs.pop(name) for name in VIDEO_OPTIONS if name in kwargs}
        super().__post_init__(**kwargs)
        if given or type(self.vision_config) is not CLIPViPVisionConfig:
            vision = self.vision_config.to_dict()
            vision.pop("model_type")
            self.vision_config = CLIPViPVisionConfig(**{**vision, **given})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json of one of our models or of a CLIP checkpoint."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_type(config, pretrained_model_name_or_path)
        if config.get("model_type") != cls.model_type:
            config = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
        return _settings_in(config, shown(pretrained_model_name_or_path)), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config as transformers does; kwargs may also override VIDEO_OPTIONS."""
        given = {name: kwargs.pop(name) for name in VIDEO_OPTIONS if name in kwargs}
        return super().from_dict({**config_dict, **given}, **kwargs)


def decoder_config(given: Any) -> PretrainedConfig:
    """Return the configuration of a decoder that attends to itself and to a video.

    given: one of DECODERS, or a dict of its settings with its model_type.
    Raises ValueError for any other.
    """
    settings = given.to_dict() if isinstance(given, PretrainedConfig) else given
    if not isinstance(settings, dict) or settings.get("model_type") not in [*DECODERS]:
        kind = settings.get("model_type") if isinstance(settings, dict) else settings
        raise ValueError(
            f"the decoder's model_type is {shown(repr(kind))[:50]}; expected one with "
            f"cross-attention: {', '.join(DECODERS)}"
        )
    config = DECODERS[settings["model_type"]]
    own = {name: settings[name] for name in _fields(config) if name in settings}
    _check_numbers(own, "decoder_config.")
    # GPT2Config has no is_decoder of its own, and needs none.
    return config(**{**own, "is_decoder": True, "add_cross_attention": True})


def check_type(config: dict[str, Any], source: object) -> None:
    """Raise ValueError if a config.json is none of CLIP's or ours: other models may have weights of
    the same names and shapes, such as MetaCLIP 2, which reads a text's feature elsewhere."""
    kind = config.get("model_type", "clip")  # old ones do not say
    towers = "text_config" in config and "vision_config" in config
    if kind != "clipvip" and not (kind == "clip" and towers):
        raise ValueError(
            f"{shown(source)} holds a {shown(repr(config.get('model_type')))} model; expected "
            "'clipvip', or 'clip' with a text and a vision tower"
        )


_LEAST_LAYER = 1 << 14  # weights that take as much memory as the Python objects of a layer


def count_weights(config: CLIPViPConfig) -> int:
    """Estimate a model's number of weights: those of its large matrices, and at least _LEAST_LAYER
    per layer."""
    text, vision = config.text_config, config.vision_config

    def tower(shapes: Any, inputs: int) -> int:
        width = shapes.hidden_size
        layer = max(_LEAST_LAYER, (4 * width + 2 * shapes.intermediate_size) * width)
        return shapes.num_hidden_layers * layer + (inputs + config.projection_dim) * width

    patch = vision.num_channels * vision.patch_size**2
    patches = (vision.image_size // vision.patch_size) ** 2
    video = patch + patches + vision.num_proxies + vision.num_frames
    count = tower(text, text.vocab_size + text.max_position_embeddings) + tower(vision, video)
    decoder = config.decoder_config
    return count + (0 if decoder is None else count_decoder_weights(decoder))


def count_decoder_weights(config: PretrainedConfig) -> int:
    """Count the weights of a decoder, one of DECODERS, up to a few per cent and a small number."""
    width = config.hidden_size
    # Each layer also attends to the video.
    layer = max(_LEAST_LAYER, (8 * width + 2 * decoder_inner(config)) * width)
    inputs = config.vocab_size + config.max_position_embeddings
    return config.num_hidden_layers * layer + inputs * width


def decoder_inner(config: PretrainedConfig) -> int:
    """Return the width of a decoder's MLP."""
    name = "n_inner" if config.model_type == "gpt2" else "intermediate_size"
    return getattr(config, name) or 4 * config.hidden_size


def _settings_in(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the model's settings in a config.json, and warn about those that ask for code.

    Raises ValueError for values that no model can have.
    """
    own = _fields(CLIPConfig) | {"decoder_config", "decoder_tokens", *VIDEO_OPTIONS}
    own |= {"model_type", "architectures"}
    kept = {key: value for key, value in config.items() if key in own}
    left_out = [key for key in _NOT_OURS if config.get(key) is not None]
    for key in ("attn_implementation", "_attn_implementation"):
        value = config.get(key)
        if value in ("eager", "sdpa") or (
            # Without its package, transformers would fetch a kernel of that name.
            value == "flash_attention_2" and is_flash_attn_2_available()
        ):
            kept["attn_implementation"] = value
        elif value is not None:
            left_out.append(f"{key}={value!r}")
    if left_out:
        logger.warning_once(  # loading a model reads its configuration twice
            f"config.json of {source} names {shown(', '.join(left_out))}, which is ignored: a "
            "model's files choose no code"
        )
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is None:
            continue
        if value not in _DTYPES:
            raise ValueError(f"{key} is {value!r}; expected one of {', '.join(_DTYPES)}")
        kept["dtype"] = value
    for key in _TOWERS:
        if isinstance(config.get(key), dict):
            fields = _fields(CLIPTextConfig if key.startswith("text") else CLIPVisionConfig)
            fields |= set(VIDEO_OPTIONS) if key.startswith("vision") else set()
            kept[key] = {name: value for name, value in config[key].items() if name in fields}
            _check_numbers(kept[key], f"{key}.")
        elif config.get(key) is not None:
            raise ValueError(f"{key} is {config[key]!r}; expected the settings of a tower")
    if kept.get("decoder_config") is not None:
        kept["decoder_config"] = decoder_config(kept["decoder_config"]).to_dict()
    _check_numbers(kept, "")
    return kept


def _fields(config: type[PretrainedConfig]) -> set[str]:
    """Return the settings that a configuration class adds to PretrainedConfig."""
    return set(config.__dataclass_fields__) - set(PretrainedConfig.__dataclass_fields__)


def _check_numbers(settings: dict[str, Any], prefix: str) -> None:
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{name} is {value}; expected a finite number")
        if name in _SIZES and (type(value) is not int or value < 1):
            raise ValueError(
                f"{prefix}{name} is {shown(repr(value))[:50]}; expected an integer of 1 or more"
            )
