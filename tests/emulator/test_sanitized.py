"""Kernels on the emulator under the address and undefined-behaviour sanitizers.

They detect what no result shows: accesses past the ends of tensors, of a block's shared memory and
of the arrays in it. The tests marked `sanitized` run a second time here, in a separate process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The product of test_emulator.py with the fault named last, on the module given first.
PRODUCT = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_emulator", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
a, b, c = torch.ones(100, 104).bfloat16(), torch.ones(77, 104).bfloat16(), torch.zeros(100, 77)
def handle(x):
    bytes = x.untyped_storage().nbytes()
    return module.Tensor(x.data_ptr(), bytes, 0, int(x is not c), tuple(x.shape), x.stride())
module.product(handle(a), handle(b), handle(c), getattr(module.Fault, sys.argv[2]))
print("sum", c.sum().item())
"""


def python(*arguments: object) -> subprocess.CompletedProcess:
    """Run Python with the sanitizers' runtimes loaded first, so that they watch torch's memory."""
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter does not free all memory when it ends
        "CLIPVIP_EMULATOR_SANITIZED": "1",
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_sound_kernel_passes(built):
    run = python("-c", PRODUCT, built(True), "none")
    assert run.stdout == f"sum {100 * 77 * 104:.1f}\n", run.stderr


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("tail_loaded", "heap-buffer-overflow"),
        ("tail_stored", "heap-buffer-overflow"),
        ("between_arrays", "use-after-poison"),
    ],
)
def test_a_fault_of_addresses_ends_the_process(built, fault, report):
    run = python("-c", PRODUCT, built(True), fault)
    assert run.returncode != 0
    assert report in run.stderr


def test_the_kernels_pass(built):
    built(True)
    run = python("-m", "pytest", "-q", "-m", "sanitized", Path(__file__).parent)
    assert run.returncode == 0, run.stdout + run.stderr
