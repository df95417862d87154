"""Weights in a TorchScript archive, such as OpenAI's files of CLIP, read without running its code.

Such an archive is a zip. Its data.pkl describes a tree of modules whose attributes are tensors,
data/N holds the numbers of storage N, and code/ the programs, which are never opened.
torch.jit.load would compile these programs.
"""

import math
import os
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipvip.files import shown

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
# The instructions that TorchScript writes.
_INSTRUCTIONS = {
    "PROTO", "STOP", "MARK", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE",
    "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT",
    "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}  # fmt: skip


def is_torchscript(path: str | os.PathLike) -> bool:
    """Whether a zip file is a TorchScript archive with weights, by the names that it holds."""
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    return {"constants.pkl", "data.pkl"} <= names


def read_torchscript(path: str | os.PathLike, device: str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a TorchScript archive by their names, as its module's state dict has
    them.

    device: "cpu", or "meta" for shapes and dtypes without the numbers.
    Raises UnpicklingError if it asks for anything but tensors and modules, and ValueError if it
    is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        (data,) = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
        folder = data.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its numbers are not little-endian")
        return _Archive(archive, folder, device).tensors()


class _Archive:
    """One archive while it is read."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, device: str) -> None:
        self.archive, self.folder, self.device = archive, folder, device
        self.storages: dict[str, Tensor] = {}  # by key

    def tensors(self) -> dict[str, Tensor]:
        data = self.archive.read(f"{self.folder}data.pkl")
        for instruction, number, _ in pickletools.genops(data):
            if instruction.name not in _INSTRUCTIONS:
                raise pickle.UnpicklingError(f"Unsupported operand {instruction.name}")
            # The unpickler allocates memory up to the number in its memo that is named.
            if instruction.name == "LONG_BINPUT" and int(number or 0) >= len(data):
                raise ValueError("its data.pkl is damaged")
        seen: set[int] = set()

        class Module:
            """A module's attributes; a new class per archive, as a pickle may change it."""

        def walk(module: Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
            if id(module) in seen:  # shared, as in a hostile tree that grows exponentially
                return
            seen.add(id(module))
            for name, value in vars(module).items():
                if isinstance(value, _Part):
                    yield prefix + name, self.tensor(value)
                elif isinstance(value, Module):
                    yield from walk(value, f"{prefix}{name}.")

        root = _Unpickler(data, Module).load()
        if not isinstance(root, Module):
            raise ValueError("its data.pkl describes no module")
        return dict(walk(root))

    def tensor(self, part: "_Part") -> Tensor:
        """Return a part of a storage as a tensor. Raises ValueError if it does not lie within, or
        has more numbers than there are; PyTorch checks neither on the meta device."""
        storage, (_, offset, size, stride) = self.storage(*part.storage), part
        if any(type(number) is not int for number in (offset, *size, *stride)):
            raise ValueError("a tensor's size, stride or offset is no number")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        whole = math.prod(size) <= storage.numel()
        if (
            min(offset, *size, *stride, 0) < 0
            or (last >= storage.numel() and 0 not in size)
            or not whole
        ):
            raise ValueError(
                f"a tensor of size {list(size)}, stride {list(stride)} and offset {offset} does "
                f"not lie within its {storage.numel()} numbers"
            )
        return storage.as_strided(size, stride, offset)

    def storage(self, identity: Any) -> Tensor:
        """Return the numbers of a storage [n], which `identity` names."""
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(count) is not int:
            raise pickle.UnpicklingError("Unsupported operand BINPERSID")
        if not re.fullmatch("[0-9]+", key):
            raise ValueError(f"its storage {shown(key)} is not named by a number")
        if key not in self.storages:
            member = self.archive.getinfo(f"{self.folder}data/{key}")
            if count * dtype.itemsize != member.file_size:
                raise ValueError(
                    f"its storage {key} has {member.file_size} bytes, and {count} {dtype} need "
                    f"{count * dtype.itemsize}"
                )
            if count and self.device != "meta":
                read = bytearray(self.archive.read(member))  # which verifies its checksum
                self.storages[key] = torch.frombuffer(read, dtype=dtype)
            else:
                self.storages[key] = torch.empty(count, dtype=dtype, device=self.device)
        if self.storages[key].dtype != dtype:
            raise ValueError(f"its storage {key} is used as two types")
        return self.storages[key]


class _Storage(NamedTuple):
    identity: Any


class _Part(NamedTuple):
    """What a pickle says of a tensor: a part of a storage. Nothing in it is checked."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Unpickler(pickle.Unpickler):
    """Builds `module`s, lists and what describes tensors, and nothing else: no instruction of a
    pickle acts on a tensor, whose __setstate__ would reach beyond its storage."""

    def __init__(self, data: bytes, module: type) -> None:
        super().__init__(BytesIO(data))
        self.module = module

    def persistent_load(self, identity: Any) -> Any:
        return _Storage(identity)

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Part(storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in _LISTS:
            return lambda values: list(values)
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, tag: value
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
