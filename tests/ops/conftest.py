"""The CUDA kernels' machine code, for tests of more than one op, and threads for all of them."""

from pathlib import Path

import kernel_table
import pytest
import torch

from clipvip.ops import _native


@pytest.fixture(scope="session")
def kernels() -> list[dict]:
    """All kernels of the built module, as bench/kernel_table.py reads them."""
    if _native.module().build_info()["cuda"] is None:
        pytest.skip("clipvip was built without CUDA kernels")
    if kernel_table.cuobjdump() is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return kernel_table.read(Path(_native.module().__file__))


@pytest.fixture(autouse=True, scope="module")
def several_threads():
    """Let kernels compute with several threads, also where tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, 2))
    yield
    torch.set_num_threads(before)
