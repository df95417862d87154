"""CLIP-ViP: video-text models made from the image-text model CLIP, with kernels of their own.

`clipvip.ops` loads torch and the compiled kernels on first use, so that commands start quickly and
respond to signals early. Import the model, data path and trainer from their own modules.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["ops"]


def __getattr__(name: str) -> Any:
    if name not in ("ops", "_C"):
        raise AttributeError(f"module 'clipvip' has no attribute {name!r}")
    ops = importlib.import_module("clipvip.ops")  # and torch, whose libraries _C needs
    return ops if name == "ops" else importlib.import_module("clipvip._C")
