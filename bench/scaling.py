"""Clips a second on 1 to 1024 GPUs, by a model of a step: `python bench/scaling.py`.

A step's time is that of its products at a share of the GPU's peak, of the loss, and of what
ranks exchange beyond what backward hides. The same model, given one process's measured time and
the measured rate of gloo, is held against two processes on this machine.
Writes bench/results/scaling.json.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import harness
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clipvip.losses import contrastive_loss
from clipvip.model import CLIPViPConfig, CLIPViPModel
from clipvip.training.config import DataConfig, ModelConfig, TrainConfig
from clipvip.training.plan import PEAKS, TERA, Plan, plan

WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CLIPS = 32  # on each GPU, as in the paper
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Machine:
    """Rates a second. wire: bytes that a rank sends in a collective of so many ranks."""

    flops: float
    loss_flops: float
    near: float
    far: float
    near_ranks: int
    latency: float
    hidden: float
    """Share of backward behind which gradients travel."""

    def wire(self, ranks: int) -> float:
        return self.near if ranks <= self.near_ranks else self.far


# Assumed, not measured: half of the dense bf16 peak; the loss in fp32 outside the tensor cores; a
# collective's bytes a second over NVLink in a node of 8, and beyond over a 400 Gb/s card for each
# GPU, where a node's bytes leave it once, by all of its cards.
H100 = Machine(0.5 * PEAKS["H100"] * TERA, 30 * TERA, 360e9, 300e9, 8, 20e-6, 0.9)


def step_seconds(
    cost: Plan, machine: Machine, ranks: int, dimension: int, pairs: int
) -> dict[str, float]:
    """Where a step of `cost.clips // ranks` clips a rank goes."""
    clips = cost.clips // ranks
    towers = 3 * clips * cost.tower_flops / machine.flops
    loss = 4 * cost.loss_flops / ranks / machine.loss_flops  # 8·n·N·D: with one recomputation
    if ranks == 1:
        return {"towers": towers, "loss": loss, "gradients": 0.0, "features": 0.0}
    rate = machine.wire(ranks)
    sent = 2 * (ranks - 1) / ranks * FLOAT * cost.trained
    gradients = sent / rate + machine.latency * 2 * (ranks - 1).bit_length()
    gradients = max(gradients - machine.hidden * towers * 2 / 3, 0.0)
    # Features there, forward and backward, and their gradients back; two collectives each way, of
    # columns' statistics, beside them: see clipvip.distributed.sharded_logsumexp. Only one's own
    # tile is computed meanwhile.
    moved = pairs * 3 * (ranks - 1) * clips * dimension * FLOAT / rate
    moved += pairs * 8 * (ranks - 1).bit_length() * machine.latency
    return {
        "towers": towers,
        "loss": loss,
        "gradients": gradients,
        "features": moved,
    }


def predictions() -> dict[str, list[dict[str, float]]]:
    """Of post-pretraining by the packaged configurations, for H100s."""
    found = {}
    for name, patch in (("B/32", 32), ("B/16", 16)):
        shapes = CLIPViPConfig(vision_config={"patch_size": patch}, projection_dim=512)
        with torch.device("meta"):
            model = CLIPViPModel(shapes)
        rows = []
        for ranks in WORLDS:
            config = TrainConfig(
                out="", task="omnisource", batch_size=CLIPS * ranks, data=DataConfig(text_length=70)
            )
            parts = step_seconds(plan(model, config, ranks), H100, ranks, 512, 3)
            seconds = sum(parts.values())
            rows.append(
                {
                    "gpus": ranks,
                    "clips_per_second": CLIPS * ranks / seconds,
                    **{f"{part}_ms": 1e3 * value for part, value in parts.items()},
                }
            )
        found[name] = rows
    return found


# --- held against two processes here ---------------------------------------------------------

LOCAL = 8  # clips on each process
DIMENSION = 256


def small() -> CLIPViPModel:
    """Wide for its tokens, so that gradients take long to travel for what they take to make."""
    torch.manual_seed(0)
    tower = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 8}
    text = {**tower, "vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999}
    vision = {**tower, "image_size": 64, "patch_size": 16}
    return CLIPViPModel(
        CLIPViPConfig(text_config=text, vision_config=vision, projection_dim=DIMENSION)
    )


class Features(torch.nn.Module):
    def __init__(self, model: CLIPViPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels, ids):
        unit = torch.nn.functional.normalize
        video, text = self.model.get_video_features(pixels), self.model.get_text_features(ids)
        return unit(video, dim=-1), unit(text, dim=-1), self.model.logit_scale.exp()


def rank_main(rank: int, world: int, folder: str) -> None:
    """Steps of one of `world` processes of one thread; the first writes what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank,
                            world_size=world)  # fmt: skip
    model = small()
    towers = Features(model)
    if world > 1:
        towers = DistributedDataParallel(towers)
    pixels, ids = torch.randn(LOCAL, 4, 3, 64, 64), torch.randint(1, 990, (LOCAL, 16))
    ids[:, -1] = 999
    times, gathered = [], []
    for _ in range(12):
        dist.barrier()
        started = time.perf_counter()
        model.zero_grad()
        contrastive_loss(*towers(pixels, ids), sharded=True).backward()
        times.append(time.perf_counter() - started)
    weights = torch.zeros(sum(p.numel() for p in model.parameters()))
    for _ in range(8):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(weights)
        gathered.append(time.perf_counter() - started)
    if rank == 0:
        measured = {
            "step": statistics.median(times[2:]),
            "reduce": statistics.median(gathered[2:]),
            "bytes": FLOAT * len(weights),
        }
        with open(f"{folder}/{world}.json", "w") as file:
            json.dump(measured, file)
    dist.destroy_process_group()


def measured(world: int, folder: str) -> dict[str, float]:
    """Two processes' steps: together, or (world 1) each for itself, on as busy a machine."""
    children = []
    for number in range(2):
        if not (child := os.fork()):
            own = folder if world == 2 else f"{folder}/{number}"
            os.makedirs(own, exist_ok=True)
            rank_main(number if world == 2 else 0, world, own)
            os._exit(0)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit("a rank failed; its error is above")
    with open(f"{folder}/{world}.json" if world == 2 else f"{folder}/0/{world}.json") as file:
        return json.load(file)


def held_against_two_processes() -> dict[str, float]:
    """Predicted from a lone process's step and the rate at which gloo reduces; and measured."""
    with tempfile.TemporaryDirectory() as folder:
        one, two = (measured(world, folder) for world in (1, 2))
    with torch.device("meta"):
        model = CLIPViPModel(small().config)
    config = TrainConfig(out="", batch_size=2 * LOCAL, mixed_precision="no", model=ModelConfig())
    config.data = DataConfig(num_frames=4, text_length=16)
    cost = plan(model, config, 2)
    flops = 3 * LOCAL * cost.tower_flops / one["step"]
    rate = two["bytes"] / two["reduce"]
    # gloo's threads work on the cores that backward works on: nothing is hidden behind it.
    here = Machine(flops, flops, rate, rate, 2, 0.0, hidden=0.0)
    predicted = sum(step_seconds(cost, here, 2, DIMENSION, 1).values())
    return {
        "alone_ms": 1e3 * one["step"],
        "all_reduce_ms": 1e3 * two["reduce"],
        "two_processes_predicted_ms": 1e3 * predicted,
        "two_processes_measured_ms": 1e3 * two["step"],
    }


def main() -> None:
    """Prints both tables and keeps them."""
    check = held_against_two_processes()
    print("two processes here: " + ", ".join(f"{k} {v:.1f}" for k, v in check.items()))
    table = predictions()
    for name, rows in table.items():
        print(f"\n{name}, {CLIPS} clips a GPU, predicted for H100\n")
        print("|  GPUs | clips/s | of linear | towers ms | loss ms | gradients ms | features ms |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            share = row["clips_per_second"] / row["gpus"] / rows[0]["clips_per_second"]
            cells = [f"{row[k]:.2f}" for k in row if k.endswith("_ms")]
            print(
                f"| {row['gpus']} | {row['clips_per_second']:,.0f} | {share:.0%} | "
                f"{' | '.join(cells)} |"
            )
    record = {"check": check, "predicted": table, "machine": harness.machine()}
    harness.write(harness.BENCH / "results" / "scaling.json", record)


if __name__ == "__main__":
    main()
