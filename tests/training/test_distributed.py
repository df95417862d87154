"""Two processes with half a batch each are one process with the whole batch."""

import runpy
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("gather_worker.py")


def test_gathered_loss_and_gradients_equal_one_process(tmp_path):
    arguments = [str(WORKER), str(tmp_path / "store"), str(tmp_path / "out")]
    subprocess.run([sys.executable, *arguments], check=True, timeout=120)
    worker = runpy.run_path(str(WORKER))
    whole = worker["Pair"]()
    loss = worker["run"](whole, *worker["batch"]())
    for rank in range(2):
        result = torch.load(tmp_path / f"out-{rank}.pt")
        torch.testing.assert_close(result["loss"], loss)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(result["gradients"][name], parameter.grad)
        assert result["present"].tolist() == [True, True, False, True]
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
