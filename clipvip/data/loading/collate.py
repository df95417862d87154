"""Pack samples into a batch of tensors, and tokenise their texts."""

from typing import Any

import torch
from torch import Tensor

from clipvip.data.loading.samples import TRIES, Report, Sample
from clipvip.inputs import tokenize

Batch = dict[str, Tensor]


class Collate:
    """Turn samples into (batch, report); the batch is None if none of them could be read.

    text_length: tokens at which texts are cut off. task: see build_loader, which lists the tensors.
    """

    def __init__(self, tokenizer: Any, text_length: int, task: str) -> None:
        self.tokenizer = tokenizer
        self.text_length = text_length
        self.task = task

    def __call__(self, samples: list[Sample]) -> tuple[Batch | None, Report]:
        read = [sample for sample in samples if sample.frames is not None]
        report = Report(
            [place for sample in samples for place in sample.tried],
            [failure for sample in samples for failure in sample.failures],
            [file for sample in samples for file in sample.damaged],
            [sample.decoder for sample in read],
            any(len(sample.failures) == TRIES for sample in samples),
        )
        return (self._pack(read) if read else None), report

    def _pack(self, samples: list[Sample]) -> Batch:
        frames = []
        for sample in samples:
            assert isinstance(sample.frames, Tensor)
            frames.append(sample.frames)
        batch = {
            "pixel_values": torch.cat(frames),
            "frame_offsets": torch.tensor([0, *map(len, frames)]).cumsum(0).to(torch.int32),
            "clip_index": torch.tensor([sample.place for sample in samples]),
        }
        if self.task == "retrieval":
            texts = [text for sample in samples for text in sample.texts]
            owners = [sample.place for sample in samples for _ in sample.texts]
            batch["text_ids"], batch["text_mask"] = self._tokens(texts)
            batch["text_clip"] = torch.tensor(owners)
        elif self.task == "omnisource":
            for name in ("subtitle", "caption"):
                given = [getattr(sample, name) for sample in samples]
                ids, mask = self._tokens([text or "" for text in given])
                batch[f"{name}_ids"], batch[f"{name}_mask"] = ids, mask
                batch[f"{name}_present"] = torch.tensor([text is not None for text in given])
            images = [sample.image for sample in samples if sample.image is not None]
            batch["image"] = torch.stack(images)
        return batch

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return tokenize(self.tokenizer, texts, self.text_length)
