"""The tokenizer of a decoder that captions: a language model's, with start and end tokens."""

import os
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from clipvip.model.pretrained import cached, found, read_json

_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
# By tokenizer_class of tokenizer_config.json, or else by model_type of config.json. All others are
# read from a tokenizer.json.
_KINDS: dict[Any, Any] = {"gpt2": GPT2Tokenizer, "bert": BertTokenizer}
_KINDS |= {f"{kind.__name__}{end}": kind for kind in _KINDS.values() for end in ("", "Fast")}


def load_decoder_tokenizer(where: str | os.PathLike, **hub: Any) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a language model that is to caption, such as gpt2 or bert-base-uncased.

    Whatever its files say, it puts a start token before each text and an end token behind it, and
    pads on the right. If it has no tokens for these, BERT's [CLS] and [SEP] are taken, and the end
    token for padding.

    where: folder or hub name. hub: transformers' hub options. No code of its files is run.
    Raises FileNotFoundError if there is no such folder or name, and ValueError if it holds no
    tokenizer, or one without tokens for start and end.
    """
    with found("the decoder's tokenizer", where, kind="tokenizer"):
        named = read_json(where, "tokenizer_config.json", hub).get("tokenizer_class")
        named = named or read_json(where, "config.json", hub).get("model_type")
        if all(cached(where, name, hub) is None for name in _FILES):
            raise ValueError(f"it holds no tokenizer ({', '.join(_FILES)})")
        read = _KINDS.get(named, PreTrainedTokenizerFast).from_pretrained(where, **hub)
        start, end = read.bos_token or read.cls_token, read.eos_token or read.sep_token
        if start is None or end is None:
            raise ValueError("it lacks a token for a text's start or end")
        inner = read.backend_tokenizer
        inner.no_padding()
        inner.no_truncation()
        ends = [(token, read.convert_tokens_to_ids(token)) for token in dict.fromkeys((start, end))]
        inner.post_processor = TemplateProcessing(single=[start, "$A", end], special_tokens=ends)
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            bos_token=start,
            eos_token=end,
            pad_token=read.pad_token or end,
            unk_token=read.unk_token,
            padding_side="right",
            truncation_side="right",
        )
