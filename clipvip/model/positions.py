"""Other frame sizes and text lengths: interpolate the position embeddings of a loaded model.

As in open_clip (resize_pos_embed and resize_text_pos_embed), positions of patches are interpolated
over their grid, bicubically with antialiasing, and positions of texts linearly. The position of
the class token, which all proxies share, is kept.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig
from transformers.utils import logging

from clipvip.files import shown
from clipvip.model.configuration import CLIPViPConfig, CLIPViPVisionConfig

logger = logging.get_logger(__name__)

MOST = 10_000  # frames, tokens or pixels that a processor or model may ask for


def with_sizes(
    config: CLIPViPConfig, image_size: int | None = None, text_length: int | None = None
) -> CLIPViPConfig:
    """Return a copy of a configuration with other sizes; None keeps a size.

    image_size: side of a frame in pixels, a multiple of the patch size.
    text_length: number of positions of the text tower.
    Raises ValueError for any other number; its message begins with the option's name.
    """
    config = copy.deepcopy(config)
    if image_size is not None:
        patch = config.vision_config.patch_size
        if type(image_size) is not int or not 0 < image_size <= MOST or image_size % patch:
            wanted = image_size if type(image_size) is int else config.vision_config.image_size
            near = max(1, round(min(wanted, MOST) / patch)) * patch
            raise ValueError(
                f"image_size is {image_size!r}; expected a multiple of {patch}, the patch size, "
                f"such as {near}, up to {MOST}"
            )
        config.vision_config.image_size = image_size
    if text_length is not None:
        if type(text_length) is not int or not 1 < text_length <= MOST:
            raise ValueError(
                f"text_length is {text_length!r}; expected a number of tokens from 2 to {MOST}"
            )
        config.text_config.max_position_embeddings = text_length
    return config


def interpolate_positions(model: Any, sizes: CLIPViPConfig) -> None:
    """Change a CLIPViPModel to the image_size and max_position_embeddings of `sizes`, in place.

    Each interpolation is logged in a line. It is computed in fp32 on the CPU, so that its result
    does not depend on the model's device. Raises ValueError if weights are offloaded.
    """
    source = shown(model.config.name_or_path or "the model")
    side = sizes.vision_config.image_size // sizes.vision_config.patch_size
    embeddings = model.vision_model.embeddings
    old = embeddings.image_size // embeddings.patch_size
    if side != old:
        _replace(embeddings, interpolate_patches(_weight(embeddings), side))
        embeddings.num_patches, embeddings.num_positions = side**2, side**2 + 1
        logger.warning(
            f"{source}: positions of patches interpolated from {old} × {old} to {side} × {side}"
        )
    embeddings.image_size = sizes.vision_config.image_size
    length = sizes.text_config.max_position_embeddings
    embeddings = model.text_model.embeddings
    old = embeddings.position_embedding.num_embeddings
    if length != old:
        _replace(embeddings, interpolate_texts(_weight(embeddings), length))
        logger.warning(f"{source}: positions of texts interpolated from {old} to {length}")

    configs = [model.config.vision_config, model.config.text_config]
    for module in model.modules():
        if hasattr(module, "patches_per_frame"):
            module.patches_per_frame = side**2
        configs.append(getattr(module, "config", None))
    for config in configs:  # some modules have copies
        if isinstance(config, CLIPViPVisionConfig):
            config.image_size = sizes.vision_config.image_size
        elif isinstance(config, CLIPTextConfig):
            config.max_position_embeddings = length


def interpolate_patches(positions: Tensor, side: int) -> Tensor:
    """Interpolate positions [1 + L, C] of the class token and a square of L patches to another
    square: [1 + side², C], in fp32."""
    positions = positions.float()
    first, patches = positions[:1], positions[1:]
    old = round(len(patches) ** 0.5)
    grid = patches.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return torch.cat([first, grid.flatten(2)[0].T])


def interpolate_texts(positions: Tensor, length: int) -> Tensor:
    """Interpolate positions [n, C] of tokens: [length, C], in fp32."""
    return F.interpolate(positions.float().T[None], length, mode="linear")[0].T


def _weight(embeddings: Any) -> Tensor:
    weight = embeddings.position_embedding.weight
    if weight.is_meta:
        raise ValueError(
            "positions cannot be interpolated while weights are offloaded; first save the model "
            "with other sizes: clipvip convert SOURCE FOLDER --image-size … --text-length …"
        )
    return weight.detach().cpu()


def _replace(embeddings: Any, positions: Tensor) -> None:
    """Set the position embedding of a tower to [n, C], in its dtype and on its device."""
    module = embeddings.position_embedding
    weight = module.weight
    positions = positions.to(weight.device, weight.dtype).contiguous()
    module.weight = nn.Parameter(positions, requires_grad=weight.requires_grad)
    module.num_embeddings = len(positions)
    device = embeddings.position_ids.device
    embeddings.position_ids = torch.arange(len(positions), device=device)[None]
