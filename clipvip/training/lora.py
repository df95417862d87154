"""LoRA by PEFT: a run trains low-rank changes of linear layers, and saves them twice.

A checkpoint's `adapter/` holds what was trained, for peft.PeftModel.from_pretrained(base, folder).
Its `model/` holds all weights with the changes added to them, which needs no PEFT to load and runs
at full speed. The unmerged ones of these weights, with which a run resumes, are in `state.pt`.
"""

import difflib
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipvip.model import CLIPViPModel
from clipvip.model.configuration import CAPTIONING
from clipvip.model.pretrained import ADDED_TO_CLIP
from clipvip.training.config import ConfigError, LoraConfig, TrainConfig

TRAINED_WHOLE = (*ADDED_TO_CLIP, "logit_scale")
NAME = "default"  # of the adapter in PEFT's layers
PREFIX = "base_model.model."  # of all names in PEFT's files
WEIGHTS = "adapter_model.safetensors"


def prepare(model: CLIPViPModel, config: TrainConfig, resumed: Path | None = None) -> None:
    """Add the configured LoRA, if any, to a model, and freeze all else but TRAINED_WHOLE
    and a captioner's decoder and bridge. Load what the checkpoint `resumed` holds of what is
    trained.

    Raises ConfigError if PEFT is not installed, if a target matches no linear layer, or if the
    checkpoint was trained with another LoRA.
    """
    lora, adapter = config.model.lora, None if resumed is None else resumed / "adapter"
    if adapter is not None:
        _check_resumed(lora, adapter)
    if lora is None:
        return
    peft = _peft()
    given = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=linear_layers(model, lora.targets),
        base_model_name_or_path=config.model.name,
    )
    peft.inject_adapter_in_model(given, model, NAME)
    for name, parameter in model.named_parameters():
        if name in TRAINED_WHOLE or name.startswith(CAPTIONING):
            parameter.requires_grad_()
    if adapter is not None:
        _load(model, adapter)


def linear_layers(model: nn.Module, targets: list[str]) -> list[str]:
    """Return the names of the linear layers that targets name by an end of their names or a glob.

    Raises ConfigError for a target that matches none. Other layers, such as embeddings, are no
    targets: the model reads their weights without calling them.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    found: set[str] = set()
    for target in targets:
        globs = target, f"*.{target}"
        matched = {name for name in names if any(fnmatchcase(name, glob) for glob in globs)}
        if not matched:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
            near = difflib.get_close_matches(target, [*ends, *names], 1)
            raise ConfigError(
                f"model.lora.targets: {target!r} matches no linear layer"
                + (f"; did you mean {near[0]}?" if near else ";")
                + f" linear layers are {', '.join(ends)}; or give a glob such as *.layers.0.*"
            )
        found |= matched
    return sorted(found)


def merged(model: CLIPViPModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whole weights by the names that they have without LoRA, with its changes added.

    weights: result of parallel.whole_weights, which is not changed. Other weights are not copied.
    """
    if not has_lora(model) or not weights:
        return dict(weights)
    plain = {
        name.replace(".base_layer.", "."): weight
        for name, weight in weights.items()
        if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, _peft().tuners.lora.LoraLayer):
            a, b = (weights[f"{name}.lora_{factor}.{NAME}.weight"] for factor in "AB")
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + (b @ a) * module.scaling[NAME]
    return plain


def has_lora(model: CLIPViPModel) -> bool:
    return NAME in getattr(model, "peft_config", {})


def save_adapter(model: CLIPViPModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write adapter_config.json, and all trained weights by PEFT's names.

    PEFT loads weights that are not its own into the parameters of the same name.

    weights: result of parallel.whole_weights.
    """
    config = model.peft_config[NAME]
    changes = _peft().get_peft_model_state_dict(
        model, state_dict=weights, adapter_name=NAME, save_embedding_layers=False
    )
    whole = {
        name: weights[name]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }
    folder.mkdir()
    save_file(
        {PREFIX + name: weight.contiguous() for name, weight in (changes | whole).items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    config.inference_mode = True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = False


def _check_resumed(lora: LoraConfig | None, adapter: Path) -> None:
    """Raise ConfigError if a checkpoint's LoRA has other settings."""
    then = None
    if adapter.is_dir():
        saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        then = {"r": saved["r"], "alpha": saved["lora_alpha"]}
    now = None if lora is None else {"r": lora.r, "alpha": lora.alpha}
    if then != now:
        raise _another_lora(then, now, adapter)


def _load(model: CLIPViPModel, adapter: Path) -> None:
    """Load trained weights. Raises ConfigError if they are not those of the model's LoRA."""
    saved = load_file(adapter / WEIGHTS)
    own = {name.removeprefix(PREFIX): weight for name, weight in saved.items()}
    expected = _peft().get_peft_model_state_dict(
        model, adapter_name=NAME, save_embedding_layers=False
    )
    then, now = (
        {name.partition(".lora_")[0] for name in names if ".lora_" in name}
        for names in (own, expected)
    )
    if other := sorted(then ^ now):
        told = [f"{'with' if other[0] in names else 'without'} {other[0]}" for names in (then, now)]
        raise _another_lora(told[0], told[1], adapter)
    _peft().set_peft_model_state_dict(model, own, NAME)


def _another_lora(then: Any, now: Any, adapter: Path) -> ConfigError:
    return ConfigError(
        f"model.lora of the checkpoint is {then}, and here {now}: resume with the same, or start a "
        f"new run from the merged model: model.name={adapter.with_name('model')} out=…"
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError('model.lora needs PEFT: pip install "clipvip[lora]"') from None
    return peft
