"""Compute how a model reads a video and how well it fits texts.

A model reads a video without its text. So attention is the same for every text; only similarities
tell texts apart. `clipvip.explain_picture` draws the results.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipvip.data.video import is_image, open_clip, read_frames
from clipvip.embedding import embed_texts
from clipvip.inputs import send
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.processing import normalize_frames
from clipvip.sentences import sentence

WINDOWS, WINDOW_SHARE = 13, 0.25  # number of windows, and the length of each as a share of a video
MOST_TEXTS = 10  # as many colours can be told apart


@dataclass(frozen=True)
class Explanation:
    """Arrays that say how a model reads a video, and its similarity to texts.

    N frames were read; M is the number of proxies, side² that of patches per frame. Similarity is
    the cosine of features, as in `clipvip search`. All tensors are on the CPU.
    """

    video: Path
    texts: list[str]  # T
    similarity: Tensor  # fp32 [T], of the whole video
    frames: Tensor  # uint8 [N, 3, image_size, image_size], as the model saw them
    times: Tensor  # float64 [N], seconds from the video's first frame
    frame_similarity: Tensor  # fp32 [T, N], of each frame as a video of one frame
    windows: Tensor  # float64 [W, 2], start and end in seconds; W = 0 for a single frame
    window_similarity: Tensor  # fp32 [T, W], of each window as a video of its own
    layers: list[int]  # K, counted from 0
    heads: int
    attention: Tensor
    """fp32 [K, M, N, side, side]: attention of each proxy to each patch, mean over heads.

    The weights of a proxy sum to 1 over the patches of all frames and the M proxies. If
    frame_pooling is "mean", each frame has proxies of its own, whose weights sum to 1 over the
    patches of that frame and those proxies.
    """
    frame_pooling: str  # "proxy" or "mean", see CLIPViPVisionConfig

    @property
    def maps(self) -> Tensor:
        """Attention as mean over layers: fp32 [M, N, side, side]."""
        return self.attention.mean(0)

    @property
    def shares(self) -> Tensor:
        """Attention of each proxy to each frame, the sum over its patches: fp32 [M, N]."""
        return self.maps.sum((-2, -1))


@torch.inference_mode()
def explain(
    model: CLIPViPModel,
    processor: CLIPViPProcessor,
    video: str | Path,
    texts: str | Sequence[str],
    *,
    layers: int = 3,
    advance: Callable[[int], None] = lambda clips: None,
) -> Explanation:
    """Compute the attention of a model's proxies in a video, and its similarity to texts over time.

    Besides the whole video, its windows are embedded: WINDOWS clips, each WINDOW_SHARE of its
    length, read as `clipvip embed` reads a clip with start and end.

    model, processor: from `clipvip.embedding.load_for_embedding`; the model on any device.
    video: a video or image file.
    layers: number of last layers whose attention is returned; all if the model has fewer.
    advance: called with 1 after each of the 1 + WINDOWS clips; see clipvip.terminal.progress.
    Raises ValueError for unusable texts and layers, and DecodeError for an unreadable video.
    """
    path, config = Path(video), model.config.vision_config
    sentences = check_texts([texts] if isinstance(texts, str) else texts)
    if layers < 1:
        raise ValueError(f"layers is {layers}; expected at least 1")
    chosen = list(model.vision_model.encoder.layers)[-layers:]
    frames, times, windows = _read(processor, path)
    of_texts = embed_texts(model, processor, sentences, len(sentences))
    with _inputs_of(chosen) as inputs:
        whole = _features(model, processor, frames, [len(frames)])
    advance(1)
    singly = _features(model, processor, frames, [1] * len(frames))
    parts = []
    for start, end in windows:
        clip = read_frames(path, start=start, end=end, **_reading(processor))
        parts.append(_features(model, processor, clip, [len(clip)]))
        advance(1)
    similarity, of_frames, of_windows = (
        of_texts @ features.T for features in (whole, singly, torch.cat(parts or [whole[:0]]))
    )
    if not all(each.isfinite().all() for each in (similarity, of_frames, of_windows)):
        raise ValueError("the model gives no finite features; its weights are damaged")
    videos = len(frames) if config.frame_pooling == "mean" else 1
    attention = [
        _attention(layer, tokens.unflatten(0, (videos, -1)), config.num_proxies).cpu()
        for layer, tokens in zip(chosen, inputs, strict=True)
    ]
    side = config.image_size // config.patch_size
    return Explanation(
        video=path,
        texts=sentences,
        similarity=similarity[:, 0],
        frames=frames,
        times=times,
        frame_similarity=of_frames,
        windows=torch.tensor(windows, dtype=torch.float64).view(-1, 2),
        window_similarity=of_windows,
        layers=list(range(config.num_hidden_layers))[-layers:],
        heads=config.num_attention_heads,
        attention=torch.stack([_by_patch(each, side) for each in attention]),
        frame_pooling=config.frame_pooling,
    )


def check_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts as they are read. Raises ValueError if any is unusable, or too many."""
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise ValueError(f"{len(texts)} texts were given; expected 1 to {MOST_TEXTS}")
    return [sentence(text, "the text") for text in texts]


def _reading(processor: CLIPViPProcessor) -> dict[str, Any]:
    settings = processor.loading()
    names = {"num_frames": "num_frames", "size": "image_size"}
    names |= {"sampling": "sampling", "resize": "resize"}
    return {name: settings[setting] for name, setting in names.items()}


def _read(
    processor: CLIPViPProcessor, path: Path
) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Read the frames that the model reads: uint8 [N, 3, size, size], their times in seconds,
    float64 [N], and the windows of the video."""
    reading = _reading(processor)
    if is_image(path):
        return read_frames(path, **reading), torch.zeros(1, dtype=torch.float64), []
    size, resize = reading.pop("size"), reading.pop("resize")
    with open_clip(path, **reading) as clip:
        frames = clip.decode(size, resize=resize).frames
        times, duration = clip.index.times, clip.index.duration
        seconds = torch.from_numpy(times[clip.chosen.frames])
    if len(times) == 1:
        return frames, seconds, []
    length = WINDOW_SHARE * duration
    starts = torch.linspace(0, duration - length, WINDOWS, dtype=torch.float64).tolist()
    return frames, seconds, [(start, start + length) for start in starts]


def _features(
    model: CLIPViPModel, processor: CLIPViPProcessor, frames: Tensor, lengths: list[int]
) -> Tensor:
    """Embed videos of these numbers of packed frames: unit features [B, P], fp32 on the CPU."""
    frames = send(frames, model.device)
    pixels = normalize_frames(frames, processor.image_mean, processor.image_std)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    features = model.get_video_features(pixels, send(offsets, model.device))
    return F.normalize(features.float(), dim=-1).cpu()


@contextmanager
def _inputs_of(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the hidden states [T, C] that enter each layer."""
    inputs: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        for layer in layers
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _attention(layer: Any, tokens: Tensor, num_proxies: int) -> Tensor:
    """Attention of the proxies to all tokens of their video: softmax(scale · query · keyᵀ), mean
    over heads. `proxy_attention_weights` would compute S rows per video for these M.

    tokens: hidden states [B, S, C] that enter the layer. Returns fp32 [B, M, S].
    """
    attention, normed = layer.self_attn, layer.layer_norm1(tokens)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).float()

    query, key = attention.q_proj(normed[:, :num_proxies]), attention.k_proj(normed)
    return (attention.scale * heads(query) @ heads(key).mT).softmax(-1).mean(1)


def _by_patch(attention: Tensor, side: int) -> Tensor:
    """Leave out attention to proxies: [B, M, M + n·side²] → [M, B·n, side, side]."""
    patches = attention[..., attention.shape[1] :].unflatten(-1, (-1, side, side))
    return patches.transpose(0, 1).flatten(1, 2)
