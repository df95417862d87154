"""The two processes of test_distributed: each a share of a batch, its gradients to a file."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipvip.distributed import all_gather, all_gather_objects
from clipvip.losses import contrastive_loss


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(5, 4, generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x, y):
        unit = nn.functional.normalize
        return unit(x @ self.a, dim=-1), unit(y @ self.b, dim=-1), self.scale.exp()


def batch():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(8, 5, generator=generator, dtype=torch.float64),
        torch.randn(8, 6, generator=generator, dtype=torch.float64),
    )


def run(module, x, y):
    a, b, scale = module(x, y)
    loss = contrastive_loss(all_gather(a), all_gather(b), scale, backend="reference")
    loss.backward()
    return loss.detach()


def main(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    module = DistributedDataParallel(Pair())
    x, y = batch()
    share = slice(4 * rank, 4 * rank + 4)
    loss = run(module, x[share], y[share])
    present = all_gather(torch.tensor([rank == 0, True]))
    result = {
        "loss": loss,
        "gradients": {n: p.grad for n, p in module.module.named_parameters()},
        "present": present,
        "objects": all_gather_objects({"rank": rank}),
    }
    torch.save(result, f"{out}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":  # two processes by a fork, so that torch is imported once
    child = os.fork()
    main(0 if child else 1, *sys.argv[1:])
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
