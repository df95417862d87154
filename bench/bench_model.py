"""The vision tower as a whole: `clipvip bench model`.

From videos of 12 frames to features, without gradients ("forward") or with gradients of all
weights ("both"); bf16 is autocast over fp32 weights. Records: model-*.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import harness
import peers
import pytest
import records
import torch
import torch.nn.functional as F
from bench_proxy_attention import join, softmax_attention, split_tokens, with_proxies
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from clipvip.model import CLIPViPConfig, CLIPViPModel
from clipvip.training import parallel

SIZES: dict[str, dict[str, Any]] = {
    "b16-fp32": dict(videos=2, patch=16, dtype="float32"),
    "b16-bf16": dict(videos=2, patch=16, dtype="bfloat16"),
    "b32-fp32": dict(videos=4, patch=32, dtype="float32"),
    "b32-bf16": dict(videos=4, patch=32, dtype="bfloat16"),
    "small-fp32": dict(videos=1, patch=32, dtype="float32", layers=2),
    "b16-bf16-batch32": dict(videos=32, patch=16, dtype="bfloat16", device="cuda"),
    "b32-bf16-batch32": dict(videos=32, patch=32, dtype="bfloat16", device="cuda"),
    "small-bf16": dict(videos=1, patch=32, dtype="bfloat16", layers=2, device="cuda"),
}
CASES = records.each_way(
    {
        f"{name}-{way}": {**size, "backward": way == "both"}
        for name, size in SIZES.items()
        for way in ("forward", "both")
    }
)
QUICK = {case: {"compiled": False} for case in ("small-fp32-both-default", "small-bf16-both-cuda")}
FRAMES, SIDE, PROXIES, LAYERS = 12, 224, 4, 12
# Weights whose gradients together depend on every product, norm and attention of the backward.
CHECKED = (
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.temporal_embedding",
    "vision_model.embeddings.added_cls",
    "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "vision_model.encoder.layers.0.mlp.fc1.weight",
    "visual_projection.weight",
)
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.15}


def clip_vip(patch: int, layers: int, text_layers: int = 1) -> CLIPViPModel:
    """Return a model of the published widths, with weights that use every part of the tower."""
    torch.manual_seed(0)
    vision = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    vision |= dict(num_hidden_layers=layers, patch_size=patch, image_size=SIDE)
    config = CLIPViPConfig(
        vision_config=vision, text_config={"num_hidden_layers": text_layers}, num_proxies=PROXIES
    )
    model = CLIPViPModel(config)
    with torch.no_grad():
        model.vision_model.embeddings.temporal_embedding.normal_(std=0.02)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model


# --- eager: the authors' form --------------------------------------------------------------------


def wide_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Apply a norm in fp32 (or wider); the result has the dtype of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = norm.weight.to(wide.dtype), norm.bias.to(wide.dtype)
    return F.layer_norm(wide, norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


def eager_attention(x: Tensor, attention: nn.Module, frames: int) -> Tensor:
    """Attention in the authors' form: proxies' keys and values copied per frame, scores stored."""
    query, key, value = (
        projection(x).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    (proxy_query, query), (proxy_key, keys), (proxy_value, values) = (
        split_tokens(each, PROXIES, frames) for each in (query, key, value)
    )
    of_proxies = softmax_attention(proxy_query, key, value)
    of_patches = softmax_attention(
        query, with_proxies(proxy_key, keys), with_proxies(proxy_value, values)
    )
    return attention.out_proj(join(of_proxies, of_patches).flatten(2))


def eager_layer(x: Tensor, layer: nn.Module, frames: int) -> Tensor:
    x = x + eager_attention(wide_norm(x, layer.layer_norm1), layer.self_attn, frames)
    inner = layer.mlp.fc1(wide_norm(x, layer.layer_norm2))
    return x + layer.mlp.fc2(inner * torch.sigmoid(1.702 * inner))


def eager_features(
    model: CLIPViPModel,
    pixels: Tensor,
    run_layer: Callable[[Tensor, nn.Module, int], Tensor] = eager_layer,
) -> Tensor:
    """Return features [B, P] of pixels [B, N, 3, H, W], with the weights of our model."""
    videos, frames = pixels.shape[:2]
    tower = model.vision_model
    parts = tower.embeddings
    position = parts.position_embedding.weight
    patches = parts.patch_embedding(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)
    time = F.interpolate(parts.temporal_embedding.transpose(1, 2), frames, mode="linear")
    patches = patches.unflatten(0, (videos, frames)) + position[1:] + time[0].T[:, None]
    proxies = torch.cat([parts.class_embedding[None], parts.added_cls]) + position[0]
    x = torch.cat([proxies.expand(videos, -1, -1), patches.flatten(1, 2)], 1)
    x = wide_norm(x, tower.pre_layrnorm)
    for layer in tower.encoder.layers:
        x = run_layer(x, layer, frames)
    return model.visual_projection(wide_norm(x[:, 0], tower.post_layernorm))


compiled_layer = torch.compile(eager_layer, dynamic=False)


def kept_little(x: Tensor, layer: nn.Module, frames: int) -> Tensor:
    """Run a layer with checkpointing, because its activations in float64 would not fit."""
    return checkpoint(eager_layer, x, layer, frames, use_reentrant=False)


# --- the others ----------------------------------------------------------------------------------


def clip_vision(model: CLIPViPModel) -> CLIPVisionModelWithProjection:
    """Return transformers' tower of the same sizes, with the weights that both have."""
    of_ours = model.config.vision_config
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    sizes = {key: getattr(of_ours, key) for key in (*keys, "patch_size", "image_size")}
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**sizes, projection_dim=model.config.projection_dim)
    )
    weights = {
        name: weight
        for name, weight in model.state_dict().items()
        if not name.endswith(("added_cls", "temporal_embedding"))
    }
    absent, _ = tower.load_state_dict(weights, strict=False)
    assert not [name for name in absent if "position_ids" not in name], absent
    return tower.to(model.device)


def pooled_features(tower: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """Return the mean of the frames' features, [B, P], of pixels [B, N, 3, H, W]."""
    return tower(pixels.flatten(0, 1)).image_embeds.unflatten(0, pixels.shape[:2]).mean(1)


def onnx_features(model: CLIPViPModel, pixels: Tensor) -> Tensor:
    """Return unit features [B, P] of pixels [B, N, 3, H, W], by ONNX Runtime."""
    return peers.onnx_runtime(model)(pixels)


Features = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]


def contestants(model: CLIPViPModel, compiled: bool) -> dict[str, Features]:
    """Return, per name, a model and a function from it and pixels [B, N, 3, H, W] to [B, P]."""
    found: dict[str, Features] = {
        "eager": (model, eager_features),
        "mean pooling": (clip_vision(model), pooled_features),
        "ours": (model, CLIPViPModel.get_video_features),
    }
    if compiled:
        ours = copy.deepcopy(model)
        parallel.compile_layers(ours)
        run_layer = functools.partial(eager_features, run_layer=compiled_layer)
        found["compiled eager"] = (model, run_layer)
        found["ours compiled"] = (ours, CLIPViPModel.get_video_features)
    return found


def left_out(compiled: bool) -> dict[str, str]:
    names = () if compiled else ("compiled eager", "ours compiled")
    return dict.fromkeys(names, "not compiled here, to save time")


def flop(videos: int, patch: int, layers: int) -> float:
    """Return the operations of the products of the forward: layers, attention, patch embedding."""
    patches = (SIDE // patch) ** 2
    tokens = videos * (PROXIES + FRAMES * patches)
    pairs = PROXIES * tokens + videos * FRAMES * patches * (PROXIES + patches)
    dense = 12 * 768**2 * layers * tokens + 3 * patch**2 * 768 * videos * FRAMES * patches
    return 2.0 * dense + 4.0 * 768 * layers * pairs


def measure(
    videos: int,
    patch: int,
    dtype: str,
    backward: bool,
    layers: int = LAYERS,
    device: str = "cpu",
    compiled: bool = True,
    budget: float = 8.0,
) -> dict[str, Any]:
    """Time every contestant on one size, in this process."""
    model = clip_vip(patch, layers).to(device)
    pixels = torch.randn(videos, FRAMES, 3, SIDE, SIDE, device=device)
    grad = torch.randn(videos, model.config.projection_dim, device=device)

    def step(model: nn.Module, features: Callable, narrow: bool = True) -> list[Tensor]:
        kind, wanted = pixels.device.type, next(model.parameters()).dtype
        with torch.autocast(kind, torch.bfloat16, enabled=narrow and dtype == "bfloat16"):
            if not backward:
                with torch.no_grad():
                    return [features(model, pixels.to(wanted))]
            out = features(model, pixels.to(wanted))
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(out, list(weights.values()), grad.to(out.dtype))
        of = dict(zip(weights, grads, strict=True))
        return [out.detach(), *(of[name] for name in CHECKED if name in of)]

    for name, parameter in model.named_parameters():  # the text tower takes no part
        tower = name.startswith(("vision_model", "visual_projection"))
        parameter.requires_grad_(tower)
    able = contestants(model, compiled)
    runtime = "ONNX Runtime" if dtype == "float32" else "ONNX Runtime, fp32"
    if device == "cpu" and not backward:
        able[runtime] = (model, onnx_features)
    kept = functools.partial(eager_features, run_layer=kept_little)
    expected = step(copy.deepcopy(model).double(), kept, narrow=False)
    pooled = copy.deepcopy(able["mean pooling"][0]).double()
    pooled.gradient_checkpointing_enable()  # otherwise a large batch would not fit
    return harness.compare(
        {name: functools.partial(step, *each) for name, each in able.items()},
        expected=expected,
        expected_of={
            "mean pooling": step(pooled, pooled_features, narrow=False),
            runtime: [F.normalize(expected[0], dim=-1)],
        },
        tolerance=TOLERANCES[dtype],
        work={"flop": flop(videos, patch, layers) * (3 if backward else 1)},
        seconds=budget,
        min_rounds=3,
        device=device,
        left_out=left_out(compiled),
    )


@pytest.mark.parametrize("case", CASES)
def test_model(case: str, run_case) -> None:
    run_case(CASES[case])
