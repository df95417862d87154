"""Which parameters are trained and at which rate: freezing, parameter groups, the schedule."""

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from clipvip.model import CLIPViPModel
from clipvip.model.configuration import CAPTIONING
from clipvip.training.config import ConfigError, OptimizerConfig, TrainConfig

_LAYER = re.compile(r"(?P<tower>text|vision)_model\.encoder\.layers\.(?P<number>\d+)\.")
_BELOW_LAYERS = ("text_model.embeddings.", "vision_model.embeddings.", "vision_model.pre_layrnorm.")


def freeze(model: nn.Module, frozen: Sequence[str], unfrozen: Sequence[str] = ()) -> None:
    """Freeze all parameters whose names match one of the `frozen` globs, and train those that match
    one of the `unfrozen` globs; all others stay as they are. Weights of layers with LoRA have their
    names without it. Raises ConfigError for a glob that matches nothing."""
    parameters = {
        name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()
    }
    names = list(parameters)
    for key, globs in (("freeze", frozen), ("unfreeze", unfrozen)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ConfigError(
                    f"model.{key}: {glob!r} matches no parameter; names are such as {names[0]}"
                )
    for name, parameter in parameters.items():
        matches = [any(fnmatchcase(name, g) for g in globs) for globs in (frozen, unfrozen)]
        parameter.requires_grad_((parameter.requires_grad and not matches[0]) or matches[1])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model.freeze leaves no parameter to train")


def adamw(model: CLIPViPModel, optim: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW in its fused form, which on CPUs is several times faster than the default."""
    return torch.optim.AdamW(parameter_groups(model, optim), optim.lr, optim.betas, fused=True)


def parameter_groups(model: CLIPViPModel, optim: OptimizerConfig) -> list[dict[str, Any]]:
    """Make groups for AdamW; "share" is a group's learning rate relative to the run's.

    Biases, LayerNorms (recognized by class) and logit_scale have no weight decay. With layer_decay
    d, the last of a tower's N layers has share d, the first d^N, and its embeddings d^(N+1); all
    other parameters, such as projections, have share 1. With decoder_lr, a captioner's decoder and
    bridge have the share that gives this rate.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name in ("bias", "logit_scale")
    }
    towers = {"text": model.text_model, "vision": model.vision_model}
    depths = {name: len(tower.encoder.layers) for name, tower in towers.items()}
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if id(parameter) in exempt else optim.weight_decay
        share = optim.layer_decay ** height(name, depths)
        if name.startswith(CAPTIONING) and optim.decoder_lr is not None:
            share = optim.decoder_lr / optim.lr
        # logit_scale has a group of its own: it is never sharded, and a group holds one kind.
        key = (name == "logit_scale", decay, share)
        group = groups.setdefault(key, {"params": [], "weight_decay": decay, "share": share})
        group["params"].append(parameter)
    return list(groups.values())


def height(name: str, depths: dict[str, int]) -> int:
    """Count the layers from the projections (0) down to a parameter. depths: layers per tower."""
    if layer := _LAYER.match(name):
        return depths[layer["tower"]] - int(layer["number"])
    if name.startswith(_BELOW_LAYERS):
        return depths[name.partition("_")[0]] + 1
    return 0


def schedule(done: int, total: int, warmup: float) -> float:
    """Return the factor of the learning rate after `done` of `total` steps.

    It rises linearly to 1 over the first `warmup` share of the steps, then follows a cosine that
    would reach 0 after the last one. transformers' get_cosine_schedule_with_warmup is not used: its
    first factor is 0, which wastes a step.
    """
    rising = math.ceil(warmup * total)
    if done < rising:
        return (done + 1) / rising
    return (1 + math.cos(math.pi * (done - rising) / (total - rising))) / 2


def run_steps(config: TrainConfig, batches: int) -> tuple[int, int]:
    """Return the optimizer steps per epoch of `batches` micro-batches, rounded down but at least 1,
    and of the whole run, rounded up."""
    steps = config.max_steps or math.ceil((config.epochs or 0) * batches / config.accumulation)
    return max(1, batches // config.accumulation), steps
