"""Embed a collection of videos once, then search it by text.

`build_index` embeds the clips that `clipvip.collection` finds and saves them in a folder, in the
format of `clipvip.index_files`. `load_index` reads the folder, and `search` ranks its clips.

An index may come from a stranger, and it names its model. Two rules keep that safe:

- The model is an absolute path, or a name on the Hugging Face hub that is in this machine's cache.
  Search downloads nothing and reads nothing from the current folder, so a foreign index can neither
  choose what is downloaded nor bring a model along. Loading a model runs no code from its folder.
- A model is used only if its fingerprint, a hash of all its weights, equals that in the index.

Search is exact: one product of all n embeddings with the query. A million clips at P = 512 take
2 GB, read once per query. Up to about that size no approximation is worth its cost. Beyond it, pass
`Index.embeddings` to an approximate nearest-neighbour library.
"""

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.collection import IndexedClip, clips_of, listed
from clipvip.data.annotations import Clip
from clipvip.data.loading import COUNTED_FROM, BadFile
from clipvip.files import only_run, shown
from clipvip.index_files import (
    DamagedIndexError,
    StoredIndex,
    check_out,
    delete_spare,
    embed_command,
    is_unit,
    read_index,
    write_index,
)
from clipvip.sentences import sentence
from clipvip.terminal import progress

__all__ = ["Hit", "Index", "IndexedClip", "build_index", "load_index", "search"]

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # least time between two saves of a build
LONGEST_QUERY = 10_000  # characters: far more than a model reads; tokenizing more is slow
NOT_FINITE = "the model gives no finite features for it"


class Hit(NamedTuple):
    """One result: cosine of query and clip; start and end in seconds, None for the video's own."""

    score: float
    path: Path
    start: float | None
    end: float | None


class Index(StoredIndex):
    """An index to search, loaded or just built. Its fields are those of StoredIndex."""

    @cached_property
    def _encoder(self) -> tuple[Any, Any]:
        from clipvip.embedding import fingerprint

        folder = _model_here(self.model, self.sources)
        model, processor = _load(folder, "cpu", local_files_only=True)
        if fingerprint(model, processor) != self.fingerprint:
            raise ValueError(
                f"the model {shown(self.model)} has changed since this index was made with it; "
                f"make the index again: {embed_command(self.model, self.sources, 'NEW_INDEX')}"
            )
        return model, processor

    @torch.inference_mode()
    def search(self, query: str, k: int = 10) -> list[Hit]:
        """Return the k clips nearest to the query, best first. The first search loads the model.

        Raises ValueError for a query that is empty or not text, for k < 1, and for a model that has
        changed or moved.
        """
        query = sentence(query, "the query")
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        model, processor = self._encoder
        inputs = processor(text=query[:LONGEST_QUERY])
        features = F.normalize(model.get_text_features(**inputs).float(), dim=-1)
        if not is_unit(features).all():
            raise ValueError(
                f"the model {shown(self.model)} gives the query no finite features; its weights "
                "are damaged: download or train it again"
            )
        if features.shape[1:] != self.embeddings.shape[1:]:
            raise ValueError(
                f"the index is damaged: its embeddings have {self.embeddings.shape[-1]} values "
                f"each, those of its model {features.shape[-1]}; make it again with clipvip embed"
            )
        best = (self.embeddings @ features[0]).topk(min(k, len(self.clips)))
        return [
            Hit(score, Path(self.clips[row].path), self.clips[row].start, self.clips[row].end)
            for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def load_index(path: str | Path) -> Index:
    """Read an index folder. Raises ValueError if there is none, or if it is damaged."""
    return Index(**vars(read_index(Path(path))))


def search(index: str | Path | Index, query: str, k: int = 10) -> list[Hit]:
    """Rank the clips of an index, a folder or loaded, by a sentence; see `Index.search`."""
    return (index if isinstance(index, Index) else load_index(index)).search(query, k)


def build_index(
    model: str | Path,
    videos: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    batch_size: int = 16,
    num_workers: int | None = None,
    decoder: str = "auto",
    device: str | torch.device | None = None,
    mixed_precision: str = "auto",
) -> Index:
    """Embed videos into an index.

    Clips that the index in `out` holds already, with unchanged files (same size and modification
    time), are not embedded again. Clips that `videos` no longer lists are dropped. Files that
    cannot be decoded are left out and listed in bad_files.jsonl.

    model: a CLIP-ViP folder or hub name, with its processor; the index remembers it.
    videos: one or more videos, images, folders, annotations (.jsonl), lists (.txt) and patterns;
        see clipvip.collection.
    out: the index folder; a new or empty one, or an index to update. A folder of something else is
        refused, and so is an index of existing videos that `videos` does not name. If the data
        files of the index are damaged, their clips are embedded again.
    num_workers: number of decoding processes; by default one per core.
    decoder: see clipvip.data.loading.LoaderOptions.
    device: by default a CUDA GPU, if there is one.
    mixed_precision: "auto", "bf16" or "no", see clipvip.embedding.precision_on. An index may hold
        clips of either precision; searches run on the CPU in that of the weights.

    Raises ValueError if nothing can be embedded, if a name in `videos` matches nothing, and if
    `out` is refused or is the index of another model; OSError if the index cannot be saved, which
    leaves it as it was.
    """
    if not os.fspath(out):
        raise ValueError("out is empty; expected the folder of an index")
    out, workers = Path(out), os.cpu_count() or 1 if num_workers is None else num_workers
    given = [videos] if isinstance(videos, str | os.PathLike) else videos
    sources = [os.fspath(source) for source in given]
    wanted, bad_files = clips_of(sources)
    check_out(out)
    from clipvip.embedding import autocast, fingerprint

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network, processor = _load(model, device)
    precision = autocast(network, mixed_precision)
    name = str(Path(model).resolve()) if Path(model).exists() else str(model)
    where = sorted(map(os.path.realpath, sources))
    nothing = torch.empty(0, network.config.projection_dim)
    index = Index(name, fingerprint(network, processor), where, nothing, [], bad_files)
    options = {"batch_size": batch_size, "num_workers": workers, "decoder": decoder}
    with only_run(out, "embeds"), precision:
        _Build(index, out, wanted).run(network, processor, options)
    if not index.clips:
        first = index.bad_files[0]
        raise ValueError(
            f"none of {len(wanted)} clips in {shown(listed(sources))} could be read; the first: "
            f"{shown(first['path'])}: {shown(first['reason'])}"
        )
    bad = f"; {len(index.bad_files)} unreadable files, see {out / 'bad_files.jsonl'}"
    line = f"{out}: {len(index.clips)} clips" + (bad if index.bad_files else "")
    print(shown(line), file=sys.stderr)
    return index


class _Build:
    """A build of an index: rows that the folder `out` holds already, and rows embedded now."""

    def __init__(self, index: Index, out: Path, wanted: list[IndexedClip]) -> None:
        check_out(out)
        self.index, self.out, self.wanted = index, out, wanted
        self.old = _old_index(out, index, wanted)
        self.saved = self.old is not None
        known = dict(zip(self.old.clips, self.old.embeddings, strict=True)) if self.old else {}
        self.rows = {clip: known[clip] for clip in wanted if clip in known}

    def run(self, network: Any, processor: Any, options: dict[str, Any]) -> None:
        """Embed the wanted clips that have no row; save the index regularly and at the end."""
        todo = [clip for clip in self.wanted if clip not in self.rows]
        reused = f", {len(self.rows)} are in the index already" if self.rows else ""
        not_finite: list[IndexedClip] = []
        due = time.monotonic() + SAVE_SECONDS
        with progress(f"embedding {len(todo)} clips{reused}", len(todo)) as advance:
            for rows in _embed(network, processor, todo, self.index.bad_files, options):
                finite = {clip: row for clip, row in rows.items() if is_unit(row)}
                not_finite += [clip for clip in rows if clip not in finite]
                self.rows.update(finite)
                advance(len(rows))
                if len(not_finite) >= COUNTED_FROM and not self.rows:
                    break  # the others would fail too
                if (started := time.monotonic()) > due:
                    self._save()
                    # However large the index grows, saving takes at most a twentieth of the time.
                    due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - started))
        if not_finite and not self.rows:
            raise ValueError(
                f"the model's weights give no finite features for any of {len(not_finite)} clips: "
                f"{shown(self.index.model)}; download or train it again"
            )
        paths = dict.fromkeys(clip.path for clip in not_finite)
        self.index.bad_files += [{"path": path, "reason": NOT_FINITE} for path in paths]
        self._save()

    def _save(self) -> None:
        index, rows = self.index, self.rows
        index.clips = [clip for clip in self.wanted if clip in rows]
        if not index.clips:
            return
        index.embeddings = torch.stack([rows[clip] for clip in index.clips])
        if self.old and replace(self.old, embeddings=index.embeddings) == index:
            return  # nothing is new
        try:
            write_index(index, self.out)
        except OSError as error:
            state = "it stays as last saved" if self.saved else "no clip is saved yet"
            raise OSError(
                f"{shown(self.out)} cannot be saved ({error.strerror or error}); {state}: correct "
                "that and run the same command again"
            ) from error
        self.saved = True


def _old_index(out: Path, index: Index, wanted: list[IndexedClip]) -> Index | None:
    """Read the index in `out` that this build replaces; None if there is none or it is damaged.

    Raises ValueError if it is of another model, or if clips of existing videos would be lost.
    """
    head = delete_spare(out)
    if head is None or head.data is None:
        return None
    model, here = shown(index.model), shown(out)
    if head.fingerprint != index.fingerprint:
        changed = f"the model {model} has changed since {here} was made with it"
        other = f"{here} is an index made with the model {shown(head.model)}, not {model}"
        raise ValueError(
            f"{changed if head.model == index.model else other}; give another --out, or delete it"
        )
    of = f"{here} is an index of {shown(listed(head.sources))}"
    advice = "name everything that it should hold, or give another --out"
    all_named = set(head.sources) <= set(index.sources)
    try:
        old, damage = load_index(out), ""
        if old.embeddings.shape[1] != index.embeddings.shape[1]:
            rows = f"have {old.embeddings.shape[1]} values each, not {index.embeddings.shape[1]}"
            damage = f"embeddings in {here} {rows}"
    except DamagedIndexError as error:
        damage = error.damage
    if damage and not all_named:
        raise ValueError(f"{damage}, and {of}: {advice}")
    if damage:
        logger.warning("%s; all its clips are embedded again", damage)
        return None
    if all_named:
        return old
    named = {(clip.path, clip.start, clip.end) for clip in wanted}
    unnamed = (clip.path for clip in old.clips if (clip.path, clip.start, clip.end) not in named)
    # A file may also exist on a disk that is not mounted.
    lost = [p for p in unnamed if os.path.lexists(p) or not os.path.isdir(os.path.dirname(p))]
    if lost:
        raise ValueError(
            f"{of}; {len(lost)} of its clips would be lost, as they are not named now "
            f"(the first: {shown(lost[0])}): {advice}, or delete it"
        )
    return old


def _embed(
    model: Any,
    processor: Any,
    clips: list[IndexedClip],
    bad_files: list[dict[str, str]],
    options: dict[str, Any],
) -> Iterator[dict[IndexedClip, Tensor]]:
    """Yield the unit vectors, float32 [P], of one batch of clips after another.

    Appends the files that could not be decoded to `bad_files` at the end.
    """
    from clipvip.embedding import embed_clips

    if not clips:
        return
    options = options | {"num_workers": min(options["num_workers"], len(clips))}
    given = [Clip(Path(clip.path), clip.start, clip.end) for clip in clips]
    unread: list[BadFile] = []
    for features in embed_clips(model, processor, given, unread, **options):
        yield {clips[place]: row for place, row in features.items()}
    bad_files += [{"path": bad.path, "reason": bad.reason} for bad in unread]


def _load(
    model: str | Path, device: str | torch.device, *, local_files_only: bool = False
) -> tuple[Any, Any]:
    from clipvip.embedding import load_for_embedding

    network: Any
    network, processor = load_for_embedding(model, local_files_only=local_files_only)
    return network.to(device), processor


def _model_here(model: str, sources: Sequence[str]) -> str:
    """Return the folder of an index's model, its own or in the hub's cache. Raises ValueError."""
    if os.path.isabs(model):
        if not os.path.exists(model):
            raise ValueError(
                f"the model {shown(model)} that this index was made with is no longer there; put "
                "it back, or give its new place as MODEL, which embeds no video again: "
                f"{embed_command('MODEL', sources, 'INDEX')}"
            )
        return model
    from huggingface_hub import try_to_load_from_cache

    try:
        # With the path of a folder, unlike with a name, transformers never contacts the hub.
        configs = [
            try_to_load_from_cache(model, name) for name in ("config.json", "open_clip_config.json")
        ]
    except ValueError:
        raise ValueError(
            f"the index names no model that may be loaded: {shown(model)!r}; expected an absolute "
            "path or a name on the Hugging Face hub: make the index again with clipvip embed"
        ) from None
    except OSError:
        configs = []
    for config in configs:
        if isinstance(config, str):
            return os.path.dirname(os.path.abspath(config))
    raise ValueError(
        f"the model {shown(model)} that this index was made with is not on this machine, and "
        "search downloads none; if you trust it, download it: "
        f"hf download {shown(shlex.quote(model))}"
    )
