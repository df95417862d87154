"""CLIPViPForCaptioning: CLIPViPModel and a decoder that writes what a video shows.

The decoder is a causal language model of transformers whose cross-attention reads the tokens of the
video tower (encoder-decoder captioning, as in BLIP, arXiv 2201.12086, and in transformers'
VisionEncoderDecoderModel). A bridge, LayerNorm and if needed a linear layer, brings these tokens to
the decoder's width.

Weights are those of CLIPViPModel, and `decoder.…` and `bridge.…`. So one folder serves search, for
which CLIPViPModel leaves the latter out, and captioning.
"""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from logging import LogRecord, getLogger
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    BertLMHeadModel,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, can_return_tuple

from clipvip.files import shown
from clipvip.model.configuration import CLIPViPConfig, count_decoder_weights, decoder_config
from clipvip.model.modeling import CLIPViPModel, pack_frames
from clipvip.model.pretrained import cached, check_size, found, quiet_load, read_json
from clipvip.model.vision import proxy_starts

_CLASSES: dict[str, Any] = {"gpt2": GPT2LMHeadModel, "bert": BertLMHeadModel}
_NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_TINY: dict[str, dict[str, Any]] = {  # shapes; the weights are large enough to tell videos apart
    "gpt2": {"n_layer": 1, "n_embd": 8, "n_head": 1, "initializer_range": 1.0},
    "bert": {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "initializer_range": 1.0,
    },
}
# Weights that a language model without cross-attention lacks.
_CROSS_ATTENTION = re.compile(r"\.(crossattention|ln_cross_attn)\.")
# Weights of published models that no decoder uses.
_UNUSED = re.compile(r"(^|\.)(pooler|seq_relationship|position_ids|attn\.(masked_)?bias)(\.|$)")


@dataclass
class CLIPViPCaptionOutput(ModelOutput):
    """Output of CLIPViPForCaptioning; without return_loss, the loss is None."""

    loss: Tensor | None = None  # 0-d, mean cross entropy of all tokens after the first
    logits: Tensor | None = None  # [B, length - 1, vocabulary], of the tokens after the first


class Bridge(nn.Module):
    """LayerNorm over the tower's channels, then a linear layer if the decoder has another width."""

    def __init__(self, config: CLIPViPConfig) -> None:
        super().__init__()
        vision, width = config.vision_config, config.decoder_config.hidden_size
        self.norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        same = vision.hidden_size == width
        self.projection = None if same else nn.Linear(vision.hidden_size, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., C] → [..., width of the decoder]."""
        tokens = self.norm(tokens)
        return tokens if self.projection is None else self.projection(tokens)


class CLIPViPForCaptioning(CLIPViPModel):
    """CLIPViPModel whose video tokens a decoder reads, to say what a video shows.

    The configuration's decoder_config says which decoder, and its decoder_tokens what it attends
    to. Raises ValueError if there is no decoder_config, or if it lacks a token for the start or end
    of a text or for padding.
    """

    has_decoder = True

    def __init__(self, config: CLIPViPConfig) -> None:
        if config.decoder_config is None:
            raise ValueError(
                "it has no decoder, so it cannot caption videos; train one first: clipvip train "
                "msrvtt_captions model.name=MODEL …"
            )
        super().__init__(config)
        shapes = copy.deepcopy(config.decoder_config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(shapes, name)
            if type(token) is not int or not 0 <= token < shapes.vocab_size:
                raise ValueError(
                    f"decoder_config.{name} is {shown(repr(token))[:50]}; expected a token of the "
                    f"decoder's, 0 to {shapes.vocab_size - 1}"
                )
        self.decoder = _CLASSES[shapes.model_type]._from_config(shapes)
        # Whatever a generation_config.json says: how captions are generated is this class's.
        self.decoder.generation_config = GenerationConfig()
        self.bridge = Bridge(config)
        self.post_init()

    @classmethod
    def with_decoder(
        cls, model: CLIPViPModel, decoder: PreTrainedModel | PretrainedConfig, tokens: str
    ) -> "CLIPViPForCaptioning":
        """Join a model with a decoder; the bridge is new.

        decoder: result of `load_decoder`, or the configuration of a new decoder with random
            weights (clipvip.model.configuration.DECODERS).
        tokens: "proxies" or "all", see CLIPViPConfig.
        """
        loaded = decoder if isinstance(decoder, PreTrainedModel) else None
        settings = model.config.to_dict()
        shapes: Any = decoder if loaded is None else loaded.config
        settings |= {"decoder_config": shapes.to_dict(), "decoder_tokens": tokens}
        joined = cls(CLIPViPConfig.from_dict(settings))
        nn.Module.to(joined, model.dtype)  # transformers annotates its own wrongly
        joined.load_state_dict(model.state_dict(), strict=False)
        if loaded is not None:
            joined.decoder.load_state_dict(loaded.state_dict())
        joined.name_or_path = joined.config.name_or_path = model.name_or_path
        return joined

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        frame_offsets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        label_smoothing: float = 0.0,
    ) -> CLIPViPCaptionOutput:
        """Predict each token of a video's caption from the tokens before it (teacher forcing).

        input_ids: int64 [B, length], captions with start and end token, padded on the right, of the
            decoder's tokenizer (`CLIPViPProcessor.caption_tokenizer`).
        pixel_values, frame_offsets: see `get_video_features`.
        attention_mask: [B, length], 0 for padding; None for no padding.
        return_loss: also compute the loss, the mean of `token_losses` over all tokens.
        return_dict: may be given by name; False returns a tuple of all values that are not None.
        """
        memory, mask = self.get_caption_memory(pixel_values, frame_offsets)
        if len(memory) != len(input_ids):
            raise ValueError(
                f"{len(memory)} videos and {len(input_ids)} captions; expected one for each video"
            )
        logits = self.decoder(
            input_ids=input_ids[:, :-1],
            attention_mask=None if attention_mask is None else attention_mask[:, :-1],
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            use_cache=False,
            return_dict=True,
        ).logits
        loss = None
        if return_loss:
            losses, counted = token_losses(logits, input_ids, attention_mask, label_smoothing)
            loss = losses.sum() / counted.sum()
        return CLIPViPCaptionOutput(loss, logits)

    def decoder_layers(self) -> list[nn.Module]:
        """Return the layers of the decoder."""
        gpt2 = self.decoder.config.model_type == "gpt2"
        return [*(self.decoder.transformer.h if gpt2 else self.decoder.bert.encoder.layer)]

    def get_caption_memory(
        self, pixel_values: Tensor, frame_offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what the decoder attends to: [B, S, width of the decoder], and its mask.

        pixel_values, frame_offsets: see `get_video_features`.

        With decoder_tokens="proxies" these are a video's M proxies; with "all", its proxies and the
        L patches of each of its N frames, so S = M + N·L of the longest video. With
        frame_pooling="mean", each frame has proxies of its own: S = N·M, or N·(M + L).

        The mask is bool [B, S], False past a video's end; None if all videos have S tokens.
        """
        pixel_values, frame_offsets = pack_frames(pixel_values, frame_offsets)
        tower, whole = self.vision_model, self.config.decoder_tokens == "all"
        offsets = self._offsets_seen(frame_offsets, len(pixel_values))
        hidden = tower.tokens(pixel_values, offsets, -1)
        proxies, patches = tower.config.num_proxies, tower.patches_per_frame
        starts = proxy_starts(offsets, proxies, patches)
        if whole:
            starts = torch.cat([starts, starts.new_full((1,), len(hidden))])
            if tower.config.frame_pooling == "mean":  # from each video's first frame on
                starts = starts[frame_offsets.long()]
            return self._padded(hidden, starts)
        rows = starts[:, None] + torch.arange(proxies, device=starts.device)
        if tower.config.frame_pooling == "mean":
            return self._padded(hidden[rows.flatten()], frame_offsets.long() * proxies)
        return self.bridge(hidden[rows]), None

    def _padded(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Bridge packed tokens [T, C], and pad each video's, from its start to the next one's, to
        the longest. On a GPU this waits for the lengths of videos. starts: int64 [B+1]."""
        lengths = starts.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        mask = torch.arange(longest, device=tokens.device) < lengths[:, None]
        bridged = self.bridge(tokens)
        kind = self.decoder.config.model_type
        if not leaves_out_padding(kind) and not mask.all():
            raise RuntimeError(
                f"the {kind} of transformers {transformers.__version__} would attend to padding "
                "behind shorter videos; upgrade transformers, or caption videos of one length"
            )
        memory = bridged.new_zeros(*mask.shape, bridged.shape[-1])
        return memory.masked_scatter(mask[..., None], bridged), mask

    def check_search(
        self, beams: int, length: int, names: Sequence[str] = ("beams", "length")
    ) -> None:
        """Raise ValueError if the width of a beam search, or the number of tokens after the start
        token, is out of its range. names: of both, for the message."""
        shapes = self.decoder.config
        limits = (shapes.vocab_size, shapes.max_position_embeddings - 1)
        for name, value, limit in zip(names, (beams, length), limits, strict=True):
            if not 1 <= value <= limit:
                raise ValueError(f"{name} is {value}; expected 1 to {limit} for this decoder")

    @torch.inference_mode()
    def generate(
        self,
        pixel_values: Tensor,
        frame_offsets: Tensor | None = None,
        *,
        num_beams: int = 5,
        max_new_tokens: int = 30,
        **options: Any,
    ) -> Tensor:
        """Write a caption for each video: int64 [B, length], from the start token to the end token,
        padded behind it. `CLIPViPProcessor.captions` turns them into text.

        pixel_values, frame_offsets: see `get_video_features`.
        num_beams: width of the beam search; 1 always takes the most likely token.
        max_new_tokens: number of tokens after the start token at which a caption is cut off.
        options: other settings of transformers' GenerationConfig, such as length_penalty or
            no_repeat_ngram_size.

        Raises ValueError for a number out of its range.
        """
        shapes = self.decoder.config
        self.check_search(num_beams, max_new_tokens, ("num_beams", "max_new_tokens"))
        memory, mask = self.get_caption_memory(pixel_values, frame_offsets)
        start = torch.full((len(memory), 1), shapes.bos_token_id, device=memory.device)
        given = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
        tokens = {name: getattr(shapes, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        given |= {f"{name}_token_id": token for name, token in tokens.items()}
        seen: dict[str, Any] = {} if mask is None else {"encoder_attention_mask": mask}
        # BERT takes no other cache for cross-attention, and generate would make another.
        cache = EncoderDecoderCache(*(DynamicCache(config=shapes) for _ in ("self", "cross")))
        # Renamed within version 5 of transformers.
        known = signature(self.decoder.forward).parameters
        seen["cache" if "cache" in known else "past_key_values"] = cache
        with _no_advice_on_padding():
            return self.decoder.generate(
                start,
                generation_config=GenerationConfig(**(given | options)),
                attention_mask=torch.ones_like(start),
                encoder_hidden_states=memory,
                synced_gpus=False,  # under FSDP it would wait for ranks that generate less often
                **seen,
            )


@cache
def leaves_out_padding(kind: str) -> bool:
    """Whether the installed transformers' decoder of this kind attends to no padding of videos: the
    GPT-2 of some versions, such as 5.4, ignores encoder_attention_mask."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), torch.device("cpu"):
        config = decoder_config({"model_type": kind, "vocab_size": 4, **_TINY[kind], **_NO_TOKENS})
        decoder = _CLASSES[kind]._from_config(config).float().eval()
        text, video = torch.zeros(1, 1, dtype=torch.int64), torch.randn(1, 2, 8)
        with torch.autocast("cpu", enabled=False):
            whole = decoder(
                input_ids=text,
                encoder_hidden_states=video,
                encoder_attention_mask=torch.tensor([[True, False]]),
                use_cache=False,
            )
            alone = decoder(input_ids=text, encoder_hidden_states=video[:, :1], use_cache=False)
        return torch.allclose(whole.logits, alone.logits, atol=1e-5)


@contextmanager
def _no_advice_on_padding() -> Iterator[None]:
    """Silence transformers' advice to pass an attention mask: where the start token is also that of
    padding, it gives it although generate was passed one, which it drops."""

    def wanted(record: LogRecord) -> bool:
        return "We strongly recommend passing in an `attention_mask`" not in record.getMessage()

    source = getLogger("transformers.modeling_utils")
    source.addFilter(wanted)
    try:
        yield
    finally:
        source.removeFilter(wanted)


def token_losses(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor | None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the cross entropy of each token of captions but the first, in fp32 or wider.

    logits: [B, length - 1, V], as CLIPViPForCaptioning returns them. input_ids, attention_mask: of
        the captions, [B, length].
    label_smoothing: share ε of the target that is spread evenly over all V tokens: the loss is
        (1 - ε)·(-log p of the token) + ε·(mean of -log p over the vocabulary) (arXiv 1512.00567,
        section 7).

    Returns losses [B, length - 1], 0 at padding, and bool [B, length - 1], False at padding.
    """
    targets = input_ids[:, 1:]
    counted = torch.ones_like(targets, dtype=torch.bool)
    if attention_mask is not None:
        counted = attention_mask[:, 1:].bool()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return losses.view(targets.shape).masked_fill(~counted, 0), counted


def read_decoder_config(source: str | os.PathLike, tokenizer: Any) -> PretrainedConfig:
    """Read the configuration of a language model as that of a decoder, with the start, end and
    padding tokens of its tokenizer.

    source: folder or hub name. Raises ValueError if it is none that can caption, see DECODERS.
    """
    settings = read_json(source, "config.json", {})
    if cached(source, "adapter_config.json", {}) is not None:
        # With peft, transformers would load the model that the adapter names.
        raise ValueError("it holds an adapter; merge it into the model")
    return with_tokens(settings, tokenizer)


def with_tokens(settings: dict[str, Any], tokenizer: Any) -> PretrainedConfig:
    """Return a decoder's configuration with the vocabulary, unless it is given, and the start, end
    and padding tokens of a tokenizer (`clipvip.model.processing.load_decoder_tokenizer`)."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(tokenizer, name) for name in names}
    return decoder_config({"vocab_size": len(tokenizer), **settings, **tokens})


def load_decoder(source: str | os.PathLike, tokenizer: Any) -> PreTrainedModel:
    """Load a language model, such as gpt2 or bert-base-uncased, as a decoder, in fp32.

    source: folder or hub name. tokenizer: see `with_tokens`.

    Cross-attention that it lacks is new, with random weights. No code of its files is run.
    Raises ValueError if its weights are not those of its configuration.
    """
    with found("the decoder", source, kind="language model"):
        config = read_decoder_config(source, tokenizer)
        check_size(count_decoder_weights(config), source, {})
        kind = _CLASSES[config.model_type]
        with quiet_load(report=False):
            decoder, info = kind.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        problems = [
            f"missing: {key}"
            for key in sorted(info["missing_keys"])
            if not _CROSS_ATTENTION.search(key)
        ]
        problems += [
            f"unexpected: {key}"
            for key in sorted(info["unexpected_keys"])
            if not _UNUSED.search(key)
        ]
        problems += [f"of another shape: {key}" for key, *_ in sorted(info["mismatched_keys"])]
        if problems:
            raise ValueError(
                f"{len(problems)} of its weights are not those of its config.json "
                f"({shown(problems[0])})"
            )
    return decoder
