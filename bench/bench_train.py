"""A whole post-pretraining step: `clipvip bench train`.

From uint8 frames to new weights: videos of 12 frames with subtitles, middle frames with captions,
both towers, the vsc_fc loss, its gradients, clipping and AdamW; bf16 is autocast over fp32 weights.
Ours is the code that the trainer runs. Records: train-*.
"""

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import harness
import psutil
import pytest
import records
import torch
import torch.nn.functional as F
from bench_model import (
    CHECKED,
    FRAMES,
    LAYERS,
    SIDE,
    TOLERANCES,
    clip_vip,
    clip_vision,
    compiled_layer,
    eager_features,
    kept_little,
    left_out,
    pooled_features,
)
from bench_pairwise_logsumexp import naive_vsc_fc
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from clipvip.model import CLIPViPModel
from clipvip.model.processing import normalize_frames
from clipvip.training import parallel
from clipvip.training.config import DataConfig, OptimizerConfig, TrainConfig
from clipvip.training.optimization import adamw
from clipvip.training.plan import plan
from clipvip.training.task import Task, Towers, task_of

SIZES: dict[str, dict[str, Any]] = {
    "b16-fp32": dict(videos=2, patch=16, dtype="float32"),
    "b16-bf16": dict(videos=2, patch=16, dtype="bfloat16"),
    "b32-fp32": dict(videos=4, patch=32, dtype="float32"),
    "b32-bf16": dict(videos=4, patch=32, dtype="bfloat16"),
    "small-fp32": dict(videos=2, patch=32, dtype="float32", layers=2),
    "b16-bf16-batch32": dict(videos=32, patch=16, dtype="bfloat16", device="cuda"),
    "b32-bf16-batch32": dict(videos=32, patch=32, dtype="bfloat16", device="cuda"),
    "small-bf16": dict(videos=2, patch=32, dtype="bfloat16", layers=2, device="cuda"),
}
CASES = records.each_way(SIZES)
QUICK = {case: {"compiled": False} for case in ("small-fp32-default", "small-bf16-cuda")}
WORDS, TEXT_LENGTH, END = 49000, 70, 49407
STATES = 5 * 4  # weights, gradients and two moments of five models

Batch = dict[str, Tensor]


def settings(videos: int, dtype: str) -> TrainConfig:
    """Return the paper's post-pretraining with a batch of `videos` clips."""
    return TrainConfig(
        out="",
        task="omnisource",
        variant="vsc_fc",
        data=DataConfig(num_frames=FRAMES, text_length=TEXT_LENGTH),
        optimizer=OptimizerConfig(lr=5e-6, weight_decay=0.05, max_grad_norm=5.0),
        batch_size=videos,
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
    )


def made_up(videos: int, device: str) -> Batch:
    """Return a random batch like the loader's: uint8 frames, texts of various lengths."""
    frames = torch.randint(256, (videos * FRAMES, 3, SIDE, SIDE), dtype=torch.uint8)
    batch = {
        "pixel_values": frames,
        "frame_offsets": torch.arange(0, len(frames) + 1, FRAMES, dtype=torch.int32),
        "image": frames[FRAMES // 2 :: FRAMES].clone(),
    }
    for name in ("subtitle", "caption"):
        ids = torch.randint(1, WORDS, (videos, TEXT_LENGTH))
        length = torch.randint(TEXT_LENGTH // 2, TEXT_LENGTH + 1, (videos, 1))
        within = torch.arange(TEXT_LENGTH) < length
        batch[f"{name}_ids"] = ids.masked_fill(~within, END).index_fill(1, torch.tensor(-1), END)
        batch[f"{name}_mask"] = within.long()
    for name in ("video", "subtitle", "caption"):
        batch[f"{name}_present"] = torch.ones(videos, dtype=torch.bool)
    # These masks decide about shapes, so the trainer keeps them on the host.
    there = {name: each for name, each in batch.items() if name.endswith("_present")}
    return {name: each.to(device) for name, each in batch.items()} | there


# --- the loss of each form -----------------------------------------------------------------------


def eager_loss(
    model: CLIPViPModel,
    batch: Batch,
    autocast: Callable[[], Any],
    features: Callable[[CLIPViPModel, Tensor], Tensor] = eager_features,
) -> Tensor:
    """Return the loss with videos, images and texts embedded separately and all logits stored."""
    dtype = model.logit_scale.dtype
    videos = normalize_frames(batch["pixel_values"]).to(dtype).unflatten(0, (-1, FRAMES))
    images = normalize_frames(batch["image"]).to(dtype)[:, None]
    with autocast():
        found = [
            features(model, videos),
            model.get_text_features(batch["subtitle_ids"], batch["subtitle_mask"]),
            features(model, images),
            model.get_text_features(batch["caption_ids"], batch["caption_mask"]),
        ]
    wide = torch.promote_types(dtype, torch.float32)
    return naive_vsc_fc(*(F.normalize(x.to(wide), dim=-1) for x in found), model.logit_scale.exp())


def pooled(model: CLIPViPModel, pixels: Tensor) -> Tensor:
    return pooled_features(model.vision_model, pixels)


def our_loss(towers: Towers, batch: Batch, autocast: Callable[[], Any], task: Task) -> Tensor:
    with autocast():
        features = towers(batch)
    return task.loss(features, batch)


def one_step(
    model: nn.Module,
    loss_of: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
) -> list[Tensor]:
    """Update the weights. Return the loss, the gradient's norm and a few gradients; in the first
    step also return how far the weights moved."""
    narrow = config.mixed_precision == "bf16" and model.logit_scale.dtype == torch.float32
    kind = batch["pixel_values"].device.type
    # Single weights cannot be compared: the first step depends on the signs of gradients.
    before = None if optimizer.state else [p.detach().clone() for p in model.parameters()]
    loss = loss_of(batch, lambda: torch.autocast(kind, torch.bfloat16, enabled=narrow))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
    optimizer.step()
    grads = {name: p.grad for name, p in model.named_parameters() if name in CHECKED}
    model.zero_grad()
    found = [loss.detach(), norm, *(grads[name] for name in CHECKED if name in grads)]
    if before:
        pairs = zip(model.parameters(), before, strict=True)
        found.append(torch.stack([(p.detach() - was).double().norm() for p, was in pairs]).norm())
    return found


def plain_adamw(model: nn.Module, config: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    """Return AdamW with the trainer's weight decay."""
    optim = config.optimizer
    decayed = [[], []]
    for name, parameter in model.named_parameters():
        kept = "norm" in name or "layrnorm" in name or name.endswith(("bias", "logit_scale"))
        decayed[not kept].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in zip(decayed, (0.0, optim.weight_decay), strict=True)
    ]
    return torch.optim.AdamW(groups, optim.lr, optim.betas, fused=fused)


def contestants(
    model: CLIPViPModel, config: TrainConfig, compiled: bool
) -> dict[str, tuple[CLIPViPModel, Callable[..., Tensor], torch.optim.Optimizer]]:
    """Return, per name, a model of its own, the loss of a batch and an optimizer.

    Eager updates each weight by itself, as PyTorch does by default on a CPU; all others update the
    weights in one pass.
    """
    task, optim = task_of(config), config.optimizer
    processor: Any = SimpleNamespace(image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD)
    found: dict[str, Any] = {}

    def plainly(name: str, changed: CLIPViPModel, features: Callable[..., Tensor]) -> None:
        step = plain_adamw(changed, config, fused=name != "eager")
        found[name] = (changed, functools.partial(eager_loss, changed, features=features), step)

    def by_trainer(name: str, changed: CLIPViPModel) -> None:
        loss = functools.partial(our_loss, task.towers(changed, processor), task=task)
        found[name] = (changed, loss, adamw(changed, optim))

    plain = copy.deepcopy(model)
    plain.text_model.config._attn_implementation = "eager"
    plainly("eager", plain, eager_features)
    mean = copy.deepcopy(model)
    mean.vision_model, mean.visual_projection = clip_vision(model), nn.Identity()
    plainly("mean pooling", mean, pooled)
    by_trainer("ours", copy.deepcopy(model))
    if compiled:
        run_layer = functools.partial(eager_features, run_layer=compiled_layer)
        plainly("compiled eager", copy.deepcopy(model), run_layer)
        forms = {"ours compiled": False}
        if model.device.type == "cuda":
            forms["ours, text compiled"] = True
        for name, only_text in forms.items():
            quick = copy.deepcopy(model)
            parallel.compile_layers(quick, only_text)
            by_trainer(name, quick)
    return found


def measure(
    videos: int,
    patch: int,
    dtype: str,
    layers: int = LAYERS,
    device: str = "cpu",
    compiled: bool = True,
    budget: float = 8.0,
) -> dict[str, Any]:
    """Time every contestant on one size, in this process."""
    model = clip_vip(patch, layers, text_layers=layers).to(device).train()
    config, batch = settings(videos, dtype), made_up(videos, device)
    without = left_out(compiled)
    gib = STATES * 4 * sum(p.numel() for p in model.parameters()) / 2**30
    if compiled and device == "cpu" and gib > psutil.virtual_memory().available / 2**30 * 0.6:
        compiled, without = False, dict.fromkeys(left_out(False), f"{gib:.0f} GiB for all states")
    able = contestants(model, config, compiled)

    def exact(model: CLIPViPModel, features: Callable[..., Tensor]) -> list[Tensor]:
        wide = copy.deepcopy(model).double()
        if isinstance(wide.vision_model, PreTrainedModel):  # otherwise a large batch would not fit
            wide.vision_model.gradient_checkpointing_enable()
        loss = functools.partial(eager_loss, wide, features=features)
        return one_step(wide, loss, plain_adamw(wide, config, fused=False), batch, config)

    return harness.compare(
        {name: functools.partial(one_step, *each, batch, config) for name, each in able.items()},
        expected=exact(model, functools.partial(eager_features, run_layer=kept_little)),
        expected_of={"mean pooling": exact(able["mean pooling"][0], pooled)},
        tolerance=TOLERANCES[dtype],
        work={"flop": plan(model, config, 1).step_flops},
        seconds=budget,
        min_rounds=3,
        device=device,
        left_out=without,
    )


@pytest.mark.parametrize("case", CASES)
def test_train(case: str, run_case) -> None:
    run_case(CASES[case], limits=2)  # it compiles both towers twice
