"""Prepare what a model reads: tokens of texts, and tensors on its device."""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipvip.sentences import plain

Item = TypeVar("Item")


def tokenize(tokenizer: Any, texts: Sequence[str], text_length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask, int64 [len(texts), longest], padded to the longest text.

    Texts are read as `clipvip.sentences.plain` has them.

    text_length: number of tokens at which texts are cut off, start and end token included.
    """
    tokens = tokenizer(
        [*map(plain, texts)],
        padding=True,
        truncation=True,
        max_length=text_length,
        return_tensors="pt",
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


def sent_ahead(
    items: Iterable[Item],
    send_item: Callable[[Item], dict[str, Tensor]],
    device: torch.device,
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """Yield each item with its tensors on `device`.

    On a GPU, the next item is drawn and copied, on a stream of its own, before an item is yielded:
    the GPU copies it while it computes with this one. If drawing an item fails, those before it are
    yielded first.

    send_item: sends the tensors of an item to `device`, by `send`.
    """
    if device.type != "cuda":
        for item in items:
            yield item, send_item(item)
        return
    copying, failure = _copy_stream(device), None
    started: deque[tuple[Item, dict[str, Tensor], torch.Event]] = deque()

    def arrived() -> tuple[Item, dict[str, Tensor]]:
        item, tensors, copied = started.popleft()
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)
        for tensor in tensors.values():
            tensor.record_stream(computing)  # its memory must outlast the work queued there
        return item, tensors

    try:
        for item in items:
            with torch.cuda.stream(copying):
                started.append((item, send_item(item), copying.record_event()))
            if len(started) > 1:
                yield arrived()
    except Exception as raised:
        failure = raised
    if started:
        yield arrived()
    if failure is not None:
        raise failure


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for all copies, as PyTorch reuses memory only within the stream it was made on."""
    return torch.cuda.Stream(device)
