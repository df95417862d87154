"""Settings of a run: typed dataclasses, filled from YAML files and `key=value` overrides.

A configuration may be a small diff from another: `base: other.yaml` at its top loads that file
first, from the same folder or by the name of a packaged one.
"""

import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipvip import caption_metrics
from clipvip.data import DECODERS
from clipvip.data.shards import is_shards
from clipvip.data.video import check_sampling
from clipvip.losses import VARIANTS
from clipvip.model.configuration import DECODER_TOKENS
from clipvip.ops.resize_crop import RESIZES
from clipvip.retrieval import METRICS, TABLES
from clipvip.training.sources import SourceConfig, check_sources


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line and says what to change."""


class TrainingError(RuntimeError):
    """A run that cannot continue; the message is one line and says why, the same on all ranks."""


class Preempted(RuntimeError):
    """The end of a run on all ranks by SIGTERM, after it saved its state; one line says so."""


@dataclass
class LoraConfig:
    """Low-rank adaptation (LoRA, arXiv 2106.09685) by PEFT, with PEFT's defaults."""

    r: int = 8  # rank of the trained change of each weight
    alpha: float = 8  # the change is scaled by alpha / r
    dropout: float = 0.0  # of the inputs of the change, in training
    # Linear layers that are changed: ends of their names such as fc1, or globs such as
    # "vision_model.*.fc?".
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass
class DecoderConfig:
    """Language model that writes captions, task captioning alone. Give `name` or `config`, not
    both; neither if model.name has a decoder that is to be trained further."""

    # Folder or hub name of a language model, GPT-2 or BERT; cross-attention is added to it.
    name: str | None = None
    # Shapes of a new decoder, such as {model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4}. It
    # starts from random weights, and reads texts by the model's own tokenizer.
    config: dict[str, Any] | None = None
    # Tokens of a video that it attends to: "proxies", or "all" for proxies and patches. By default
    # those that the decoder of model.name was trained with, or proxies.
    tokens: str | None = None


@dataclass
class ModelConfig:
    """Model to train. Give `name` or `config`, not both."""

    # Folder of a CLIP or CLIP-ViP, hub name, or a file of weights (`clipvip convert --help`).
    name: str | None = None
    # Shapes of a new model, as nested keys of CLIPViPConfig; it starts from random weights.
    config: dict[str, Any] | None = None
    # Folder or hub name of a tokenizer or processor; by default that of `name`.
    tokenizer: str | None = None
    # Side of the frames in pixels, by default that of `name` or `config`. For another one, the
    # positions of patches are interpolated. A run that resumes keeps the size it began with.
    image_size: int | None = None
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass: less memory
    # Globs of parameter names that are not trained; for the text tower ["text_model.*",
    # "text_projection.*"].
    freeze: list[str] = field(default_factory=list)
    unfreeze: list[str] = field(default_factory=list)  # globs of exceptions from `freeze`
    # Train low-rank changes of linear layers, what CLIP lacks (proxies, temporal embedding), and
    # logit_scale; all else is frozen, except for what `unfreeze` names. {} for the defaults.
    lora: LoraConfig | None = None
    decoder: DecoderConfig | None = None  # that a captioner is given; null for that of `name`


@dataclass
class DataConfig:
    """Clips to train and validate on, and how they are read."""

    # Annotations (JSON Lines); or shards as "clips/{00000..00099}.tar", their folder, or their
    # manifest, also at any fsspec URL. Give this or `sources`.
    train: str | None = None
    sources: list[SourceConfig] = field(default_factory=list)  # several, mixed by ratios
    shuffle: int = 1024  # encoded clips from shards that each rank holds in memory to shuffle among
    # Annotations of the clips by which the best checkpoint is chosen. Do not use the test set: a
    # score on the clips that chose the checkpoint is too high.
    validation: str | None = None
    # Frames per clip. The default of this and the next four settings is the value in the model's
    # processor (for a plain CLIP 12, 77, false, uniform, crop). The run's processor saves them.
    num_frames: int | None = None
    # Tokens per text; longer texts are truncated. Beyond the positions of the model, its positions
    # are interpolated to this number (not for captioning, whose decoder reads the texts).
    text_length: int | None = None
    paragraph: bool | None = None  # join all texts of a clip into one, also in evaluation
    # Which frames are read: "uniform", "fps:R", "clip:R", or "authors", as in the authors' code.
    sampling: str | None = None
    # How frames are made square: "crop" (as in CLIP), "pad", or "squash" (as in the authors' code).
    resize: str | None = None
    num_workers: int = 4  # decoding processes per rank
    # "dali", "pyav", or "auto": NVIDIA DALI if it is installed and starts on a GPU, otherwise PyAV.
    # Both give the same clips and frames; PyAV decodes the files that DALI cannot.
    decoder: str = "auto"
    max_bad_share: float = 0.05  # a run with a higher share of unreadable clips stops

    @property
    def reads_shards(self) -> bool:
        """Whether the training clips are in shards, and not listed by annotations."""
        if self.train is None:
            return self.sources[0].clips is None
        return is_shards(self.train)


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-6  # highest learning rate
    # The same of a captioner's decoder and of the bridge to it; by default `lr`.
    decoder_lr: float | None = None
    weight_decay: float = 0.2  # weight decay, except for biases, LayerNorms and logit_scale
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0  # norm to which the gradients are clipped, all together
    layer_decay: float = 1.0  # factor of each layer's learning rate relative to the layer above it
    warmup: float = 0.01  # share of steps in which the rate rises linearly; a cosine to 0 follows


@dataclass
class TrainConfig:
    """A run of post-pretraining or fine-tuning."""

    out: str = MISSING  # folder for checkpoints, metrics.jsonl, bad_files.jsonl, tensorboard
    # "omnisource" (post-pretraining), or fine-tuning for "retrieval" or "captioning"
    task: str = "retrieval"
    variant: str = "vsc_fc"  # omnisource loss: "vs", "vsc" or "vs_vc", each also with "_fc"
    label_smoothing: float = 0.1  # captioning loss: share of the target spread over all tokens
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    # Clips per optimizer step, over all ranks and backward passes. The negatives of a clip are the
    # others of its backward pass, which holds batch_size / accumulation clips, at least 2 (1 for
    # captioning, which compares no clips).
    batch_size: int = 128
    accumulation: int = 1  # backward passes per optimizer step
    # Clips that a rank embeds at a time (gradient caching). The negatives remain the same. Memory
    # then does not grow with the batch, at the price of one more forward pass.
    micro_batch: int | None = None
    epochs: float | None = None  # passes over the clips; give this or max_steps
    max_steps: int | None = None  # optimizer steps
    mixed_precision: str = "bf16"  # "bf16" (autocast over fp32 weights) or "no" (fp32)
    parallel: str = "ddp"  # each rank holds all weights ("ddp") or a share of them ("fsdp")
    # Layers that torch.compile compiles, once for any number of frames: "none", those of the "text"
    # tower, or "all". Vision layers then use PyTorch's elementwise work instead of our kernels'.
    compile: str = "none"
    # Decay of an average of the weights, such as 0.9999; the average is validated and saved.
    ema: float | None = None
    backend: str = "native"  # attention and loss: "native" (compiled) or "reference" (PyTorch)
    seed: int = 42
    # Ask PyTorch for deterministic algorithms. On a GPU, only then does a resumed run equal an
    # uninterrupted one bit for bit; it is slower there.
    deterministic: bool = False
    # Seconds of silence from a rank after which the others end and name it. A rank that is slow but
    # alive is not silent.
    lost_after: float = 20.0
    timeout: float = 1800.0  # seconds that ranks wait for a rank that is alive
    # What to do if a loss or gradient is NaN or infinite: "stop", or "skip" the optimizer step and
    # stop after ten such steps in a row. The clips of such a step are named.
    on_nonfinite: str = "stop"
    # Where metrics go besides metrics.jsonl: tensorboard, wandb, mlflow or others of accelerate.
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 1  # steps between rows of metrics
    eval_every: int | None = None  # steps between validations; by default one epoch
    save_every: int | None = None  # steps between checkpoints; by default one epoch
    eval_batch_size: int = 32  # clips that a rank embeds at a time in a validation
    keep_checkpoints: int = 2  # number of latest checkpoints that are kept, besides the best one
    # Validation metric that chooses the best checkpoint, by default "text_to_video/R@1", or
    # "captions/CIDEr" for captioning.
    best_metric: str | None = None
    # "latest" resumes from the newest checkpoint in `out`, or starts a new run if there is none;
    # "never" refuses a folder that holds a run.
    resume: str = "never"


# Pairs of settings for one thing: given in a higher layer, one replaces the other. model.name and
# model.config are no such pair: a key of model.config above a name may be meant for the named
# model, and would silently start a new one from random weights.
_EXCLUSIVE = (
    ("epochs", "max_steps"),
    ("data.train", "data.sources"),
    ("model.decoder.name", "model.decoder.config"),
)

_CHOICES = {
    "task": ("omnisource", "retrieval", "captioning"),
    "variant": VARIANTS,
    "mixed_precision": ("no", "bf16"),
    "parallel": ("ddp", "fsdp"),
    "compile": ("none", "text", "all"),
    "resume": ("never", "latest"),
    "on_nonfinite": ("stop", "skip"),
    "backend": ("native", "reference"),
    "data.decoder": DECODERS,
    "data.resize": RESIZES,
}
_POSITIVE = (
    "model.image_size", "data.num_frames", "data.shuffle", "batch_size",
    "accumulation", "micro_batch", "epochs", "max_steps", "log_every", "eval_every", "save_every",
    "eval_batch_size", "keep_checkpoints", "optimizer.lr", "optimizer.decoder_lr",
    "optimizer.max_grad_norm",
)  # fmt: skip
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(_POSITIVE, ("above 0", lambda value: value > 0)),
    "ema": ("between 0 and 1", lambda value: 0 < value < 1),
    # Below 2, tokenizers do not truncate at all; with 2, a text is a start and an end token.
    "data.text_length": ("at least 3", lambda value: value >= 3),
    "label_smoothing": ("in [0, 1)", lambda value: 0 <= value < 1),
    "optimizer.layer_decay": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "optimizer.warmup": ("in [0, 1)", lambda value: 0 <= value < 1),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Merge a file, its bases below it and the overrides above it into one checked TrainConfig.

    Where two settings exclude each other, the one in a higher layer replaces the other.

    path: a YAML file, or the name of a packaged configuration such as "msrvtt".
    overrides: "key=value" with dotted keys, such as "optimizer.lr=1e-5".
    Raises ConfigError if a key is unknown (the message suggests the nearest one), a value has
    another type, a required key is missing, or values contradict each other.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    merged = OmegaConf.structured(TrainConfig)
    whole = TrainConfig(model=ModelConfig(lora=LoraConfig(), decoder=DecoderConfig()))
    known = _settings(OmegaConf.structured(whole))
    layers = [*_layers(find_config(path), ())]
    try:
        layers.append(("command line", OmegaConf.from_dotlist(list(overrides))))
    except Exception as error:
        raise ConfigError(f"command line: {_first_line(error)}") from None
    for source, layer in layers:
        for key, value in _settings(layer).items():
            # Shapes are checked when the model is built.
            if not key.startswith(("model.config.", "model.decoder.config.")):
                refuse_unknown_key(key, list(known), source)
                _check_kind(key, value, known, source)
        try:
            merged = OmegaConf.merge(_without_replaced(merged, layer, source), layer)
        except OmegaConfBaseException as error:
            where = getattr(error, "full_key", None)
            raise ConfigError(f"{source}: {where}: {_first_line(error)}") from None
    try:
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{missing[0]} is required: give it as {missing[0]}=VALUE")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    assert isinstance(config, TrainConfig)
    if config.mixed_precision == "False":  # YAML's reading of a bare no
        config.mixed_precision = "no"
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """Raise ConfigError if values are out of range or contradict each other."""
    given = flat(config)
    for key, choices in _CHOICES.items():
        if given[key] not in (*choices, None):
            raise ConfigError(f"{key} is {given[key]!r}; it must be one of {', '.join(choices)}")
    for key, (expected, fits) in _RANGES.items():
        if given[key] is not None and not fits(given[key]):
            raise ConfigError(f"{key} is {given[key]}; it must be {expected}")
    if config.data.sampling is not None:
        try:
            check_sampling(config.data.sampling)
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None
    if (config.epochs is None) == (config.max_steps is None):
        raise ConfigError(
            f"give either epochs or max_steps: epochs is {config.epochs}, "
            f"max_steps is {config.max_steps}"
        )
    _check_captioning(config)
    if config.task != "captioning" and config.batch_size < 2 * config.accumulation:
        raise ConfigError(
            f"batch_size is {config.batch_size} and accumulation {config.accumulation}; a clip is "
            "compared with the others of its backward pass, which holds batch_size / accumulation "
            "clips, and learns nothing alone: give batch_size of at least 2 × accumulation, "
            f"{2 * config.accumulation}"
        )
    data, model = config.data, config.model
    if model.lora is not None:
        lora = model.lora
        for key, good, expected in (
            ("r", lora.r >= 1, "at least 1"),
            ("alpha", lora.alpha > 0, "above 0"),
            ("dropout", 0 <= lora.dropout < 1, "in [0, 1)"),
            ("targets", bool(lora.targets), "a list with at least one name"),
        ):
            if not good:
                value = getattr(lora, key)
                raise ConfigError(f"model.lora.{key} is {value}; it must be {expected}")
    if data.train is None and not data.sources:
        raise ConfigError("data.train is required: give it as data.train=VALUE")
    if data.train is not None and data.sources:
        raise ConfigError("give either data.train or data.sources, not both")
    try:
        check_sources(data.sources)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from None
    if model.name is None and model.config is None:
        raise ConfigError(
            "model.name is empty; expected the folder of a model, a file of weights or a name "
            "on the Hugging Face hub such as openai/clip-vit-base-patch32; or give model.config, "
            "the shapes of a new model"
        )
    if model.name is not None and model.config is not None:
        raise ConfigError(
            "give either model.name (a checkpoint) or model.config (a new model); model.name=null "
            "or model.config=null removes the one that a file gives"
        )
    if model.config is not None and model.tokenizer is None:
        raise ConfigError("model.config needs model.tokenizer, the folder of a CLIP tokenizer")


def best_metrics(config: TrainConfig) -> tuple[str, ...]:
    """Return the validation metrics of a configuration's task, the default of best_metric first."""
    if config.task != "captioning":
        return tuple(f"{table}/{metric}" for table in TABLES for metric in METRICS)
    metrics = sorted(caption_metrics.METRICS, key=lambda metric: metric != "CIDEr")
    return tuple(f"captions/{metric}" for metric in metrics)


def _check_captioning(config: TrainConfig) -> None:
    """Raise ConfigError if settings belong to another task, or contradict each other."""
    metrics, decoder = best_metrics(config), config.model.decoder
    if config.best_metric not in (*metrics, None):
        raise ConfigError(
            f"best_metric is {config.best_metric!r}; it must be one of {', '.join(metrics)}"
        )
    if config.task != "captioning":
        for key, value in (
            ("model.decoder", decoder),
            ("optimizer.decoder_lr", config.optimizer.decoder_lr),
        ):
            if value is not None:
                raise ConfigError(f"{key} is of task=captioning; leave it out for {config.task}")
        return
    new = decoder is not None and (decoder.name is not None or decoder.config is not None)
    if config.model.name is None and not new:
        raise ConfigError(
            "task=captioning needs a decoder: give model.decoder.name, such as gpt2, or "
            "model.decoder.config, the shapes of a new one"
        )
    if decoder is None:
        return
    if decoder.name is not None and decoder.config is not None:
        raise ConfigError(
            "give either model.decoder.name (a language model) or model.decoder.config (a new "
            "one), not both"
        )
    if decoder.tokens not in (*DECODER_TOKENS, None):
        raise ConfigError(
            f"model.decoder.tokens is {decoder.tokens!r}; it must be one of "
            f"{', '.join(DECODER_TOKENS)}"
        )


def check_batch(config: TrainConfig, processes: int) -> None:
    """Raise ConfigError if batch_size cannot be divided evenly among so many processes."""
    parts = processes * config.accumulation
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size is {config.batch_size}; it must be a multiple of {parts} "
            f"({processes} processes × accumulation {config.accumulation})"
        )


def find_config(name: str | Path) -> Path:
    """Return the file of that path, or the packaged configuration of that name (with or without
    .yaml). Raises ConfigError if there is neither."""
    path = Path(name)
    if path.is_file():
        return path
    packaged = {entry.stem: entry for entry in packaged_configs()}
    stem = path.name.removesuffix(".yaml")
    if path.parent == Path() and stem in packaged:
        return packaged[stem]
    raise ConfigError(
        f"no configuration {str(name)!r}: neither a file nor one of {', '.join(sorted(packaged))}"
    )


def packaged_configs() -> list[Path]:
    return sorted(Path(str(resources.files("clipvip.configs"))).glob("*.yaml"))


def refuse_unknown_key(key: str, known: Sequence[str], source: str) -> None:
    """Raise ConfigError if a dotted key is not known; suggest the nearest one that is."""
    if key in known:
        return
    leaves: dict[str, str] = {}
    for name in known:
        leaves.setdefault(name.rpartition(".")[2], name)
    near = difflib.get_close_matches(key, known, 1) or [
        leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], leaves, 1)
    ]
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
    raise ConfigError(f"{source}: unknown key {key}{hint}")


def _layers(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, DictConfig]]:
    """Yield the name and content of a file's bases, lowest first, and of the file itself."""
    path = path.resolve()
    if path in above:
        raise ConfigError(f"{path} is its own base")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # yaml's errors have no common base in omegaconf
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: holds a list; expected keys and values")
    base = layer.pop("base", None)
    if base is not None:
        beside = path.parent / str(base)
        yield from _layers(beside if beside.is_file() else find_config(str(base)), (*above, path))
    yield path.name, layer


def _without_replaced(below: DictConfig, layer: DictConfig, source: str) -> DictConfig:
    """Return the layers below without the settings that this layer replaces by their other form."""
    given, kept = _settings(layer), copy.deepcopy(below)
    for pair in _EXCLUSIVE:
        here = [key for key in pair if given.get(key)]
        if len(here) > 1:
            raise ConfigError(f"{source}: give either {pair[0]} or {pair[1]}, not both")
        for key in here:
            (other,) = set(pair) - {key}
            if OmegaConf.select(kept, other) is not None:
                OmegaConf.update(kept, other, [] if other == "data.sources" else None)
    return kept


def _settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a layer, and its groups of values, by dotted keys."""
    if isinstance(tree, DictConfig):
        tree = OmegaConf.to_container(tree, resolve=False)
    settings: dict[str, Any] = {}
    for name, value in tree.items():
        settings[f"{prefix}{name}"] = value
        if isinstance(value, dict):
            settings |= _settings(value, f"{prefix}{name}.")
    return settings


def _check_kind(key: str, value: Any, known: dict[str, Any], source: str) -> None:
    """Raise ConfigError if a setting is a list or a group of settings, and `value` is not."""
    kind = type(known[key])
    if kind not in (dict, list) or isinstance(value, kind | None) or "${" in str(value):
        return
    like = f"a list, such as {key}=[{value}]"
    if kind is dict:
        like = f"settings, such as {next(name for name in known if name.startswith(f'{key}.'))}"
    raise ConfigError(f"{source}: {key} is {value!r}; expected {like}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def flat(config: TrainConfig) -> dict[str, Any]:
    """Return the settings by dotted keys."""
    settings: dict[str, Any] = {}
    for key, value in asdict(config).items():
        group = value if isinstance(value, dict) else {}
        settings |= {f"{key}.{name}": inner for name, inner in group.items()} or {key: value}
    return settings
