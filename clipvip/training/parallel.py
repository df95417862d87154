"""How a model's weights lie on the ranks: copied to each (DDP) or sharded among them (FSDP2).

A checkpoint holds whole tensors by parameter name, so it is the same for both and for any number
of ranks. FSDP2 is used through PyTorch, not accelerate: accelerate's runs on GPUs only and cannot
exclude a scalar parameter such as logit_scale.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from clipvip.distributed import rank, world_size
from clipvip.model import CLIPViPForCaptioning, CLIPViPModel

COMPILED_GRAPHS = 32


def layers(model: CLIPViPModel) -> list[nn.Module]:
    """Return the layers of both towers, and of a captioner's decoder."""
    decoder = model.decoder_layers() if isinstance(model, CLIPViPForCaptioning) else []
    return [*_tower_layers(model), *decoder]


def _tower_layers(model: CLIPViPModel) -> list[nn.Module]:
    return [*model.text_model.encoder.layers, *model.vision_model.encoder.layers]


def compile_layers(model: CLIPViPModel, only_text: bool = False) -> None:
    """Compile each layer, or each of the text tower, for any number of tokens. All layers of a
    tower share their graphs."""
    # Dynamo counts graphs per code object, which both towers share, and beyond its limit of 8 runs
    # code uncompiled. Training, the first pass of gradient caching, evaluation, texts with and
    # without padding, and batches of one clip each need a graph of their own.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_GRAPHS)
    for layer in model.text_model.encoder.layers if only_text else _tower_layers(model):
        layer.compile(dynamic=True)


def distribute(
    towers: nn.Module, model: CLIPViPModel, kind: str, accelerator: Accelerator
) -> nn.Module:
    """Move towers, which wrap model, to the device, and distribute them. kind: "ddp" or "fsdp"."""
    if kind == "ddp" or world_size() == 1:
        return accelerator.prepare(towers)
    towers.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (world_size(),))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    captions = ["generate"] * isinstance(model, CLIPViPForCaptioning)
    for name in ("get_video_features", "get_text_features", *captions):
        register_fsdp_forward_method(model, name)
    return towers


def without_sync(
    towers: nn.Module, model: CLIPViPModel, accelerator: Accelerator
) -> AbstractContextManager:
    """Return a context in which DDP ranks do not exchange gradients. FSDP ranks do even there, as
    each of them keeps only its shard of a gradient."""
    return nullcontext() if is_sharded(model) else accelerator.no_sync(towers)


def clip_gradients(model: CLIPViPModel, limit: float) -> Tensor:
    """Scale all gradients together to a norm of at most `limit`; return the norm before, 0-d."""
    scale = model.logit_scale.grad
    if is_sharded(model) and scale is not None:  # the one gradient that FSDP does not average
        dist.all_reduce(scale)
        scale /= world_size()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [nn.utils.get_total_norm(kind) for kind in _kinds(gradients)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = torch.stack(whole).norm()
    for kind in _kinds(p for p in model.parameters() if p.grad is not None):
        nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def whole_on_each_rank(model: CLIPViPModel) -> Iterator[None]:
    """Gather whole weights on each rank, so that inside no call of the model waits for other ranks
    and ranks may call it different numbers of times."""
    if not is_sharded(model):
        yield
        return
    shards = [module for module in (*layers(model), model) if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


_WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Copy all weights to the CPU of the first rank, by name; other ranks keep no copy and
    get an empty result. All ranks must call, as shards are gathered."""
    if is_sharded(model):
        whole: dict[str, Any] = states.get_model_state_dict(model, options=_WHOLE)
        if "logit_scale" in whole:  # no shard, so on a CPU it is the weight itself
            whole["logit_scale"] = whole["logit_scale"].clone()
    elif rank() != 0:
        return {}
    else:
        whole = {name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()}
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if source in whole:  # tied weights, such as a decoder's, are stored once
            whole[name] = whole[source]
    return whole


def whole_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copy the optimizer's state like whole_weights, by parameter name. All ranks must call."""
    return states.get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load the result of whole_weights, or a part of it, given on every rank, into the model."""
    states.set_model_state_dict(
        model, weights, options=states.StateDictOptions(full_state_dict=True)
    )


def load_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Any]
) -> None:
    """Load the result of whole_moments, given on every rank, into the optimizer. Its groups and
    their settings stay. Parameters that were frozen when it was saved start without moments."""
    groups = states.get_optimizer_state_dict(model, optimizer)["param_groups"]
    options = states.StateDictOptions(full_state_dict=True, strict=False)
    states.set_optimizer_state_dict(
        model, optimizer, {**moments, "param_groups": groups}, options=options
    )


class Average:
    """Exponential moving average of a model's trained weights, sharded like them.

    The decay at a step is min(decay, (1 + step) / (10 + step)), so the weights of the first steps
    are soon forgotten. torch's AveragedModel cannot be used: it deep-copies the model, which FSDP2
    refuses ("FSDP does not support deepcopy").
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = [p for p in model.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model's weights after a step, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, live in zip(_kinds(self.mean), _kinds(self.live), strict=True):
            torch._foreach_lerp_(mean, live, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the model's weights for the average inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, live in zip(self.mean, self.live, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)


def _kinds(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Separate shards from other tensors, as functions of many tensors accept only one kind."""
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return [kind for kind in kinds if kind]
