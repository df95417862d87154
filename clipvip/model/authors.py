"""Checkpoints of the authors' code and of CLIP to ours, and ours to the authors'.

The authors save one state dict by torch.save: transformers' CLIPModel of 2022 under the prefix
`clipmodel.`, with two `position_ids` buffers that newer transformers has dropped.
"""

import os
import pickle
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from clipvip.model.configuration import CLIPViPConfig

logger = logging.get_logger(__name__)

AUTHORS_SUFFIXES = (".pt", ".pth")
_PREFIX = "clipmodel."
_NESTED = ("model", "state_dict", "model_state_dict")
# The paper's models and every CLIP ViT-B and ViT-L; the files do not say.
_HEAD_DIM = 64


def read_authors_checkpoint(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the authors' file (.pt) into a state dict with our names.

    A state dict nested under "model" or "state_dict" and the prefix "module." of wrapped models
    are unwrapped; `position_ids` are dropped. Nothing in the file is executed. Raises ValueError
    for a file of something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # Not what PyTorch then says: to run the code that a file may hold.
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} cannot be read as a PyTorch file of weights: {reason}; fetch it again, or "
            "save its state dict alone"
        ) from error
    while isinstance(content, dict) and (inner := [k for k in _NESTED if k in content]):
        content = content[inner[0]]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict; expected names and tensors")
    names = {name: name.removeprefix("module.").removeprefix(_PREFIX) for name in content}
    return {
        ours: content[name] for name, ours in names.items() if not ours.endswith("position_ids")
    }


def infer_config(
    state_dict: dict[str, Tensor], source: str | os.PathLike, **options: Any
) -> CLIPViPConfig:
    """The configuration that a state dict's shapes speak of; heads are 64 wide.

    options: VIDEO_OPTIONS, over what the shapes say. Raises ValueError where a shape is missing.
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
    added = state_dict.get("vision_model.embeddings.added_cls")
    shapes = {
        "num_proxies": 1 if added is None else len(added) + 1,
        "num_frames": shape("vision_model.embeddings.temporal_embedding")[1],
    }
    return CLIPViPConfig(
        text_config={
            **tower("text_model"),
            "projection_dim": projection,
            "vocab_size": vocabulary,
            "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight")[0],
            # The authors read the text's feature at its highest token: the vocabulary's last.
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
        **{**shapes, **options},
    )


def authors_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """A CLIPViPModel's weights under the authors' names, position_ids included."""
    weights = dict(model.state_dict())
    for embeddings in ("text_model.embeddings", "vision_model.embeddings"):
        positions = len(weights[f"{embeddings}.position_embedding.weight"])
        weights[f"{embeddings}.position_ids"] = torch.arange(positions)[None]
    return {_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}
