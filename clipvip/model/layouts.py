"""Names and shapes of CLIP's weights in the files of those who train it.

| layout | text tower | vision tower | made by |
|---|---|---|---|
| CLIP-ViP's | `clipmodel.text_model.…` | `clipmodel.vision_model.…` | the authors' code |
| transformers' | `text_model.…` | `vision_model.…` | CLIPModel; ours is this one |
| OpenAI's | `transformer.resblocks.…` | `visual.…` | OpenAI, open_clip |
| open_clip's | `text.transformer.resblocks.…` | `visual.…` | open_clip's CustomTextCLIP |
| CLIP4Clip's | `clip.transformer.resblocks.…` | `clip.visual.…` | CLIP4Clip |

Shapes do not say which activation a model was trained with, nor how wide its heads are. OpenAI's
code and those that derive from it have one answer; a file of open_clip alone does not tell.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from clipvip.files import shown
from clipvip.model.configuration import CLIPViPConfig

ACTIVATIONS = ("gelu", "quick_gelu")
ADDED_TO_CLIP = ("vision_model.embeddings.added_cls", "vision_model.embeddings.temporal_embedding")
AUTHORS = "CLIP-ViP"  # the layout of the authors' code
_PREFIX = "clipmodel."
# The sizes that OpenAI's archives hold beside the weights.
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
# Width of a head of the vision tower by the tower's, in all of open_clip's configurations of ViTs.
_HEAD_WIDTHS = {
    **dict.fromkeys((384, 512, 768, 896, 1024), 64),
    1280: 80,  # H
    1408: 88,  # g
    1664: 104,  # bigG
    1792: 112,  # e
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Names that CLIP's own towers lack, and the architectures that have them.
_FOREIGN = (
    (r"visual\.(layer1|attnpool)\.", "a ResNet as its vision tower"),
    (r"visual\.conv2\.", "patches over several frames (CLIP4Clip's linear_patch=3d)"),
    (r"visual\.attn_pool", "attentional pooling, as in CoCa"),
    (r"text_decoder\.", "a text decoder, as CoCa"),
    (r"(text\.)?cls_emb$", "a class token in its text tower, as CoCa"),
    (r"visual\.trunk\.", "a vision tower of timm, as SigLIP, EVA and ConvNeXt have"),
    (r"visual\.(blocks|rope|cls_token|patch_embed)", "the vision tower of EVA"),
    (r".*\.ls_[12]\.", "LayerScale"),
    (r"text\.transformer\.(?!resblocks)", "a text tower of transformers"),
    (r"(text_model|vision_model)\.head\.", "the pooling head of SigLIP"),
    (r"logit_bias$", "the bias of SigLIP's loss"),
)


@dataclass(frozen=True)
class Weights:
    """A checkpoint's weights by our names, and what its layout says about the model.

    state_dict: weights by our names, views of the file's where the two differ.
    layout: whose layout it is, of the table above.
    hidden_act: activation, as in CLIPConfig; None if the file does not tell.
    head_width: channels of a head of the vision tower; None if the file does not tell.
    text_head_width: channels of a head of the text tower.
    left_out: first parts of names that are none of CLIP's.
    added: weights of our model that the checkpoint may lack.
    """

    state_dict: dict[str, Tensor]
    layout: str
    hidden_act: str | None = None
    head_width: int | None = None
    text_head_width: int = 64
    left_out: tuple[str, ...] = ()
    added: frozenset[str] = frozenset(ADDED_TO_CLIP)

    @property
    def trained_on_video(self) -> bool:
        """Whether they have the proxies and the temporal embedding of CLIP-ViP."""
        return not self.added


def recognise(content: dict[str, Tensor], source: object) -> Weights:
    """Recognise the layout of a checkpoint and rename its weights.

    The prefix "module." of wrapped models is removed; position_ids and masks of attention, which
    are constants, are left out.

    source: name of the checkpoint in errors.
    Raises ValueError if it is no CLIP, or one of an architecture that CLIP's towers cannot hold,
    or if two of its weights have one name.
    """
    unwrapped = {name: name.removeprefix("module.") for name in content}
    names = {name: inner.removeprefix(_PREFIX) for name, inner in unwrapped.items()}
    if len(set(names.values())) < len(names):
        once: dict[str, str] = {}
        first, second = next((once[n], k) for k, n in names.items() if once.setdefault(n, k) != k)
        raise ValueError(
            f"{source} holds two weights of one name, {shown(first)} and {shown(second)}; expected "
            "the weights of one model: save only those to use"
        )
    weights = {
        ours: content[name]
        for name, ours in names.items()
        if not ours.endswith(("position_ids", "attn_mask"))
    }
    _refuse_foreign(weights, source)
    if _has(weights, ("vision_model.", "text_model.")):
        if ADDED_TO_CLIP[1] not in weights:
            return Weights(weights, "transformers")
        if _PREFIX + ADDED_TO_CLIP[1] in unwrapped.values():
            return Weights(weights, AUTHORS, "quick_gelu", 64, added=frozenset())
        return Weights(weights, "transformers", added=frozenset())
    if _has(weights, ("clip.visual.", "clip.transformer.", "clip.token_embedding.")):
        clip = {
            name.removeprefix("clip."): weights.pop(name)
            for name in list(weights)
            if name.startswith("clip.")
        }
        _refuse_foreign(clip, source)
        left_out = tuple(dict.fromkeys(name.partition(".")[0] for name in weights))
        renamed = _renamed(clip, source)
        return Weights(renamed, "CLIP4Clip", "quick_gelu", 64, left_out=left_out)
    if _has(weights, ("visual.", "transformer.resblocks.", "text.", "token_embedding.")):
        sizes = [weights.pop(name, None) for name in _OPENAI_SIZES]
        if any(size is not None for size in sizes):
            return Weights(_renamed(weights, source), "OpenAI", "quick_gelu", 64)
        return Weights(_renamed(weights, source), "open_clip")
    found = ", ".join(list(weights)[:3]) or "none"
    raise ValueError(
        f"{source} is no CLIP or CLIP-ViP checkpoint: it has none of the names looked for "
        "(vision_model.… of transformers and of the CLIP-ViP authors, visual.… of OpenAI and "
        f"open_clip, clip.visual.… of CLIP4Clip); the first of its names: {shown(found)}"
    )


# Settings of open_clip's towers that change nothing in CLIP's architecture, and those that are read
# or that weights' shapes say. Each other setting must have the value here, its default.
_OPEN_CLIP_FREE = {
    "vision": {
        "patch_dropout", "output_tokens", "pos_embed_type", "attn_pooler_queries",
        "attn_pooler_heads", "layers", "width", "head_width", "mlp_ratio", "patch_size",
        "image_size",
    },
    "text": {
        "output_tokens", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id",
        "eos_id", "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio",
    },
}  # fmt: skip
_OPEN_CLIP_DEFAULTS = {
    "vision": {"pool_type": "tok"},
    "text": {"pool_type": "argmax", "proj_type": "linear"},
}
# These settings stand beside the name of a model that open_clip takes from elsewhere.
_OPEN_CLIP_OTHERS = {"vision": "timm_", "text": "hf_"}


def configured_by_open_clip(weights: Weights, settings: object, source: object) -> Weights:
    """Add what an open_clip_config.json says of the model and its weights do not.

    settings: its `model_cfg`.
    Raises ValueError if it names an architecture that CLIP's towers cannot hold, or other sizes
    than those of the weights.
    """
    name = f"open_clip_config.json of {source}"
    towers = {}
    for tower in ("vision", "text"):
        given = settings.get(f"{tower}_cfg") if isinstance(settings, dict) else None
        if not isinstance(given, dict):
            raise ValueError(f"{name} holds no {tower}_cfg; expected the settings of a tower")
        other = _OPEN_CLIP_OTHERS[tower]
        if taken := given.get(f"{other}model_name"):
            raise ValueError(
                f"{name} names a {tower} tower of another architecture than CLIP's: "
                f"{other}model_name={shown(repr(taken))}; expected a CLIP with a plain ViT"
            )
        for key, value in given.items():
            default = _OPEN_CLIP_DEFAULTS[tower].get(key)
            free = key in _OPEN_CLIP_FREE[tower] or key.startswith(other)
            if not free and value and value != default:
                raise ValueError(
                    f"{name} names a {tower} tower that CLIP's cannot hold: "
                    f"{shown(key)}={shown(repr(value))}; expected "
                    f"{'none' if default is None else default}"
                )
        towers[tower] = given
    assert isinstance(settings, dict)
    _check_sizes(weights, towers, name, source)
    heads = towers["text"].get("heads", 8)
    width = weights.state_dict["text_model.final_layer_norm.weight"].shape[0]
    if type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(f"{name}: the text tower's heads are {heads!r}, its width is {width}")
    head_width = towers["vision"].get("head_width", 64)
    if type(head_width) is not int or head_width < 1:
        raise ValueError(f"{name}: head_width is {head_width!r}; expected a number of channels")
    return replace(
        weights,
        hidden_act="quick_gelu" if settings.get("quick_gelu") else "gelu",
        head_width=head_width,
        text_head_width=width // heads,
    )


def _check_sizes(
    weights: Weights, towers: dict[str, dict[str, Any]], name: str, source: object
) -> None:
    """Raise ValueError if a setting of open_clip differs from the size that weights have."""
    state_dict = weights.state_dict
    patch = state_dict["vision_model.embeddings.patch_embedding.weight"].shape
    tokens = state_dict["text_model.embeddings.token_embedding.weight"].shape
    side = image_size(weights, source)
    sizes = {
        "vision": {"width": patch[0], "patch_size": patch[-1], "image_size": side},
        "text": {
            "vocab_size": tokens[0],
            "width": tokens[-1],
            "context_length": len(state_dict["text_model.embeddings.position_embedding.weight"]),
        },
    }
    for tower, known in sizes.items():
        known["layers"] = len(
            {key.split(".")[3] for key in state_dict if key.startswith(f"{tower}_model.encoder.")}
        )
        for key, size in known.items():
            given = towers[tower].get(key, size)
            if given not in (size, [size, size]):
                raise ValueError(
                    f"{name} does not fit its weights: the {tower} tower's {key} is "
                    f"{shown(repr(given))}, that of the weights {size}"
                )


def infer_config(
    weights: Weights,
    source: object,
    activation: str | None = None,
    head_width: int | None = None,
    **options: Any,
) -> CLIPViPConfig:
    """Infer the configuration from the shapes of weights.

    source: name of the checkpoint in errors.
    activation: one of ACTIVATIONS; head_width: channels of a head of the vision tower. They are
        needed where the layout does not say them, and must agree where it does.
    options: any of VIDEO_OPTIONS; overrides what the shapes say.
    Raises ValueError if a weight that gives a shape is missing or if sizes do not fit each other.
    """
    state_dict = weights.state_dict

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f"{source} is no CLIP or CLIP-ViP checkpoint: it has no {name}")
        sizes = state_dict[name].shape
        if len(sizes) != dimensions or 0 in sizes:
            raise ValueError(f"{source}: {name} is {list(sizes)}; expected {dimensions} dimensions")
        return sizes

    def tower(prefix: str) -> dict[str, Any]:
        intermediate, hidden = shape(f"{prefix}.encoder.layers.0.mlp.fc1.weight", 2)
        layers = {
            name.split(".")[3]
            for name in state_dict
            if name.startswith(f"{prefix}.encoder.layers.")
        }
        return {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": len(layers),
        }

    text, vision = tower("text_model"), tower("vision_model")
    vocabulary = shape("text_model.embeddings.token_embedding.weight", 2)[0]
    patch = shape("vision_model.embeddings.patch_embedding.weight", 4)[-1]
    projection = shape("visual_projection.weight", 2)[0]
    if weights.trained_on_video:
        added = state_dict.get(ADDED_TO_CLIP[0], ())
        frames = shape(ADDED_TO_CLIP[1], 3)[1]
        options = {"num_proxies": len(added) + 1, "num_frames": frames, **options}
    act = _activation(weights, source, activation)
    width = _head_width(weights, source, vision["hidden_size"], head_width)
    config = CLIPViPConfig(
        text_config={
            **text,
            "num_attention_heads": _heads(
                source, "text", text["hidden_size"], weights.text_head_width
            ),
            "hidden_act": act,
            "projection_dim": projection,
            "vocab_size": vocabulary,
            "max_position_embeddings": shape("text_model.embeddings.position_embedding.weight", 2)[
                0
            ],
            # OpenAI and all after it read a text's feature at its highest token, the end token.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
        vision_config={
            **vision,
            "num_attention_heads": _heads(source, "vision", vision["hidden_size"], width),
            "hidden_act": act,
            "projection_dim": projection,
            "patch_size": patch,
            "image_size": image_size(weights, source),
        },
        projection_dim=projection,
        **options,
    )
    config.dtype = _widest(tensor.dtype for tensor in state_dict.values())
    return config


def image_size(weights: Weights, source: object) -> int:
    """Return the side in pixels of the frames that a vision tower reads, from its positions."""
    patch = weights.state_dict.get("vision_model.embeddings.patch_embedding.weight")
    positions = weights.state_dict.get("vision_model.embeddings.position_embedding.weight")
    if patch is None or positions is None or patch.ndim != 4 or positions.ndim != 2:
        raise ValueError(
            f"{source} is no CLIP or CLIP-ViP checkpoint: it has no vision_model.embeddings of "
            "patches and positions"
        )
    side = round((len(positions) - 1) ** 0.5)
    if side < 1 or side**2 + 1 != len(positions):
        raise ValueError(
            f"{source} has {len(positions)} positions of patches; expected 1 and a square number, "
            "those of square frames"
        )
    return side * patch.shape[-1]


def authors_state_dict(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the weights of a CLIPViPModel under the authors' names, with position_ids."""
    weights = dict(model.state_dict())
    for embeddings in ("text_model.embeddings", "vision_model.embeddings"):
        positions = len(weights[f"{embeddings}.position_embedding.weight"])
        weights[f"{embeddings}.position_ids"] = torch.arange(positions)[None]
    return {_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}


def _has(weights: dict[str, Tensor], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in weights)


def _refuse_foreign(weights: dict[str, Tensor], source: object) -> None:
    for pattern, what in _FOREIGN:
        for name in weights:
            if re.match(pattern, name):
                raise ValueError(
                    f"{source} is a model of another architecture than CLIP's: it has {what} "
                    f"({shown(name)}); expected a CLIP with a plain ViT, such as ViT-B/32"
                )


def _renamed(weights: dict[str, Tensor], source: object) -> dict[str, Tensor]:
    """Rename the weights of OpenAI's layout, with the text tower at the root or under `text.`.

    Raises ValueError that lists the names that are missing or that CLIP lacks.
    """
    text = "text." if _has(weights, ("text.",)) else ""
    left, missing = dict(weights), []
    ours: dict[str, Tensor] = {}

    def take(name: str) -> Tensor | None:
        tensor = left.pop(name, None)
        if tensor is None:
            missing.append(name)
        return tensor

    def move(theirs: str, name: str, *, transposed: bool = False) -> None:
        tensor = take(theirs)
        if tensor is not None:
            ours[name] = tensor.t() if transposed else tensor

    def move_layer(theirs: str, name: str) -> None:
        for kind in ("weight", "bias"):
            move(f"{theirs}.{kind}", f"{name}.{kind}")

    def move_tower(theirs: str, name: str) -> None:
        pattern = re.compile(re.escape(f"{theirs}transformer.resblocks.") + r"(\d+)\.")
        blocks = {match[1] for match in map(pattern.match, weights) if match}
        for number in range(max(len(blocks), 1)):
            block = f"{theirs}transformer.resblocks.{number}"
            layer = f"{name}.encoder.layers.{number}"
            for part, renamed in _BLOCK.items():
                move_layer(f"{block}.{part}", f"{layer}.{renamed}")
            for kind in ("weight", "bias"):
                whole = take(f"{block}.attn.in_proj_{kind}")
                if whole is None:
                    continue
                for each, third in zip("qkv", whole.tensor_split(3), strict=True):
                    ours[f"{layer}.self_attn.{each}_proj.{kind}"] = third

    move(f"{text}token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    move(f"{text}positional_embedding", "text_model.embeddings.position_embedding.weight")
    move_tower(text, "text_model")
    move_layer(f"{text}ln_final", "text_model.final_layer_norm")
    move(f"{text}text_projection", "text_projection.weight", transposed=True)
    move("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
    move("visual.class_embedding", "vision_model.embeddings.class_embedding")
    move("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight")
    move_layer("visual.ln_pre", "vision_model.pre_layrnorm")
    move_tower("visual.", "vision_model")
    move_layer("visual.ln_post", "vision_model.post_layernorm")
    move("visual.proj", "visual_projection.weight", transposed=True)
    move("logit_scale", "logit_scale")
    if missing or left:
        _refuse_names(source, missing, list(left))
    if ours["logit_scale"].numel() == 1:  # some have one dimension
        ours["logit_scale"] = ours["logit_scale"].reshape(())
    return ours


def _refuse_names(source: object, missing: list[str], unknown: list[str]) -> NoReturn:
    towers = {"text tower": "token_embedding.weight", "vision tower": "visual.conv1.weight"}
    absent = {name.removeprefix("text.") for name in missing}
    lacks = [tower for tower, name in towers.items() if name in absent]
    parts = [f"it has no {' and no '.join(lacks)}"] * bool(lacks)
    parts += [f"it lacks {_listed(missing)}"] * bool(missing)
    parts += [f"CLIP has no {_listed(unknown)}"] * bool(unknown)
    raise ValueError(
        f"{source} has names of OpenAI's and open_clip's layout, but does not fit CLIP: "
        f"{'; '.join(parts)}; expected both towers of a CLIP with a plain ViT"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return shown(", ".join(names[:3])) + more


def _activation(weights: Weights, source: object, given: str | None) -> str:
    if given is not None and given not in ACTIVATIONS:
        raise ValueError(f"activation is {given!r}; expected one of {', '.join(ACTIVATIONS)}")
    told = weights.hidden_act
    if told is None and given is None:
        raise ValueError(
            f"{source} does not say which activation its model was trained with; give activation "
            "(clipvip convert: --activation): quick_gelu for OpenAI's weights and for models of "
            "open_clip whose names end in -quickgelu, gelu for its others, such as LAION's"
        )
    if told is not None and given not in (None, told):
        raise ValueError(f"activation is {given}, but {source} is {weights.layout}'s, with {told}")
    return told or str(given)


def _head_width(weights: Weights, source: object, width: int, given: int | None) -> int:
    """Return the number of channels per head of the vision tower, which is `width` wide."""
    told = weights.head_width or (_HEAD_WIDTHS.get(width) if given is None else None)
    if told is None and given is None:
        raise ValueError(
            f"{source} does not say how wide the heads of its vision tower are, and no model that "
            f"is known is {width} wide; give head_width (clipvip convert: --head-width), the "
            "channels of a head, most often 64"
        )
    if told is not None and given not in (None, told):
        raise ValueError(
            f"head_width is {given}, but {source} is {weights.layout}'s, with heads of {told}"
        )
    return told or int(given or 0)


def _heads(source: object, tower: str, width: int, head_width: int) -> int:
    if head_width < 1 or (width > head_width and width % head_width):
        raise ValueError(
            f"{source} has a {tower} tower {width} wide, which heads of {head_width} do not divide"
        )
    return max(width // head_width, 1)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that holds all of these numbers exactly, as OpenAI's files mix two."""
    widest = torch.float16
    for number, dtype in enumerate(dtypes):
        widest = dtype if number == 0 else torch.promote_types(widest, dtype)
    return widest
