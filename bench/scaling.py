"""Predicts clips per second on 1 to 1024 GPUs by a model of a step: `python bench/scaling.py`.

The time of a step is the sum of three parts: its products at a share of the GPU's peak, the loss,
and the exchange between ranks that backward does not hide. To test the model, it predicts a step of
two processes on this machine from the measured time of one process and the measured rates of gloo
and of copies, once with mostly gradients exchanged and once with mostly features. It is an error if
prediction and measurement differ by more than TOLERANCE. Writes bench/results/scaling.json.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import records
import torch
import torch.distributed as dist
from machine import machine
from tables import markdown_table
from torch.nn.parallel import DistributedDataParallel

from clipvip.losses import contrastive_loss
from clipvip.model import CLIPViPConfig, CLIPViPModel
from clipvip.sharded import _reduce_scatter
from clipvip.training.config import DataConfig, ModelConfig, TrainConfig
from clipvip.training.plan import PEAKS, TERA, Plan, plan

WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CLIPS = 32  # per GPU, as in the paper
FLOAT = 4  # bytes
TOLERANCE = 0.25  # largest relative error of a predicted step of two processes


@dataclass(frozen=True)
class Machine:
    """Rates per second: operations, bytes that a rank sends in a collective within its node (near)
    and between nodes (far), and bytes that it reads and writes in its memory."""

    flops: float
    loss_flops: float
    near: float
    far: float
    memory: float
    near_ranks: int
    latency: float
    hidden: float
    """Share of backward during which gradients are exchanged."""

    def wire(self, ranks: int) -> float:
        """Return the rate of a collective of so many ranks."""
        return self.near if ranks <= self.near_ranks else self.far


# Assumed, not measured: half of the dense bf16 peak; the loss in fp32 outside the tensor cores;
# collectives over NVLink in a node of 8 GPUs, and between nodes over one 400 Gb/s card per GPU,
# where the bytes of a node leave it once over all its cards; 3/4 of the memory's rate.
H100 = Machine(0.5 * PEAKS["H100"] * TERA, 30 * TERA, 360e9, 300e9, 2.5e12, 8, 20e-6, 0.9)


def step_seconds(
    cost: Plan, machine: Machine, ranks: int, dimension: int, pairs: int
) -> dict[str, float]:
    """Return the seconds of each part of a step with `cost.clips // ranks` clips per rank."""
    clips = cost.clips // ranks
    forward, backward = clips * cost.tower_flops, clips * cost.backward_flops
    towers = (forward + backward) / machine.flops
    loss = 4 * cost.loss_flops / ranks / machine.loss_flops  # 8·n·N·D: with one recomputation
    if ranks == 1:
        return {"towers": towers, "loss": loss, "gradients": 0.0, "features": 0.0}
    rate, hops = machine.wire(ranks), (ranks - 1).bit_length()
    size = FLOAT * cost.trained
    gradients = 2 * (ranks - 1) / ranks * size / rate + machine.latency * 2 * hops
    gradients = max(gradients - machine.hidden * backward / machine.flops, 0.0)
    gradients += (
        4 * size / machine.memory
    )  # copied into buckets and back, read and written each time
    # Features are sent in forward and in backward, and their gradients back, in eight collectives
    # (see clipvip.sharded.sharded_logsumexp). Meanwhile a rank computes its own tile only.
    features = pairs * 3 * (ranks - 1) * clips * dimension * FLOAT / rate
    features += pairs * 8 * hops * machine.latency
    return {"towers": towers, "loss": loss, "gradients": gradients, "features": features}


def predictions() -> dict[str, list[dict[str, float]]]:
    """Return predictions for post-pretraining with the packaged configurations on H100s."""
    found = {}
    for name, patch in (("B/32", 32), ("B/16", 16)):
        shapes = CLIPViPConfig(vision_config={"patch_size": patch}, projection_dim=512)
        with torch.device("meta"):
            model = CLIPViPModel(shapes)
        rows = []
        for ranks in WORLDS:
            data = DataConfig(num_frames=12, text_length=70)
            config = TrainConfig(out="", task="omnisource", batch_size=CLIPS * ranks, data=data)
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


# --- compared with two processes on this machine ------------------------------------------------

ROUNDS = 10
# Clips per process, and features per clip.
LOCAL, WIDE = {"gradients": 8, "features": 64}, {"gradients": 256, "features": 16384}


def small() -> CLIPViPModel:
    """Return a model with few tokens for its width, so that exchanging its gradients takes long
    compared with computing them."""
    torch.manual_seed(0)
    tower = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    tower |= {"num_attention_heads": 8}
    text = {**tower, "vocab_size": 1000, "bos_token_id": 998, "eos_token_id": 999}
    vision = {**tower, "image_size": 64, "patch_size": 16}
    return CLIPViPModel(
        CLIPViPConfig(text_config=text, vision_config=vision, projection_dim=WIDE["gradients"])
    )


def cost_of(case: str) -> Plan:
    """Return the cost of a step of two processes."""
    with torch.device("meta"):
        model = CLIPViPModel(small().config)
    clips = 2 * LOCAL[case]
    config = TrainConfig(out="", batch_size=clips, mixed_precision="no", model=ModelConfig())
    config.data = DataConfig(num_frames=4, text_length=16)
    cost = plan(model, config, 2)
    if case == "features":  # features are given, so there are no towers
        loss = cost.loss_flops * WIDE[case] / model.config.projection_dim
        cost = replace(cost, tower_flops=0.0, backward_flops=0.0, trained=0, loss_flops=loss)
    return cost


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = small()

    def forward(self, pixels, ids):
        unit = torch.nn.functional.normalize
        video, text = self.model.get_video_features(pixels), self.model.get_text_features(ids)
        return unit(video, dim=-1), unit(text, dim=-1), self.model.logit_scale.exp()


def step_of(case: str, sharded: bool) -> Callable[[], object]:
    """Return a step of this process, alone or together with the other one."""
    clips = LOCAL[case]
    if case == "features":
        given = [torch.randn(clips, WIDE[case]) / WIDE[case] ** 0.5 for _ in range(2)]
        given.append(torch.tensor(20.0))
        for tensor in given:
            tensor.requires_grad_()
        return lambda: contrastive_loss(*given, sharded=sharded).backward()
    towers = DistributedDataParallel(Towers()) if sharded else Towers()
    pixels, ids = torch.randn(clips, 4, 3, 64, 64), torch.randint(1, 990, (clips, 16))
    ids[:, -1] = 999

    def step() -> None:
        towers.zero_grad()
        contrastive_loss(*towers(pixels, ids), sharded=sharded).backward()

    return step


def rank_main(rank: int, folder: str) -> None:
    """Time steps of one and of two processes, and the collectives and copies in them; rank 0 writes
    the medians in seconds.

    All of them take turns, so that other load on the machine affects all alike. Each process has
    one thread.
    """
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    weights = torch.zeros(cost_of("gradients").trained)
    other = torch.zeros_like(weights)
    whole = torch.zeros(2, LOCAL["features"] * WIDE["features"])

    def exchange_features() -> None:
        for _ in range(2):
            dist.all_gather(list(whole.unbind()), whole[rank].clone())
        _reduce_scatter(whole[rank].clone(), whole.flatten())

    actions = {f"{case} alone": step_of(case, sharded=False) for case in LOCAL}
    actions |= {f"{case} together": step_of(case, sharded=True) for case in LOCAL}
    actions["copy"] = lambda: weights.copy_(other)
    actions["all-reduce"] = lambda: dist.all_reduce(weights)
    actions["exchange"] = exchange_features
    actions["latency"] = lambda: dist.all_reduce(whole[0, :1])
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS):
        for name, action in actions.items():
            dist.barrier()
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    if rank == 0:
        medians = {name: statistics.median(found[2:]) for name, found in times.items()}
        with open(f"{folder}/medians.json", "w") as file:
            json.dump(medians, file)
    dist.destroy_process_group()


def measured() -> dict[str, float]:
    """Return the medians of two processes in seconds; see `rank_main`."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            if not (child := os.fork()):
                rank_main(rank, folder)
                os._exit(0)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit("scaling: a rank failed; its error is printed above")
        with open(f"{folder}/medians.json") as file:
            return json.load(file)


def held_against_two_processes() -> dict[str, dict[str, float]]:
    """Return, per case, the step predicted from that of one process and the rates of gloo and of
    copies, and the measured step."""
    seconds, found = measured(), {}
    copies = 2 * FLOAT * cost_of("gradients").trained / seconds["copy"]
    rates = {
        "gradients": FLOAT * cost_of("gradients").trained / seconds["all-reduce"],
        "features": 3 * FLOAT * LOCAL["features"] * WIDE["features"] / seconds["exchange"],
    }
    for case, clips in LOCAL.items():
        cost, wire = cost_of(case), rates[case]
        alone = clips * (cost.tower_flops + cost.backward_flops) or cost.loss_flops
        flops = alone / seconds[f"{case} alone"]
        # gloo's threads use the same cores as backward, so backward hides nothing.
        here = Machine(flops, flops, wire, wire, copies, 2, seconds["latency"], hidden=0.0)
        parts = step_seconds(cost, here, 2, WIDE[case], 1)
        found[case] = {
            "alone_ms": 1e3 * seconds[f"{case} alone"],
            **{f"{part}_ms": 1e3 * value for part, value in parts.items()},
            "predicted_ms": 1e3 * sum(parts.values()),
            "measured_ms": 1e3 * seconds[f"{case} together"],
        }
    return found


def misses(check: dict[str, dict[str, float]]) -> list[str]:
    """Return one line per prediction that is off by more than TOLERANCE."""
    return [
        f"{case}: {row['predicted_ms']:.1f} ms predicted, {row['measured_ms']:.1f} ms measured, "
        f"over {TOLERANCE:.0%} apart"
        for case, row in check.items()
        if abs(row["predicted_ms"] - row["measured_ms"]) > TOLERANCE * row["measured_ms"]
    ]


def main() -> None:
    """Print both tables and write the record."""
    check = held_against_two_processes()
    for case, row in check.items():
        print(
            f"two processes on this machine, {case}: "
            + ", ".join(f"{k} {v:.1f}" for k, v in row.items())
        )
    if found := misses(check):
        sys.exit("; ".join(found) + "; nothing was written; run it on an idle machine")
    table = predictions()
    for name, rows in table.items():
        print(f"\n{name}, {CLIPS} clips per GPU, predicted for H100\n")
        heads = "GPUs|clips/s|of linear|towers ms|loss ms|gradients ms|features ms"
        lines = []
        for row in rows:
            gpus, speed = int(row["gpus"]), row["clips_per_second"]
            share = speed / gpus / rows[0]["clips_per_second"]
            parts = [f"{row[k]:.2f}" for k in row if k.endswith("_ms")]
            lines.append([str(gpus), f"{speed:,.0f}", f"{share:.0%}", *parts])
        print(markdown_table(heads.split("|"), lines))
    record = {"check": check, "predicted": table, "machine": machine()}
    records.write(records.RESULTS / "scaling.json", record)


if __name__ == "__main__":
    main()
