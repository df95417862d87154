"""What is trained, at which rate: frozen parameters, groups of the optimiser, the schedule."""

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from clipvip.model import CLIPViPModel
from clipvip.training.config import ConfigError, OptimizerConfig, TrainConfig

_LAYER = re.compile(r"(?P<tower>text|vision)_model\.encoder\.layers\.(?P<number>\d+)\.")
_BELOW_LAYERS = ("text_model.embeddings.", "vision_model.embeddings.", "vision_model.pre_layrnorm.")


def freeze(model: nn.Module, frozen: Sequence[str], unfrozen: Sequence[str] = ()) -> None:
    """Trains no parameter whose name one of the `frozen` globs matches, unless one of the
    `unfrozen` does. Raises ConfigError for a glob that matches nothing."""
    names = [name for name, _ in model.named_parameters()]
    for key, globs in (("freeze", frozen), ("unfreeze", unfrozen)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ConfigError(
                    f"model.{key}: {glob!r} matches no parameter; names are such as {names[0]}"
                )
    for name, parameter in model.named_parameters():
        matches = [any(fnmatchcase(name, g) for g in globs) for globs in (frozen, unfrozen)]
        parameter.requires_grad_(not matches[0] or matches[1])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model.freeze leaves no parameter to train")


def adamw(model: CLIPViPModel, optim: OptimizerConfig) -> torch.optim.AdamW:
    """In one pass over memory, which is several times quicker than PyTorch's default on CPUs."""
    return torch.optim.AdamW(parameter_groups(model, optim), optim.lr, optim.betas, fused=True)


def parameter_groups(model: CLIPViPModel, optim: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups for AdamW, each with the "share" of the run's learning rate that it gets.

    Biases, LayerNorms (told by their class, whatever their name) and logit_scale are not
    decayed. With layer_decay d, of N layers of a tower the last has share d, the first d^N,
    and what lies below d^(N+1); projections and all else have 1.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name in ("bias", "logit_scale")
    }
    depths = {
        "text": len(model.text_model.encoder.layers),
        "vision": len(model.vision_model.encoder.layers),
    }
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if id(parameter) in exempt else optim.weight_decay
        share = optim.layer_decay ** height(name, depths)
        # logit_scale apart: it is never a shard, and a group holds one kind.
        key = (name == "logit_scale", decay, share)
        group = groups.setdefault(key, {"params": [], "weight_decay": decay, "share": share})
        group["params"].append(parameter)
    return list(groups.values())


def height(name: str, depths: dict[str, int]) -> int:
    """How many layers a parameter lies below the projections."""
    if layer := _LAYER.match(name):
        return depths[layer["tower"]] - int(layer["number"])
    if name.startswith(_BELOW_LAYERS):
        return depths[name.partition("_")[0]] + 1
    return 0


def schedule(done: int, total: int, warmup: float) -> float:
    """Factor of the learning rate after `done` of `total` steps: linear over the first
    `warmup` share of steps to 1, then a cosine that would reach 0 after the last."""
    rising = math.ceil(warmup * total)
    if done < rising:
        return (done + 1) / rising
    return (1 + math.cos(math.pi * (done - rising) / (total - rising))) / 2


def run_steps(config: TrainConfig, batches: int) -> tuple[int, int]:
    """Optimiser steps of an epoch of so many batches, rounded down, and of the whole run."""
    epoch = max(1, batches // config.accumulation)
    passes = config.epochs or 0
    return epoch, config.max_steps or math.ceil(passes * batches / config.accumulation)
