"""How a model's weights lie on the ranks: copied to each (DDP) or cut up among them (FSDP2).

What a checkpoint keeps is whole, by parameters' names, and so the same for both and for any
number of ranks. accelerate's own FSDP2 runs on GPUs only and cannot leave out a scalar, which
logit_scale is; PyTorch's, which it wraps, can.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from clipvip.distributed import world_size
from clipvip.model import CLIPViPModel

COMPILED_GRAPHS = 32


def layers(model: CLIPViPModel) -> list[nn.Module]:
    """The blocks of both towers."""
    return [*model.text_model.encoder.layers, *model.vision_model.encoder.layers]


def compile_layers(model: CLIPViPModel) -> None:
    """Compiles each block for any number of tokens. All blocks of a tower share their graphs."""
    # Dynamo counts graphs by code, which both towers share, and runs what is beyond its limit of 8
    # uncompiled. A tower has one each for training, for caching's first pass and for evaluation,
    # texts with and without padding, and batches of one clip are other ones still.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILED_GRAPHS)
    for layer in layers(model):
        layer.compile(dynamic=True)


def distribute(
    towers: nn.Module, model: CLIPViPModel, kind: str, accelerator: Accelerator
) -> nn.Module:
    """Moves towers (around model) to the device and spreads them over ranks; kind: "ddp" or
    "fsdp"."""
    if kind == "ddp" or world_size() == 1:
        return accelerator.prepare(towers)
    towers.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (world_size(),))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
    for name in ("get_video_features", "get_text_features"):
        register_fsdp_forward_method(model, name)
    return towers


def without_sync(
    towers: nn.Module, model: CLIPViPModel, accelerator: Accelerator
) -> AbstractContextManager:
    """No exchange of gradients within. Shards are exchanged all the same: what is kept of a
    gradient is then a shard, not the whole."""
    return nullcontext() if is_sharded(model) else accelerator.no_sync(towers)


def clip_gradients(model: CLIPViPModel, limit: float) -> Tensor:
    """Scales all gradients together to a norm of at most `limit`; their norm before, 0-d."""
    scale = model.logit_scale.grad
    if is_sharded(model) and scale is not None:  # the one gradient that FSDP leaves to us
        dist.all_reduce(scale)
        scale /= world_size()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norms = [
        _whole(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in _kinds(parameters)
    ]
    norm = torch.stack(norms).norm()
    for group in _kinds(parameters):
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def whole_on_each_rank(model: CLIPViPModel) -> Iterator[None]:
    """Within, ranks may call the model as often as each likes: no call waits for the others."""
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


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """A copy of every weight, on the CPU; empty on all ranks but the first where they are shards.
    All ranks must call."""
    if is_sharded(model):
        return get_model_state_dict(model, options=_WHOLE)
    return {name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()}


def whole_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by parameters' names, as whole_weights."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Of whole_weights, on every rank."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def load_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Any]
) -> None:
    """Of whole_moments, on every rank. Groups and their settings stay the optimiser's own; a
    parameter that was frozen when the moments were taken starts from none."""
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, optimizer, {**moments, "param_groups": groups}, options=options)


class Average:
    """An exponential moving average of a model's weights, in fp32 shards where those are.

    It follows with min(decay, (1 + step) / (10 + step)), so that the first steps' weights are
    soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = [p for p in model.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, live in zip(_kinds(self.mean), _kinds(self.live), strict=True):
            torch._foreach_lerp_(mean, live, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model's weights are the average."""
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
    """Shards and others apart: functions of many tensors take only one kind."""
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return [kind for kind in kinds if kind]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
