"""The CUDA kernels' machine code, for tests of more than one op."""

from pathlib import Path

import kernel_table
import pytest

from clipvip.ops import _native


@pytest.fixture(scope="session")
def kernels() -> list[dict]:
    """All kernels of the built module, as bench/kernel_table.py reads them."""
    if _native.module().build_info()["cuda"] is None:
        pytest.skip("clipvip was built without CUDA kernels")
    if kernel_table.cuobjdump() is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return kernel_table.read(Path(_native.module().__file__))
