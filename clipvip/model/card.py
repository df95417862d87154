"""Model cards: the README.md that a model is saved with and pushed to the Hugging Face hub with.

A card ends with a checksum of itself, which tells a card that somebody edited from one that may be
replaced. A card describes weights, so it goes along only with the weights that it was written for.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clipvip.files import read_own, shown, write_whole
from clipvip.model.configuration import CLIPViPConfig
from clipvip.model.pretrained import no_bars

README = "README.md"
TAGS = ("clip", "clip-vip", "video", "text-to-video-retrieval", "video-to-text-retrieval")
PAPER = "https://arxiv.org/abs/2209.06430"
_MARK = re.compile(r"<!-- clipvip card ([0-9a-f]{16}) -->\n\Z")
_LARGEST = 1 << 20  # bytes of a card
_HUB_OPTIONS = ("repo_id", "commit_message", "create_pr", "private", "revision", "token")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

USE = """## Use

```python
from clipvip import CLIPViPModel, CLIPViPProcessor

name = "…"  # this repository or folder
model, processor = (x.from_pretrained(name) for x in (CLIPViPModel, CLIPViPProcessor))
batch = processor(text=["a dog runs", "a man cooks"], videos=["dog.mp4", "pan.mp4"])
print(model(**batch).logits_per_video.softmax(-1))  # [videos, texts]
```

```
clipvip embed NAME ~/videos --out index
clipvip search "a dog catches a frisbee" --index index
```
"""

CAPTION = """Caption videos:

```python
from clipvip import CLIPViPForCaptioning

model = CLIPViPForCaptioning.from_pretrained(name)
batch = processor(videos=["dog.mp4", "pan.mp4"])
print(processor.captions(model.generate(**batch)))
```

```
clipvip describe NAME ~/videos
```
"""


def model_card(
    config: CLIPViPConfig,
    title: str = "CLIP-ViP video-text model",
    source: str | None = None,
    sections: str = "",
    results: Sequence[EvalResult] = (),
) -> str:
    """Return the card of a model.

    source: path or hub name of what the model was made from. Of a path, only the last part is told.
    sections: Markdown on how the model was trained. results: what it was measured to do.
    """
    text, video = config.text_config, config.vision_config
    made_from = f" Made from {shown_name(source)}." if source else ""
    shapes = {
        "video tower": f"{video.num_hidden_layers} layers of {video.hidden_size} channels, "
        f"patches of {video.patch_size} × {video.patch_size} pixels",
        "text tower": f"{text.num_hidden_layers} layers of {text.hidden_size} channels, "
        f"{text.max_position_embeddings} tokens",
        "frames": f"{video.image_size} × {video.image_size} pixels, at {video.num_frames} learned "
        "positions in time",
        "a video's feature": f"{config.projection_dim} channels, "
        + (
            f"from {video.num_proxies} video proxies"
            if video.frame_pooling == "proxy"
            else "the mean of its frames' features"
        ),
    }
    decoder = config.decoder_config
    if decoder is not None:
        shapes["decoder"] = (
            f"{decoder.model_type}, {decoder.num_hidden_layers} layers of {decoder.hidden_size} "
            f"channels, {decoder.vocab_size} tokens; attends to {config.decoder_tokens}"
        )
    metadata = ModelCardData(
        base_model=base_model(source),
        library_name="clipvip",
        pipeline_tag="feature-extraction",
        tags=list(TAGS),
        model_name=title if results else None,
        eval_results=list(results) or None,
        ignore_metadata_errors=True,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {title}",
        f"A video-text model, [CLIP-ViP]({PAPER}), for searching videos by text"
        f"{'' if decoder is None else ' and for captioning them'}.{made_from}",
        table(shapes),
        USE.strip(),
        "" if decoder is None else CAPTION.strip(),
        sections.strip(),
        "## License\n\nNot stated: add `license:` to the metadata above. The license of the model "
        "that this one was made from may bind it.",
    ]
    return _signed("\n\n".join(filter(None, parts)) + "\n\n")


def table(rows: Mapping[str, Any]) -> str:
    """Return a Markdown table of two columns."""
    lines = [f"| {key} | {shown(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def shown_name(source: object) -> str:
    """Return a hub name, or the last part of a path or URL: folders may be private."""
    text = str(source)
    return shown(text if _is_hub_name(text) else Path(text.partition("?")[0]).name)


def base_model(source: str | None) -> str | None:
    """Return the name on the hub of what a model was made from, if it can be known."""
    if source is None or _is_hub_name(source):
        return source
    card = _read(Path(source))
    if not card:
        return None
    try:
        name = _loaded(card).data.get("base_model")
    except Exception:  # a card by anybody: yaml's errors have no common base with huggingface_hub's
        return None
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def write_card(folder: str | Path, text: str) -> None:
    """Write README.md, unless there is one that we did not write or that somebody edited."""
    path = Path(folder, README)
    there = _read(Path(folder)) if path.exists() else ""
    if there is not None and not is_edited(there):
        write_whole(path, text)


def is_edited(card: str) -> bool:
    """Whether a card is not exactly as `model_card` returned it. No text is no edited card."""
    mark = _MARK.search(card)
    return bool(card) and not (mark and _signed(card[: mark.start()]) == card)


class Pushable:
    """`push_to_hub` of what has `save_pretrained`."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] = (),
        **options: Any,
    ) -> str:
        """Upload what `save_pretrained` writes, and return the address of the commit.

        A model card on the hub that somebody wrote or edited is kept; transformers' method would
        replace ours by a template.

        repo_id: "user/name"; the repository is created if needed.
        private, token, revision, create_pr, commit_message, commit_description: see
            huggingface_hub.HfApi.upload_folder. tags: more tags for our card.
        options: options of `save_pretrained`.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)  # type: ignore[attr-defined]
            card = Path(folder, README)
            if card.exists() and api.file_exists(repo_id, README, revision=revision):
                there = api.hf_hub_download(repo_id, README, revision=revision)
                if is_edited(Path(there).read_bytes().decode(errors="replace")):
                    card.unlink()
            if tags and card.exists():
                card.write_text(_with_tags(card.read_text(encoding="utf-8"), tags), "utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


class WithCard(Pushable):
    """`save_pretrained` of a model, with a model card."""

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save as transformers does, with a README.md, the model card. One that somebody edited is
        kept; see also `push_to_hub`."""
        model: Any = self
        source = model.name_or_path or None
        weights = model.state_dict() if state_dict is None else state_dict
        text = _card_of(source, weights) or model_card(model.config, source=source)
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        again = None if state_dict is None else dict(state_dict)  # transformers empties its own
        with no_bars():
            super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process, state_dict, **options
            )
        if is_main_process:
            write_card(save_directory, text)
            if push_to_hub:
                model.name_or_path = str(save_directory)  # whose card goes along
                try:
                    repo_id = hub.pop("repo_id", Path(save_directory).name)
                    self.push_to_hub(repo_id, **hub, state_dict=again, **options)
                finally:
                    model.name_or_path = source or ""


def _signed(text: str) -> str:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}<!-- clipvip card {digest} -->\n"


def _with_tags(card: str, tags: Sequence[str]) -> str:
    edited, loaded = is_edited(card), _loaded(card)
    loaded.data["tags"] = list(dict.fromkeys([*(loaded.data.get("tags") or ()), *tags]))
    return str(loaded) if edited else _signed(_MARK.sub("", str(loaded)))


def _loaded(card: str) -> ModelCard:
    return ModelCard(card, ignore_metadata_errors=True)


def _is_hub_name(source: str) -> bool:
    return bool(_HUB_NAME.fullmatch(source)) and not Path(source).exists()


def _read(folder: Path) -> str | None:
    """Return the card of a folder; None if there is none that can be read."""
    try:
        return read_own(folder / README, _LARGEST).decode()
    except (OSError, UnicodeDecodeError):
        return None


def _card_of(source: str | None, weights: Mapping[str, Tensor]) -> str | None:
    """Return the card of a folder if it holds exactly these weights."""
    text = None if source is None else _read(Path(source))
    if source is None or text is None:
        return None
    try:
        with safe_open(Path(source, "model.safetensors"), "pt") as file:
            if set(file.keys()) != set(weights):
                return None
            pairs = ((file.get_tensor(name), weight.cpu()) for name, weight in weights.items())
            same = all(x.dtype == y.dtype and x.equal(y) for x, y in pairs)
    except (OSError, RuntimeError, SafetensorError):  # RuntimeError: shards, or on no device
        return None
    return text if same else None
