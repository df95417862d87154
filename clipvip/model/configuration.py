"""Configuration of CLIP-ViP: CLIP's own, and what makes an image tower a video tower."""

from typing import Any, ClassVar

import transformers.configuration_utils
from huggingface_hub.dataclasses import strict
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

PROXY_INITS = ("class_token", "normal")
FRAME_POOLINGS = ("proxy", "mean")
ATTENTION_BACKENDS = ("native", "reference")


@strict
class CLIPViPVisionConfig(CLIPVisionConfig):
    """CLIP's vision tower with video proxy tokens (CLIP-ViP, section 3.2).

    num_proxies: M, CLIP's class token and M - 1 added tokens.
    num_frames: T, the length of the temporal embedding. Videos of another number of frames
        get it linearly interpolated.
    proxy_init: how added proxies start where a checkpoint has none: "class_token" (CLIP's
        class token plus small noise) or "normal" (unit normal, as the authors do).
    frame_pooling: "proxy" (the method) or "mean" (the mean-pooling baseline: every frame is a
        one-frame video, and a video's feature is the mean of its frames' unit features).
    attention_backend: "native" (the compiled op) or "reference" (plain PyTorch); the loss of
        the model's forward follows it.
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
            ("proxy_init", PROXY_INITS),
            ("frame_pooling", FRAME_POOLINGS),
            ("attention_backend", ATTENTION_BACKENDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {known}")
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout is {self.attention_dropout}; proxy-guided attention has "
                "none, set it to 0"
            )


VIDEO_OPTIONS = ("num_proxies", "num_frames", "proxy_init", "frame_pooling", "attention_backend")


@strict
class CLIPViPConfig(CLIPConfig):
    """Configuration of `CLIPViPModel`.

    The options of `CLIPViPVisionConfig` named in VIDEO_OPTIONS may be given here too, and in
    `from_pretrained`; they are kept in `vision_config`. `from_pretrained` reads a plain CLIP
    checkpoint's config as well.
    """

    model_type = "clipvip"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": CLIPTextConfig,
        "vision_config": CLIPViPVisionConfig,
    }
    # Its name since transformers 5.20, which wants the classes wrapped.
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        name: getattr(transformers.configuration_utils, "SubConfigSpec", lambda x: x)(config)
        for name, config in sub_configs.items()
    }

    # Given as dicts, or not at all, they become configs in transformers' __post_init__.
    text_config: Any = None
    vision_config: Any = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592

    def __post_init__(self, **kwargs: Any) -> None:
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
        """Read config.json of our own or of a CLIP checkpoint."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config.get("model_type") != cls.model_type:
            if "text_config" not in config or "vision_config" not in config:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds a {config.get('model_type')!r} "
                    "model; expected 'clipvip', or 'clip' with a text and a vision tower"
                )
            config = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
        return config, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', and VIDEO_OPTIONS among the overrides."""
        given = {name: kwargs.pop(name) for name in VIDEO_OPTIONS if name in kwargs}
        return super().from_dict({**config_dict, **given}, **kwargs)
