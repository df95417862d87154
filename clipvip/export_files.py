"""Files of an exported tower: writing and opening programs of torch.export and graphs in ONNX."""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OPSET = 18  # that of PyTorch's own translations; others are converted from it


@dataclass
class Tower:
    """A tower to export, and what its files must compute."""

    name: str
    module: nn.Module
    inputs: dict[str, dict[int, str]]  # name → the dimensions of any size, and what they count
    largest: dict[str, int]  # limits of some of these
    example: tuple[Tensor, ...]
    cases: list[tuple[tuple[Tensor, ...], Tensor]]  # inputs and features, of other sizes

    @property
    def output(self) -> str:
        return f"{self.name}_features"


def check_onnx_packages() -> None:
    """Raise RuntimeError unless what writes, checks and runs ONNX is installed."""
    wanted = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"ONNX needs {' and '.join(missing)}, not installed here: "
            'pip install "clipvip[export]", or leave out --onnx'
        )


def write_program(tower: Tower, path: Path) -> torch.export.ExportedProgram:
    """Trace a tower and write it. Raises OSError if the file cannot be written."""
    counts = {word for words in tower.inputs.values() for word in words.values()}
    sizes = {word: torch.export.Dim(word, max=tower.largest.get(word)) for word in counts}
    shapes = {
        name: {at: sizes[word] for at, word in words.items()}
        for name, words in tower.inputs.items()
    }
    with _quiet():
        program = torch.export.export(tower.module, tower.example, dynamic_shapes=shapes)
        with _Output(path, "wb") as file:
            torch.export.save(program, file)
    if file.failure is not None:
        raise file.failure
    return program


class _Output(io.FileIO):
    """A file that remembers its first error and drops what it cannot write: where writing raises,
    torch.export.save ends the process."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:  # type: ignore[override]
        rest = memoryview(data).cast("B")
        count = len(rest)
        try:
            while rest and self.failure is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        return count


def opened_program(path: Path) -> Callable[..., Tensor]:
    """Return a function of a tower's inputs that runs its program."""
    with _quiet():
        return torch.export.load(path).module()


def write_onnx(tower: Tower, program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph. Weights of more than 1.5 GB go into a second file, NAME.onnx.data."""
    import onnx

    with _quiet():
        translated = torch.onnx.export(
            program,
            input_names=list(tower.inputs),
            output_names=[tower.output],
            dynamic_shapes=tower.inputs,
            opset_version=OPSET,
            verbose=False,
        )
        assert translated is not None
        translated.save(path)
    onnx.checker.check_model(path, full_check=True)


def opened_onnx(tower: Tower, path: Path) -> Callable[..., Tensor]:
    """Return a function of a tower's inputs that runs its graph in ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        given = {name: x.numpy() for name, x in zip(tower.inputs, inputs, strict=True)}
        return torch.from_numpy(np.asarray(session.run([tower.output], given)[0]))

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of PyTorch about its own calls, and that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
