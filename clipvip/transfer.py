"""Copies from the host to a GPU that neither side waits for."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, itself where it is there already.

    A copy to a GPU goes through page-locked memory: from any other memory the host would wait
    until the GPU has done all that was asked of it before.
    """
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
