"""A captioner: any image-to-text model that transformers loads, and how each kind of it is asked.

    chat      its processor has a chat template: LLaVA, Qwen-VL, SmolVLM, …. Pictures and prompt are
              one message of the user; the answer is the caption.
    git       GIT. The caption continues the prompt, if there is one, which ends without a
              separator. Models for video (GIT on VATEX) read several frames at once.
    prefix    all others, such as BLIP and BLIP-2: pictures and prompt go to the processor.
    pair      a tokenizer and an image processor without a common one (ViT-GPT2): no prompt.

`Preparer` turns pictures into the inputs of a model; it has no weights and works in any process.
`Captioner` has the weights, and generates. No code of a model's author is run.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from clipvip.captions.filters import THINK
from clipvip.embedding import precision_of
from clipvip.files import shown
from clipvip.model.pretrained import found, no_bars, read_json

logger = logging.get_logger(__name__)

ASK = "Describe this image in one sentence."
ASK_FRAMES = "These are frames of one video. Describe it in one sentence."
TRIED_SIDE = 64  # pixels of the grey picture on which a model is tried

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Asking:
    """Prompt and options with which a model is asked.

    prompt: None for the kind's own: a chat model is asked for one sentence, others get none.
    length: most tokens of a caption. beams: of the beam search; 1 is greedy. frames: frames per
        clip, of which a chat model reads all for one caption.
    """

    prompt: str | None = None
    length: int = 40
    beams: int = 1
    frames: int = 1

    def __post_init__(self) -> None:
        for name in ("length", "beams", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty; leave it out, or give a text")


class Answer(NamedTuple):
    """The answer of a model. cut: the limit on tokens cut it off."""

    text: str
    cut: bool


@dataclass(frozen=True)
class Preparer:
    """A model's processor, and the way to ask the model.

    kind: see above. prompt: empty for none. at_once: pictures that the model reads for one caption.
    """

    processor: Any
    kind: str
    prompt: str
    at_once: int

    def __call__(self, pictures: Sequence[Sequence[Picture]]) -> dict[str, Any]:
        """Return the model's inputs for the pictures of clips: one row per clip if the model reads
        several at once, else one per picture. Raises whatever the processor raises."""
        from PIL import Image

        # A Pillow image says what a small array does not: which of its axes are the colours.
        nested = [[Image.fromarray(picture) for picture in clip] for clip in pictures]
        flat = [picture for clip in nested for picture in clip]
        if self.kind == "chat":
            return dict(self._chat(nested if self.at_once > 1 else [[each] for each in flat]))
        if self.kind == "pair":
            return dict(self.processor.image_processor(flat, return_tensors="pt"))
        if self.kind == "git":
            return self._git(nested, flat)
        if not self.prompt:
            return dict(self.processor(images=flat, return_tensors="pt"))
        texts = [self.prompt] * len(flat)
        return dict(self.processor(images=flat, text=texts, padding=True, return_tensors="pt"))

    def begins_to_think(self) -> bool:
        """Whether the request to a chat model opens a thought, which its answer only closes."""
        return self.kind == "chat" and self._request(1).rstrip().endswith(THINK)

    def _request(self, pictures: int) -> str:
        """The text that asks a chat model about so many pictures."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": self.prompt}]
        message = {"role": "user", "content": content}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)

    def _chat(self, pictures: list[list[Any]]) -> Any:
        texts = [self._request(len(clip)) for clip in pictures]
        first = self.processor.tokenizer.bos_token  # which a template writes itself, or not
        own = {"add_special_tokens": False} if first and texts[0].startswith(first) else {}
        return self.processor(images=pictures, text=texts, padding=True, return_tensors="pt", **own)

    def _git(self, nested: list[list[Any]], flat: list[Any]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        if self.at_once > 1:  # all clips have as many frames; the last ones repeat
            flat = [clip[min(i, len(clip) - 1)] for clip in nested for i in range(self.at_once)]
        inputs = dict(self.processor(images=flat, return_tensors="pt"))
        if self.at_once > 1:
            inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (-1, self.at_once))
        if self.prompt:
            ids = [
                tokenizer.cls_token_id,
                *tokenizer(self.prompt, add_special_tokens=False).input_ids,
            ]
            inputs["input_ids"] = torch.tensor([ids] * len(inputs["pixel_values"]))
        return inputs


@dataclass
class _Pair:
    """An image processor and a tokenizer that no processor joins."""

    image_processor: Any
    tokenizer: Any


class Captioner:
    """A model that says what pictures show.

    source: a folder or a hub name. device: by default a CUDA GPU, if there is one.
    mixed_precision: "bf16" or "no" (the precision of the weights); "auto", see
        clipvip.embedding.precision_of. Unlike in training, bf16 converts the weights.

    Raises ValueError, in one line, for a model that is no captioner, needs code of its author or a
    package that is missing, lacks weights, or cannot be asked like this; FileNotFoundError if there
    is no model.
    """

    def __init__(
        self,
        source: str,
        asking: Asking,
        device: str | torch.device | None = None,
        mixed_precision: str = "auto",
    ) -> None:
        self.source, self.asking = source, asking
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with found("the captioner", source), _packages(source), no_bars(), _quiet():
            if os.path.isfile(source):
                raise ValueError(
                    f"the captioner is {source!r}, a file; expected a folder as transformers saves "
                    "it, or a name on the Hugging Face hub"
                )
            read_json(source, "config.json", {})  # fails sooner than transformers if it is absent
            config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
            if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
                own = config.model_type.startswith("clipvip")
                hint = "; `clipvip describe` captions with models of clipvip" if own else ""
                raise ValueError(
                    f"the captioner is {source!r}, of the type {config.model_type!r}; expected a "
                    "model from pictures to text, such as BLIP, GIT, LLaVA or Qwen-VL"
                    f"{hint}"
                )
            self.prepare = _preparer(source, config, asking)
            stored = getattr(config, "dtype", None) or torch.float32
            self.precision = precision_of(stored, self.device, mixed_precision)
            self.model = _load(source, torch.bfloat16 if self.precision == "bf16" else "auto")
        blank = np.full((TRIED_SIDE, TRIED_SIDE, 3), 128, np.uint8)
        with self._tried("whose processor fails"):
            self._grey = self.prepare([[blank] * asking.frames])
            self._before = THINK if self.prepare.begins_to_think() else ""

    @contextmanager
    def _tried(self, what: str) -> Iterator[None]:
        """Raise ValueError, before a long run starts, if the model cannot be asked like this."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            asks = bool(self.prepare.prompt) or self.prepare.kind == "pair"
            hint = "" if asks else "; it may need a prompt: give --prompt"
            hint = "; give --frames 1" if self.asking.frames > 1 else hint
            if isinstance(error.__cause__, torch.OutOfMemoryError):
                hint = "; take a smaller model, or a GPU with more memory"
            raise ValueError(
                f"the captioner is {self.source!r}, {what} on a grey picture "
                f"({type(error).__name__}: {reason}){hint}"
            ) from error

    def fingerprint(self) -> str:
        """Hash all weights and settings of the model and of its processor, not their folder."""
        processor = self.prepare.processor
        settings: list[Any] = [
            self.prepare.kind,
            processor.image_processor.to_dict(),
            getattr(processor, "chat_template", None),
            sorted(processor.tokenizer.get_vocab().items()),
            self.model.generation_config.to_diff_dict(),
        ]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.inference_mode()
    def start(self) -> "Captioner":
        """Move the model to its device, and try it. Raises ValueError if it cannot caption."""
        self.model.to(self.device)
        with self._tried("which fails"):
            self._generated(self._grey, self.prepare.at_once < self.asking.frames, 1)
        return self

    @torch.inference_mode()
    def answer(self, inputs: dict[str, Any], counts: Sequence[int]) -> list[Answer]:
        """Return one answer per clip.

        inputs: those that `prepare` returns. counts: number of pictures of each clip. Of the
        answers to a clip's pictures, the one with the highest mean log-probability of its tokens is
        returned.
        """
        if not counts:
            return []
        several = self.prepare.at_once == 1 and max(counts) > 1
        found, tokens = self._generated(inputs, several, len(counts))
        answers = self._decoded(tokens)
        if not several:
            return answers
        likely = self._likelihoods(found, tokens)
        best, first = [], 0
        for count in counts:
            best.append(max(range(first, first + count), key=likely.__getitem__))
            first += count
        return [answers[row] for row in best]

    def _generated(self, inputs: dict[str, Any], several: bool, clips: int) -> tuple[Any, Tensor]:
        """Return what the model generates, and the tokens that it adds to what it was given.

        several: whether it also returns how likely they are. clips: their number, for an error.
        """
        begin = _Begin()
        given = tree_map_only(Tensor, self._sent, inputs)
        options = {
            "max_new_tokens": self.asking.length,
            "num_beams": self.asking.beams,
            "do_sample": False,
            **dict.fromkeys(("temperature", "top_p", "top_k")),
            "logits_processor": LogitsProcessorList([begin]),
            "return_dict_in_generate": True,
            "output_logits": several and self.asking.beams == 1,
            "output_scores": several and self.asking.beams > 1,  # for sequences_scores
        }
        try:
            with _quiet():
                found = self.model.generate(**given, **options)
        except torch.OutOfMemoryError as error:
            reason = "the GPU's memory does not hold "
            if clips > 1:
                reason += f"{clips} clips at once; give a smaller --batch-size"
            else:
                reason += "the model and one clip"
            raise ValueError(reason) from error
        if begin.length is None:
            raise ValueError(f"{shown(self.source)} does not generate token by token")
        return found, found.sequences[:, begin.length :]

    def _sent(self, tensor: Tensor) -> Tensor:
        dtype = self.model.dtype if tensor.is_floating_point() else None
        return tensor.to(self.device, dtype)

    def _decoded(self, tokens: Tensor) -> list[Answer]:
        tokenizer = self.prepare.processor.tokenizer
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ended = self._ended(tokens).any(1).tolist()
        pairs = zip(texts, ended, strict=True)
        return [Answer(self._before + text, not end) for text, end in pairs]

    def _ended(self, tokens: Tensor) -> Tensor:
        """Whether a token ends its caption: bool, as `tokens`."""
        tokenizer, config = self.prepare.processor.tokenizer, self.model.config.get_text_config()
        ends: set[int] = set()
        for given in (
            self.model.generation_config.eos_token_id,
            getattr(config, "eos_token_id", None),
            getattr(config, "sep_token_id", None),
            tokenizer.eos_token_id,
            tokenizer.sep_token_id,
        ):
            ends.update([] if given is None else given if isinstance(given, list) else [given])
        return torch.isin(tokens, torch.tensor(sorted(ends), device=tokens.device))

    def _likelihoods(self, found: Any, tokens: Tensor) -> list[float]:
        """Mean log-probability of each caption's tokens, up to the one that ends it."""
        if self.asking.beams > 1:
            return found.sequences_scores.tolist()
        chances = torch.stack(found.logits, 1).float().log_softmax(-1)  # [rows, tokens, vocabulary]
        chances = chances.gather(2, tokens[..., None])[..., 0]
        ended = self._ended(tokens).int()
        before = (ended.cumsum(1) - ended) == 0
        return ((chances * before).sum(1) / before.sum(1)).tolist()


class _Begin(LogitsProcessor):
    """Note how many tokens a sequence has before the first is generated: the prompt, if the model
    repeats it in its output, and what each sequence starts with."""

    length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self.length is None:
            self.length = input_ids.shape[1]
        return scores


def _preparer(source: str, config: Any, asking: Asking) -> Preparer:
    processor: Any = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    kind = "git" if config.model_type == "git" else "prefix"
    if not hasattr(processor, "image_processor"):
        images = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        processor, kind = _Pair(images, tokenizer), "pair"
    elif getattr(processor, "chat_template", None):
        kind = "chat"
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"  # what is generated follows the prompt directly
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompt = asking.prompt
    if kind == "pair" and prompt is not None:
        raise ValueError(f"the captioner is {source!r}, which takes no prompt; leave --prompt out")
    at_once = asking.frames if kind == "chat" else 1
    if kind == "git" and 1 < asking.frames <= (config.num_image_with_embedding or 1):
        at_once = asking.frames
    if kind == "chat" and prompt is None:
        prompt = ASK if at_once == 1 else ASK_FRAMES
    return Preparer(processor, kind, prompt or "", at_once)


def _load(source: str, dtype: Any) -> Any:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        source, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"the captioner is {source!r}, whose files lack {len(missing)} weights, the first "
            f"{missing[0]}; save or fetch it again"
        )
    return model.eval()


@contextmanager
def _packages(source: str) -> Any:
    """Say in one line which package a model needs."""
    try:
        yield
    except ImportError as error:
        needed = "torchvision" if "torchvision" in str(error).lower() else None
        reason = " ".join(str(error).split())[:200]
        said = f"torchvision, as its processor reads videos: pip install {needed}"
        said = said if needed else f"a package that is missing here ({reason})"
        raise ValueError(f"the captioner is {source!r}, which needs {said}") from error


@contextmanager
def _quiet() -> Any:
    """Silence what transformers logs of a load; what matters of it is an error here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
