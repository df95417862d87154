"""Load a model to embed with rather than to train."""

from os import PathLike
from typing import Any

from clipvip.model.modeling import CLIPViPModel
from clipvip.model.processing import CLIPViPProcessor
from clipvip.model.sources import found, hub_options, is_plain_clip, read_config


def load_for_embedding(
    source: str | PathLike, **options: Any
) -> tuple[CLIPViPModel, CLIPViPProcessor]:
    """Load a model and its processor to embed videos and texts with, not to train.

    A plain CLIP's proxies would be untrained, so it is loaded without them unless frame_pooling
    is given, here or in its config.json: a video's feature is then the mean of CLIP's own
    features of its frames, and that is logged.

    source: a folder or hub name that `CLIPViPModel.from_pretrained` takes, its tokenizer with it.
    options: of `CLIPViPModel.from_pretrained`, such as frame_pooling="proxy".
    Returns the model in eval mode on the CPU, and a processor that fits it. Raises
    FileNotFoundError where there is no model.
    """
    with found("the model", source, options.get("subfolder") or ""):
        processor = CLIPViPProcessor.from_pretrained(source, **hub_options(options))
        config = read_config(source, options)
        given = {**config, **(config.get("vision_config") or {}), **options}
        if is_plain_clip(config) and "frame_pooling" not in given:
            options = {"frame_pooling": "mean", "num_proxies": 1, **options}
        model = CLIPViPModel.from_pretrained(source, **options)
        processor.fit(model.config)
    return model, processor
