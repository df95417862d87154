"""Embed a collection of videos once, then search it by text.

An index is a folder:

    index.json                 model, its fingerprint, source, and the two data files that hold now
    embeddings-*.safetensors   "embeddings": float32 [n, P], unit vectors
    clips-*.jsonl              line i: path, start and end (seconds) of clip i, its file's state
    bad_files.jsonl            files that could not be decoded, and why

index.json is replaced last and atomically, so a reader never sees half an update, and a build
that is killed goes on from its last save.

Search is exact: one product of all n embeddings with the query. A million clips at P = 512 are
2 GB, read once per query; up to about that size nothing cleverer pays. Beyond it, hand
`Index.embeddings` to an approximate nearest-neighbour library.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.data.container import VIDEO_SUFFIXES
from clipvip.progress import progress

FORMAT = 1
SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class IndexedClip:
    """One row: the clip (seconds; None is the file's start or end), and its file's state when
    it was embedded."""

    path: str
    start: float | None
    end: float | None
    size: int
    mtime_ns: int


class Hit(NamedTuple):
    """One result: cosine of query and clip, the video's path, the clip's seconds in it."""

    score: float
    path: Path
    start: float | None
    end: float | None


@dataclass
class Index:
    """A loaded index. embeddings: float32 [n, P], unit vectors; row i is clips[i].

    bad_files: {"path", "reason"} of every file that the last build could not decode.
    """

    model: str
    fingerprint: str
    source: str
    embeddings: Tensor
    clips: list[IndexedClip]
    bad_files: list[dict[str, str]] = field(default_factory=list)

    @cached_property
    def _encoder(self) -> tuple[Any, Any]:
        model, processor = _load(self.model, "cpu")
        if _fingerprint(model) != self.fingerprint:
            raise ValueError(
                f"the model {self.model} has changed since this index was made with it; make the "
                f"index again: clipvip embed {self.model} {self.source} --out NEW_INDEX"
            )
        return model, processor

    @torch.inference_mode()
    def search(self, query: str, k: int = 10) -> list[Hit]:
        """The k clips nearest to the query (all of them where k > n), best first.

        The model's text tower is loaded by the first search and kept.
        Raises ValueError for an empty query, k < 1, or a model that has changed.
        """
        if not query.strip():
            raise ValueError("the query is empty; expected a sentence")
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        from clipvip.data.loader import tokenize

        model, processor = self._encoder
        length = min(model.config.text_config.max_position_embeddings, 77)
        features = model.get_text_features(*tokenize(processor.tokenizer, [query], length))
        scores = self.embeddings @ F.normalize(features.float(), dim=-1)[0]
        best = scores.topk(min(k, len(self.clips)))
        return [
            Hit(score, Path(self.clips[row].path), self.clips[row].start, self.clips[row].end)
            for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def load_index(path: str | Path) -> Index:
    """Read an index folder. Raises ValueError where there is none or it is damaged."""
    folder = Path(path)
    try:
        head = json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"no index in {folder}; make one: clipvip embed MODEL VIDEOS --out {folder}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'index.json'} is damaged ({error})") from None
    if head.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has index format {head.get('format')}; this version reads {FORMAT}"
        )
    from safetensors.torch import load_file

    embeddings = load_file(folder / head["embeddings"])["embeddings"]
    clips = [IndexedClip(**record) for record in _read_lines(folder / head["clips"])]
    if len(clips) != len(embeddings):
        raise ValueError(
            f"{folder} is damaged: {len(clips)} clips but {len(embeddings)} embeddings"
        )
    bad = folder / "bad_files.jsonl"
    bad_files = list(_read_lines(bad)) if bad.exists() else []
    return Index(head["model"], head["fingerprint"], head["source"], embeddings, clips, bad_files)


def search(index: str | Path | Index, query: str, k: int = 10) -> list[Hit]:
    """Rank the clips of an index (a folder, or loaded) by a sentence; see `Index.search`."""
    return (index if isinstance(index, Index) else load_index(index)).search(query, k)


def build_index(
    model: str | Path,
    videos: str | Path,
    out: str | Path,
    *,
    batch_size: int = 16,
    num_workers: int | None = None,
    decoder: str = "auto",
    device: str | torch.device | None = None,
) -> Index:
    """Embed every video of a folder, or every clip of an annotations file, into an index.

    model: a CLIP-ViP folder or hub name, with its processor; the index remembers it.
    videos: a folder, searched recursively for VIDEO_SUFFIXES (each file is one clip), or a JSON
        Lines file of annotations (each line is one clip; texts are not used).
    out: the index folder. What is in it and unchanged (same size and modification time) is not
        embedded again; clips that `videos` no longer lists are dropped.
    num_workers: decoding processes; by default one a core. decoder: see
        clipvip.data.loader.build_loader.
    Files that cannot be decoded are left out and listed in bad_files.jsonl.
    Raises ValueError where nothing can be embedded, or `out` is the index of another model or of
    other videos.
    """
    from clipvip.training.evaluate import Reading

    out, workers = Path(out), os.cpu_count() or 1 if num_workers is None else num_workers
    wanted = _list_clips(Path(videos))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network, processor = _load(model, device)
    name = str(Path(model).resolve()) if Path(model).exists() else str(model)
    index = Index(name, _fingerprint(network), str(Path(videos).resolve()), torch.empty(0), [])
    known = _known_rows(out, index)

    done = {clip: known[clip] for clip in wanted if clip in known}
    todo = [clip for clip in wanted if clip not in known]

    def save() -> None:
        index.clips = [clip for clip in wanted if clip in done]
        if index.clips:
            index.embeddings = torch.stack([done[clip] for clip in index.clips])
            _write(index, out)

    due = time.monotonic() + SAVE_SECONDS
    reused = f", {len(done)} are in the index already" if done else ""
    with progress(f"embedding {len(todo)} clips{reused}", len(todo)) as advance:
        reading = Reading.load(model)
        batches = _embed(
            network, processor, todo, reading, batch_size, workers, decoder, index.bad_files
        )
        for rows in batches:
            done.update(rows)
            advance(len(rows))
            if time.monotonic() > due:
                started = time.monotonic()
                save()
                # However large the index grows, saving takes at most a twentieth of the time.
                due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - started))
    save()
    if not index.clips:
        first = index.bad_files[0]
        raise ValueError(
            f"none of {len(wanted)} clips in {videos} could be read; the first: "
            f"{first['path']}: {first['reason']}"
        )
    bad = f"; {len(index.bad_files)} unreadable files, see {out / 'bad_files.jsonl'}"
    print(f"{out}: {len(index.clips)} clips" + (bad if index.bad_files else ""), file=sys.stderr)
    return index


def _list_clips(videos: Path) -> list[IndexedClip]:
    """Every distinct clip, in a stable order."""
    if videos.is_dir():
        files = sorted(p for p in videos.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            raise ValueError(
                f"no videos in {videos}; looked for {' '.join(sorted(VIDEO_SUFFIXES))}"
            )
        spans: list[tuple[Path, float | None, float | None]] = [(p, None, None) for p in files]
    else:
        from clipvip.data.annotations import load_annotations

        spans = [(clip.video, clip.start, clip.end) for clip in load_annotations(videos)]
    clips: dict[IndexedClip, None] = {}
    for path, start, end in spans:
        full = os.path.abspath(path)
        try:
            state = os.stat(full)
            clips[IndexedClip(full, start, end, state.st_size, state.st_mtime_ns)] = None
        except OSError:  # told as a bad file when it is to be read
            clips[IndexedClip(full, start, end, 0, 0)] = None
    return list(clips)


def _known_rows(out: Path, index: Index) -> dict[IndexedClip, Tensor]:
    """What `out` holds already, where it is an index of the same model and videos."""
    if not (out / "index.json").exists():
        return {}
    old = load_index(out)
    for what, there, given in (
        ("of", old.source, index.source),
        ("made with the model", old.model, index.model),
    ):
        if there != given:
            raise ValueError(
                f"{out} is an index {what} {there}, not {given}; give another --out, or delete it"
            )
    if old.fingerprint != index.fingerprint:
        raise ValueError(
            f"the model {index.model} has changed since {out} was made with it; give another "
            "--out, or delete it"
        )
    return dict(zip(old.clips, old.embeddings, strict=True))


@torch.inference_mode()
def _embed(
    model: Any,
    processor: Any,
    clips: list[IndexedClip],
    reading: Any,
    batch_size: int,
    workers: int,
    decoder: str,
    bad_files: list[dict[str, str]],
) -> Iterator[dict[IndexedClip, Tensor]]:
    """Unit vectors float32 [P] of a batch of clips at a time; appends to bad_files at the end."""
    from clipvip.data.annotations import Clip
    from clipvip.data.loader import build_loader
    from clipvip.training.evaluate import embed_batches

    if not clips:
        return
    loader = build_loader(
        [Clip(Path(clip.path), clip.start, clip.end) for clip in clips],
        tokenizer=None,
        image_size=model.config.vision_config.image_size,
        num_frames=reading.num_frames,
        text_length=reading.text_length,
        task="video",
        batch_size=batch_size,
        training=False,
        seed=0,
        num_workers=min(workers, len(clips)),
        max_bad_share=1.0,
        sampling=reading.sampling,
        decoder=decoder,
    )
    for features in embed_batches(model, processor, loader):
        yield {clips[place]: row for place, row in features.items()}
    bad_files += [{"path": bad.path, "reason": bad.reason} for bad in loader.bad_files]


def _load(model: str | Path, device: str | torch.device) -> tuple[Any, Any]:
    from transformers.utils import logging

    from clipvip.model import CLIPViPModel, CLIPViPProcessor

    logging.disable_progress_bar()  # of loading a model: breaks our own
    network = CLIPViPModel.from_pretrained(model).to(device).eval()
    return network, CLIPViPProcessor.from_pretrained(model)


def _fingerprint(model: Any) -> str:
    """SHA-256 of all weights: the same for the same model wherever it lies."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(index: Index, out: Path) -> None:
    """Write new data files, point index.json at them, delete the old ones."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    # Named by content: writing the same again changes nothing.
    state = hashlib.sha256(repr((index.fingerprint, index.clips)).encode()).hexdigest()[:16]
    head: dict[str, Any] = {
        "format": FORMAT,
        "model": index.model,
        "fingerprint": index.fingerprint,
        "source": index.source,
        "embeddings": f"embeddings-{state}.safetensors",
        "clips": f"clips-{state}.jsonl",
    }
    _replace(
        out / head["embeddings"],
        lambda path: save_file({"embeddings": index.embeddings.contiguous()}, path),
    )
    _replace_lines(out / head["clips"], [asdict(clip) for clip in index.clips])
    _replace_lines(out / "bad_files.jsonl", index.bad_files)
    _replace(out / "index.json", lambda path: path.write_text(json.dumps(head, indent=1) + "\n"))
    for pattern in ("embeddings-*.safetensors", "clips-*.jsonl"):
        for path in out.glob(pattern):
            if path.name not in (head["embeddings"], head["clips"]):
                path.unlink()


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def _replace_lines(path: Path, records: list[Any]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
