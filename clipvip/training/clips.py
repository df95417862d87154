"""The clips of a run: loaded, checked against its task, and made into batches."""

from pathlib import Path

from clipvip import distributed
from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.loading import ClipLoader, LoaderOptions, build_loader
from clipvip.data.shards import Shards, Source, build_shard_loader, is_shards
from clipvip.embedding import join_texts
from clipvip.model.processing import CLIPViPProcessor
from clipvip.training.config import ConfigError, SourceConfig, TrainConfig
from clipvip.training.task import task_of


def load_clips(config: TrainConfig) -> tuple[list[Clip] | Shards, list[Clip]]:
    """Load training and validation clips; the latter are empty if data.validation is not given.

    Raises ConfigError or ShardError if they lack the texts that the task or validation needs.
    """
    data = config.data
    validation = load_annotations(data.validation) if data.validation else []
    if validation and not any(clip.text for clip in validation):
        raise ConfigError(f"{data.validation}: no clip has a text to search with")
    clips: list[Clip] | Shards
    if data.train is None or is_shards(data.train):
        sources = data.sources or [SourceConfig(str(data.train))]
        clips = Shards([Source(source.shards, source.ratio) for source in sources])
    else:
        clips = load_annotations(data.train)
    task_of(config).check(clips, data.train)
    return clips, validation


def training_loader(
    config: TrainConfig, clips: list[Clip] | Shards, processor: CLIPViPProcessor
) -> ClipLoader:
    """Build this rank's loader of micro-batches."""
    micro, data = config.batch_size // config.accumulation, config.data
    if len(clips) < micro:
        given = data.train or "data.sources"
        raise ConfigError(
            f"{given} holds {len(clips)} clips, fewer than one micro-batch of {micro}"
        )
    options = LoaderOptions(
        tokenizer=processor.tokenizer,
        task=config.task,
        batch_size=micro // distributed.world_size(),
        seed=config.seed,
        num_workers=data.num_workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        max_bad_share=data.max_bad_share,
        bad_files=Path(config.out) / "bad_files.jsonl",
        decoder=data.decoder,
        **processor.loading(),
    )
    if isinstance(clips, Shards):
        return build_shard_loader(
            clips, options, paragraph=processor.paragraph, shuffle=data.shuffle
        )
    return build_loader(join_texts(clips, processor.paragraph), options, training=True)
