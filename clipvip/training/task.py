"""Tasks: the features that a run computes, the loss over them, and what its clips must have.

`task_of` is the one place that looks at which task a configuration names. Another task, such as
captioning, is one more subclass of Task in TASKS.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipvip.data.annotations import Clip
from clipvip.data.shards import Shards
from clipvip.embedding import text_features
from clipvip.losses import VARIANTS, contrastive_loss, omnisource_loss
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.model.processing import normalize_frames
from clipvip.training.config import ConfigError, TrainConfig

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Features = dict[str, Tensor]


class Task:
    """A training objective."""

    name: str  # in configurations and for loaders
    needs: tuple[str, ...]  # names of the texts of a clip, of which it must have at least one
    texts: tuple[str, ...]  # names of the texts of a clip that are embedded
    with_image = False  # whether the image of each clip is embedded too
    pairs = 1  # number of pairs of features whose similarities the loss computes

    def __init__(self, config: TrainConfig) -> None:
        self.backend = config.backend

    def towers(self, model: CLIPViPModel, processor: CLIPViPProcessor) -> "Towers":
        """Make the module that turns a batch into features; data parallelism wraps it."""
        return Towers(model, processor, self)

    def loss(self, features: Features, batch: Batch) -> Tensor:
        """Compute the loss over the clips of all ranks, 0-d, the same on every rank.

        features: features of all clips of this rank, from the towers.
        batch: batch of a ClipLoader. Its presence masks, bool [n], are on the host, since they
            decide the logits' shapes.
        """
        raise NotImplementedError

    def check(self, clips: list[Clip] | Shards, where: object) -> None:
        """Raise ConfigError or ShardError if clips lack the texts that this task trains on.

        where: path of the clips, for the error message.
        """
        if isinstance(clips, Shards):
            clips.check(self.name)
            return
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
    """Post-pretraining: videos and images against subtitles and captions, in a loss variant."""

    name = "omnisource"
    needs = ("subtitle", "caption")

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.variant = config.variant
        self.texts = self.needs[:1] if self.variant == "vs" else self.needs
        self.with_image = self.variant.endswith("fc")
        self.pairs = sum(len(term) - 1 for term in self.variant.split("_"))

    def loss(self, features: Features, batch: Batch) -> Tensor:
        return omnisource_loss(
            features["video"],
            features["subtitle"],
            features.get("frame"),
            features.get("caption"),
            features["scale"],
            self.variant,
            subtitle_present=batch["subtitle_present"],
            caption_present=batch["caption_present"],
            sharded=True,
            backend=self.backend,
        )

    def check(self, clips: list[Clip] | Shards, where: object) -> None:
        """Check the clips as above; also raise ConfigError if no clip has a text that the variant
        compares, so that the loss would be 0. Warn if only some of its terms would be 0."""
        super().check(clips, where)
        if isinstance(clips, Shards):
            subtitles = any(source.subtitles for source in clips.sources)
            captions = any(source.captions for source in clips.sources)
        else:
            subtitles = any(clip.subtitle is not None for clip in clips)
            captions = any(clip.caption is not None for clip in clips)
        there = {"subtitle": subtitles, "caption": captions}
        used = [name for name in there if name[0] in self.variant]
        absent = ", no ".join(name for name in used if not there[name])
        if not any(there[name] for name in used):
            others = ", ".join(name for name in VARIANTS if "c" in name)
            raise ConfigError(
                f"variant={self.variant} compares videos with subtitles alone, and no clip has a "
                f"{absent}; choose a variant that compares captions too ({others}), or give clips "
                "with subtitles"
            )
        if absent:
            logger.warning(
                "variant=%s: no clip has a %s; its terms with them are 0", self.variant, absent
            )


TASKS = {task.name: task for task in (Omnisource, Retrieval)}


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
        """Embed a batch of n clips, as a ClipLoader gives it, on the model's device.

        Returns fp32 unit features [n, P] named "video", by each of the texts, and "frame" for
        images where they are embedded; and "scale", 0-d, the factor of similarities.
        """
        pixels, offsets = batch["pixel_values"], batch["frame_offsets"]
        count = len(offsets) - 1
        if self.task.with_image:  # images are videos of one frame, in the same packed batch
            pixels = torch.cat([pixels, batch["image"]])
            images = torch.arange(1, count + 1, device=offsets.device, dtype=offsets.dtype)
            offsets = torch.cat([offsets, offsets[-1] + images])
        pixels = normalize_frames(pixels, self.mean, self.std)
        visual = F.normalize(self.model.get_video_features(pixels, offsets).float(), dim=-1)
        features = {"video": visual[:count], "scale": self.model.logit_scale.exp()}
        if self.task.with_image:
            features["frame"] = visual[count:]
        for name in self.task.texts:
            ids, mask = batch[f"{name}_ids"], batch.get(f"{name}_mask")
            features[name] = text_features(self.model, ids, mask)
        return features
