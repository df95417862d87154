"""The CUDA kernels' machine code, read from the built module: no GPU is needed.

The main instances are those of 16-bit numbers with heads of up to 96, and the 16-bit loss.
"""

import re

import kernel_table
import pytest

from clipvip.ops import _native

MAIN = r"(forward|backward)<b?float16, (32|64|80|96)>|(statistics|panel)<b?float16>"


@pytest.fixture(scope="module")
def main_kernels(kernels) -> list[dict]:
    return [row for row in kernels if re.search(MAIN, row["kernel"])]


def test_every_architecture_has_every_kernel(kernels):
    built = {x.split("-")[0] for x in _native.module().build_info()["cuda"].split(",")}
    names = {row["kernel"] for row in kernels}
    assert len([name for name in names if re.search(MAIN, name)]) == 20
    assert {(row["arch"], row["kernel"]) for row in kernels} == {
        (arch, name) for arch in built for name in names
    }


def test_no_main_instance_spills(main_kernels):
    spilling = [row for row in main_kernels if row["stack"] or row["local_memory"]]
    assert not spilling, kernel_table.table(spilling)


def test_main_instances_use_tensor_cores_and_copy_in_the_background(main_kernels):
    without = [
        row for row in main_kernels if not (row["mma"] and row["ldmatrix"] and row["cp_async"])
    ]
    assert not without, kernel_table.table(without)


def test_registers_leave_room_for_two_blocks_of_attention(main_kernels):
    """One block can then compute while the other waits for memory; the loss needs a whole one.

    Shared memory may not leave it, see below. Attention's largest block is one that is alone on a
    multiprocessor, and has twice as many warps.
    """
    for row in main_kernels:
        blocks = 2 if "proxy_attention" in row["kernel"] else 1
        warps = row["threads"] // 32 // blocks
        assert kernel_table._blocks(row["registers"], warps, row["arch"]) >= blocks, row


# Where a block's rows leave a multiprocessor no shared memory for a second block; then it has more
# warps. Keys and values of 580 rows fill more than half of the largest (L/14@336, forward). So do
# all four matrices of 260 rows (L/14, backward), and of 200 rows in 164 KiB. On 120, with 100 KiB,
# two rings with the statistics of 200 rows are 1.25 KiB too large.
ALONE = {
    ("forward", "B/16"): ["120"],
    ("forward", "L/14"): ["120"],
    ("forward", "L/14@336"): ["90a", "100"],
    ("backward", "B/16"): ["80", "120"],
    ("backward", "L/14"): ["80", "90a", "100", "120"],
    ("backward", "L/14@336"): ["120"],
}


def test_two_blocks_of_attention_share_a_multiprocessor_except_for_those_listed(kernels):
    cases = kernel_table.occupancy(kernels)
    assert cases
    for case in cases:
        alone = case["arch"] in ALONE.get((case["direction"], case["model"]), [])
        assert case["blocks"] == 1 if alone else case["blocks"] >= 2, case
        shared = {"forward": 7, "backward": 4}[case["direction"]]  # most warps of one of two blocks
        assert case["warps"] > shared if alone else case["warps"] <= shared, case
