"""Where models are loaded from: folders, the authors' files, names on the Hugging Face hub."""

import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from transformers import PretrainedConfig

from clipvip.model.conversion import AUTHORS_SUFFIXES

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
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
)
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
            f"{what} is {value!r}, which does not exist here, nor could it be had from the hub "
            f"(it is not there, it needs a login, or this machine is offline); {wanted}"
        ) from failed
    except Exception as failed:
        # tokenizers raises a bare Exception; other errors say themselves what they are about.
        if type(failed) is not Exception and not isinstance(failed, _DAMAGED):
            raise
        reason = str(failed).partition("\n")[0].partition(". ")[0] or type(failed).__name__
        raise ValueError(
            f"{what} is {value!r}, of which a file is damaged ({reason}); save or fetch it again"
        ) from failed


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


def is_plain_clip(config: dict[str, Any]) -> bool:
    """Whether a model's config.json is that of an image model, which has no video weights."""
    return config.get("model_type") != "clipvip"
