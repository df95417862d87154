"""CLIP-ViP: video-text models made from the image-text model CLIP, with kernels of their own.

The names below are loaded on first use, so that commands start quickly and respond to signals
early. The data path, losses and trainer are imported from their own modules.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipvip.index import VideoIndex as VideoIndex
    from clipvip.model import CLIPViPConfig as CLIPViPConfig
    from clipvip.model import CLIPViPForCaptioning as CLIPViPForCaptioning
    from clipvip.model import CLIPViPModel as CLIPViPModel
    from clipvip.model import CLIPViPProcessor as CLIPViPProcessor

__version__ = "0.1.0"
_HOMES = dict.fromkeys(
    ("CLIPViPConfig", "CLIPViPForCaptioning", "CLIPViPModel", "CLIPViPProcessor"), "clipvip.model"
)
_HOMES["VideoIndex"] = "clipvip.index"
__all__ = [*_HOMES, "ops"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name not in ("ops", "_C"):
        raise AttributeError(f"module 'clipvip' has no attribute {name!r}")
    ops = importlib.import_module("clipvip.ops")  # and torch, whose libraries _C needs
    return ops if name == "ops" else importlib.import_module("clipvip._C")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
