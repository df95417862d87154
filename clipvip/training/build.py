"""From a configuration to what the training loop works on."""

import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from omegaconf import OmegaConf
from transformers import CLIPTokenizer

from clipvip import distributed
from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.loading import ClipLoader, LoaderOptions, build_loader
from clipvip.data.shards import Shards, Source, build_shard_loader, is_shards
from clipvip.embedding import with_texts_read
from clipvip.files import LOCK, read_own, shown, write_whole
from clipvip.losses import VARIANTS
from clipvip.model import CLIPViPConfig, CLIPViPModel
from clipvip.model.authors import AUTHORS_SUFFIXES, infer_config, read_authors_checkpoint
from clipvip.model.pretrained import found
from clipvip.model.processing import READING, CLIPViPProcessor, NoTokenizer, load_tokenizer
from clipvip.ops import proxy_attention
from clipvip.training import checkpoint, parallel
from clipvip.training.config import ConfigError, SourceConfig, TrainConfig, flat, refuse_unknown_key
from clipvip.training.optimization import freeze

logger = logging.getLogger(__name__)

_WRITTEN = "# written by clipvip train\n"  # opens a run's config.yaml
_OVERWRITTEN = (
    "config.yaml", "metrics.jsonl", "bad_files.jsonl", "trackers.json", "last", "best", "last.new",
    "best.new",
)  # fmt: skip


def make_accelerator(config: TrainConfig) -> Accelerator:
    transformers.utils.logging.disable_progress_bar()  # of saving a model: breaks our own
    AcceleratorState._reset_state()  # a second run in this process may use another precision
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch raises
        torch.use_deterministic_algorithms(True)
    distributed.start(config.timeout)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        log_with=known_trackers(config),
        project_config=ProjectConfiguration(config.out, f"{config.out}/tensorboard"),
    )
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size is {config.batch_size}; it must be a multiple of {parts} "
            f"({accelerator.num_processes} processes × accumulation {config.accumulation})"
        )
    return accelerator


def known_trackers(config: TrainConfig) -> list[str | LoggerType]:
    known = sorted(set(LoggerType.list()) - {"all"})
    for name in config.trackers:
        if name not in known:
            raise ConfigError(f"trackers: {name!r} is not one of {', '.join(known)}")
        if name not in map(str, get_available_trackers()):
            raise ConfigError(f"trackers: {name} is not installed: pip install {name}")
    return [LoggerType(name) for name in config.trackers]


def refuse_foreign(out: Path) -> None:
    """Raise a ConfigError where a run would overwrite or delete files that no run wrote.

    A run is known by the first line of its config.yaml, which is written before all else, and by
    the lock beside it, which a copy of that file lacks; or by its checkpoints, which find_resumed
    checks, as runs of earlier versions lack that line.
    """
    there = [shown(name) for name in _OVERWRITTEN if os.path.lexists(out / name)]
    if not there or checkpoint.checkpoints(out / "checkpoints"):
        return
    try:
        marked = read_own(out / "config.yaml", most=1 << 24).startswith(_WRITTEN.encode())
        ours = marked and (out / LOCK).exists()
    except OSError:
        ours = False
    if not ours:
        raise ConfigError(
            f"out is {shown(out)}, which holds {', '.join(there)} but no run of clipvip train; a "
            f"run would overwrite or delete that; give another out, such as {shown(out / 'run')}"
        )


def find_resumed(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from; refuses to mix a new run into an old one's folder."""
    folder = Path(config.out) / "checkpoints"
    found = distributed.first_does(lambda: checkpoint.checkpoints(folder))
    if config.resume == "never" and found:
        raise ConfigError(
            f"{config.out} already holds a run (step {checkpoint.checkpoint_step(found[-1])}): "
            "resume=latest goes on with it; else give another out"
        )
    newest = distributed.first_does(lambda: checkpoint.newest_good(folder))
    same = checkpoint.appears(newest) if newest else not checkpoint.checkpoints(folder)
    if not all(distributed.all_gather_objects(same)):
        raise ConfigError(f"{config.out} is not the same folder for all ranks; use shared storage")
    return newest


def start_trackers(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Write config.yaml, then start the trackers: TensorBoard without the events of steps after
    `step`, wandb and MLflow with the runs that they had before it."""
    out = Path(config.out)
    remembered = out / "trackers.json"

    def start() -> None:
        settings = out / "config.yaml"
        try:  # first, as it marks the folder as a run's, and a tracker's thread hides why it fails
            write_whole(settings, _WRITTEN + OmegaConf.to_yaml(OmegaConf.structured(config)))
        except OSError as error:
            raise ConfigError(
                f"{shown(settings)} cannot be written: {error.strerror}; make room there or give "
                "another out"
            ) from error
        ids: dict[str, str] = {}
        if step and remembered.exists():
            try:
                ids = dict(json.loads(remembered.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                logger.warning("%s cannot be read (%s): trackers start anew", remembered, error)
        wandb_id = ids.get("wandb", uuid.uuid4().hex)
        named = {"name": out.name, "group": out.name, "dir": config.out}
        options = {
            "tensorboard": {"purge_step": step + 1},
            "wandb": {**named, "id": wandb_id, "resume": "allow"},
            "mlflow": {"run_name": out.name, "run_id": ids.get("mlflow")},
        }
        try:
            accelerator.init_trackers("clipvip", init_kwargs=options)
            for tracker in accelerator.trackers:
                # TensorBoard makes another run of a configuration; MLflow takes it once.
                if tracker.name != "tensorboard" and tracker.name not in ids:
                    tracker.store_init_configuration(flat(config))
                    mlflow = tracker.name == "mlflow"
                    ids[tracker.name] = tracker.tracker.info.run_id if mlflow else wandb_id
        except Exception as error:  # of services not logged in to, or not reached
            raise ConfigError(f"trackers: {' '.join(str(error).split())}") from error
        if ids:
            write_whole(remembered, json.dumps(ids) + "\n")

    distributed.first_does(start)


def load_clips(config: TrainConfig) -> tuple[list[Clip] | Shards, list[Clip]]:
    """Training clips, refused where the task has nothing to train on, and validation clips."""
    data = config.data
    validation = load_annotations(data.validation) if data.validation else []
    if validation and not any(clip.text for clip in validation):
        raise ConfigError(f"{data.validation}: no clip has a text to search with")
    if data.train is None or is_shards(data.train):
        sources = data.sources or [SourceConfig(str(data.train))]
        shards = Shards([Source(source.shards, source.ratio) for source in sources])
        shards.check(config.task)
        if config.task == "omnisource":
            check_variant(
                config.variant,
                subtitles=sum(source.subtitles for source in shards.sources),
                captions=sum(source.captions for source in shards.sources),
            )
        return shards, validation
    clips = load_annotations(data.train)
    if config.task == "retrieval":
        mute = [clip for clip in clips if not clip.text]
    else:
        mute = [clip for clip in clips if clip.subtitle is None and clip.caption is None]
    if mute:
        needed = "text" if config.task == "retrieval" else "subtitle and no caption"
        raise ConfigError(
            f"{config.data.train}: {len(mute)} of {len(clips)} clips have no {needed} for "
            f"task={config.task}; the first is on line {mute[0].line}"
        )
    if config.task == "omnisource":
        check_variant(
            config.variant,
            subtitles=sum(clip.subtitle is not None for clip in clips),
            captions=sum(clip.caption is not None for clip in clips),
        )
    return clips, validation


def check_variant(variant: str, *, subtitles: int, captions: int) -> None:
    """Raise a ConfigError where the data have nothing that a variant of the loss compares, which
    would be 0; warn where one of its terms would be.

    subtitles, captions: the number of clips that have one.
    """
    counts = {"s": ("subtitle", subtitles), "c": ("caption", captions)}
    used = {letter: counts[letter] for letter in counts if letter in variant}
    absent = ", no ".join(name for name, count in used.values() if not count)
    if not absent:
        return
    if not any(count for _, count in used.values()):
        others = ", ".join(name for name in VARIANTS if "c" in name)
        raise ConfigError(
            f"variant={variant} compares videos with subtitles alone, and no clip has a {absent}; "
            f"choose a variant that compares captions too ({others}), or give clips with subtitles"
        )
    logger.warning("variant=%s: no clip has a %s; its terms with them are 0", variant, absent)


def build_model(config: TrainConfig, resumed: Path | None) -> tuple[CLIPViPModel, CLIPViPProcessor]:
    """The model in fp32 and its processor: of the checkpoint, of model.name, or new. What the
    configuration says of how clips are read, the processor does from here on."""
    source = config.model.name if resumed is None else str(resumed / "model")
    if source is not None:
        with _given("model.name", source):
            if not Path(source).is_file():  # the authors' heads are of 64
                _check_heads("model.name", CLIPViPConfig.from_pretrained(source), config.backend)
            model = CLIPViPModel.from_pretrained(
                source, attention_backend=config.backend, dtype=torch.float32
            )
    else:
        model = _new_model(config)
    processor = build_processor(config, model.config, resumed)
    if config.model.gradient_checkpointing:
        # transformers renamed it within version 5
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    freeze(model, config.model.freeze, config.model.unfreeze)
    if config.compile:
        parallel.compile_layers(model)
    return model.train(), processor


def build_processor(
    config: TrainConfig, shapes: CLIPViPConfig, resumed: Path | None = None
) -> CLIPViPProcessor:
    """The processor that build_model makes, for a model of these shapes."""
    source = config.model.name if resumed is None else str(resumed / "model")
    tokenizer = config.model.tokenizer if resumed is None else None
    if source is None:
        processor = CLIPViPProcessor(_tokenizer(config))
    else:
        with _given("model.tokenizer" if tokenizer else "model.name", tokenizer or source):
            processor = CLIPViPProcessor.from_pretrained(source, tokenizer=tokenizer)
    processor.fit(shapes)
    longest = shapes.text_config.max_position_embeddings
    for name in READING:
        chosen = getattr(config.data, name)
        if chosen is not None:
            setattr(processor, name, chosen)
    if processor.text_length > longest:
        raise ConfigError(
            f"data.text_length is {processor.text_length}; the model reads at most {longest}"
        )
    return processor


def settled(config: TrainConfig, processor: CLIPViPProcessor) -> TrainConfig:
    """The configuration, with what it leaves to the model's processor filled in."""
    read = {name: getattr(processor, name) for name in READING}
    return replace(config, data=replace(config.data, **read))


def model_config(config: TrainConfig) -> CLIPViPConfig:
    """The shapes of what build_model makes, without weights where those are not in one file."""
    name = config.model.name
    if name is None:
        return _new_config(config, _tokenizer(config))
    with _given("model.name", name):
        if Path(name).suffix in AUTHORS_SUFFIXES:
            return infer_config(read_authors_checkpoint(name), name)
        shapes = CLIPViPConfig.from_pretrained(name)
    _check_heads("model.name", shapes, config.backend)
    return shapes


def _tokenizer(config: TrainConfig) -> CLIPTokenizer:
    with _given("model.tokenizer", str(config.model.tokenizer)):
        return load_tokenizer(str(config.model.tokenizer))


@contextmanager
def _given(key: str, value: str) -> Iterator[None]:
    """Around a load of `value`: a ConfigError that names the key where there is no such thing, it
    has no tokenizer, or one of its files is damaged."""
    kind: Any = "tokenizer" if key == "model.tokenizer" else "model"
    try:
        with found(key, value, kind=kind, error=ConfigError):
            try:
                yield
            except NoTokenizer:
                if not Path(value).exists():
                    raise  # says found
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
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    given["text_config"] = text | dict(given.get("text_config") or {})
    given["vision_config"] = {
        **(given.get("vision_config") or {}),
        "attention_backend": config.backend,
    }
    try:
        shapes = CLIPViPConfig(**given)
    except Exception as error:  # validators raise errors of their own
        raise ConfigError(f"model.config: {' '.join(str(error).split())}") from None
    _check_heads("model.config", shapes, config.backend)
    return shapes


def _check_heads(key: str, shapes: CLIPViPConfig, backend: str) -> None:
    """ConfigError where the video tower's attention cannot run with this backend."""
    width, heads = shapes.vision_config.hidden_size, shapes.vision_config.num_attention_heads
    proxy = torch.zeros(1, 3, 1, width // heads)
    try:  # the op knows which sizes it takes
        proxy_attention(proxy, torch.zeros(2, dtype=torch.int32), 1, 1, backend=backend)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ConfigError(
            f"{key}: vision_config has heads of {width // heads} (hidden_size {width} / "
            f"num_attention_heads {heads}), which the compiled attention does not take ({reason}); "
            "give backend=reference, which takes any, or other shapes"
        ) from None


def _new_model(config: TrainConfig) -> CLIPViPModel:
    shapes = _new_config(config, _tokenizer(config))
    try:
        return CLIPViPModel(shapes)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.config: {error}") from None


def training_loader(
    config: TrainConfig,
    clips: list[Clip] | Shards,
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
) -> ClipLoader:
    micro, data = config.batch_size // config.accumulation, config.data
    if len(clips) < micro:
        given = data.train or "data.sources"
        raise ConfigError(
            f"{given} holds {len(clips)} clips, fewer than one micro-batch of {micro}"
        )
    options = LoaderOptions(
        tokenizer=processor.tokenizer,
        task=config.task,
        batch_size=micro // distributed.world_size(),
        seed=config.seed,
        num_workers=data.num_workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        max_bad_share=data.max_bad_share,
        bad_files=Path(config.out) / "bad_files.jsonl",
        decoder=data.decoder,
        **processor.loading(),
    )
    if isinstance(clips, Shards):
        return build_shard_loader(
            clips, options, paragraph=processor.paragraph, shuffle=data.shuffle
        )
    return build_loader(with_texts_read(clips, processor.paragraph), options, training=True)
