"""Ranks of test_distributed, forked so that torch is imported once.

`python sharded_worker.py FOLDER` runs, for each world of WORLDS, ranks that share a batch and write
their results to FOLDER.
"""

import os
import sys
import traceback
from contextlib import ExitStack
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipvip import sharded
from clipvip.distributed import all_gather_objects
from clipvip.losses import VARIANTS, contrastive_loss, omnisource_loss
from clipvip.sharded import all_reduce

CLIPS = 13
WORLDS = {2: [6, 7], 3: [5, 0, 8], 4: [1, 4, 2, 6]}  # clips of each rank: unequal, or none
EVEN = 6, 24  # shape of each rank's features for the count of bytes
NAMES = "video", "subtitle", "frame", "caption"
CASES = [
    "contrastive",
    *(f"{variant}{masked}" for masked in ("", " masked", " images") for variant in VARIANTS),
]
IMAGES = 6  # the first clip that is an image: in each world, the last rank has images alone
BACKENDS = {"reference": torch.float64, "native": torch.float32}


class Towers(nn.Module):
    """Four sources' unit features [n, 24] from inputs [n, 5], and a learned scale."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterDict(
            {name: torch.randn(5, 24, generator=generator, dtype=dtype) for name in NAMES}
        )
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))

    def forward(self, inputs):
        features = [nn.functional.normalize(inputs @ self.weights[name], dim=-1) for name in NAMES]
        return features, self.scale.exp()


def batch(dtype):
    """Inputs [CLIPS, 5], and which clips have a video, a subtitle, a frame and a caption."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(CLIPS, 5, generator=generator, dtype=torch.float64).to(dtype)
    present = torch.rand(3, CLIPS, generator=generator) < 0.6
    return inputs, torch.cat([torch.rand(1, CLIPS, generator=generator) < 0.6, present])


def of_images(present, first):
    """The masks of clips, numbered from `first` on, of which some are images with captions."""
    clips = torch.arange(first, first + present.shape[1])
    video, caption = clips < IMAGES, clips >= IMAGES
    return torch.stack([video, video, torch.ones_like(video), caption | present[3]])


def run(towers, inputs, present, case, backend, over_ranks, first=0):
    """The loss of a case and its gradients, in the order of parameters. first: of the clips."""
    towers.zero_grad()
    features, scale = towers(inputs)
    where = {"sharded": over_ranks, "backend": backend}
    if case == "contrastive":
        loss = contrastive_loss(*features[:2], scale, **where)
    else:
        variant, _, masked = case.partition(" ")
        if masked == "images":
            present = of_images(present, first)
        masks = {f"{name}_present": mask for name, mask in zip(NAMES, present, strict=True)}
        loss = omnisource_loss(*features, scale, variant, **(masks if masked else {}), **where)
    (loss + 0 * sum(p.sum() for p in towers.parameters())).backward()
    return loss.detach(), [p.grad.clone() for p in towers.parameters()]


def bytes_received(a, b, scale):
    """Bytes that a rank receives in forward and backward, if its collectives run in rings."""
    world, received = dist.get_world_size(), [0, 0]
    stage = 0

    def counting(function, size_of):
        def counted(*given, **settings):
            received[stage] += size_of(*given)
            return function(*given, **settings)

        return counted

    sizes = {
        (dist, "all_gather"): lambda parts, own: (world - 1) * own.nbytes,
        (dist, "all_reduce"): lambda tensor, *_: 2 * (world - 1) / world * tensor.nbytes,
        (sharded, "_reduce_scatter"): lambda own, whole: (world - 1) * own.nbytes,
    }
    with ExitStack() as stack:
        for (module, name), size_of in sizes.items():
            counted = counting(getattr(module, name), size_of)
            stack.enter_context(mock.patch.object(module, name, counted))
        (counts,) = sharded.gather_counts([len(b)], b.device)
        outputs = sharded.sharded_logsumexp(a, b, scale, counts=counts)
        stage = 1
        sum(output.sum() for output in outputs).backward()
    return received


def exchanges_of_counts(towers, inputs, present):
    """How often a loss of several pairs of sources makes the host wait for other ranks' counts."""
    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers:
        run(towers, inputs, present, "vsc_fc masked", "native", over_ranks=True)
    return sum(not call.args[1].is_floating_point() for call in gathers.call_args_list)


def main(folder, world, rank):
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    first = sum(WORLDS[world][:rank])
    share = slice(first, first + WORLDS[world][rank])
    found = {"objects": all_gather_objects({"rank": rank})}
    found["sum"] = all_reduce(torch.tensor([1.0 + rank]))
    for backend, dtype in BACKENDS.items():
        towers = DistributedDataParallel(Towers(dtype))
        inputs, present = batch(dtype)
        for case in CASES:
            found[case, backend] = run(
                *(towers, inputs[share], present[:, share], case, backend),
                over_ranks=True,
                first=first,
            )
    found["exchanges of counts"] = exchanges_of_counts(towers, inputs[share], present[:, share])
    a, b = (torch.randn(*EVEN, requires_grad=True) for _ in range(2))
    found["bytes"] = bytes_received(a, b, torch.tensor(1.0))
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for world in WORLDS:
        ranks = []
        for rank in range(world):
            if not (child := os.fork()):
                try:
                    main(sys.argv[1], world, rank)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            ranks.append(child)
        if any([os.waitpid(child, 0)[1] for child in ranks]):
            sys.exit(1)
