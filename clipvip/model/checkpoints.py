"""Files of weights, whoever wrote them, read into tensors by name without running their code.

torch.save's files and TorchScript archives are pickles, which may ask to run any code; what asks
for more than tensors is refused. `clipvip.model.layouts` says whose weights they are.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from clipvip.files import shown
from clipvip.model.layouts import Weights, recognise
from clipvip.model.torchscript import is_torchscript, read_torchscript

FILE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_NESTED = ("model", "state_dict", "model_state_dict")
_MOST_NESTED = 8  # a dict may hold itself


def is_checkpoint_file(source: str | os.PathLike) -> bool:
    """Whether a model's source is, or by its name should be, one file of weights."""
    return os.path.isfile(source) or (
        Path(source).suffix in FILE_SUFFIXES and not os.path.isdir(source)
    )


def read_checkpoint(path: str | os.PathLike, device: str = "cpu") -> Weights:
    """Read a file of weights of any layout that `clipvip.model.layouts` knows.

    A state dict nested under "model" or "state_dict" is unwrapped.

    device: "cpu", or "meta" for shapes and dtypes without the numbers.
    Raises ValueError if the file is damaged, holds anything but weights, or those of no CLIP.
    """
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty; fetch it again")
    if Path(path).suffix == ".safetensors":
        content: Any = _read_header(path) if device == "meta" else load_file(path)
    else:
        content = _read_pickled(path, device)
    for _ in range(_MOST_NESTED):
        if isinstance(content, dict) and (inner := [key for key in _NESTED if key in content]):
            content = content[inner[0]]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path} holds no state dict; expected tensors by name")
    weights = recognise(content, path)
    for name, tensor in weights.state_dict.items():
        if (
            not tensor.is_floating_point()
            or tensor.layout != torch.strided
            or (tensor.is_meta and device != "meta")
        ):
            raise ValueError(
                f"{path}: {shown(name)} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; "
                "expected plain floating-point weights"
            )
    return weights


def _read_header(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return a safetensors file's tensors on the meta device, without reading their numbers."""
    tensors = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            shape = part.get_shape()
            dtype = (part[:0] if shape else file.get_tensor(name)).dtype
            tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
    return tensors


def _read_pickled(path: str | os.PathLike, device: str) -> Any:
    """Read a file of torch.save or a TorchScript archive; its errors become one line."""
    try:
        if zipfile.is_zipfile(path):
            _check_members(path)
            if is_torchscript(path):
                return read_torchscript(path, device)
        # Mapped, as transformers maps its files: weights are read when they are first used.
        mapped = zipfile.is_zipfile(path) and device == "cpu"
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file may cause any
        # Leave out PyTorch's advice, which is to run the code that a file may hold.
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} cannot be read as a PyTorch file of weights: {reason}; fetch it again, or "
            "save only its state dict"
        ) from error


def _check_members(path: str | os.PathLike) -> None:
    """Raise ValueError if a zip's members take more bytes than it has: a small file may claim any
    size of members that are compressed or share bytes. PyTorch compresses none but TorchScript's
    programs in NAME/code/, which are not read."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    read = [each for each in members if each.filename.split("/")[1:2] != ["code"]]
    claimed = sum(member.file_size for member in read)
    if claimed > os.path.getsize(path):
        raise ValueError(
            f"it has {os.path.getsize(path)} bytes, but its members claim {claimed}, more than "
            "PyTorch, which compresses none, would write"
        )
