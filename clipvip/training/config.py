"""What a run is: typed dataclasses, filled from YAML files and `key=value` overrides.

A configuration may be a small diff from another: `base: other.yaml` at its top loads that
file first (beside it, or by the name of a packaged one).
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
from clipvip.data.shards import is_shards
from clipvip.data.video import check_sampling
from clipvip.losses import VARIANTS
from clipvip.ops.resize_crop import RESIZES
from clipvip.retrieval import METRICS, TABLES


class ConfigError(ValueError):
    """A configuration that cannot be run; one line that says what to change."""


class TrainingError(RuntimeError):
    """A run that cannot go on; one line that says why and where, the same on all ranks."""


class Preempted(RuntimeError):
    """SIGTERM ended a run, on all ranks, after it saved where it stood; one line that says so."""


@dataclass
class ModelConfig:
    """Give `name` or `config`, not both."""

    name: str | None = None
    """CLIP or CLIP-ViP folder, hub name, or an authors' .pt file."""
    config: dict[str, Any] | None = None
    """A CLIPViPConfig as nested keys: a new model, trained from nothing."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer or processor; by default that of `name`."""
    gradient_checkpointing: bool = False
    freeze: list[str] = field(default_factory=list)
    """Globs of names of parameters that are not trained; the text tower is
    ["text_model.*", "text_projection.*"]."""
    unfreeze: list[str] = field(default_factory=list)
    """Globs of those to train all the same."""


@dataclass
class SourceConfig:
    """Shards that are trained from together with others."""

    shards: str = MISSING
    """As data.train."""
    ratio: float = 1.0
    """Share of clips, relative to the other sources' ratios."""


@dataclass
class DataConfig:
    train: str | None = None
    """Annotations (JSON Lines); or shards: "clips/{00000..00099}.tar", their folder or manifest,
    also at any fsspec URL. Give this or `sources`; the one given last replaces the other."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sets of shards, mixed."""
    shuffle: int = 1024
    """Encoded clips of shards that each rank holds in memory to shuffle among."""
    validation: str | None = None
    """Annotations that choose the best checkpoint. Not the test set: a figure measured on
    the clips that chose the checkpoint is too good."""
    num_frames: int | None = None
    """Frames of a clip. This and the next four: by default as the model's processor says (of a
    plain CLIP 12, 77, false, uniform, crop); they are saved in the processor of the run."""
    text_length: int | None = None
    """Tokens at which texts are cut off."""
    paragraph: bool | None = None
    """Join a clip's texts to one paragraph, in training and evaluation."""
    sampling: str | None = None
    """Which frames: "uniform", "fps:R", "clip:R", or "authors", as in the authors' code."""
    resize: str | None = None
    """How a frame becomes a square: "crop" (CLIP's own), "pad", or "squash", as in the authors'
    code."""
    num_workers: int = 4
    """Decoding processes of each rank."""
    decoder: str = "auto"
    """"dali", "pyav", or "auto": NVIDIA DALI where it and a GPU are and it can start, else PyAV.
    Either sees the same clips and frames; what DALI cannot decode, PyAV does."""
    max_bad_share: float = 0.05


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    layer_decay: float = 1.0
    """Each layer's rate is this times that of the layer above it."""
    warmup: float = 0.01
    """Share of all steps in which the rate rises linearly; a cosine to 0 follows."""


@dataclass
class TrainConfig:
    out: str = MISSING
    """Folder of the run: checkpoints, metrics.jsonl, bad_files.jsonl, tensorboard."""
    task: str = "retrieval"
    """"omnisource" (post-pretraining) or "retrieval" (fine-tuning)."""
    variant: str = "vsc_fc"
    """Loss of the omnisource task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 128
    """Clips an optimiser step, over all processes and accumulated micro-batches. Negatives
    come from the batch_size / accumulation clips between two backward passes, at least 2."""
    accumulation: int = 1
    micro_batch: int | None = None
    """Clips that a process embeds at once, with all of the batch as negatives all the same
    (gradient caching): memory that does not grow with the batch for one more forward pass."""
    epochs: float | None = None
    max_steps: int | None = None
    """Optimiser steps; give this or epochs. The one given last replaces the other."""
    mixed_precision: str = "bf16"
    parallel: str = "ddp"
    """Of several processes, each holds all weights ("ddp") or a share of them ("fsdp")."""
    compile: bool = False
    """Compile the towers' layers with torch.compile, once for any number of frames."""
    ema: float | None = None
    """Decay of an average of the weights, such as 0.9999: what is validated and saved then."""
    backend: str = "native"
    """Of both ops: "native" (compiled) or "reference" (plain PyTorch)."""
    seed: int = 42
    deterministic: bool = False
    """Ask PyTorch for deterministic algorithms, which a GPU needs for a resumed run to equal
    an unbroken one to the last bit; slower there."""
    lost_after: float = 20.0
    """Seconds without a sign of life from a rank, of its process and not of its progress, after
    which the others end and name it."""
    timeout: float = 1800.0
    """Seconds that ranks wait for one that lives but does not come."""
    on_nonfinite: str = "stop"
    """Where a loss or gradient is NaN or infinite: "stop", or "skip" the optimiser's step and
    stop only after ten in a row. Either way the clips of that step are named."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where rows of metrics go besides metrics.jsonl, by accelerate's names: tensorboard, wandb,
    mlflow, trackio, …"""
    log_every: int = 1
    eval_every: int | None = None
    """Steps between evaluations; by default an epoch."""
    save_every: int | None = None
    """Steps between checkpoints; by default an epoch."""
    eval_batch_size: int = 32
    """Clips a rank embeds at once."""
    keep_checkpoints: int = 2
    best_metric: str = "text_to_video/R@1"
    resume: str = "never"
    """"latest" goes on from the newest checkpoint in `out`, or starts if there is none."""


# Two ways to say one thing: in a layer above the other's, either replaces it. model.name and
# model.config are not of these: a key of model.config, given above a name, may be meant for the
# named model, and taken as a new one it would train from nothing.
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
    """The file, its bases below it and the overrides above it, as one checked TrainConfig.

    Of epochs and max_steps, and of data.train and data.sources, the one given in the higher of
    these layers replaces the other.

    Args:
        path: a YAML file, or the name of a packaged configuration such as "msrvtt".
        overrides: "key=value" with dotted keys, such as "optimizer.lr=1e-5".

    Raises:
        ConfigError: unknown key (the nearest known one is named), value of another type,
            missing required key, or values that contradict each other, such as epochs and
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
    """Raise ConfigError where values are out of range or contradict each other."""

    def get(key: str) -> Any:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        return value

    for key, choices in _CHOICES.items():
        if get(key) not in (*choices, None):
            raise ConfigError(f"{key} is {get(key)!r}; it must be one of {', '.join(choices)}")
    for key in _POSITIVE:
        if get(key) is not None and get(key) <= 0:
            raise ConfigError(f"{key} is {get(key)}; it must be above 0")
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
            "or model.config=null takes back the one that a file gives"
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
    """A path that exists, or the packaged configuration of that name (with or without .yaml)."""
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
    """Raise ConfigError naming the nearest of the known dotted keys, unless key is one."""
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
    """The chain of bases of a file, lowest first."""
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
        if not key.startswith("model.config."):  # checked against CLIPViPConfig on building
            refuse_unknown_key(key, known, source)


def _without_replaced(below: DictConfig, layer: DictConfig, source: str) -> DictConfig:
    """What lies below a layer, without what the layer gives in another way."""
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
    """The value at a dotted key; None where there is none."""
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


_NOT_THE_COURSE = (
    "out", "resume", "log_every", "save_every", "keep_checkpoints", "eval_batch_size",
    "data.num_workers", "data.validation", "best_metric", "eval_every", "lost_after", "timeout",
    "on_nonfinite", "trackers",
)  # fmt: skip


def flat(config: TrainConfig) -> dict[str, Any]:
    """Its settings by dotted keys."""
    settings: dict[str, Any] = {}
    for key, value in asdict(config).items():
        if isinstance(value, dict):
            settings.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            settings[key] = value
    return settings


def course(config: TrainConfig, processes: int) -> dict[str, Any]:
    """What decides a run's losses: gone on with under other values, it is another run."""
    settings = {"processes": processes, **flat(config)}
    return {key: value for key, value in settings.items() if key not in _NOT_THE_COURSE}


def changes(then: dict[str, Any], config: TrainConfig, processes: int) -> Iterator[str]:
    """A line for each difference from the course that a checkpoint was written in."""
    for key, value in course(config, processes).items():
        before = then.get(key)
        if before == value:
            continue
        if key in ("model.name", "model.config", "model.tokenizer"):
            yield f"{key} is {value} now, and was {before}; the model stays the checkpoint's"
        elif key != "processes":
            yield f"resuming with another {key}: was {before}, is {value}"
        elif config.data.train is None or is_shards(config.data.train):
            yield (
                f"resuming with {value} processes after {before}: what is left of this epoch is "
                "drawn from the shards anew, so some of its clips come twice and some not at all"
            )
        else:
            yield (
                f"resuming with {value} processes after {before}: the batches stay as they would "
                "have been, and losses too but for rounding and dropout"
            )
