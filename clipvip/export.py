"""Export a model's two towers for use without this package. This is `clipvip export`.

Each tower becomes a program of torch.export and, if asked for, a graph in ONNX. Attention is plain
PyTorch in both. docs/export.md shows how to run them.
"""

import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipvip import __version__
from clipvip.embedding import load_for_embedding
from clipvip.export_files import (
    Tower,
    check_onnx_packages,
    opened_onnx,
    opened_program,
    write_onnx,
    write_program,
)
from clipvip.files import renamed_when_whole, shown
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.pretrained import check_name, failed_writes

DESCRIPTION = "export.json"
TOLERANCE = 1e-4  # of unit features
RESIZES = {
    "crop": "the shortest side is resized to `size` (bicubic, antialiased), the centre is cut out",
    "squash": "the whole frame is resized to a square (bicubic, without antialiasing)",
    "pad": "the longest side is resized to `size` (bicubic, antialiased), black bars fill the rest",
}


@dataclass
class Exported:
    """Files that `export` wrote, and how far their outputs are from the model's."""

    files: list[str]
    difference: float  # largest, of numbers of unit features
    stored: str  # dtype of the model's weights; those exported are float32


class VideoTower(nn.Module):
    """From pixel_values [B, N, 3, H, W] to unit features [B, P], as exported."""

    def __init__(self, model: CLIPViPModel) -> None:
        super().__init__()
        self.model = _with_only(model, "vision_model", "visual_projection")

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.model.get_video_features(pixel_values), dim=-1)


class _TextTower(nn.Module):
    def __init__(self, model: CLIPViPModel) -> None:
        super().__init__()
        self.model = _with_only(model, "text_model", "text_projection")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return F.normalize(self.model.get_text_features(input_ids, attention_mask), dim=-1)


def _with_only(model: CLIPViPModel, *parts: str) -> CLIPViPModel:
    """Return the model without its other parts: torch.export would store their weights too."""
    view = copy.copy(model)
    view._modules = {name: model._modules[name] for name in parts}
    view._parameters = {}
    return view


def export(source: str | os.PathLike, destination: str | os.PathLike, onnx: bool) -> Exported:
    """Write a folder with both towers, the tokenizer, and export.json, which describes them.

    source: folder or hub name, as for `load_for_embedding`. Weights are exported in fp32.
    onnx: whether to write video.onnx and text.onnx beside video.pt2 and text.pt2.

    All files are run on inputs of several sizes and compared with the model. `destination` appears
    only when it is complete. Raises FileExistsError if it exists, ValueError if an output is not
    the model's, and RuntimeError if a package for ONNX is missing.
    """
    if onnx:
        check_onnx_packages()
    destination = Path(destination)
    check_name("the destination", destination)
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} exists; remove it or choose another destination")
    model, processor = load_for_embedding(source, attn_implementation="sdpa")
    stored = str(model.dtype).removeprefix("torch.")
    towers = _towers(model.float().requires_grad_(False), processor)
    # The towers' expected features come from the model as it was loaded.
    make_exportable(model)
    with renamed_when_whole(destination) as unfinished, failed_writes():
        processor.save_pretrained(unfinished)
        difference = max(_write(tower, unfinished, onnx) for tower in towers)
        description = _describe(source, model, processor, towers, unfinished)
        unfinished.joinpath(DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        files = sorted(path.name for path in unfinished.iterdir())
    return Exported(files, difference, stored)


def make_exportable(model: CLIPViPModel) -> None:
    """Compute attention by the reference: it alone can be exported for any number of frames."""
    # The vision tower has a configuration of its own.
    for config in (model.config.vision_config, model.vision_model.config):
        config.attention_backend = "reference"


@torch.no_grad()
def _towers(model: CLIPViPModel, processor: CLIPViPProcessor) -> list[Tower]:
    vision, text = model.config.vision_config, model.config.text_config
    generator = torch.Generator().manual_seed(0)

    def videos(count: int, frames: int) -> tuple[Tensor, ...]:
        shape = count, frames, 3, vision.image_size, vision.image_size
        return (torch.randn(shape, generator=generator),)

    def texts(count: int, length: int) -> tuple[Tensor, ...]:
        """Texts of different lengths, with their end token, and padding after it."""
        ids = torch.randint(text.vocab_size, (count, length), generator=generator)
        ends = length - 1 - torch.arange(count) % length
        ids[torch.arange(count), ends] = processor.tokenizer.eos_token_id
        mask = torch.arange(length) <= ends[:, None]
        return ids.where(mask, processor.tokenizer.pad_token_id), mask.long()

    most, usual = text.max_position_embeddings, vision.num_frames
    video_tower, text_tower = VideoTower(model).eval(), _TextTower(model).eval()
    of_videos = [videos(*shape) for shape in ((1, 1), (3, 2), (1, usual), (1, usual + 5))]
    of_texts = [texts(*shape) for shape in ((1, 2), (3, most), (2, (most + 2) // 2))]
    batch = {0: "texts", 1: "length"}
    return [
        Tower(
            "video",
            video_tower,
            {"pixel_values": {0: "videos", 1: "frames"}},
            {},
            videos(2, 3),
            [(inputs, video_tower(*inputs)) for inputs in of_videos],
        ),
        Tower(
            "text",
            text_tower,
            {"input_ids": batch, "attention_mask": batch},
            {"length": most},
            texts(2, min(5, most)),
            [(inputs, text_tower(*inputs)) for inputs in of_texts],
        ),
    ]


def _write(tower: Tower, folder: Path, onnx: bool) -> float:
    """Write a tower's files; return the largest difference of their outputs from the model's."""
    path = folder / f"{tower.name}.pt2"
    _say(f"{path.name}: tracing, writing and comparing the {tower.name} tower")
    program = write_program(tower, path)
    difference = _compare(tower, path.name, opened_program(path))
    if onnx:
        path = folder / f"{tower.name}.onnx"
        _say(f"{path.name}: translating, writing and comparing the {tower.name} tower")
        write_onnx(tower, program, path)
        difference = max(difference, _compare(tower, path.name, opened_onnx(tower, path)))
    return difference


def _compare(tower: Tower, name: str, run: Callable[..., Tensor]) -> float:
    """Return the largest difference of outputs from the model's. Raises ValueError if too large."""
    largest = 0.0
    for inputs, wanted in tower.cases:
        with torch.no_grad():
            difference = float((run(*inputs) - wanted).abs().max())
        if not difference <= TOLERANCE:  # also if it is NaN
            raise ValueError(
                f"{name} differs from the model by {difference:.2g} for inputs of "
                f"{[list(x.shape) for x in inputs]}, expected at most {TOLERANCE:g}; nothing was "
                f"exported (clipvip {__version__}, torch {torch.__version__}; please report it)"
            )
        largest = max(largest, difference)
    return largest


def _describe(
    source: str | os.PathLike,
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
    towers: list[Tower],
    folder: Path,
) -> dict[str, Any]:
    """Return what export.json says: all that one must know to run the files."""

    def described(tower: Tower) -> dict[str, Any]:
        inputs = {}
        for (name, words), x in zip(tower.inputs.items(), tower.example, strict=True):
            shape = [words.get(at, size) for at, size in enumerate(x.shape)]
            inputs[name] = {"dtype": str(x.dtype).removeprefix("torch."), "shape": shape}
        count = next(iter(tower.inputs.values()))[0]
        features = {"dtype": "float32", "shape": [count, model.config.projection_dim]}
        return {
            "files": sorted(path.name for path in folder.glob(f"{tower.name}.*")),
            "inputs": inputs,
            "outputs": {tower.output: features},
        }

    return {
        "model": str(source),
        "made_by": f"clipvip {__version__}, torch {torch.__version__}",
        **{tower.name: described(tower) for tower in towers},
        "frames": {
            "count": processor.num_frames,
            "sampling": processor.sampling,
            "resize": processor.resize,
            "size": processor.image_size,
            "mean": processor.image_mean,
            "std": processor.image_std,
        },
        "texts": {
            "longest": processor.longest_text,
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        "logit_scale": model.logit_scale.exp().item(),
        "notes": [
            "pixel_values: RGB, (pixel / 255 - mean) / std. Any number of frames may be given.",
            f"resize: {RESIZES[processor.resize]}.",
            "input_ids: as tokenizer.json encodes a text, start and end token included, HTML "
            "entities resolved first. Cut a long text to `longest` tokens and keep its end token.",
            "attention_mask: 1 for tokens, 0 for padding, which is on the right.",
            "Features are unit vectors. Logits are logit_scale * video_features @ text_features.T.",
        ],
    }


def _say(line: str) -> None:
    print(shown(line), file=sys.stderr, flush=True)
