"""What a configuration costs, before it runs: tokens, operations, bytes.

Operations are those of the model's products, two for each multiplication, as the field counts
them; what is computed again is not counted. Backward is twice forward, but for what is frozen: of
a weight no gradient is made, and below a tower's lowest trained layer nothing at all.
"""

from dataclasses import dataclass

import torch

from clipvip.model import CLIPViPModel
from clipvip.training.config import TrainConfig
from clipvip.training.optimization import height
from clipvip.training.task import task_of

TERA, GIB = 1e12, 2.0**30
# Dense 16-bit products of one GPU, 10¹² operations a second, as their maker states them (half of
# those with sparsity). The first whose name is in the device's counts.
PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "H800 PCIe": 756.5,
    "H800": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
}

# Bytes that a layer keeps of a token for backward, for each of its channels: in fp32, and under
# bf16 autocast, which keeps the residual stream and LayerNorms in fp32.
_KEPT = {"vision": {"no": 40.2, "bf16": 24.2}, "text": {"no": 80.5, "bf16": 47.0}}
_FLOAT = 4  # bytes


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
    backward_flops: float
    """Of a clip through the towers, backward."""
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
        return self.clips * (self.tower_flops + self.backward_flops) + 3 * self.loss_flops

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
    """Plan the training of a model, which may be on the meta device, by a configuration that says
    how clips are read."""
    task, vision = task_of(config), model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    frames, length, proxies = config.data.num_frames, config.data.text_length, vision.num_proxies
    assert frames is not None and length is not None
    video_tokens = proxies + frames * patches
    image_tokens = task.with_image * (proxies + patches)
    text_tokens = len(task.texts) * length

    towers = {kind: _Tower.of(model, kind) for kind in ("vision", "text")}

    def video(count: int) -> _Input:
        pairs = count * patches * (patches + proxies) + proxies * (proxies + count * patches)
        return _Input(towers["vision"], proxies + count * patches, pairs, count * patches)

    dimension = model.config.projection_dim
    text = _Input(towers["text"], length, length * length, 0)
    inputs = [video(frames), *len(task.texts) * [text], *task.with_image * [video(1)]]
    negatives = config.batch_size // config.accumulation  # of a clip
    loss_flops = 2.0 * task.pairs * config.accumulation * negatives**2 * dimension

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    state = 4.0 * (parameters + trained * (3 + (config.ema is not None)))
    if config.parallel == "fsdp":
        state /= processes

    at_once = negatives // processes
    at_once = min(config.micro_batch or at_once, at_once)
    tokens = {"vision": video_tokens + image_tokens, "text": text_tokens}
    kept = [tower.kept(kind, tokens[kind], config) for kind, tower in towers.items()]
    of_clip = sum(all_along for all_along, _ in kept) + max(for_a_layer for _, for_a_layer in kept)
    return Plan(
        parameters,
        trained,
        video_tokens,
        image_tokens,
        text_tokens,
        sum(each.forward() for each in inputs),
        sum(each.backward() for each in inputs),
        loss_flops,
        state,
        at_once * of_clip,
        config.batch_size,
        processes,
    )


@dataclass(frozen=True)
class _Tower:
    """Sizes of a tower, and what of it is trained."""

    width: int
    inner: int
    layers: int
    pixels: int
    """Of a patch; 0 for texts."""
    reached: int
    """Layers that backward reaches."""
    trained: int
    """Weights of the layers' products that are trained."""
    norm_reached: bool
    """Whether backward reaches what lies between embeddings and layers, and"""
    embedding_trained: bool
    """the embeddings."""

    @classmethod
    def of(cls, model: CLIPViPModel, kind: str) -> "_Tower":
        shapes = getattr(model.config, f"{kind}_config")
        layers = shapes.num_hidden_layers
        depths = {kind: layers}
        trained = {
            name: weight
            for name, weight in model.named_parameters()
            if weight.requires_grad and name.startswith(f"{kind}_model.")
        }
        highest = max((height(name, depths) for name in trained), default=0)
        return cls(
            shapes.hidden_size,
            shapes.intermediate_size,
            layers,
            3 * shapes.patch_size**2 if kind == "vision" else 0,
            min(highest, layers),
            sum(w.numel() for name, w in trained.items() if ".layers." in name and w.ndim == 2),
            highest > layers,
            any(".embeddings." in name for name in trained),
        )

    def kept(self, kind: str, tokens: int, config: TrainConfig) -> tuple[float, float]:
        """Bytes kept for backward from the forward pass on, and those of one layer at a time."""
        of_layer, for_a_layer = _KEPT[kind][config.mixed_precision], 0.0
        if config.model.gradient_checkpointing:  # inputs of layers, and the insides of one
            of_layer, for_a_layer = _FLOAT, of_layer * (self.reached > 0)
        channel = self.reached * of_layer + _FLOAT * (kind == "text" and self.reached > 0)
        if kind == "vision":
            product = _FLOAT if config.mixed_precision == "no" else _FLOAT / 2
            channel += _FLOAT * self.norm_reached
            channel += (_FLOAT + product * self.pixels / self.width) * self.embedding_trained
        return tokens * self.width * channel, tokens * self.width * for_a_layer


@dataclass(frozen=True)
class _Input:
    """Of a clip to a tower, and the pairs of queries and values that attend."""

    tower: _Tower
    tokens: int
    pairs: int
    patches: int

    def forward(self) -> float:
        tower = self.tower
        weights = 4 * tower.width**2 + 2 * tower.width * tower.inner
        of_layer = self.tokens * weights + 2 * tower.width * self.pairs
        return 2.0 * (tower.layers * of_layer + self.patches * tower.pixels * tower.width)

    def backward(self) -> float:
        """Gradients of inputs, of both factors of attention's products, and of weights."""
        tower = self.tower
        weights = 4 * tower.width**2 + 2 * tower.width * tower.inner
        of_layer = self.tokens * weights + 4 * tower.width * self.pairs
        embedding = self.patches * tower.pixels * tower.width * tower.embedding_trained
        return 2.0 * (tower.reached * of_layer + self.tokens * tower.trained + embedding)


def peak_tera(device: torch.device) -> float | None:
    """PEAKS of a device; None where it is not known, as of a part of one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return None if "MIG" in name else next((p for key, p in PEAKS.items() if key in name), None)
