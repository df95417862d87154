"""Settings of a run: typed dataclasses, filled from YAML files and `key=value` overrides.

A configuration may be a small diff from another: `base: other.yaml` at its top loads that file
first, from the same folder or by the name of a packaged one.
"""

import copy
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipvip.data import DECODERS
from clipvip.data.video import check_sampling
from clipvip.losses import VARIANTS
from clipvip.ops.resize_crop import RESIZES
from clipvip.retrieval import METRICS, TABLES


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line and says what to change."""


class TrainingError(RuntimeError):
    """A run that cannot continue; the message is one line and says why, the same on all ranks."""


class Preempted(RuntimeError):
    """The end of a run on all ranks by SIGTERM, after it saved its state; one line says so."""


@dataclass
class ModelConfig:
    """Model to train. Give `name` or `config`, not both."""

    name: str | None = None
    """Folder of a CLIP or CLIP-ViP, hub name, or one of the authors' .pt files."""
    config: dict[str, Any] | None = None
    """Shapes of a new model, as nested keys of CLIPViPConfig; it starts from random weights."""
    tokenizer: str | None = None
    """Folder or hub name of a tokenizer or processor; by default that of `name`."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its intermediate results."""
    freeze: list[str] = field(default_factory=list)
    """Globs of parameter names that are not trained; for the text tower
    ["text_model.*", "text_projection.*"]."""
    unfreeze: list[str] = field(default_factory=list)
    """Globs of parameter names that are trained although `freeze` matches them."""


@dataclass
class SourceConfig:
    """One of several sets of shards to train from."""

    shards: str = MISSING
    """Shards, in the forms that data.train allows."""
    ratio: float = 1.0
    """Share of clips from this source, relative to the ratios of the others."""


@dataclass
class DataConfig:
    """Clips to train and validate on, and how they are read."""

    train: str | None = None
    """Annotations (JSON Lines); or shards as "clips/{00000..00099}.tar", their folder, or their
    manifest, also at any fsspec URL. Give this or `sources`; in layers of configurations, the
    higher layer's choice replaces the lower one's."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sets of shards, mixed by their ratios."""
    shuffle: int = 1024
    """Encoded clips from shards that each rank holds in memory to shuffle among."""
    validation: str | None = None
    """Annotations of the clips by which the best checkpoint is chosen. Do not use the test set: a
    score on the clips that chose the checkpoint is too high."""
    num_frames: int | None = None
    """Frames per clip. The default of this and the next four settings is the value in the model's
    processor (for a plain CLIP 12, 77, false, uniform, crop). The run's processor saves them."""
    text_length: int | None = None
    """Tokens per text; longer texts are truncated."""
    paragraph: bool | None = None
    """Join all texts of a clip into one paragraph, in training and evaluation."""
    sampling: str | None = None
    """Which frames are read: "uniform", "fps:R", "clip:R", or "authors", as in the authors'
    code."""
    resize: str | None = None
    """How frames are made square: "crop" (as in CLIP), "pad", or "squash" (as in the authors'
    code)."""
    num_workers: int = 4
    """Decoding processes per rank."""
    decoder: str = "auto"
    """"dali", "pyav", or "auto": NVIDIA DALI if it is installed and starts on a GPU, otherwise
    PyAV. Both give the same clips and frames; PyAV decodes the files that DALI cannot."""
    max_bad_share: float = 0.05
    """Share of clips that may be unreadable; a run with more of them stops."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-6
    """Highest learning rate."""
    weight_decay: float = 0.2
    """Weight decay, except for biases, LayerNorms and logit_scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    """Norm to which the gradients are clipped, all together."""
    layer_decay: float = 1.0
    """Factor of each layer's learning rate relative to the layer above it."""
    warmup: float = 0.01
    """Share of all steps in which the rate rises linearly; a cosine to 0 follows."""


@dataclass
class TrainConfig:
    """A run of post-pretraining or fine-tuning."""

    out: str = MISSING
    """Folder of the run: checkpoints, metrics.jsonl, bad_files.jsonl, tensorboard."""
    task: str = "retrieval"
    """"omnisource" (post-pretraining) or "retrieval" (fine-tuning)."""
    variant: str = "vsc_fc"
    """Variant of the omnisource loss: "vs", "vsc" or "vs_vc", each also with "_fc"."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 128
    """Clips per optimizer step, over all ranks and accumulated micro-batches. The negatives of a
    clip are the other clips of its backward pass, which holds batch_size / accumulation clips, at
    least 2."""
    accumulation: int = 1
    """Backward passes per optimizer step."""
    micro_batch: int | None = None
    """Clips that a rank embeds at a time, while the negatives remain those of the whole backward
    pass (gradient caching). Memory then does not grow with the batch, at the price of one more
    forward pass."""
    epochs: float | None = None
    """Passes over the clips. Give this or max_steps; in layers of configurations, the higher
    layer's choice replaces the lower one's."""
    max_steps: int | None = None
    """Optimizer steps."""
    mixed_precision: str = "bf16"
    """"bf16" (autocast over fp32 weights) or "no" (fp32)."""
    parallel: str = "ddp"
    """How weights lie on several ranks: each holds all of them ("ddp") or a share ("fsdp")."""
    compile: bool = False
    """Compile the towers' layers with torch.compile, once for any number of frames."""
    ema: float | None = None
    """Decay of an average of the weights, such as 0.9999, which is then validated and saved."""
    backend: str = "native"
    """Implementation of attention and loss: "native" (compiled) or "reference" (plain PyTorch)."""
    seed: int = 42
    deterministic: bool = False
    """Ask PyTorch for deterministic algorithms. On a GPU, only then does a resumed run equal an
    uninterrupted one bit for bit; it is slower there."""
    lost_after: float = 20.0
    """Seconds of silence from the process of a rank after which the other ranks end and name it. A
    rank that is slow but alive is not silent."""
    timeout: float = 1800.0
    """Seconds that ranks wait for a rank that is alive."""
    on_nonfinite: str = "stop"
    """What to do if a loss or gradient is NaN or infinite: "stop", or "skip" the optimizer step and
    stop only after ten such steps in a row. In both cases the clips of the step are named."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where metrics go besides metrics.jsonl, by accelerate's names: tensorboard, wandb, mlflow,
    trackio, …"""
    log_every: int = 1
    """Steps between rows of metrics."""
    eval_every: int | None = None
    """Steps between validations; by default one epoch."""
    save_every: int | None = None
    """Steps between checkpoints; by default one epoch."""
    eval_batch_size: int = 32
    """Clips that a rank embeds at a time in a validation."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints that are kept, besides the best one."""
    best_metric: str = "text_to_video/R@1"
    """Validation metric by which the best checkpoint is chosen."""
    resume: str = "never"
    """"latest" resumes from the newest checkpoint in `out`, or starts a new run if there is none;
    "never" refuses a folder that holds a run."""


# Pairs of settings for one thing: in a higher layer, one replaces the other. model.name and
# model.config are no such pair: a key of model.config above a name may be meant for the named
# model, and would silently start a new one from random weights.
_EXCLUSIVE = (("epochs", "max_steps"), ("data.train", "data.sources"))

_CHOICES = {
    "task": ("omnisource", "retrieval"),
    "variant": VARIANTS,
    "mixed_precision": ("no", "bf16"),
    "parallel": ("ddp", "fsdp"),
    "resume": ("never", "latest"),
    "on_nonfinite": ("stop", "skip"),
    "backend": ("native", "reference"),
    "data.decoder": DECODERS,
    "data.resize": RESIZES,
    "best_metric": tuple(f"{table}/{metric}" for table in TABLES for metric in METRICS),
}
_POSITIVE = (
    "data.num_frames", "data.text_length", "data.shuffle", "batch_size", "accumulation",
    "micro_batch", "epochs", "max_steps", "log_every", "eval_every", "save_every",
    "eval_batch_size", "keep_checkpoints", "optimizer.lr", "optimizer.max_grad_norm",
)  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Merge a file, its bases below it and the overrides above it into one checked TrainConfig.

    Of epochs and max_steps, and of data.train and data.sources, the one given in a higher layer
    replaces the other.

    Args:
        path: a YAML file, or the name of a packaged configuration such as "msrvtt".
        overrides: "key=value" with dotted keys, such as "optimizer.lr=1e-5".

    Raises:
        ConfigError: a key is unknown (the message suggests the nearest one), a value has another
            type, a required key is missing, or values contradict each other, such as epochs and
            max_steps in one layer.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
    schema = OmegaConf.structured(TrainConfig)
    merged = schema
    layers = [*_layers(find_config(path), ())]
    try:
        layers.append(("command line", OmegaConf.from_dotlist(list(overrides))))
    except Exception as error:
        raise ConfigError(f"command line: {_first_line(error)}") from None
    for source, layer in layers:
        _refuse_unknown(layer, schema, source)
        try:
            merged = OmegaConf.merge(_without_replaced(merged, layer, source), layer)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None)
            raise ConfigError(f"{source}: {key}: {_first_line(error)}") from None
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
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
    for key in _POSITIVE:
        if given[key] is not None and given[key] <= 0:
            raise ConfigError(f"{key} is {given[key]}; it must be above 0")
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
    if config.batch_size < 2 * config.accumulation:
        raise ConfigError(
            f"batch_size is {config.batch_size} and accumulation {config.accumulation}; a clip is "
            "compared with the others of its backward pass, which holds batch_size / accumulation "
            "clips, and learns nothing alone: give batch_size of at least 2 × accumulation, "
            f"{2 * config.accumulation}"
        )
    if config.data.train is None and not config.data.sources:
        raise ConfigError("data.train is required: give it as data.train=VALUE")
    if config.data.train is not None and config.data.sources:
        raise ConfigError("give either data.train or data.sources, not both")
    for source in config.data.sources:
        if not source.ratio > 0:
            raise ConfigError(f"data.sources: ratio is {source.ratio}; it must be above 0")
    if config.model.name is None and config.model.config is None:
        raise ConfigError(
            "model.name is empty; expected the folder of a model, an authors' .pt file or a name "
            "on the Hugging Face hub such as openai/clip-vit-base-patch32; or give model.config, "
            "the shapes of a new model"
        )
    if config.model.name is not None and config.model.config is not None:
        raise ConfigError(
            "give either model.name (a checkpoint) or model.config (a new model); model.name=null "
            "or model.config=null removes the one that a file gives"
        )
    if config.model.config is not None and config.model.tokenizer is None:
        raise ConfigError("model.config needs model.tokenizer, the folder of a CLIP tokenizer")
    if config.ema is not None and not 0 < config.ema < 1:
        raise ConfigError(f"ema is {config.ema}; it must be between 0 and 1")
    if not 0 < config.optimizer.layer_decay <= 1:
        decay = config.optimizer.layer_decay
        raise ConfigError(f"optimizer.layer_decay is {decay}; it must be above 0 and at most 1")
    if not 0 <= config.optimizer.warmup < 1:
        raise ConfigError(f"optimizer.warmup is {config.optimizer.warmup}; it must be in [0, 1)")


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
    folder = Path(str(resources.files("clipvip.configs")))
    return sorted(folder.glob("*.yaml"))


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


def _refuse_unknown(layer: DictConfig, schema: DictConfig, source: str) -> None:
    known = list(_keys(schema))
    for key in _keys(layer):
        if not key.startswith("model.config."):  # checked when the model is built
            refuse_unknown_key(key, known, source)


def _without_replaced(below: DictConfig, layer: DictConfig, source: str) -> DictConfig:
    """Return the layers below without the settings that this layer replaces by their other form."""
    given = OmegaConf.to_container(layer, resolve=False)
    kept = copy.deepcopy(below)
    for pair in _EXCLUSIVE:
        here = [key for key in pair if _at(given, key)]
        if len(here) > 1:
            raise ConfigError(f"{source}: give either {pair[0]} or {pair[1]}, not both")
        for key in here:
            (other,) = set(pair) - {key}
            OmegaConf.update(kept, other, [] if other == "data.sources" else None)
    return kept


def _at(tree: Any, key: str) -> Any:
    """Return the value at a dotted key; None if there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, config):
        yield f"{prefix}{name}"
        if OmegaConf.is_missing(config, name) or OmegaConf.is_interpolation(config, name):
            continue
        if isinstance(config[name], DictConfig):
            yield from _keys(config[name], f"{prefix}{name}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def flat(config: TrainConfig) -> dict[str, Any]:
    """Return the settings by dotted keys."""
    settings: dict[str, Any] = {}
    for key, value in asdict(config).items():
        if isinstance(value, dict):
            settings.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            settings[key] = value
    return settings
