"""Turn videos and texts into the inputs of CLIPViPModel.

The processor, saved with the model, decides how videos and texts are read for the whole package.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, CLIPTokenizer, ProcessorMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from clipvip.data.video import check_sampling, read_frames, rgb_of
from clipvip.files import shown
from clipvip.inputs import send, tokenize
from clipvip.model.card import Pushable
from clipvip.model.checkpoints import is_checkpoint_file
from clipvip.model.configuration import CLIPViPConfig
from clipvip.model.decoder_tokenizer import load_decoder_tokenizer
from clipvip.model.layouts import ADDED_TO_CLIP, AUTHORS, image_size
from clipvip.model.positions import MOST
from clipvip.model.pretrained import (
    cached,
    found,
    is_plain_clip,
    open_clip_config,
    read_json,
    read_weights,
)
from clipvip.ops.resize_crop import check_resize, resize_frames

logger = logging.get_logger(__name__)

MOST_TOKENS = 77  # that CLIP reads
READING = ("num_frames", "text_length", "paragraph", "sampling", "resize")
"""Attributes of a processor that a training run may choose."""
CLIP_READING = {"sampling": "uniform", "resize": "crop"}
AUTHORS_READING = {"sampling": "authors", "resize": "squash"}  # as in the authors' code
PROCESSOR_CONFIG = "processor_config.json"
DECODER_TOKENIZER = "decoder_tokenizer"  # folder of it in a model's folder
_PUNCTUATED = "it's a t-shirt."
_SPACED = {
    re.compile(r" ([.,;:!?]+)(?= |$)"): r"\1",
    re.compile(r"(?<=\w) ?' ?(s|t|re|ve|ll|d|m)\b"): r"'\1",
    re.compile(r"(?<=\w) - (?=\w)"): "-",
}
_SAVED = ("image_size", "image_mean", "image_std", *READING)

# A video is a path, frames as one uint8 array [N, H, W, 3] or [N, 3, H, W], or a list of frames,
# each a PIL image or an array [H, W, 3] or [3, H, W]. A single frame is a video of one frame.
Video = Any


class CLIPViPProcessor(Pushable, ProcessorMixin):  # type: ignore[misc]
    """CLIP's tokenizer, and the settings by which videos and texts are read.

    tokenizer: a CLIPTokenizer.
    image_size: side of a frame in pixels.
    image_mean, image_std: mean and standard deviation per channel, for pixels of 0 to 1.
    num_frames: number of frames that are read from a video.
    text_length: number of tokens at which texts are cut off, the end token kept; None for the
        tokenizer's own limit.
    paragraph: whether all texts of a clip are joined into one.
    sampling: which frames are read, see clipvip.data.video.sampling.
    resize: how frames become squares, see clipvip.ops.resize_crop.

    Of a model that captions, the attribute decoder_tokenizer is the tokenizer of its decoder, as
    `load_decoder_tokenizer` returns it; None if that is CLIP's.
    """

    # No argument: ProcessorMixin would require it of every model.
    decoder_tokenizer: Any = None

    def __init__(
        self,
        tokenizer: Any,
        image_size: int = 224,
        image_mean: Sequence[float] = OPENAI_CLIP_MEAN,
        image_std: Sequence[float] = OPENAI_CLIP_STD,
        num_frames: int = 12,
        text_length: int | None = None,
        paragraph: bool = False,
        sampling: str = CLIP_READING["sampling"],
        resize: str = CLIP_READING["resize"],
    ) -> None:
        super().__init__(tokenizer)
        given = locals()
        check_settings({name: given[name] for name in _SAVED})
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_frames = num_frames
        self.text_length = text_length
        self.paragraph = paragraph
        self.sampling = sampling
        self.resize = resize

    def check_tokens(self, config: CLIPViPConfig) -> None:
        """Raise ValueError if the tokenizer has more tokens or another end token than the model."""
        known, vocabulary = config.text_config.vocab_size, self.tokenizer.get_vocab()
        tokens = max(len(self.tokenizer), 1 + max(vocabulary.values(), default=0))
        wanted = "expected the tokenizer that the model was trained with"
        if tokens > known:
            raise ValueError(f"the tokenizer has {tokens} tokens, the model {known}; {wanted}")
        # A text's feature is read at its end token. OpenAI's models say 2 and mean the highest id.
        end, own = config.text_config.eos_token_id, self.tokenizer.eos_token_id
        if end not in (2, own):
            raise ValueError(
                f"the tokenizer ends texts with token {own}, the model with {end}; {wanted}"
            )
        decoder, spoken = config.decoder_config, self.caption_tokenizer
        if decoder is None:
            return
        tokens = max(len(spoken), 1 + max(spoken.get_vocab().values()))
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        theirs, ours = ([getattr(each, name) for name in names] for each in (spoken, decoder))
        if tokens > decoder.vocab_size or theirs != ours:
            raise ValueError(
                f"the decoder's tokenizer has {tokens} tokens, with {theirs} for start, end and "
                f"padding; the decoder has {decoder.vocab_size}, with {ours}; {wanted}"
            )

    def fit(self, config: CLIPViPConfig, text_length: int | None = None) -> None:
        """Adapt frame size and text length to a model. Raises ValueError as check_tokens does.

        text_length: number of tokens to read; None for the processor's or tokenizer's own limit.
            Either is lowered to the number that the model and its decoder read.
        """
        self.check_tokens(config)
        self.image_size = config.vision_config.image_size
        positions = config.text_config.max_position_embeddings
        limit = text_length or self.text_length or self.tokenizer.model_max_length
        self.text_length = int(min(limit, longest_text(config)))
        self.tokenizer.model_max_length = positions

    @property
    def longest_text(self) -> int:
        """Number of tokens at which texts are cut off; before `fit`, at most MOST_TOKENS unless
        text_length says otherwise."""
        return self.text_length or min(self.tokenizer.model_max_length, MOST_TOKENS)

    @property
    def caption_tokenizer(self) -> Any:
        """Tokenizer of the decoder of a model that captions: its own, or else CLIP's."""
        return self.tokenizer if self.decoder_tokenizer is None else self.decoder_tokenizer

    def captions(self, tokens: Tensor) -> list[str]:
        """Turn tokens, as CLIPViPForCaptioning.generate returns them, int64 [B, length], into texts
        of one line."""
        tokenizer = self.caption_tokenizer
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        texts = [" ".join(text.split()) for text in texts]
        # CLIP's and BERT's decode punctuation as words; GPT-2's keep the spaces of a text.
        sample = tokenizer.decode(tokenizer(_PUNCTUATED).input_ids, skip_special_tokens=True)
        return texts if sample.strip() == _PUNCTUATED else [*map(_joined, texts)]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Save as transformers does, and the decoder's tokenizer in a folder of its own."""
        if self.decoder_tokenizer is not None:
            self.decoder_tokenizer.save_pretrained(Path(save_directory, DECODER_TOKENIZER))
        return super().save_pretrained(save_directory, **kwargs)

    def settings(self) -> dict[str, Any]:
        """Return the arguments of this class, except the tokenizer."""
        return {name: getattr(self, name) for name in _SAVED}

    def loading(self) -> dict[str, Any]:
        """Return the fields of clipvip.data.loading.LoaderOptions that say how clips are read."""
        names = ("image_size", "num_frames", "sampling", "resize")
        return {name: getattr(self, name) for name in names} | {"text_length": self.longest_text}

    def __call__(  # type: ignore[override]
        self,
        text: str | Sequence[str] | None = None,
        videos: Video | Sequence[Video] | None = None,
        *,
        text_length: int | None = None,
    ) -> BatchFeature:
        """Make a batch of one or more texts, of one or more videos, or of both.

        text: HTML entities are resolved. videos: of any lengths; see `Video`.
        text_length: overrides that of the processor.
        Returns input_ids and attention_mask int64 [n, longest], and pixel_values fp32
        [F, 3, image_size, image_size] with frame_offsets int32 [B+1].
        """
        if text is None and videos is None:
            raise ValueError("neither text nor videos was given; pass at least one of them")
        batch: dict[str, Tensor] = {}
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            length = text_length or self.longest_text
            batch["input_ids"], batch["attention_mask"] = tokenize(self.tokenizer, texts, length)
        if videos is not None:
            clips = [self._frames(video) for video in _as_list_of_videos(videos)]
            lengths = torch.tensor([0, *(len(frames) for frames in clips)])
            packed = torch.cat(clips) if clips else self._frames([])
            batch["pixel_values"] = normalize_frames(packed, self.image_mean, self.image_std)
            batch["frame_offsets"] = lengths.cumsum(0).to(torch.int32)
        return BatchFeature(batch)

    def _frames(self, video: Video) -> Tensor:
        """Read a video in any form: uint8 [N, 3, image_size, image_size]."""
        if isinstance(video, str | os.PathLike):
            return read_frames(
                Path(video),
                self.num_frames,
                size=self.image_size,
                resize=self.resize,
                sampling=self.sampling,
            )
        if isinstance(video, list | tuple):
            if not video:
                return torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
            return torch.cat([self._frames(frame) for frame in video])
        if isinstance(video, Image.Image):
            video = rgb_of(video)
        frames = torch.as_tensor(video)
        if frames.dtype != torch.uint8:
            raise TypeError(f"frames are {frames.dtype}; expected uint8 of 0 to 255")
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.ndim == 4 and frames.shape[1] != 3 and frames.shape[3] == 3:
            frames = frames.permute(0, 3, 1, 2)
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(
                f"frames have shape {list(frames.shape)}; expected [N, H, W, 3] or [N, 3, H, W]"
            )
        return resize_frames(frames, self.image_size, self.resize)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        tokenizer: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> "CLIPViPProcessor":
        """Load the processor of one of our models, of a plain CLIP or of a file of weights.

        For a file of the CLIP-ViP authors, videos are read as in their code (AUTHORS_READING); for
        other files, frames are read as CLIP reads images; for a model of open_clip, as its
        open_clip_config.json says.

        tokenizer: folder or hub name of the tokenizer; by default that of the model.
        kwargs: transformers' hub options (revision, cache_dir, local_files_only, …).
        Raises NoTokenizer if there is none.
        """
        for name in ("trust_remote_code", "_from_auto"):
            kwargs.pop(name, None)
        source = pretrained_model_name_or_path
        if tokenizer is None:
            loaded = load_tokenizer(source, **kwargs)
        else:  # from elsewhere, so the model's revision and subfolder do not apply
            hub = {name: kwargs[name] for name in kwargs if name not in ("revision", "subfolder")}
            loaded = load_tokenizer(tokenizer, **hub)
        settings = read_settings(source, **kwargs)
        if not settings and tokenizer is not None:
            settings = read_settings(tokenizer)
        processor = cls(loaded, **settings)
        if not is_checkpoint_file(source) and read_json(source, "config.json", kwargs).get(
            "decoder_config"
        ):
            inner = f"{kwargs.get('subfolder') or ''}/{DECODER_TOKENIZER}".strip("/")
            if cached(source, f"{DECODER_TOKENIZER}/tokenizer.json", kwargs) is not None:
                kwargs = {**kwargs, "subfolder": inner}
                processor.decoder_tokenizer = load_decoder_tokenizer(source, **kwargs)
        return processor


def normalize_frames(
    frames: Tensor, mean: Sequence[float] = OPENAI_CLIP_MEAN, std: Sequence[float] = OPENAI_CLIP_STD
) -> Tensor:
    """Normalise uint8 frames [..., 3, H, W] on their device: (frames/255 - mean)/std in fp32."""
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames are {frames.dtype}; expected uint8")
    scale = 1 / (255 * torch.tensor(std))
    shift = 255 * torch.tensor(mean) * scale
    scale, shift = (send(x[:, None, None], frames.device) for x in (scale, shift))
    return frames * scale - shift


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError for arguments of CLIPViPProcessor that are none that it can have."""
    for name, value in settings.items():
        if name in ("image_mean", "image_std"):
            expected = "three finite numbers, one per channel" + ", above 0" * (name == "image_std")
            fits = _are_channels(value) and (name == "image_mean" or min(value) > 0)
        elif name == "paragraph":
            fits, expected = isinstance(value, bool), "a bool"
        elif name in ("sampling", "resize"):
            fits, expected = isinstance(value, str), "a str"
        else:
            fits = _is_count(value) or (name == "text_length" and value is None)
            expected = f"an integer of 1 to {MOST}"
        if not fits:
            raise ValueError(f"{name} is {shown(repr(value))}; expected {expected}")
    if "sampling" in settings:
        check_sampling(settings["sampling"])
    if "resize" in settings:
        check_resize(settings["resize"])


def read_settings(source: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    """Return the arguments of CLIPViPProcessor, except the tokenizer, that are saved with a model.

    source: folder, hub name or file of weights. hub: transformers' hub options.
    Raises ValueError if a value is none that the processor can have.
    """
    with found("the model", source, hub.get("subfolder") or "", kind="tokenizer"):
        settings = _saved_settings(source, **hub)
        check_settings(settings)
        return settings


def _saved_settings(source: str | os.PathLike, **hub: Any) -> dict[str, Any]:
    weights = read_weights(source, hub, "meta")
    if weights is not None:
        settings: dict[str, Any] = {"image_size": image_size(weights, source)}
        if weights.trained_on_video:
            settings["num_frames"] = weights.state_dict[ADDED_TO_CLIP[1]].shape[1]
            if weights.layout == AUTHORS:
                return settings | AUTHORS_READING
            logger.warning(
                f"{shown(source)} does not say how its model read videos in training; they are "
                f"read by sampling={CLIP_READING['sampling']!r}, resize={CLIP_READING['resize']!r}"
            )
        if config := open_clip_config(source, hub):
            settings |= _settings_of_open_clip(config.get("preprocess_cfg") or {}, source)
        return settings
    own = read_json(source, PROCESSOR_CONFIG, hub)
    if "image_size" not in own:
        clip = own.get("image_processor") or read_json(source, "preprocessor_config.json", hub)
        if not clip and not os.path.exists(source):
            logger.warning(
                f"{source} does not say how frames are read, or its file that does is not in the "
                "cache and the hub cannot be reached; they are read as by OpenAI's CLIP"
            )
        return _settings_of_clip(clip, source)
    settings = {name: own[name] for name in _SAVED if name in own}
    if "sampling" not in own:  # older models keep how clips are read in a file of its own
        older = read_json(source, "reading.json", hub)
        settings |= {name: older[name] for name in READING if name in older}
    return settings


def save_settings(folder: str | os.PathLike, **settings: Any) -> None:
    """Save arguments of CLIPViPProcessor where it will find them once a tokenizer is there."""
    whole = {"processor_class": CLIPViPProcessor.__name__, **settings}
    Path(folder, PROCESSOR_CONFIG).write_text(json.dumps(whole, indent=2) + "\n")


class NoTokenizer(OSError):
    """A processor cannot be loaded without a tokenizer; one line that says what to give."""


def load_tokenizer(where: str | os.PathLike, **hub: Any) -> CLIPTokenizer:
    """Load the tokenizer of a folder or hub name.

    Raises FileNotFoundError if there is no such folder or name, and NoTokenizer if it has none.
    """
    with found("the tokenizer", where, kind="tokenizer"):
        if not os.path.exists(where):
            # Fails once if the hub cannot be reached, not for each of a tokenizer's files.
            cached(where, "config.json", hub)
        loaded = None if is_checkpoint_file(where) else CLIPTokenizer.from_pretrained(where, **hub)
        # Without files, transformers makes a tokenizer of the special tokens alone.
        if loaded is None or len(loaded) <= len(loaded.all_special_ids):
            kind = " --to clip" if is_plain_clip(where) else ""
            raise NoTokenizer(
                f"{where} holds no tokenizer; convert it with one: clipvip convert {where} FOLDER"
                f"{kind} --tokenizer openai/clip-vit-base-patch32 (in Python, give tokenizer=)"
            )
        # Whatever its files say: CLIP counts positions from a text's start.
        loaded.padding_side = loaded.truncation_side = "right"
        longest = loaded.model_max_length
        if not isinstance(longest, int | float) or longest < 2:
            raise ValueError(f"model_max_length is {longest!r}; expected 2 or more")
        if None in (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id):
            raise ValueError("it lacks a token for a text's start or end or for padding")
        return loaded


def _joined(text: str) -> str:
    """Remove the spaces that a tokenizer's words leave before punctuation, and in contractions and
    compounds."""
    for spaced, joined in _SPACED.items():
        text = spaced.sub(joined, text)
    return text


def longest_text(config: CLIPViPConfig) -> int:
    """Return the number of tokens that a model reads, and its decoder if it has one."""
    towers = (config.text_config, config.decoder_config)
    return min(each.max_position_embeddings for each in towers if each is not None)


def _settings_of_clip(clip: dict[str, Any], source: str | os.PathLike) -> dict[str, Any]:
    """Convert settings of a CLIPImageProcessor; use the nearest and warn if there is no equal."""
    colours = ("image_mean", "image_std")
    settings: dict[str, Any] = {name: clip[name] for name in colours if name in clip}
    size = clip.get("size")
    crop = clip.get("crop_size") if clip.get("do_center_crop", True) else None
    for given in (crop, size):
        if not isinstance(given, int | dict | None):
            raise ValueError(f"{source} resizes frames to {given!r}; expected a size in pixels")
    sides = [
        given if isinstance(given, int) else given.get("height") or given.get("shortest_edge")
        for given in (crop, size)
        if given is not None
    ]
    if sides:
        settings["image_size"] = sides[0]
    if isinstance(size, dict) and "height" in size:
        settings["resize"] = "squash"
        logger.warning(
            f"{source} squashes whole frames with antialiasing; using the nearest way, "
            "resize='squash', which has none"
        )
    elif size is not None and len(set(sides)) + (crop is None) > 1:
        logger.warning(
            f"{source} resizes frames to {size} and crops to {crop}; using the nearest way, "
            f"resize='crop', with {sides[0]} for both"
        )
    return settings


def image_processor_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Convert arguments of CLIPViPProcessor to settings of a CLIPImageProcessor, as
    preprocessor_config.json holds them. Raises ValueError if there is no equal."""
    side = settings["image_size"]
    square = {"height": side, "width": side}
    sizes: dict[str, Any] = {
        "crop": {"do_center_crop": True, "crop_size": square, "size": {"shortest_edge": side}},
        "squash": {"do_center_crop": False, "size": square},
    }
    if settings["resize"] not in sizes:
        raise ValueError(
            f"resize is {settings['resize']!r}, which transformers' CLIPImageProcessor does not "
            "have; leave out --to clip"
        )
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(settings.get("image_mean", OPENAI_CLIP_MEAN)),
        "image_std": list(settings.get("image_std", OPENAI_CLIP_STD)),
        **sizes[settings["resize"]],
    }


def _settings_of_open_clip(chosen: Any, source: str | os.PathLike) -> dict[str, Any]:
    """Convert open_clip's settings of how images are read; warn if there is no equal."""
    if not isinstance(chosen, dict):
        raise ValueError(f"{source} has a preprocess_cfg of {chosen!r}; expected settings")
    names = {"mean": "image_mean", "std": "image_std"}
    settings = {ours: chosen[name] for name, ours in names.items() if name in chosen}
    mode = chosen.get("resize_mode", "shortest")
    ways = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    if not isinstance(mode, str) or mode not in ways:
        raise ValueError(
            f"{source} has resize_mode {shown(repr(mode))}; expected one of {', '.join(ways)}"
        )
    interpolation = chosen.get("interpolation", "bicubic")
    if mode == "squash" or interpolation != "bicubic":
        logger.warning(
            f"{source} resizes frames by resize_mode={mode}, interpolation={interpolation}; using "
            f"the nearest way, resize={ways[mode]!r}"
        )
    fill = chosen.get("fill_color", 0)
    if mode == "longest" and fill not in (0, [0, 0, 0]):
        logger.warning(
            f"{source} pads frames with fill_color={shown(repr(fill))}; using the nearest way, "
            "resize='pad', which pads with black"
        )
    return {**settings, "resize": ways[mode]}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST


def _are_channels(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )


def _as_list_of_videos(videos: Any) -> Sequence[Video]:
    single = isinstance(videos, str | os.PathLike | Image.Image)
    if single or (isinstance(videos, np.ndarray | Tensor) and videos.ndim < 5):
        return [videos]
    return videos
