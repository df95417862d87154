"""Prepare what a model reads: tokens of texts, and tensors on its device."""

import html
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A text of megabytes would take seconds and much memory, and no model reads that far.
MOST_CHARACTERS = 20_000


def tokenize(tokenizer: Any, texts: Sequence[str], text_length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, int64 [len(texts), longest], padded to the longest text.

    HTML entities are resolved first, as in CLIP's own tokenizer. Only MOST_CHARACTERS are read.

    text_length: number of tokens at which texts are cut off, start and end token included.
    """
    texts = [html.unescape(html.unescape(text[:MOST_CHARACTERS])) for text in texts]
    tokens = tokenizer(
        texts, padding=True, truncation=True, max_length=text_length, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to `device` without waiting; return the tensor itself if it is there already.

    The copy goes through page-locked memory: from any other memory, the host would wait until the
    GPU has finished all earlier work.
    """
    device = torch.device(device)
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
