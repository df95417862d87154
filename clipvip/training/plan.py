"""Cost of a configuration before it runs: tokens, operations, bytes.

As usual, operations are those of matrix products, two per multiplication, and recomputation is not
counted. The backward pass has twice the operations of the forward pass, except for frozen weights,
which get no gradient, and for all that lies below the lowest trained layer of a tower.
"""

from dataclasses import dataclass

import torch

from clipvip.model import CLIPViPModel
from clipvip.training.config import TrainConfig
from clipvip.training.optimization import height
from clipvip.training.task import task_of

TERA, GIB = 1e12, 2.0**30
# Peak rate of dense 16-bit products of a GPU, in 10¹² operations per second, as stated by its maker
# (half of the rate with sparsity). The first name that the device's name contains counts.
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

# Bytes per token and channel that a layer keeps for the backward pass: in fp32, and under bf16
# autocast, which keeps the residual stream and LayerNorms in fp32.
_KEPT = {"vision": {"no": 40.2, "bf16": 24.2}, "text": {"no": 80.5, "bf16": 47.0}}
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Plan:
    """Cost of a training step.

    parameters, trained: number of weights, and of those that are trained.
    video_tokens: proxies and patches of the frames of a clip.
    image_tokens: the same of its image; 0 if the task uses none.
    text_tokens: highest number of tokens of its texts.
    tower_flops, backward_flops: operations per clip in the towers, forward and backward.
    loss_flops: operations per step in the loss, forward.
    state_bytes: weights, gradients, moments and average, per process.
    activation_bytes: tensors kept for the backward pass at the same time, per process.
    clips: clips per step, over all processes.
    processes: number of processes.
    """

    parameters: int
    trained: int
    video_tokens: int
    image_tokens: int
    text_tokens: int
    tower_flops: float
    backward_flops: float
    loss_flops: float
    state_bytes: float
    activation_bytes: float
    clips: int
    processes: int

    @property
    def step_flops(self) -> float:
        """Operations per step, forward and backward, over all processes."""
        return self.clips * (self.tower_flops + self.backward_flops) + 3 * self.loss_flops

    def describe(self, clips: int, steps: int) -> str:
        """Return a line per figure.

        clips: number of clips in the training data.
        steps: number of steps of the run.
        """
        each = self.clips // self.processes
        tera = self.step_flops / TERA
        lines = {
            "parameters": f"{self.parameters / 1e6:.1f} M, {self.trained / 1e6:.1f} M trained",
            "tokens per clip": f"{self.video_tokens} of video, {self.image_tokens} of image, "
            f"at most {self.text_tokens} of text",
            "operations per step": f"{tera:.2f} T forward and backward, "
            f"{300 * self.loss_flops / self.step_flops:.1f} % of them in the loss",
            "memory per process": f"{self.state_bytes / GIB:.2f} GiB of weights, gradients and "
            f"moments, about {self.activation_bytes / GIB:.2f} GiB kept for the backward pass",
            "step": f"{self.clips} clips, {each} on each of {self.processes} processes",
            "run": f"{steps} steps, {steps * self.clips} samples drawn from {clips} clips, "
            f"{steps * tera / 1e6:.3g} · 10¹⁸ operations",
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def plan(model: CLIPViPModel, config: TrainConfig, processes: int) -> Plan:
    """Plan the training of a model, which may be on the meta device.

    config: configuration with all settings of how clips are read.
    """
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
    negatives = config.batch_size // config.accumulation  # per clip, and itself
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
    per_clip = sum(throughout for throughout, _ in kept) + max(in_a_layer for _, in_a_layer in kept)
    return Plan(
        parameters=parameters,
        trained=trained,
        video_tokens=video_tokens,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        tower_flops=sum(each.forward() for each in inputs),
        backward_flops=sum(each.backward() for each in inputs),
        loss_flops=loss_flops,
        state_bytes=state,
        activation_bytes=at_once * per_clip,
        clips=config.batch_size,
        processes=processes,
    )


@dataclass(frozen=True)
class _Tower:
    """Sizes of a tower, and which part of it is trained.

    width, inner: channels of a layer, and inside its MLP.
    layers: number of layers.
    pixels: pixels of a patch times 3 colours; 0 for texts.
    reached: number of layers that the backward pass reaches.
    trained: number of trained weights in the layers' matrix products.
    norm_reached: whether the backward pass reaches the norm between embeddings and layers.
    embedding_trained: whether embeddings are trained.
    """

    width: int
    inner: int
    layers: int
    pixels: int
    reached: int
    trained: int
    norm_reached: bool
    embedding_trained: bool

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
        """Return the bytes kept until the backward pass, and those in one layer at a time."""
        per_layer, in_a_layer = _KEPT[kind][config.mixed_precision], 0.0
        if config.model.gradient_checkpointing:  # inputs of layers, and the inside of one of them
            per_layer, in_a_layer = _FLOAT, per_layer * (self.reached > 0)
        channel = self.reached * per_layer + _FLOAT * (kind == "text" and self.reached > 0)
        if kind == "vision":
            product = _FLOAT if config.mixed_precision == "no" else _FLOAT / 2
            channel += _FLOAT * self.norm_reached
            channel += (_FLOAT + product * self.pixels / self.width) * self.embedding_trained
        return tokens * self.width * channel, tokens * self.width * in_a_layer


@dataclass(frozen=True)
class _Input:
    """Input of a tower from one clip.

    tokens, patches: number of all tokens, and of those that come from patches of pixels.
    pairs: number of pairs of tokens of which one attends to the other.
    """

    tower: _Tower
    tokens: int
    pairs: int
    patches: int

    def forward(self) -> float:
        """Count the operations of the forward pass."""
        tower = self.tower
        weights = 4 * tower.width**2 + 2 * tower.width * tower.inner
        per_layer = self.tokens * weights + 2 * tower.width * self.pairs
        return 2.0 * (tower.layers * per_layer + self.patches * tower.pixels * tower.width)

    def backward(self) -> float:
        """Count gradients of inputs, of both factors in attention's products, and of weights."""
        tower = self.tower
        weights = 4 * tower.width**2 + 2 * tower.width * tower.inner
        per_layer = self.tokens * weights + 4 * tower.width * self.pairs
        embedding = self.patches * tower.pixels * tower.width * tower.embedding_trained
        return 2.0 * (tower.reached * per_layer + self.tokens * tower.trained + embedding)


def peak_tera(device: torch.device) -> float | None:
    """Return the rate of a device in PEAKS; None if not known, as for a part of a GPU (MIG)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return None if "MIG" in name else next((p for key, p in PEAKS.items() if key in name), None)
