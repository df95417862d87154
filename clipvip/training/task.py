"""Tasks: the features that a run computes, the loss over them, and what its clips must have.

`task_of` is the one place that looks at which task a configuration names. Another task is one more
subclass of Task in TASKS.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipvip.data.annotations import Clip
from clipvip.data.loading import COMPARED, ClipSource, ClipSources, texts_compared
from clipvip.data.shards import Shards
from clipvip.data.video import is_image
from clipvip.embedding import needed_mask, text_features
from clipvip.files import shown
from clipvip.losses import VARIANTS, contrastive_loss, omnisource_loss
from clipvip.model import CLIPViPForCaptioning, CLIPViPModel, CLIPViPProcessor
from clipvip.model.captioning import token_losses
from clipvip.model.processing import normalize_frames
from clipvip.retrieval import TABLES
from clipvip.sharded import all_reduce
from clipvip.training.config import ConfigError, TrainConfig
from clipvip.training.evaluate import evaluate, evaluate_captions
from clipvip.training.sources import Clips

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Features = dict[str, Tensor]


class Task:
    """A training objective."""

    name: str  # in configurations and for loaders
    needs: tuple[str, ...]  # names of the texts of a clip, of which it must have at least one
    texts: tuple[str, ...]  # names of the texts of a clip that are embedded
    compared: tuple[str, ...] = ()  # for the loader, see clipvip.data.loading.roles
    with_image = False  # whether the image of each clip is embedded too
    pairs = 1  # number of pairs of features whose similarities the loss computes
    model_class: type[CLIPViPModel] = CLIPViPModel
    frozen: tuple[str, ...] = ()  # globs of parameters that the loss does not reach
    tables: tuple[str, ...] = TABLES  # names of the results of `evaluate` that are metrics
    evaluate: Any = staticmethod(evaluate)  # measures a model on validation clips

    def __init__(self, config: TrainConfig) -> None:
        self.backend = config.backend

    @property
    def batches(self) -> str:
        """Kind of a loader's batches, see clipvip.data.loading.LoaderOptions."""
        return self.name

    def tokenizer(self, processor: CLIPViPProcessor) -> Any:
        """Return the tokenizer of the texts of a batch."""
        return processor.tokenizer

    def mask(self, model: CLIPViPModel, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return the mask of a batch of texts, int64 [n, length] on the CPU, or None if a model's
        features on its device are the same without it."""
        return needed_mask(model.text_model.config, ids, mask, model.device)

    def towers(self, model: CLIPViPModel, processor: CLIPViPProcessor) -> nn.Module:
        """Make the module that turns a batch into features; data parallelism wraps it."""
        return Towers(model, processor, self)

    def loss(self, features: Features, batch: Batch) -> Tensor:
        """Compute the loss over the clips of all ranks, 0-d, the same on every rank.

        features: features of all clips of this rank, from the towers.
        batch: batch of a ClipLoader. Its presence masks, bool [n], are on the host, since they
            decide the logits' shapes.
        """
        raise NotImplementedError

    def check(self, clips: Clips, where: object) -> None:
        """Raise ConfigError or ShardError if clips lack the texts that this task trains on.

        where: path of the clips, for the error message; not used of several sources.
        """
        if isinstance(clips, Shards):
            clips.check(self.batches)
            return
        if isinstance(clips, ClipSources):
            for source in clips.sources:
                self._check_file(source.clips, source.name)
        else:
            self._check_file(clips, where)

    def _check_file(self, clips: Sequence[Clip], where: object) -> None:
        useless = [
            clip for clip in clips if all(getattr(clip, name) in (None, ()) for name in self.needs)
        ]
        if useless:
            raise ConfigError(
                f"{where}: {len(useless)} of {len(clips)} clips have no "
                f"{' and no '.join(self.needs)} for task={self.name}; the first is on line "
                f"{useless[0].line}"
            )


class Retrieval(Task):
    """Fine-tuning: videos against their texts."""

    name = "retrieval"
    needs = texts = ("text",)

    def loss(self, features: Features, batch: Batch) -> Tensor:
        video, text, scale = features["video"], features["text"], features["scale"]
        return contrastive_loss(video, text, scale, sharded=True, backend=self.backend)


class Omnisource(Task):
    """Post-pretraining: videos and images against subtitles and captions, in a loss variant.

    Which clip is a positive in which term of the loss is in the table of
    clipvip.data.loading.roles: a `text` takes the place of a video's missing subtitle (V-S) or of
    an image's missing caption; an image with a caption or text is a frame alone (F-C), not embedded
    as a video, and no negative of one.
    """

    name = "omnisource"
    needs = ("subtitle", "caption", "text")

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.variant = config.variant
        self.compared = tuple(name for name in COMPARED if name[0] in self.variant)
        self.texts = tuple(name for name in ("subtitle", "caption") if name in self.compared)
        self.with_image = "frame" in self.compared
        self.pairs = sum(len(term) - 1 for term in self.variant.split("_"))

    def loss(self, features: Features, batch: Batch) -> Tensor:
        return omnisource_loss(
            features["video"],
            features["subtitle"],
            features.get("frame"),
            features.get("caption"),
            features["scale"],
            self.variant,
            video_present=batch["video_present"],
            subtitle_present=batch["subtitle_present"],
            caption_present=batch["caption_present"],
            sharded=True,
            backend=self.backend,
        )

    def check(self, clips: Clips, where: object) -> None:
        """Check the clips as above; also raise ConfigError if no clip has a text that the variant
        compares, so that the loss would be 0. Warn if only some of its terms would be 0, or if a
        source has no such text, and so gives nothing but negatives."""
        super().check(clips, where)
        there: set[str] = set()
        useless = []
        for name, found in self._texts_of_sources(clips):
            there |= found
            useless += [] if found else [name]
        if not there:
            others = ", ".join(name for name in VARIANTS if "c" in name)
            raise ConfigError(
                f"variant={self.variant} compares videos with subtitles alone, and no clip has a "
                "subtitle or text; choose a variant that compares captions too "
                f"({others}), or give clips with subtitles"
            )
        for name in useless:
            logger.warning(
                "variant=%s: no clip of %s has a subtitle or text; they are only negatives",
                *(self.variant, shown(name)),
            )
        absent = ", no ".join(name for name in self.texts if name not in there)
        if absent:
            logger.warning(
                "variant=%s: no clip has a %s; its terms with them are 0", self.variant, absent
            )

    def _texts_of_sources(self, clips: Clips) -> Iterator[tuple[str, set[str]]]:
        """Yield the name of each source, and which texts that the variant compares its clips have.
        Counts of shards do not say which clip has what; texts that some clip may have are given."""
        if isinstance(clips, Shards):
            for source in clips.sources:
                found = {"subtitle"} if source.subtitles else set()
                found |= {"caption"} if source.captions else set()
                if source.texts and source.images != len(source):
                    found.add("subtitle")
                if source.texts and source.images != 0:
                    found.add("caption" if "caption" in self.compared else "subtitle")
                yield source.name, found & set(self.texts)
            return
        sources = clips.sources if isinstance(clips, ClipSources) else [ClipSource("", clips)]
        for each in sources:
            found = set()
            for clip in each.clips:
                picture = bool(clip.text) and is_image(clip.video)  # else it does not matter
                found |= texts_compared(clip, picture, self.compared)
                if len(found) == len(self.texts):
                    break
            yield each.name, found


class Captioning(Task):
    """Fine-tuning: a decoder writes a video's text, token by token, from the text so far."""

    name = "captioning"
    batches = "retrieval"  # type: ignore[assignment]
    needs = texts = ("text",)
    pairs = 0
    model_class = CLIPViPForCaptioning
    # The video tower is read before its last norm.
    frozen = (
        "text_model.*", "text_projection.*", "visual_projection.*", "logit_scale",
        "vision_model.post_layernorm.*",
    )  # fmt: skip
    tables = ("captions",)
    evaluate = staticmethod(evaluate_captions)

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.label_smoothing = config.label_smoothing

    def tokenizer(self, processor: CLIPViPProcessor) -> Any:
        return processor.caption_tokenizer

    def mask(self, model: CLIPViPModel, ids: Tensor, mask: Tensor) -> Tensor | None:
        return mask  # it says which tokens count

    def towers(self, model: CLIPViPModel, processor: CLIPViPProcessor) -> nn.Module:
        return Captioner(cast(CLIPViPForCaptioning, model), processor, self)

    def loss(self, features: Features, batch: Batch) -> Tensor:
        """Compute the mean over the tokens of all ranks of their label-smoothed cross entropy."""
        sums = torch.stack([features["loss"].sum(), features["tokens"].detach().sum()])
        losses, tokens = all_reduce(sums)
        return losses / tokens


TASKS = {task.name: task for task in (Omnisource, Retrieval, Captioning)}


def task_of(config: TrainConfig) -> Task:
    """Make the task that a configuration names, with its options."""
    return TASKS[config.task](config)


class Towers(nn.Module):
    """A model's towers, from a batch to unit features."""

    def __init__(self, model: CLIPViPModel, processor: CLIPViPProcessor, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.mean, self.std = processor.image_mean, processor.image_std

    def forward(self, batch: Batch) -> Features:
        """Embed a batch of n clips, as clipvip.training.step sends it to the model's device.

        batch: a ClipLoader's; and if not all clips have a video, "videos" int64 [v], those that do.

        Returns fp32 unit features [n, P] named "video", by each of the texts, and "frame" for
        images where they are embedded; and "scale", 0-d, the factor of similarities. The "video"
        features of clips without one are 0.
        """
        pixels, offsets = batch["pixel_values"], batch["frame_offsets"]
        count, videos = len(offsets) - 1, batch.get("videos")
        if videos is not None:
            offsets = torch.cat([offsets[:1], offsets.index_select(0, videos + 1)])
        embedded = len(offsets) - 1
        if self.task.with_image:  # images are videos of one frame, in the same packed batch
            pixels = torch.cat([pixels, batch["image"]])
            images = torch.arange(1, count + 1, device=offsets.device, dtype=offsets.dtype)
            offsets = torch.cat([offsets, offsets[-1] + images])
        pixels = normalize_frames(pixels, self.mean, self.std)
        visual = F.normalize(self.model.get_video_features(pixels, offsets).float(), dim=-1)
        video = visual[:embedded]
        if videos is not None:
            video = video.new_zeros(count, video.shape[1]).index_copy(0, videos, video)
        features = {"video": video, "scale": self.model.logit_scale.exp()}
        if self.task.with_image:
            features["frame"] = visual[embedded:]
        for name in self.task.texts:
            ids, mask = batch[f"{name}_ids"], batch.get(f"{name}_mask")
            features[name] = text_features(self.model, ids, mask)
        return features


class Captioner(nn.Module):
    """A model with a decoder, from a batch to the losses of its captions."""

    def __init__(
        self, model: CLIPViPForCaptioning, processor: CLIPViPProcessor, task: Captioning
    ) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, task.label_smoothing
        self.mean, self.std = processor.image_mean, processor.image_std

    def forward(self, batch: Batch) -> Features:
        """Predict the captions of a batch of n clips, as a ClipLoader gives it, on the model's
        device.

        Returns, fp32 [n], "loss", the sum over the tokens of a caption, and "tokens", their number.
        """
        ids, mask = batch["text_ids"], batch["text_mask"]
        pixels = normalize_frames(batch["pixel_values"], self.mean, self.std)
        logits = self.model(ids, pixels, batch["frame_offsets"], mask).logits
        losses, counted = token_losses(logits, ids, mask, self.label_smoothing)
        return {"loss": losses.sum(1), "tokens": counted.sum(1).to(losses.dtype)}
