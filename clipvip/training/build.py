"""Parts from which a run is built: its clips, and its model and processor.

The model comes from a checkpoint, from model.name, or new from model.config.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer, PretrainedConfig

from clipvip import distributed
from clipvip.caption_metrics import check_installed
from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.loading import ClipLoader, ClipSources, LoaderOptions, build_loader
from clipvip.data.shards import Shards, build_shard_loader
from clipvip.embedding import join_texts
from clipvip.model import CLIPViPConfig, CLIPViPForCaptioning, CLIPViPModel
from clipvip.model.captioning import load_decoder, read_decoder_config, with_tokens
from clipvip.model.configuration import DECODER_TOKENS, DECODERS
from clipvip.model.decoder_tokenizer import load_decoder_tokenizer
from clipvip.model.positions import interpolate_positions, with_sizes
from clipvip.model.pretrained import found, read_config
from clipvip.model.processing import (
    READING,
    CLIPViPProcessor,
    NoTokenizer,
    load_tokenizer,
    longest_text,
)
from clipvip.ops import proxy_attention
from clipvip.training import lora, parallel
from clipvip.training.config import ConfigError, TrainConfig, best_metrics, refuse_unknown_key
from clipvip.training.optimization import freeze
from clipvip.training.sources import Clips, SourceConfig, load_sources
from clipvip.training.task import task_of

_KINDS = {"model.tokenizer": "tokenizer", "model.decoder.name": "language model"}


def load_clips(config: TrainConfig) -> tuple[Clips, list[Clip]]:
    """Load training and validation clips; the latter are empty if data.validation is not given.

    Raises ConfigError or ShardError if they lack the texts that the task or validation needs, or
    are too few for a batch.
    """
    data = config.data
    validation = load_annotations(data.validation) if data.validation else []
    if validation and not any(clip.text for clip in validation):
        raise ConfigError(f"{data.validation}: no clip has a text to compare with")
    if validation and config.task == "captioning":
        try:
            check_installed()
        except ValueError as error:
            raise ConfigError(f"data.validation: {error}") from None
    clips: Clips
    if data.train is None or data.reads_shards:
        clips = load_sources(data.sources or [SourceConfig(data.train)])
    else:
        clips = load_annotations(data.train)
    task_of(config).check(clips, data.train)
    together = config.batch_size // config.accumulation
    if len(clips) < together:
        raise ConfigError(
            f"{data.train or 'data.sources'} holds {len(clips)} clips; expected at least "
            f"{together}, those of batch_size / accumulation: lower batch_size"
        )
    return clips, validation


def training_loader(config: TrainConfig, clips: Clips, processor: CLIPViPProcessor) -> ClipLoader:
    """Build this rank's loader of micro-batches."""
    micro, data = config.batch_size // config.accumulation, config.data
    task = task_of(config)
    options = LoaderOptions(
        tokenizer=task.tokenizer(processor),
        task=task.batches,
        batch_size=micro // distributed.world_size(),
        seed=config.seed,
        num_workers=data.num_workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        max_bad_share=data.max_bad_share,
        bad_files=Path(config.out) / "bad_files.jsonl",
        decoder=data.decoder,
        compared=task_of(config).compared,
        **processor.loading(),
    )
    paragraph = processor.paragraph
    if isinstance(clips, Shards):
        return build_shard_loader(clips, options, paragraph=paragraph, shuffle=data.shuffle)
    return build_loader(_with_texts_joined(clips, paragraph), options, training=True)


def _with_texts_joined(
    clips: list[Clip] | ClipSources, paragraph: bool
) -> list[Clip] | ClipSources:
    """Return the clips; where their source says paragraph, all texts of a clip are joined into one.

    paragraph: for what is not, or does not say so.
    """
    if not isinstance(clips, ClipSources):
        return join_texts(clips, paragraph)
    joined = []
    for source in clips.sources:
        own = paragraph if source.paragraph is None else source.paragraph
        joined.append(replace(source, clips=join_texts(source.clips, own)))
    return ClipSources(joined)


def build_model(config: TrainConfig, resumed: Path | None) -> tuple[CLIPViPModel, CLIPViPProcessor]:
    """Build the model, in fp32, and its processor, with LoRA, frozen weights and compiled layers as
    configured. From here on the processor decides how clips are read.

    resumed: checkpoint to load them from; None for model.name or model.config.
    """
    source = config.model.name if resumed is None else str(resumed / "model")
    task = task_of(config)
    if source is not None:
        with _given("model.name", source):
            shapes = read_config(source)
            _check_heads("model.name", shapes, config.backend)
            joined = resumed is None and _needs_decoder(config, shapes)
            kind = CLIPViPModel if joined else task.model_class
            model = kind.from_pretrained(
                source, attention_backend=config.backend, dtype=torch.float32
            )
        if resumed is None:
            interpolate_positions(model, _sized(config, model.config))
        elif config.model.image_size not in (None, model.config.vision_config.image_size):
            raise ConfigError(
                f"model.image_size is {config.model.image_size}, but the run that is resumed reads "
                f"frames of {model.config.vision_config.image_size}; give that, or another out for "
                "a new run"
            )
    else:
        shapes = _new_config(config, _tokenizer(config))
        joined = _needs_decoder(config, shapes)
        try:
            model = CLIPViPModel(shapes)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.config: {error}") from None
    if joined:
        model = _with_decoder(config, model)
    processor = build_processor(config, model.config, resumed)
    if config.model.gradient_checkpointing:
        # transformers renamed it within version 5
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    lora.prepare(model, config, resumed)
    freeze_for(model, config)
    if config.compile != "none":
        parallel.compile_layers(model, only_text=config.compile == "text")
    return model.train(), processor


def freeze_for(model: CLIPViPModel, config: TrainConfig) -> None:
    """Freeze what the configuration asks for, and what its task's loss does not reach, for whose
    gradients data-parallel ranks would wait."""
    freeze(model, config.model.freeze, config.model.unfreeze)
    freeze(model, task_of(config).frozen)


def build_processor(
    config: TrainConfig, shapes: CLIPViPConfig, resumed: Path | None = None
) -> CLIPViPProcessor:
    """Build the processor of a model of these shapes, with the configured way to read clips."""
    source = config.model.name if resumed is None else str(resumed / "model")
    tokenizer = config.model.tokenizer if resumed is None else None
    if source is None:
        processor = CLIPViPProcessor(_tokenizer(config))
    else:
        with _given("model.tokenizer" if tokenizer else "model.name", tokenizer or source):
            processor = CLIPViPProcessor.from_pretrained(source, tokenizer=tokenizer)
    decoder = config.model.decoder
    if resumed is None and decoder is not None and decoder.name is not None:
        with _given("model.decoder.name", decoder.name):
            processor.decoder_tokenizer = load_decoder_tokenizer(decoder.name)
    processor.fit(shapes)
    longest = longest_text(shapes)
    for name in READING:
        chosen = getattr(config.data, name)
        if chosen is not None:
            setattr(processor, name, chosen)
    assert processor.text_length is not None  # by fit
    if processor.text_length > longest:
        reader = "the new model" if resumed is None else "the run that is resumed"
        if config.task == "captioning":
            reader += " or its decoder"
        raise ConfigError(
            f"data.text_length is {processor.text_length}; expected at most {longest}, which "
            f"{reader} reads"
        )
    return processor


def settled(config: TrainConfig, processor: CLIPViPProcessor) -> TrainConfig:
    """Return the configuration with the settings that it leaves to the processor, and to the task,
    filled in."""
    read = {name: getattr(processor, name) for name in READING}
    metric = config.best_metric or best_metrics(config)[0]
    return replace(config, data=replace(config.data, **read), best_metric=metric)


def model_config(config: TrainConfig) -> CLIPViPConfig:
    """Return the shapes of a new run's model without loading its weights."""
    name = config.model.name
    if name is None:
        shapes = _new_config(config, _tokenizer(config))
    else:
        with _given("model.name", name):
            shapes = read_config(name)
        _check_heads("model.name", shapes, config.backend)
        shapes = _sized(config, shapes)
    if _needs_decoder(config, shapes):
        assert config.model.decoder is not None
        shapes.decoder_config = _decoder_config(config)
        shapes.decoder_tokens = config.model.decoder.tokens or DECODER_TOKENS[0]
    return shapes


def _needs_decoder(config: TrainConfig, shapes: CLIPViPConfig) -> bool:
    """Whether a new run's model, of these shapes, is given a decoder.

    Raises ConfigError if it has one and is given another, or if the run needs one and has none.
    """
    if config.task != "captioning":
        return False
    decoder = config.model.decoder
    new = decoder is not None and (decoder.name is not None or decoder.config is not None)
    if shapes.decoder_config is None:
        if not new:
            raise ConfigError(
                f"model.name is {config.model.name}, which has no decoder; give "
                "model.decoder.name, such as gpt2, or model.decoder.config"
            )
        return True
    if new:
        raise ConfigError(
            f"model.name is {config.model.name}, which has a decoder; to train it further, give "
            "model.decoder=null"
        )
    if decoder is not None and decoder.tokens not in (None, shapes.decoder_tokens):
        raise ConfigError(
            f"model.decoder.tokens is {decoder.tokens!r}, but the decoder of {config.model.name} "
            f"was trained with {shapes.decoder_tokens!r}; leave it out"
        )
    return False


def _with_decoder(config: TrainConfig, model: CLIPViPModel) -> CLIPViPForCaptioning:
    """Join a new run's model with its decoder."""
    decoder = config.model.decoder
    assert decoder is not None
    loaded: Any
    if decoder.name is None:
        loaded = _decoder_config(config)
    else:
        with _given("model.decoder.name", decoder.name):
            loaded = load_decoder(decoder.name, load_decoder_tokenizer(decoder.name))
    tokens = decoder.tokens or DECODER_TOKENS[0]
    try:
        return CLIPViPForCaptioning.with_decoder(model, loaded, tokens)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.decoder: {' '.join(str(error).split())}") from None


def _decoder_config(config: TrainConfig) -> PretrainedConfig:
    """Return the configuration of a new run's decoder, without loading weights."""
    decoder = config.model.decoder
    assert decoder is not None
    if decoder.name is not None:
        with _given("model.decoder.name", decoder.name):
            return read_decoder_config(decoder.name, load_decoder_tokenizer(decoder.name))
    given, key = dict(decoder.config or {}), "model.decoder.config"
    kind = given.get("model_type")
    if kind in DECODERS:
        for name in given:
            refuse_unknown_key(name, [*DECODERS[kind]().to_dict()], key)
    source = str(config.model.tokenizer or config.model.name)
    with _given("model.tokenizer" if config.model.tokenizer else "model.name", source):
        tokenizer = load_tokenizer(source)
    try:
        return with_tokens(given, tokenizer)
    except Exception as error:  # validators raise errors of their own
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from None


def _tokenizer(config: TrainConfig) -> CLIPTokenizer:
    with _given("model.tokenizer", str(config.model.tokenizer)):
        return load_tokenizer(str(config.model.tokenizer))


@contextmanager
def _given(key: str, value: str) -> Iterator[None]:
    """Within, raise a ConfigError that names `key` if what `value` names does not exist, has no
    tokenizer, or has a damaged file."""
    kind: Any = _KINDS.get(key, "model")
    try:
        with found(key, value, kind=kind, error=ConfigError):
            try:
                yield
            except NoTokenizer:
                if not Path(value).exists():
                    raise  # `found` says so
                raise ConfigError(
                    f"{value} holds no tokenizer: give model.tokenizer=, a folder or hub name that "
                    "does, such as openai/clip-vit-base-patch32"
                ) from None
    except ValueError as failed:
        raise ConfigError(str(failed)) from failed


def _new_config(config: TrainConfig, tokenizer: CLIPTokenizer) -> CLIPViPConfig:
    given = dict(config.model.config or {})
    known = CLIPViPConfig().to_dict()
    towers = ("text_config", "vision_config")
    keys = [*known, *(f"{tower}.{key}" for tower in towers for key in known[tower])]
    for key, value in given.items():
        for name in [key, *(f"{key}.{inner}" for inner in (value if key in towers else ()))]:
            refuse_unknown_key(name, keys, "model.config")

    text = {
        key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    text["vocab_size"] = len(tokenizer)
    given["text_config"] = text | dict(given.get("text_config") or {})
    vision = given.get("vision_config") or {}
    given["vision_config"] = {**vision, "attention_backend": config.backend}
    try:
        shapes = CLIPViPConfig(**given)
    except Exception as error:  # validators raise errors of their own
        raise ConfigError(f"model.config: {' '.join(str(error).split())}") from None
    _check_heads("model.config", shapes, config.backend)
    return _sized(config, shapes)


def _sized(config: TrainConfig, shapes: CLIPViPConfig) -> CLIPViPConfig:
    """Return the shapes of a new run's model, which reads frames of model.image_size and, if it is
    a checkpoint, texts of data.text_length."""
    length = 0 if config.model.name is None else config.data.text_length or 0
    # A captioner's decoder reads texts, not the text tower.
    longer = length > shapes.text_config.max_position_embeddings and config.task != "captioning"
    try:
        return with_sizes(shapes, config.model.image_size, length if longer else None)
    except ValueError as error:  # begins with the name of the option
        group = "model" if str(error).startswith("image_size") else "data"
        raise ConfigError(f"{group}.{error}") from None


def _check_heads(key: str, shapes: CLIPViPConfig, backend: str) -> None:
    """Raise ConfigError if the video tower's attention cannot run with this backend."""
    width, heads = shapes.vision_config.hidden_size, shapes.vision_config.num_attention_heads
    proxy = torch.zeros(1, 3, 1, width // heads)
    try:  # the op knows the sizes it supports
        proxy_attention(proxy, torch.zeros(2, dtype=torch.int32), 1, 1, backend=backend)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ConfigError(
            f"{key}: vision_config has heads of {width // heads} (hidden_size {width} / "
            f"num_attention_heads {heads}), which the compiled attention does not support "
            f"({reason}); give backend=reference, which supports any, or other shapes"
        ) from None
