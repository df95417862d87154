"""The model card of a run's checkpoint: what it was trained on, how, and how well it does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from clipvip.model.card import model_card, shown_name, table
from clipvip.model.configuration import CLIPViPConfig
from clipvip.retrieval import METRICS, TABLES
from clipvip.training.config import TrainConfig, flat

SETTINGS = (
    "task", "variant", "label_smoothing", "batch_size", "accumulation", "mixed_precision", "ema",
    "seed", "optimizer.lr", "optimizer.decoder_lr", "optimizer.weight_decay",
    "optimizer.layer_decay", "model.lora", "model.freeze", "model.unfreeze", "data.num_frames",
    "data.text_length", "data.paragraph", "data.sampling", "data.resize",
)  # fmt: skip

CHOSEN = "These clips may have chosen the checkpoint: expect less on others."


def run_card(
    config: TrainConfig,
    shapes: CLIPViPConfig,
    *,
    step: int,
    steps: int,
    clips: int,
    metrics: Mapping[str, float],
) -> str:
    """Return the card of the checkpoint of a step.

    Data are told by the names of their files alone: folders may be private.

    shapes: configuration of the model. steps: of the whole run. clips: number of clips to train on.
    metrics: of the validation after this step, such as "text_to_video/R@1"; empty for none.
    """
    sections = f"## Training\n\n{table(_training(config, step, steps, clips))}"
    results = []
    if metrics:
        name = shown_name(config.data.validation)
        captions = config.task == "captioning"
        what = "Captions" if captions else "Retrieval"
        scores = table({_plain(key): f"{value:.1f}" for key, value in metrics.items()})
        if not captions:
            scores = _retrieval(metrics)
        sections += f"\n\n## {what} on {name}\n\n{scores}\n\n{CHOSEN}"
        results = [
            EvalResult(
                task_type="video-captioning" if captions else "retrieval",
                dataset_type=name,
                dataset_name=name,
                metric_type=key.partition("/")[2].lower() if captions else "recall",
                metric_name=_plain(key),
                metric_value=round(value, 2),
            )
            for key, value in metrics.items()
            if captions or ("/R@" in key and "dsl" not in key)
        ]
    return model_card(shapes, Path(config.out).name, config.model.name, sections, results)


def _plain(metric: str) -> str:
    return metric.removeprefix("captions/").replace("_", " ").replace("/", " ")


def _training(config: TrainConfig, step: int, steps: int, clips: int) -> dict[str, Any]:
    settings, data = flat(config), config.data
    sources = [source.path for source in data.sources] or [str(data.train)]
    names = ", ".join(shown_name(source) for source in sources)
    rows = {"clips": f"{clips} of {names}", "step": f"{step} of {steps}"}
    if config.task != "omnisource":
        settings["variant"] = None
    if config.task != "captioning":
        settings["label_smoothing"] = None
    given = {key: settings[key] for key in SETTINGS if settings[key] not in (None, [], False)}
    return rows | given


def _retrieval(metrics: Mapping[str, float]) -> str:
    lines = ["| direction | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name in TABLES:
        label = name.replace("_to_", " → ").replace("_dsl", ", dual softmax")
        values = (f"{metrics[f'{name}/{metric}']:.1f}" for metric in METRICS)
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join(lines).replace("_", " ")
