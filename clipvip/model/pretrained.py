"""Where models are loaded from: folders, the authors' files, names on the Hugging Face hub."""

import contextlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.utils import cached_file

from clipvip.files import shown
from clipvip.model.authors import AUTHORS_SUFFIXES
from clipvip.model.configuration import CLIPViPConfig, count_weights

_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
_DAMAGED = (
    json.JSONDecodeError,
    UnicodeDecodeError,
    RecursionError,
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
)
_WEIGHTS = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What torch.load says of TorchScript, and of a pickle that names or calls more than tensors need.
# One of protocol 4 or later, which torch.save does not write, opens with a FRAME.
_CODE = re.compile(
    r"GLOBAL|unrecognized function|Can only (create new object|build)|must be imported to load|"
    r"Cannot use `*weights_only|"
    rf"Unsupported operand {pickle.FRAME[0]}\b"
)
_SLACK = 1 << 24  # weights that a file may lack
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@contextmanager
def found(
    what: str,
    source: str | PathLike,
    subfolder: str = "",
    *,
    kind: Literal["model", "tokenizer"] = "model",
    error: type[Exception] = FileNotFoundError,
) -> Iterator[None]:
    """Around a load of `source`: one line that says what is wrong where there is no such thing, or
    where one of its files is damaged (ValueError).

    transformers takes whatever is no folder for a name on the hub, and speaks of that alone.

    what: the subject of the message, such as "the model" or the name of a setting.
    error: what to raise; its base may be OSError, so that callers can tell it from a load that
        failed otherwise.
    """
    value, path = fspath(source), Path(source)
    wanted = f"expected the folder of a {kind}" + ", an authors' .pt file" * (kind == "model")
    wanted += " or a name on the Hugging Face hub such as openai/clip-vit-base-patch32"
    if not value.strip():
        raise error(f"{what} is empty; {wanted}")
    check_name(what, value)
    named = _HUB_NAME.fullmatch(value) and path.suffix not in AUTHORS_SUFFIXES
    if not path.exists() and not named:
        raise error(f"{what} is {value!r}, which does not exist; {wanted}")
    if path.is_dir() and kind == "model" and not (path / subfolder / "config.json").is_file():
        raise error(f"{what} is {value!r}, a folder without config.json; {wanted}")
    try:
        yield
    except OSError as failed:
        if path.exists():
            raise
        raise error(
            f"{what} is {value!r}, which does not exist here, nor could it be fetched from the hub "
            f"(it is not there, it needs a login, or this machine is offline); {wanted}"
        ) from failed
    except BaseException as failed:
        # A panic in Rust is a BaseException.
        if not isinstance(failed, Exception) and type(failed).__name__ != "PanicException":
            raise
        if holds_code(failed):
            raise ValueError(
                f"{what} is {value!r}, which holds more than weights (code, or a pickle that "
                "could run it) and is refused; save or fetch its weights as safetensors"
            ) from failed
        if isinstance(failed, error) or (type(failed) is ValueError and value in str(failed)):
            raise  # says itself what it is about
        reason = " ".join(str(failed).split()).partition(". ")[0][:300] or type(failed).__name__
        # tokenizers raises a bare Exception.
        if type(failed) is Exception or isinstance(failed, _DAMAGED):
            reason = f"of which a file is damaged ({reason}); save or fetch it again"
        else:
            if not isinstance(failed, ValueError | RuntimeError | TypeError):
                reason = f"{type(failed).__name__}: {reason}"
            reason = f"which cannot be loaded: {reason}"
        raise ValueError(f"{what} is {value!r}, {reason}") from failed


def holds_code(error: BaseException | None) -> bool:
    """Whether torch.load refused a file because of what it asks to be run or made."""
    while error is not None:
        if isinstance(error, pickle.UnpicklingError | RuntimeError) and _CODE.search(str(error)):
            return True
        error = error.__cause__
    return False


def check_name(what: str, path: str | PathLike) -> None:
    """Raise a ValueError where a path is not UTF-8, which the library of weights takes alone."""
    try:
        fspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} is {fspath(path)!r}, a name that is not UTF-8, as those of models must be; "
            "rename it"
        ) from None


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s options that say where on the hub, and how to get it."""
    return {name: options[name] for name in _HUB_OPTIONS if name in options}


def read_config(source: str | PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """config.json of a folder or hub name as it stands there.

    options: of `from_pretrained`; those that say where on the hub are used.
    """
    config: Any = PretrainedConfig.get_config_dict(source, **hub_options(options))[0]
    if not isinstance(config, dict):
        raise ValueError(f"config.json of {fspath(source)!r} holds no object; expected a model's")
    return config


def refuse_adapter(source: str | PathLike, options: dict[str, Any]) -> None:
    """Raise a ValueError where a folder or hub name holds an adapter: with peft installed,
    transformers would load the model that it names."""
    file = "adapter_config.json"
    hub = hub_options(options)
    if cached_file(source, file, _raise_exceptions_for_missing_entries=False, **hub) is not None:
        raise ValueError("it holds an adapter; merge it into the model")


def is_plain_clip(config: dict[str, Any]) -> bool:
    """Whether a model's config.json is that of an image model, which has no video weights."""
    return config.get("model_type") != "clipvip"


def check_size(config: CLIPViPConfig, source: str | PathLike, options: dict[str, Any]) -> None:
    """Raise a ValueError where a configuration has more weights than the files of a folder, a hub
    name or an authors' file have bytes: they would be made up, whatever memory that takes."""
    path = Path(source)
    stored = path.stat().st_size if path.is_file() else _weight_bytes(source, options)
    wanted = count_weights(config)
    if stored is not None and wanted > stored + _SLACK:
        raise ValueError(
            f"its configuration has {wanted:.3g} weights, but its files hold only {stored} bytes "
            "of them; save or fetch it again"
        )


def _weight_bytes(source: str | PathLike, options: dict[str, Any]) -> int | None:
    """Size of a folder's or hub name's weights; None where they have no usual name."""
    hub = hub_options(options)
    for name in _WEIGHTS:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
        if file is None:
            continue
        files = [file]
        if name.endswith(".json"):
            index = json.loads(Path(file).read_text(encoding="utf-8"))
            if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
                raise ValueError(f"{name} holds no index of weights")
            parts = set(map(str, index["weight_map"].values()))
            if outside := [part for part in parts if Path(part).name != part]:
                raise ValueError(f"{name} names {shown(outside[0])!r}, a file in another folder")
            files = [str(cached_file(source, part, **hub)) for part in sorted(parts)]
        return sum(Path(file).stat().st_size for file in files)
    return None


@contextlib.contextmanager
def failed_writes() -> Iterator[None]:
    """Raise OSError in place of torch's and safetensors' errors about a file that cannot be
    written."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise OSError(str(error)) from error
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        if isinstance(error.__context__, OSError):  # of the file that torch writes to
            raise error.__context__ from None
        raise OSError("a file could not be written to its end") from error
