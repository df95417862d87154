"""Cost of a configuration before it runs: tokens, operations, bytes.

As usual, operations are those of matrix products, two per multiplication, and recomputation is not
counted. The backward pass has twice the operations of the forward pass, except for frozen weights,
which get no gradient, and for all that lies below the lowest trained layer of a tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipvip.model import CLIPViPModel
from clipvip.model.configuration import CAPTIONING, decoder_inner
from clipvip.training.config import TrainConfig
from clipvip.training.optimization import height
from clipvip.training.task import task_of

TERA, GIB = 1e12, 2.0**30
# Peak rate of dense 16-bit products of a GPU, in 10¹² operations per second, as stated by its maker
# (half of the rate with sparsity). The first name that the device's name contains counts.
PEAKS = {
    "GB200": 2500.0, "B200": 2250.0, "H200 NVL": 835.5, "H200": 989.4,
    "H100 NVL": 835.5, "H100 PCIe": 756.5, "H100": 989.4, "H800 PCIe": 756.5, "H800": 989.4,
    "A100": 312.0, "L40S": 362.0,
}  # fmt: skip

# Bytes per token and channel that a layer keeps for the backward pass: in fp32, and under bf16
# autocast, which keeps the residual stream and LayerNorms in fp32.
_KEPT = {"vision": {"no": 40.2, "bf16": 24.2}, "text": {"no": 80.5, "bf16": 47.0}}
# The same that a layer of the video tower keeps in addition for each linear layer with LoRA, which
# runs as plain PyTorch.
_KEPT_BY_LORA = {
    "no": {"q_proj": 1.0, "k_proj": 1.0, "v_proj": 1.0, "fc1": 4.0, "fc2": 16.0},
    "bf16": {"q_proj": 2.0, "k_proj": 2.0, "v_proj": 2.0, "out_proj": 2.0, "fc1": 3.0, "fc2": 9.0},
}
# The same that a decoder's layer keeps per token and channel, and per channel inside its MLP; per
# token of the video and channel, its keys and values, and the bridge; and per logit.
_KEPT_BY_DECODER = {"no": 69.0, "bf16": 56.0}
_KEPT_BY_DECODER_MLP = {"gpt2": {"no": 19.0, "bf16": 9.0}, "bert": {"no": 8.0, "bf16": 4.0}}
_KEPT_OF_VIDEO = {"no": 8.0, "bf16": 4.0}
_KEPT_BY_BRIDGE = {"no": 16.0, "bf16": 12.0}
_KEPT_OF_LOGITS = 4.0
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Plan:
    """Cost of a training step."""

    parameters: int
    trained: int  # parameters that are trained
    video_tokens: int  # proxies and patches of the frames of a clip
    image_tokens: int  # the same of its image; 0 if the task uses none
    text_tokens: int  # highest number of tokens of its texts
    images: float  # share of images among the clips
    tokens_as_video: int  # tokens of an image as a video; 0 if it is embedded as an image alone
    tower_flops: float  # operations per clip in the towers, forward
    backward_flops: float  # the same, backward
    loss_flops: float  # operations per step in the loss, forward
    state_bytes: float  # weights, gradients, moments and average, per process
    activation_bytes: float  # tensors kept for the backward pass at the same time, per process
    clips: int  # clips per step, over all processes
    processes: int

    @property
    def step_flops(self) -> float:
        """Operations per step, forward and backward, over all processes."""
        return self.clips * (self.tower_flops + self.backward_flops) + 3 * self.loss_flops

    def describe(self, clips: int, steps: int, sources: Sequence[str] = ()) -> str:
        """Return a line per figure, for a run of `steps` steps on `clips` clips.

        sources: descriptions of the sources that it mixes.
        """
        each = self.clips // self.processes
        tera = self.step_flops / TERA
        rest = f" ({self.tokens_as_video} in images, {self.images:.1%} of the clips)"
        lines = {
            "parameters": f"{self.parameters / 1e6:.1f} M, {self.trained / 1e6:.1f} M trained",
            "tokens per clip": f"{self.video_tokens} of video{rest if self.images else ''}, "
            f"{self.image_tokens} of image, at most {self.text_tokens} of text",
            "operations per step": f"{tera:.2f} T forward and backward, "
            f"{300 * self.loss_flops / self.step_flops:.1f} % of them in the loss",
            "memory per process": f"{self.state_bytes / GIB:.2f} GiB of weights, gradients and "
            f"moments, about {self.activation_bytes / GIB:.2f} GiB kept for the backward pass",
            "step": f"{self.clips} clips, {each} on each of {self.processes} processes",
            "run": f"{steps} steps, {steps * self.clips} samples drawn from {clips} clips, "
            f"{steps * tera / 1e6:.3g} · 10¹⁸ operations",
        }
        width = max(map(len, lines))
        figures = [f"{name:{width}}  {value}" for name, value in lines.items()]
        mixed = [f"{'' if i else 'sources':{width}}  {line}" for i, line in enumerate(sources)]
        return "\n".join(figures + mixed)


def plan(model: CLIPViPModel, config: TrainConfig, processes: int, images: float = 0.0) -> Plan:
    """Plan the training of a model, which may be on the meta device, by a settled configuration.

    images: share of images among the clips. Their texts are taken to be captions; memory is that of
        a batch without images.
    """
    task, vision = task_of(config), model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    frames, length, proxies = config.data.num_frames, config.data.text_length, vision.num_proxies
    assert frames is not None and length is not None
    video_tokens = proxies + frames * patches
    image_tokens = task.with_image * (proxies + patches)
    text_tokens = len(task.texts) * length

    towers = {kind: _Tower(model, kind) for kind in ("vision", "text")}

    def video(count: int) -> tuple[float, float]:
        pairs = count * patches * (patches + proxies) + proxies * (proxies + count * patches)
        return towers["vision"].operations(proxies + count * patches, pairs, count * patches)

    captions = model.config.decoder_config is not None and task.pairs == 0
    if captions:
        decoder = _Decoder(model, video_tokens, length - 1)
        texts = [decoder.operations()]
    else:
        texts = len(task.texts) * [towers["text"].operations(length, length * length, 0)]
    as_videos = [video(frames), video(1) if not task.with_image else (0.0, 0.0)]
    visual = [(1 - images) * a + images * b for a, b in zip(*as_videos, strict=True)]
    inputs = [visual, *texts, *task.with_image * [video(1)]]
    negatives = config.batch_size // config.accumulation  # per clip, and itself
    logits = config.accumulation * negatives**2
    loss_flops = 2.0 * task.pairs * logits * model.config.projection_dim

    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = 4.0 * (parameters + trained * (3 + (config.ema is not None)))
    if config.parallel == "fsdp":
        state /= processes

    at_once = min(config.micro_batch or negatives, negatives // processes)
    tokens = {"vision": video_tokens + image_tokens, "text": text_tokens}
    kept = [tower.kept(tokens[kind], config) for kind, tower in towers.items()]
    if captions:
        kept.append(decoder.kept(config))
    per_clip = sum(throughout for throughout, _ in kept) + max(in_a_layer for _, in_a_layer in kept)
    return Plan(
        parameters=parameters,
        trained=trained,
        video_tokens=video_tokens,
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        images=images,
        tokens_as_video=0 if task.with_image else proxies + patches,
        tower_flops=sum(forward for forward, _ in inputs),
        backward_flops=sum(backward for _, backward in inputs),
        loss_flops=loss_flops,
        state_bytes=state,
        activation_bytes=at_once * per_clip,
        clips=config.batch_size,
        processes=processes,
    )


class _Tower:
    """Sizes of a tower, and which part of it is trained. kind: "vision" or "text"."""

    def __init__(self, model: CLIPViPModel, kind: str) -> None:
        shapes = getattr(model.config, f"{kind}_config")
        self.kind = kind
        self.width, self.inner = shapes.hidden_size, shapes.intermediate_size  # inner: of the MLP
        self.layers = shapes.num_hidden_layers
        # Numbers in a patch of pixels; texts have none.
        self.pixels = 3 * shapes.patch_size**2 if kind == "vision" else 0

        trained = {
            name: weight
            for name, weight in model.named_parameters()
            if weight.requires_grad and name.startswith(f"{kind}_model.")
        }
        highest = max((height(name, {kind: self.layers}) for name in trained), default=0)
        self.reached = min(highest, self.layers)  # layers that the backward pass reaches
        self.norm_reached = highest > self.layers  # the norm between embeddings and layers
        self.embedding_trained = any(".patch_embedding." in name for name in trained)
        # Names of linear layers with LoRA, one for each layer of the tower that has it.
        self.changed = [name.split(".")[-4] for name in trained if ".lora_A." in name]
        self.trained = sum(  # weights in the layers' matrix products
            w.numel() for name, w in trained.items() if ".layers." in name and w.ndim == 2
        )

    def kept(self, tokens: int, config: TrainConfig) -> tuple[float, float]:
        """Return the bytes kept until the backward pass, and those in one layer at a time."""
        per_layer, in_a_layer = _KEPT[self.kind][config.mixed_precision], 0.0
        if self.kind == "vision":
            more = _KEPT_BY_LORA[config.mixed_precision]
            per_layer += sum(more.get(name, 0.0) for name in self.changed) / self.layers
        if config.model.gradient_checkpointing:  # inputs of layers, and the inside of one of them
            per_layer, in_a_layer = _FLOAT, per_layer * (self.reached > 0)
        channel = self.reached * per_layer + _FLOAT * (self.kind == "text" and self.reached > 0)
        if self.kind == "vision":
            product = _FLOAT if config.mixed_precision == "no" else _FLOAT / 2
            channel += _FLOAT * self.norm_reached
            channel += (_FLOAT + product * self.pixels / self.width) * self.embedding_trained
        return tokens * self.width * channel, tokens * self.width * in_a_layer

    def operations(self, tokens: int, pairs: int, patches: int) -> tuple[float, float]:
        """Count the operations of the forward and of the backward pass on one input.

        tokens, patches: number of all tokens, and of those that come from patches of pixels.
        pairs: number of pairs of tokens of which one attends to the other.
        """
        weights = tokens * (4 * self.width**2 + 2 * self.width * self.inner)
        attention = 2 * self.width * pairs
        embedding = patches * self.pixels * self.width
        forward = self.layers * (weights + attention) + embedding
        # Gradients of inputs, of both factors in attention's products, and of weights.
        backward = self.reached * (weights + 2 * attention) + tokens * self.trained
        return 2.0 * forward, 2.0 * (backward + embedding * self.embedding_trained)


class _Decoder:
    """Sizes of a captioner's decoder, which is trained whole or not at all.

    video_tokens: proxies and patches of a clip. tokens: of a caption, without the last one.
    """

    def __init__(self, model: CLIPViPModel, video_tokens: int, tokens: int) -> None:
        config, vision = model.config.decoder_config, model.config.vision_config
        self.tokens, self.kind = tokens, config.model_type
        self.width, self.inner = config.hidden_size, decoder_inner(config)
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.head = self.width**2 * (self.kind == "bert")  # before the vocabulary's product
        whole = model.config.decoder_tokens == "all"
        self.memory = video_tokens if whole else vision.num_proxies
        self.channels = vision.hidden_size
        self.trained = any(
            weight.requires_grad and name.startswith(CAPTIONING)
            for name, weight in model.named_parameters()
        )

    def operations(self) -> tuple[float, float]:
        """Count the operations of the forward and of the backward pass on one caption."""
        tokens, memory, width = self.tokens, self.memory, self.width
        weights = tokens * (6 * width + 2 * self.inner) * width + memory * 2 * width**2
        attention = 2 * width * tokens * (tokens + memory)
        head = tokens * (self.vocabulary * width + self.head)
        bridge = memory * self.channels * width * (self.channels != width)
        forward = self.layers * (weights + attention) + head + bridge
        return 2.0 * forward, 4.0 * forward * self.trained

    def kept(self, config: TrainConfig) -> tuple[float, float]:
        """Return the bytes kept until the backward pass, and those in one layer at a time."""
        precision, tokens = config.mixed_precision, self.tokens
        per_token = self.width * _KEPT_BY_DECODER[precision]
        per_token += self.inner * _KEPT_BY_DECODER_MLP[self.kind][precision]
        per_layer = tokens * per_token + self.memory * self.width * _KEPT_OF_VIDEO[precision]
        in_a_layer = 0.0
        if config.model.gradient_checkpointing:
            per_layer, in_a_layer = tokens * self.width * _FLOAT, per_layer
        bridge = self.memory * (self.channels / 2 + self.width) * _KEPT_BY_BRIDGE[precision]
        logits = tokens * self.vocabulary * _KEPT_OF_LOGITS
        return self.trained * (self.layers * per_layer + bridge + logits), in_a_layer


def peak_tera(device: torch.device) -> float | None:
    """Return the rate of a device in PEAKS; None if not known, as for a part of a GPU (MIG)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return None if "MIG" in name else next((p for key, p in PEAKS.items() if key in name), None)
