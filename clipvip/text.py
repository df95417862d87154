"""TODO."""

import html
from collections.abc import Sequence
from typing import Any

from torch import Tensor

LONGEST = 20_000  # characters: a text of megabytes would take seconds for each, and much memory


def tokenize(tokenizer: Any, texts: Sequence[str], text_length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [len(texts), longest], at most text_length with both specials.

    HTML entities are undone first, as CLIP's own tokenizer did. No more than a text's first
    20,000 characters are looked at.
    """
    tokens = tokenizer(
        [html.unescape(html.unescape(text[:LONGEST])) for text in texts],
        padding=True,
        truncation=True,
        max_length=text_length,
        return_tensors="pt",
    )
    return tokens["input_ids"], tokens["attention_mask"]
