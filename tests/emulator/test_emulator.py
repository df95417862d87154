"""The emulator detects planted faults of every kind."""

import ast
from pathlib import Path

import pytest
import torch

from clipvip.ops import _native

SEEDS = range(6)
STUB = Path(_native.__file__).parents[1] / "_C.pyi"
ROWS, COLUMNS, DEPTH = 100, 77, 104  # multiples of no tile


def product(emulator, fault="none", rows=ROWS):
    """Return a·bᵀ by the kernel and by PyTorch, and whether memory behind the result is intact."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, DEPTH, generator=generator).bfloat16()
    b = torch.randn(COLUMNS, DEPTH, generator=generator).bfloat16()
    memory = torch.full((rows + 4, COLUMNS), 7.0)
    c = memory[:rows]
    emulator.product(*(_native.handle(x) for x in (a, b, c)), getattr(emulator.Fault, fault))
    return c, a.float() @ b.float().T, bool((memory[rows:] == 7).all())


def test_the_stub_declares_the_cuda_functions(emulator):
    declared = {getattr(node, "name", "") for node in ast.parse(STUB.read_text()).body}
    exported = {name for name in dir(emulator) if name.endswith("_cuda")}
    assert exported == {name for name in declared if name.endswith("_cuda")}


@pytest.mark.sanitized
@pytest.mark.parametrize("seed", SEEDS)
def test_a_sound_kernel_is_exact_in_every_schedule(emulator, seed):
    emulator.configure(seed=seed)
    got, expected, untouched = product(emulator)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    assert untouched


@pytest.mark.parametrize(
    "fault",
    [
        "no_barrier_before_use",
        "no_barrier_before_refill",
        "no_wait",
        "wait_too_short",
        "wrong_row",
        "wrong_column",
        "tail_stored",
        "unwritten",
    ],
)
def test_a_fault_shows_in_the_result(emulator, fault):
    shows = []
    for seed in SEEDS:
        emulator.configure(seed=seed)
        got, expected, untouched = product(emulator, fault)
        shows.append(not untouched or not torch.allclose(got, expected, atol=1e-4))
    assert any(shows)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lane_leaves", "no thread can go on.* at mma.* lane 31 at the end"),
        ("warp_skips_barrier", "no thread can go on.*the block's barrier; warp 1 .*the end"),
        ("no_last_wait", "a thread ends with unfinished cp.async groups .thread 0 of block 0,0,0"),
        ("misaligned", "cp.async: a shared address is not a multiple of 16 .thread 0 of block"),
    ],
)
def test_a_fault_ends_the_launch_with_its_place(emulator, fault, message):
    with pytest.raises(RuntimeError, match=f"a product: {message}"):
        product(emulator, fault)


def test_a_launch_that_no_gpu_takes_is_refused(emulator):
    emulator.configure(max_shared_bytes=1024)
    with pytest.raises(RuntimeError, match="a product: no GPU takes such a launch"):
        product(emulator)
