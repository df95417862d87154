"""What a configuration costs, before it runs: tokens, operations, bytes.

Operations are those of the model's products, two for each multiplication, as the field counts
them: backward is twice forward, and what is computed again is not counted.
"""

from dataclasses import dataclass
from typing import Any

import torch

from clipvip.model import CLIPViPModel
from clipvip.training.config import TrainConfig

TERA, GIB = 1e12, 2.0**30
# Dense 16-bit products of one GPU, 10¹² operations a second, as their maker states them.
PEAKS = {"B200": 2250.0, "H200": 989.4, "H100": 989.4, "H800": 989.4, "A100": 312.0, "L40S": 362.0}

# Bytes that a layer keeps of a token for backward, for each of its channels: in fp32, and under
# bf16 autocast, which keeps the residual stream and LayerNorms in fp32.
_KEPT = {"video": {"no": 40.2, "bf16": 24.2}, "text": {"no": 80.5, "bf16": 47.0}}
_KEPT_BELOW = {"video": {"no": 32.0, "bf16": 20.0}, "text": {"no": 4.0, "bf16": 4.0}}


@dataclass(frozen=True)
class Plan:
    """A step of a run. clips: of a step, over all processes; processes: how many."""

    parameters: int
    trained: int
    video_tokens: int
    """Of a clip: proxies and patches of its frames."""
    image_tokens: int
    """Of its image, 0 where the loss takes none."""
    text_tokens: int
    """Of its texts, at most."""
    tower_flops: float
    """Of a clip through the towers, forward."""
    loss_flops: float
    """Of a step, forward."""
    state_bytes: float
    """Of a process: weights, gradients, the optimiser's moments, the average."""
    activation_bytes: float
    """Of a process, kept for backward at once."""
    clips: int
    processes: int

    @property
    def step_flops(self) -> float:
        """Of a step, forward and backward, over all processes."""
        return 3 * (self.clips * self.tower_flops + self.loss_flops)

    def describe(self, clips: int, steps: int) -> str:
        """A line for each figure. clips: in the training data; steps: of the run."""
        each = self.clips // self.processes
        tera = self.step_flops / TERA
        lines = {
            "parameters": f"{self.parameters / 1e6:.1f} M, {self.trained / 1e6:.1f} M trained",
            "tokens of a clip": f"{self.video_tokens} of video, {self.image_tokens} of image, "
            f"{self.text_tokens} of text at most",
            "operations of a step": f"{tera:.2f} T forward and backward, of which the loss "
            f"{300 * self.loss_flops / self.step_flops:.1f} %",
            "memory of a process": f"{self.state_bytes / GIB:.2f} GiB of weights, gradients and "
            f"moments, about {self.activation_bytes / GIB:.2f} GiB kept for backward",
            "a step": f"{self.clips} clips, {each} on each of {self.processes} processes",
            "the run": f"{steps} steps, {steps * self.clips} samples drawn of {clips} clips, "
            f"{steps * tera / 1e6:.3g} · 10¹⁸ operations",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def plan(model: CLIPViPModel, config: TrainConfig, processes: int) -> Plan:
    """Of a model, which may be on the meta device, trained by a configuration."""
    text, vision = model.config.text_config, model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    frames, proxies = config.data.num_frames, vision.num_proxies
    with_image = config.task == "omnisource" and config.variant.endswith("fc")
    texts = 1 if config.task == "retrieval" or config.variant == "vs" else 2
    video_tokens = proxies + frames * patches
    image_tokens = (proxies + patches) if with_image else 0
    text_tokens = texts * config.data.text_length

    def layers(tower: Any, tokens: int, pairs: float) -> float:
        """Products of all layers with their weights, and of queries and values with `pairs`."""
        width, inner = tower.hidden_size, tower.intermediate_size
        weights = tokens * (4 * width * width + 2 * width * inner)
        return 2 * tower.num_hidden_layers * (weights + 2 * width * pairs)

    def video(count: int) -> float:
        pairs = count * patches * (patches + proxies) + proxies * (proxies + count * patches)
        embedding = 2 * count * patches * 3 * vision.patch_size**2 * vision.hidden_size
        return embedding + layers(vision, proxies + count * patches, pairs)

    length, dimension = config.data.text_length, model.config.projection_dim
    tower_flops = video(frames) + texts * layers(text, length, length * length)
    if with_image:
        tower_flops += video(1)
    negatives = config.batch_size // config.accumulation  # of a clip
    pairs = sum(len(term) - 1 for term in config.variant.split("_"))
    pairs = 1 if config.task == "retrieval" else pairs
    loss_flops = 2.0 * pairs * config.accumulation * negatives**2 * dimension

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    state = 4.0 * (parameters + trained * (3 + (config.ema is not None)))
    if config.parallel == "fsdp":
        state /= processes

    def kept(tower: Any, kind: str, tokens: int) -> float:
        of_layer = _KEPT[kind][config.mixed_precision]
        of_layers = tower.num_hidden_layers * of_layer
        if config.model.gradient_checkpointing:  # inputs of layers, and the insides of one
            of_layers = tower.num_hidden_layers * 4 + of_layer
        return tokens * tower.hidden_size * (of_layers + _KEPT_BELOW[kind][config.mixed_precision])

    at_once = negatives // processes
    at_once = min(config.micro_batch or at_once, at_once)
    of_clip = kept(vision, "video", video_tokens + image_tokens) + kept(text, "text", text_tokens)
    return Plan(
        parameters,
        trained,
        video_tokens,
        image_tokens,
        text_tokens,
        tower_flops,
        loss_flops,
        state,
        at_once * of_clip,
        config.batch_size,
        processes,
    )


def peak_tera(device: torch.device) -> float | None:
    """PEAKS of a device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
