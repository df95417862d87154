"""The CUDA kernels on the CPU: a module with those functions of clipvip._C that end in _cuda."""

import contextlib
import fcntl
import importlib.util
import os
import platform
import subprocess
import sysconfig
from pathlib import Path

import pytest

from clipvip.ops import _native

ROOT = Path(__file__).parents[2]
SANITIZED = "CLIPVIP_EMULATOR_SANITIZED" in os.environ  # set by test_sanitized.py for its own run


def build(sanitized: bool) -> Path:
    """Build the module in the C++ tests' build tree and return its path."""
    import pybind11

    tree = ROOT / "build" / ("ctest-ON" if sanitized else "ctest-OFF")
    definitions = {
        "CLIPVIP_PYTHON": "OFF",
        "CLIPVIP_TESTS": "ON",
        "CLIPVIP_SANITIZE": "ON" if sanitized else "OFF",
        "CLIPVIP_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "CLIPVIP_PYBIND11_INCLUDE": pybind11.get_include(),
        "CLIPVIP_EXT_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }
    flags = [f"-D{name}={value}" for name, value in definitions.items()]
    tree.mkdir(parents=True, exist_ok=True)
    with (tree / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until closed: one process builds, others find it built
        for command in (
            ["cmake", "-S", ROOT, "-B", tree, "-G", "Ninja", *flags],
            ["cmake", "--build", tree, "--target", "_emulator"],
        ):
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode != 0:
                said = f"{' '.join(map(str, command))}:\n{run.stdout}{run.stderr}"
                pytest.fail(said, pytrace=False)
    (module,) = tree.glob("_emulator*.so")
    return module


@pytest.fixture(scope="session")
def built():
    """`build`, or a skip where the emulator does not run."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator switches stacks in x86-64 assembly")
    return build


@pytest.fixture(scope="session")
def emulator_module(built):
    spec = importlib.util.spec_from_file_location("_emulator", built(SANITIZED))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulator(emulator_module, monkeypatch):
    """The module, which clipvip.ops then calls in place of clipvip._C on a GPU."""
    monkeypatch.setattr(_native, "module", lambda: emulator_module)
    monkeypatch.setattr(_native, "launch_context", lambda tensor: contextlib.nullcontext((0, 0)))
    emulator_module.configure()
    yield emulator_module
    emulator_module.configure()
