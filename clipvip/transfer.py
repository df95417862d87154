"""Asynchronous copies from the host to a GPU."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to `device` without waiting; return the tensor itself if it is there already.

    The copy goes through page-locked memory: from any other memory, the host would wait until the
    GPU has finished all earlier work.
    """
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
