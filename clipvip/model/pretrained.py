"""Loading of weights, whoever made them: find the files, check them, refuse what is no model.

A model may come from a folder, from one file of weights or from the Hugging Face hub; a folder or
hub name holds the files of transformers or those of open_clip. Each error is one line that names
the source. `CLIPViPModel.from_pretrained` and the processor load within `found`; `resolve`,
`quiet_load`, `same_draws` and `check_…` are the model's steps.
"""

import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from difflib import get_close_matches
from itertools import islice
from logging import ERROR, LogRecord, getLogger
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import cached_file, logging

from clipvip.files import shown
from clipvip.model.checkpoints import FILE_SUFFIXES, is_checkpoint_file, read_checkpoint
from clipvip.model.configuration import VIDEO_OPTIONS, CLIPViPConfig, check_type, count_weights
from clipvip.model.layouts import ADDED_TO_CLIP, Weights, configured_by_open_clip, infer_config
from clipvip.ops.proxy_attention import takes_heads_of

OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"
)  # fmt: skip
_DAMAGED = (
    json.JSONDecodeError, UnicodeDecodeError, RecursionError, SafetensorError,
    pickle.UnpicklingError, EOFError,
)  # fmt: skip
_TRANSFORMERS_WEIGHTS = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What errors of torch.load and of our own reader say about TorchScript, and about a pickle that
# names or calls more than tensors need. Pickles of protocol 4 or later, which torch.save does not
# write, start with FRAME.
_CODE = re.compile(
    r"GLOBAL|unrecognized function|Can only (create new object|build)|must be imported to load|"
    r"Cannot use `*weights_only|"
    rf"Unsupported operand ({pickle.FRAME[0]}\b|[A-Z])"
)
logger = logging.get_logger(__name__)

_SLACK = 1 << 24  # number of weights that a file may lack
_HEADS = ("config.json", OPEN_CLIP_CONFIG, "tokenizer_config.json")  # one is in every model
_UNREACHED: set[str] = set()  # names for which the hub could not be reached: it is not tried again
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@contextmanager
def found(
    what: str,
    source: str | PathLike,
    subfolder: str = "",
    *,
    kind: Literal["model", "tokenizer", "language model"] = "model",
    error: type[Exception] = FileNotFoundError,
) -> Iterator[None]:
    """Run a load of `source`, and turn its errors into one line that says what is wrong.

    transformers takes all that is no folder for a hub name, and its errors speak of the hub alone.

    what: subject of the message, such as "the model" or the name of a setting.
    error: raised if `source` does not exist. It may derive from OSError, so that callers can tell
        it from other failures.
    Raises ValueError if a file is damaged, holds code or cannot be loaded.
    """
    value, path = fspath(source), Path(source)
    wanted = f"expected the folder of a {kind}" + ", a file of weights" * (kind == "model")
    known = "openai-community/gpt2" if kind == "language model" else "openai/clip-vit-base-patch32"
    wanted += f" or a name on the Hugging Face hub such as {known}"
    if not value.strip():
        raise error(f"{what} is empty; {wanted}")
    check_name(what, value)
    named = _HUB_NAME.fullmatch(value) and path.suffix not in FILE_SUFFIXES
    if not path.exists() and not named:
        raise error(f"{what} is {value!r}, which does not exist; {wanted}{_nearest(path)}")
    if path.is_dir() and kind != "tokenizer":
        inner = path / subfolder
        if not any((inner / name).is_file() for name in ("config.json", OPEN_CLIP_CONFIG)):
            files = sorted(file for file in inner.glob("*") if file.suffix in FILE_SUFFIXES)
            hint = f"; for the file of weights in it, give {shown(files[0])}" if files else ""
            hint *= kind == "model"
            if (inner / "adapter_config.json").is_file():
                hint = "; it holds an adapter of PEFT: give the model that it is merged into"
            raise error(f"{what} is {value!r}, a folder without config.json; {wanted}{hint}")
    try:
        yield
    except OSError as failed:
        if path.exists():
            raise
        inside = len(path.parts) > 1 and path.parent.is_dir()
        here = f"the folder {shown(path.parent)} does not hold" if inside else "does not exist here"
        raise error(
            f"{what} is {value!r}, which {here} and could not be fetched from the hub (it does not "
            f"exist there, needs a login, or this machine is offline); {wanted}"
            f"{'' if inside and not _close(path) else _nearest(path)}"
        ) from failed
    except BaseException as failed:
        if not isinstance(failed, Exception) and type(failed).__name__ != "PanicException":
            raise  # but not for a panic in Rust, which is a BaseException
        if holds_code(failed):
            raise ValueError(
                f"{what} is {value!r}, which is refused because it holds more than weights (code, "
                "or a pickle that could run code); save or fetch its weights as safetensors"
            ) from failed
        if isinstance(failed, error) or (type(failed) is ValueError and value in str(failed)):
            raise  # it names the source already
        reason = " ".join(str(failed).split()).partition(". ")[0][:300] or type(failed).__name__
        if type(failed) is Exception or isinstance(failed, _DAMAGED):  # the first by tokenizers
            said = f"one of its files is damaged ({reason}); save or fetch it again"
        elif isinstance(failed, ValueError | RuntimeError | TypeError):
            said = f"it cannot be loaded: {reason}"
        else:
            said = f"it cannot be loaded: {type(failed).__name__}: {reason}"
        raise ValueError(f"{what} is {value!r}, but {said}") from failed


def _nearest(path: Path) -> str:
    """Suggest what a path that does not exist may mean, for the end of an error.

    It is a name that is close, beside the first part that does not exist, or else the folder in
    which that part was looked for, unless that is the current one or the root.
    """
    while not path.parent.exists():
        path = path.parent
    if close := _close(path):
        return f"; did you mean {shown(path.parent / close)}?"
    if path.parent in (Path(), Path(path.anchor)):
        return ""
    return f"; the folder {shown(path.parent)} exists, but holds no {shown(path.name)}"


def _close(path: Path) -> str | None:
    """Return the name in a path's folder that is most like the path's, if one is close."""
    try:
        names = [entry.name for entry in islice(os.scandir(path.parent), 10_000)]
    except OSError:
        return None
    return next(iter(get_close_matches(path.name, names, n=1)), None)


def holds_code(error: BaseException | None) -> bool:
    """Whether torch.load refused a file because it asks to run code or to build other objects."""
    while error is not None:
        if isinstance(error, pickle.UnpicklingError | RuntimeError) and _CODE.search(str(error)):
            return True
        error = error.__cause__
    return False


def check_name(what: str, path: str | PathLike) -> None:
    """Raise ValueError if a path is not UTF-8: safetensors takes no other."""
    try:
        fspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} is {fspath(path)!r}, a name that is not UTF-8; expected UTF-8: rename it"
        ) from None


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` that say where on the hub a file is and how to fetch it."""
    return {name: options[name] for name in _HUB_OPTIONS if name in options}


def cached(source: str | PathLike, name: str, options: dict[str, Any]) -> Path | None:
    """Return a file of a folder or hub name, fetched if needed; None if there is no such file.

    If the hub cannot be reached, files that are not in the cache count as absent, provided that
    something of the model is there.
    options: options of `from_pretrained`; see `hub_options`.
    Raises OSError if nothing is there, here or on the hub.
    """
    hub, folder = hub_options(options), options.get("subfolder") or ""
    if os.path.isdir(source):
        path = Path(source, folder, name)
        return path if path.is_file() else None
    where, known = fspath(source), {key: hub.get(key) for key in ("cache_dir", "revision")}
    if where in _UNREACHED:
        hub["local_files_only"] = True
    try:
        with _no_retries_shown():
            return Path(hf_hub_download(where, name, **hub))
    except LocalEntryNotFoundError:
        _UNREACHED.add(where)
        for head in _HEADS:
            if isinstance(
                try_to_load_from_cache(where, f"{folder}/{head}".strip("/"), **known), str
            ):
                return None
        raise
    except EntryNotFoundError:
        return None


@contextmanager
def _no_retries_shown() -> Iterator[None]:
    """Keep the hub's client from logging each of its retries; the error says what they say."""
    client = getLogger("huggingface_hub.utils._http")
    level = client.level
    client.setLevel(ERROR)
    try:
        yield
    finally:
        client.setLevel(level)


def read_json(source: str | PathLike, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a JSON file as `cached` finds it; empty if there is none."""
    file = cached(source, name, options)
    content = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{name} of {fspath(source)!r} holds no object; expected settings")
    return content


def resolve(
    source: str | PathLike | None, options: dict[str, Any]
) -> tuple[str | PathLike | None, dict[str, Any], frozenset[str]]:
    """Return the location and options with which to call transformers' `from_pretrained`, and the
    names of weights that the source may lack."""
    options = dict(options)
    told = {name: options.pop(name, None) for name in ("activation", "head_width")}
    if source is None:
        return None, options, frozenset()
    weights = read_weights(source, options)
    given = [name for name, value in told.items() if value is not None]
    if weights is not None:
        options["state_dict"] = weights.state_dict
        if given and options.get("config") is not None:
            raise ValueError(f"config says the {given[0]}; leave out {' and '.join(given)}")
        if options.get("config") is None:
            video = {name: options.pop(name) for name in VIDEO_OPTIONS if name in options}
            config = options["config"] = infer_config(weights, source, **told, **video)
            check_size(count_weights(config), source, options)
        if weights.left_out:
            logger.warning(
                f"{shown(source)} is a {weights.layout} checkpoint: its CLIP is read, and left out "
                f"is what it adds to CLIP: {shown(', '.join(weights.left_out))}"
            )
        return None, options, weights.added
    if given:
        raise ValueError(f"its config.json says the {given[0]}; leave out {' and '.join(given)}")
    settings = read_json(source, "config.json", options)
    if cached(source, "adapter_config.json", options) is not None:
        # With peft, transformers would load the model that the adapter names.
        raise ValueError("it holds an adapter; merge it into the model")
    if settings:
        check_type(settings, source)
    if options.get("config") is None:
        video = {name: options[name] for name in VIDEO_OPTIONS if name in options}
        shapes = CLIPViPConfig.from_pretrained(source, **hub_options(options), **video)
        check_size(count_weights(shapes), source, options)
    return (
        source,
        options,
        frozenset(() if settings.get("model_type") == "clipvip" else ADDED_TO_CLIP),
    )


def read_weights(
    source: str | PathLike, options: dict[str, Any], device: str = "cpu"
) -> Weights | None:
    """Read the weights of a file, or of a folder or hub name with the files of open_clip.

    options: options of `from_pretrained`. device: see `read_checkpoint`.
    Returns None for all others, which transformers reads.
    """
    config = open_clip_config(source, options)
    if is_checkpoint_file(source):
        file = Path(source)
    elif not config:
        return None
    else:
        files = [cached(source, name, options) for name in _OPEN_CLIP_WEIGHTS]
        found_file = next((each for each in files if each is not None), None)
        if found_file is None:
            raise ValueError(
                f"{fspath(source)!r} holds {OPEN_CLIP_CONFIG} but none of its weights; expected "
                f"{' or '.join(_OPEN_CLIP_WEIGHTS)}"
            )
        file = found_file
    weights = read_checkpoint(file, device)
    if config:
        return configured_by_open_clip(weights, config.get("model_cfg"), source)
    # transformers loads files of these names with the configuration beside them.
    beside = file.name in _TRANSFORMERS_WEIGHTS and file.with_name("config.json").is_file()
    if beside and weights.hidden_act is None and options.get("config") is None:
        raise ValueError(
            f"{shown(source)} lies beside its config.json, which says what weights alone do not; "
            f"give the folder, {shown(file.parent)}"
        )
    return weights


def is_plain_clip(source: str | PathLike) -> bool:
    """Whether a model is a CLIP that has no proxies and temporal embedding yet."""
    weights = read_weights(source, {}, "meta")
    if weights is None:
        return read_json(source, "config.json", {}).get("model_type") != "clipvip"
    return not weights.trained_on_video


def read_config(
    source: str | PathLike,
    activation: str | None = None,
    head_width: int | None = None,
    **hub: Any,
) -> CLIPViPConfig:
    """Return the configuration of any model that `CLIPViPModel.from_pretrained` reads, without its
    weights' numbers.

    activation, head_width: see `infer_config`. hub: transformers' hub options.
    """
    weights = read_weights(source, hub, "meta")
    if weights is None:
        return CLIPViPConfig.from_pretrained(source, **hub)
    return infer_config(weights, source, activation, head_width)


def needs_reference(config: CLIPViPConfig) -> bool:
    """Whether a model has heads that the compiled attention, which it asks for, does not take."""
    vision = config.vision_config
    width = vision.hidden_size // vision.num_attention_heads
    return vision.attention_backend == "native" and not takes_heads_of(width)


def open_clip_config(source: str | PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """Return the open_clip_config.json of a folder or hub name, or beside a file of open_clip;
    empty if there is none, or if a folder has the configuration of a CLIP of transformers."""
    if is_checkpoint_file(source):
        file = Path(source)
        here = file.name in _OPEN_CLIP_WEIGHTS and file.with_name(OPEN_CLIP_CONFIG).is_file()
        return read_json(file.parent, OPEN_CLIP_CONFIG, {}) if here else {}
    config = read_json(source, "config.json", options)
    if "text_config" in config and "vision_config" in config:
        return {}
    return read_json(source, OPEN_CLIP_CONFIG, options)


@contextmanager
def quiet_load(*, report: bool) -> Iterator[None]:
    """Silence what transformers shows of a load: its bar, and its table of keys that do not fit.

    The table repeats what our error lists, and reports the weights that plain CLIP lacks as a
    fault. report: whether to keep it, as no error is raised.
    """

    def wanted(record: LogRecord) -> bool:
        return report or "LOAD REPORT" not in record.getMessage()

    source = getLogger("transformers.modeling_utils")
    source.addFilter(wanted)
    try:
        with no_bars():
            yield
    finally:
        source.removeFilter(wanted)


@contextmanager
def no_bars() -> Iterator[None]:
    """Show no progress bars of transformers, which say nothing of loads and saves this short."""
    shown_before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            logging.enable_progress_bar()


_same_draws = ContextVar("_same_draws", default=False)


@contextmanager
def same_draws() -> Iterator[None]:
    """Load models within, and all that their checkpoints lack is the same each time."""
    before = _same_draws.set(True)
    try:
        yield
    finally:
        _same_draws.reset(before)


def draws() -> AbstractContextManager:
    """Context in which to initialise weights: SameDraws within `same_draws`, else an empty one.

    It is not entered for a whole load, since each operation on a tensor takes longer within.
    """
    return SameDraws() if _same_draws.get() else nullcontext()


class SameDraws(TorchDispatchMode):
    """Context in which normal_ draws the same numbers each time it is entered.

    It leaves the global generators alone. Numbers are drawn in double precision on the CPU and then
    rounded, so that they depend neither on the processor nor on a tensor's dtype or device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.normal_.default:
            return func(*args, **(kwargs or {}))

        def draw(tensor: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
            if tensor.is_meta:  # has no numbers, and would shift those of the others
                return tensor
            shape, generator = tensor.shape, self.generator
            numbers = torch.randn(shape, generator=generator, dtype=torch.double, device="cpu")
            return tensor.copy_((numbers * std + mean).float())

        return draw(*args, **(kwargs or {}))


def check_fit(
    source: Any, info: dict[str, Any], added: frozenset[str], strict: bool, any_shape: bool
) -> None:
    """Raise ValueError with a list of the checkpoint's keys that do not fit the model."""
    problems = []
    if strict:
        for word in ("missing", "unexpected"):
            problems += [f"{word}: {key}" for key in sorted(set(info[f"{word}_keys"]) - added)]
    if not any_shape:
        problems += [
            f"shape: {key} is {list(given)} in the checkpoint, {list(expected)} in the model"
            for key, given, expected in sorted(info["mismatched_keys"])
        ]
    if problems:
        raise ValueError(
            f"{source} does not fit this model (strict=False allows missing and unexpected keys, "
            "ignore_mismatched_sizes=True other shapes):\n  " + "\n  ".join(problems)
        )


def check_finite(source: Any, model: nn.Module) -> None:
    """Raise ValueError if weights are NaN or infinite, which damaged files cause."""
    weights = {name: each.detach() for name, each in model.named_parameters() if not each.is_meta}
    # The norm is the fastest reduction that no NaN or infinity leaves finite. It may overflow too.
    wrong = [
        name
        for name, weight in weights.items()
        if not torch.linalg.vector_norm(weight).isfinite() and not weight.isfinite().all()
    ]
    if wrong:
        raise ValueError(
            f"the model is {str(source)!r}, but one of its files is damaged ({len(wrong)} weights "
            f"are not finite, the first is {wrong[0]}); save or fetch it again"
        )


@contextmanager
def failed_writes() -> Iterator[None]:
    """Turn torch's and safetensors' errors about a file that cannot be written into OSError."""
    try:
        yield
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        if isinstance(error.__context__, OSError):  # from the file that torch writes to
            raise error.__context__ from None
        raise OSError("a file could not be written completely") from error


def check_size(wanted: int, source: str | PathLike, options: dict[str, Any]) -> None:
    """Raise ValueError if a configuration has more weights, `wanted`, than the model's files have
    bytes.

    transformers would initialise the missing ones, however much memory that takes.
    """
    path = Path(source)
    stored = path.stat().st_size if path.is_file() else _weight_bytes(source, options)
    if stored is not None and wanted > stored + _SLACK:
        raise ValueError(
            f"its configuration has {wanted:.3g} weights, but its files hold only {stored} bytes "
            "of weights; save or fetch it again"
        )


def _weight_bytes(source: str | PathLike, options: dict[str, Any]) -> int | None:
    """Bytes of the weights of a folder or hub name; None if their files have unusual names."""
    for name in _TRANSFORMERS_WEIGHTS + _OPEN_CLIP_WEIGHTS:
        file = cached(source, name, options)
        if file is None:
            continue
        if file.suffix != ".json":
            return file.stat().st_size
        weights = read_json(source, name, options).get("weight_map")
        if not isinstance(weights, dict):
            raise ValueError(f"{name} holds no index of weights")
        parts = sorted(set(map(str, weights.values())))
        if outside := [part for part in parts if Path(part).name != part]:
            raise ValueError(f"{name} names {shown(outside[0])!r}, a file in another folder")
        hub = hub_options(options)
        return sum(os.path.getsize(str(cached_file(source, part, **hub))) for part in parts)
    return None
