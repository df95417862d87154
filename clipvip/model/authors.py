"""Names and shapes in the checkpoint files of the authors' code, read and written.

The authors save one state dict with torch.save: that of transformers' CLIPModel of 2022 under the
prefix `clipmodel.`, with two `position_ids` buffers that newer versions of transformers dropped.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipvip.model.configuration import CLIPViPConfig

AUTHORS_SUFFIXES = (".pt", ".pth")
_PREFIX = "clipmodel."
_NESTED = ("model", "state_dict", "model_state_dict")
# Width of a head in the paper's models and in every CLIP ViT-B and ViT-L; the files do not say it.
_HEAD_DIM = 64


def is_authors_file(source: str | os.PathLike) -> bool:
    """Whether a model's source is, or by its name should be, an authors' file."""
    return os.path.isfile(source) or Path(source).suffix in AUTHORS_SUFFIXES


def read_authors_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read an authors' file (.pt) into a state dict with our names.

    A state dict nested under "model" or "state_dict" is unwrapped, the prefix "module." of wrapped
    models is removed, and `position_ids` are dropped. Nothing in the file is executed. Raises
    ValueError if it holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # Leave out PyTorch's advice, which is to run the code that a file may hold.
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} cannot be read as a PyTorch file of weights: {reason}; fetch it again, or "
            "save only its state dict"
        ) from error
    while isinstance(content, dict) and (inner := [k for k in _NESTED if k in content]):
        content = content[inner[0]]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict; expected tensors by name")
    names = {name: name.removeprefix("module.").removeprefix(_PREFIX) for name in content}
    return {
        ours: content[name] for name, ours in names.items() if not ours.endswith("position_ids")
    }


def infer_config(
    state_dict: dict[str, Tensor], source: str | os.PathLike, **options: Any
) -> CLIPViPConfig:
    """Infer the configuration from a state dict's shapes, with heads of 64.

    source: name of the checkpoint in errors.
    options: any of VIDEO_OPTIONS; overrides what the shapes say.
    Raises ValueError if a weight that gives a shape is missing.
    """

    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f"{source} is no CLIP-ViP checkpoint: it has no {name}")
        return state_dict[name].shape

    def tower(prefix: str) -> dict[str, Any]:
        intermediate, hidden = shape(f"{prefix}.encoder.layers.0.mlp.fc1.weight")
        layers = {
            name.split(".")[3] for name in state_dict if name.startswith(f"{prefix}.encoder.layers")
        }
        return {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": len(layers),
            "num_attention_heads": max(hidden // _HEAD_DIM, 1),
        }

    vocabulary = shape("text_model.embeddings.token_embedding.weight")[0]
    patch = shape("vision_model.embeddings.patch_embedding.weight")[-1]
    patches = shape("vision_model.embeddings.position_embedding.weight")[0] - 1
    projection = shape("visual_projection.weight")[0]
    frames = shape("vision_model.embeddings.temporal_embedding")[1]
    added = state_dict.get("vision_model.embeddings.added_cls", ())
    return CLIPViPConfig(
        text_config={
            **tower("text_model"),
            "projection_dim": projection,
            "vocab_size": vocabulary,
            "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight")[0],
            # The authors read a text's feature at its highest token, the last of the vocabulary.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
        vision_config={
            **tower("vision_model"),
            "projection_dim": projection,
            "patch_size": patch,
            "image_size": patch * round(patches**0.5),
        },
        projection_dim=projection,
        **{"num_proxies": len(added) + 1, "num_frames": frames, **options},
    )


def authors_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of a CLIPViPModel under the authors' names, with position_ids."""
    weights = dict(model.state_dict())
    for embeddings in ("text_model.embeddings", "vision_model.embeddings"):
        positions = len(weights[f"{embeddings}.position_embedding.weight"])
        weights[f"{embeddings}.position_ids"] = torch.arange(positions)[None]
    return {_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}
