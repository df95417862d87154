"""Ranks that share a batch get the loss and gradients of one process with the whole batch."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipvip.sharded import _logsumexp_over_ranks

WORKER = Path(__file__).with_name("sharded_worker.py")
worker = runpy.run_path(str(WORKER))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of every rank of every world."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run([sys.executable, str(WORKER), str(folder)], check=True, timeout=120)
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        for world in worker["WORLDS"]
    }


@pytest.mark.parametrize("backend", worker["BACKENDS"])
@pytest.mark.parametrize("case", worker["CASES"])
def test_shards_have_the_loss_and_gradients_of_the_whole_batch(found, case, backend):
    dtype = worker["BACKENDS"][backend]
    whole = worker["run"](
        worker["Towers"](dtype), *worker["batch"](dtype), case, backend, over_ranks=False
    )
    for results in found.values():
        for result in results:
            torch.testing.assert_close(result[case, backend], whole)


def test_what_else_ranks_exchange(found):
    for world, results in found.items():
        for result in results:
            assert result["objects"] == [{"rank": rank} for rank in range(world)]
            assert result["sum"].tolist() == [world * (world + 1) / 2]


def test_a_loss_exchanges_counts_once(found):
    for results in found.values():
        for result in results:
            assert result["exchanges of counts"] == 1


def test_bytes_on_the_wire_are_as_documented(found):
    """See clipvip.sharded.sharded_logsumexp."""
    for world, results in found.items():
        clips, dimension = worker["EVEN"]
        columns, share = world * clips, (world - 1) / world
        features = columns * dimension * 4
        for result in results:
            forward, backward = result["bytes"]
            assert forward == pytest.approx(share * (features + 16 * columns + 8 * world))
            assert backward == pytest.approx(share * (2 * features + 4 * columns))


def test_what_is_not_finite_on_a_rank_is_so_for_all(tmp_path):
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, torch.finfo(torch.float32).max])
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = _logsumexp_over_ranks(values)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, values, equal_nan=True)
