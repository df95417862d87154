"""Embed a collection of videos once, then search it by text.

`build_index` embeds the clips that `clipvip.collection` finds and saves them in a folder, in the
format of `clipvip.index_files`. `load_index` reads the folder, and `search` ranks its clips.

An index may come from somebody else, and names its model. Two rules keep that safe:

- The model is an absolute path, or a name on the Hugging Face hub that is in this machine's cache
  of it. Search fetches nothing and takes nothing from the current folder, so a foreign index can
  neither choose what is downloaded nor bring a model along. The model of one's own index is here,
  as embedding fetched it. Loading a model runs no code from its folder.
- A model is used only if its fingerprint, over all of its weights, is that in the index.

Search is exact: one product of all n embeddings with the query. A million clips at P = 512 are
2 GB, read once per query; up to about that size nothing cleverer pays. Beyond it, hand
`Index.embeddings` to an approximate nearest-neighbour library.
"""

import hashlib
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
from clipvip.progress import progress

__all__ = ["Hit", "Index", "IndexedClip", "build_index", "load_index", "search"]

logger = logging.getLogger(__name__)

SAVE_SECONDS = 60.0  # from one save of a build to the next, at least
LONGEST_QUERY = 10_000  # characters: far more than a model reads; tokenizing more takes long
NOT_FINITE = "the model gives no finite features for it"


class Hit(NamedTuple):
    """One result: cosine of query and clip, the video's path, the clip's seconds in it."""

    score: float
    path: Path
    start: float | None
    end: float | None


class Index(StoredIndex):
    """An index that can be searched, loaded or just built. Its fields are those of StoredIndex."""

    @cached_property
    def _encoder(self) -> tuple[Any, Any]:
        here = _model_here(self.model, self.sources)
        model, processor = _load(here, "cpu", local_files_only=True)
        if _fingerprint(model, processor) != self.fingerprint:
            raise ValueError(
                f"the model {shown(self.model)} has changed since this index was made with it; "
                f"make the index again: {embed_command(self.model, self.sources, 'NEW_INDEX')}"
            )
        return model, processor

    @torch.inference_mode()
    def search(self, query: str, k: int = 10) -> list[Hit]:
        """Return the k clips nearest to the query (all of them where k > n), best first.

        The first search loads the model and keeps it.
        Raises ValueError for a query that is empty or no text, k < 1, or a model that has changed
        or moved.
        """
        if not query.strip():
            raise ValueError("the query is empty; expected a sentence")
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        try:
            # In an ASCII locale, Python holds other bytes of the command line as surrogates.
            query = query.encode(errors="surrogateescape").decode()
        except UnicodeError:
            raise ValueError(f"the query {query!r} is not UTF-8; expected a sentence") from None
        model, processor = self._encoder
        inputs = processor(text=query.lstrip()[:LONGEST_QUERY])
        features = F.normalize(model.get_text_features(**inputs).float(), dim=-1)
        if not is_unit(features).all():
            raise ValueError(
                f"the model {shown(self.model)} gives the query no finite features; its weights "
                "are damaged: fetch or train it again"
            )
        if features.shape[1:] != self.embeddings.shape[1:]:
            raise ValueError(
                f"the index is damaged: its embeddings have {self.embeddings.shape[-1]} values "
                f"each, those of its model {features.shape[-1]}; make it again with clipvip embed"
            )
        scores = self.embeddings @ features[0]
        best = scores.topk(min(k, len(self.clips)))
        return [
            Hit(score, Path(self.clips[row].path), self.clips[row].start, self.clips[row].end)
            for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def load_index(path: str | Path) -> Index:
    """Read an index folder. Raises ValueError where there is none or it is damaged."""
    return Index(**vars(read_index(Path(path))))


def search(index: str | Path | Index, query: str, k: int = 10) -> list[Hit]:
    """Rank the clips of an index (a folder, or loaded) by a sentence; see `Index.search`."""
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
) -> Index:
    """Embed videos into an index.

    model: a CLIP-ViP folder or hub name, with its processor; the index remembers it.
    videos: one or more videos, images, folders, annotations (.jsonl), lists (.txt) and patterns;
        see clipvip.collection.
    out: the index folder, a new or empty one at first. Clips that are in it and whose files are
        unchanged (same size and modification time) are not embedded again; clips that `videos` no
        longer lists are dropped. An index of videos that still exist and that `videos` does not
        name is refused, not overwritten; so is a folder of something else. Where its data files
        are damaged, what they held is embedded again.
    num_workers: decoding processes; by default one per core.
    decoder: see clipvip.data.loading.LoaderOptions.
    Files that cannot be decoded are left out and listed in bad_files.jsonl.
    Raises ValueError where nothing can be embedded, `videos` names something that matches nothing,
    or `out` is the index of another model or of other videos, or something else; OSError where the
    index cannot be saved, which leaves it as it was.
    """
    if not os.fspath(out):
        raise ValueError("out is empty; expected the folder of an index")
    out, workers = Path(out), os.cpu_count() or 1 if num_workers is None else num_workers
    given = [videos] if isinstance(videos, str | os.PathLike) else videos
    sources = [os.fspath(source) for source in given]
    wanted, bad_files = clips_of(sources)
    check_out(out)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network, processor = _load(model, device)
    name = str(Path(model).resolve()) if Path(model).exists() else str(model)
    where = sorted(map(os.path.realpath, sources))
    nothing = torch.empty(0, network.config.projection_dim)
    index = Index(name, _fingerprint(network, processor), where, nothing, [], bad_files)
    with only_run(out, "embeds"):
        _update(index, out, wanted, network, processor, batch_size, workers, decoder)
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


def _update(
    index: Index,
    out: Path,
    wanted: list[IndexedClip],
    network: Any,
    processor: Any,
    batch_size: int,
    workers: int,
    decoder: str,
) -> None:
    """Fill an index with the clips wanted, which `out` holds already or which are embedded now;
    save it there now and then and at the end."""
    check_out(out)
    old = _old_index(out, index, wanted)
    known = dict(zip(old.clips, old.embeddings, strict=True)) if old else {}
    done = {clip: known[clip] for clip in wanted if clip in known}
    todo = [clip for clip in wanted if clip not in known]
    not_finite: list[IndexedClip] = []
    saved = old is not None

    def save() -> None:
        nonlocal saved
        index.clips = [clip for clip in wanted if clip in done]
        if not index.clips:
            return
        index.embeddings = torch.stack([done[clip] for clip in index.clips])
        if old and replace(old, embeddings=index.embeddings) == index:
            return  # nothing is new
        try:
            write_index(index, out)
        except OSError as error:
            state = "it stays as last saved" if saved else "no clip is saved yet"
            raise OSError(
                f"{shown(out)} cannot be saved ({error.strerror or error}); {state}: correct that "
                "and run the same command again"
            ) from error
        saved = True

    due = time.monotonic() + SAVE_SECONDS
    reused = f", {len(done)} are in the index already" if done else ""
    with progress(f"embedding {len(todo)} clips{reused}", len(todo)) as advance:
        batches = _embed(network, processor, todo, batch_size, workers, decoder, index.bad_files)
        for rows in batches:
            finite = {clip: row for clip, row in rows.items() if is_unit(row)}
            not_finite += [clip for clip in rows if clip not in finite]
            done.update(finite)
            advance(len(rows))
            if len(not_finite) >= COUNTED_FROM and not done:
                break  # the others would fail alike
            if time.monotonic() > due:
                started = time.monotonic()
                save()
                # However large the index grows, saving takes at most a twentieth of the time.
                due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - started))
    if not_finite and not done:
        raise ValueError(
            f"the model's weights give no finite features for any of {len(not_finite)} clips: "
            f"{shown(index.model)}; fetch or train it again"
        )
    paths = dict.fromkeys(clip.path for clip in not_finite)
    index.bad_files += [{"path": path, "reason": NOT_FINITE} for path in paths]
    save()


def _old_index(out: Path, index: Index, wanted: list[IndexedClip]) -> Index | None:
    """Read the index in `out`, to take rows from it and replace it; None where there is none, or
    its data files are damaged.

    Raises ValueError where it is of another model, or of videos that still exist and are not
    wanted, whose clips would be lost.
    """
    head = delete_spare(out)
    if head is None or head.data is None:
        return None
    if head.fingerprint != index.fingerprint:
        changed = f"the model {shown(index.model)} has changed since {shown(out)} was made with it"
        other = (
            f"{shown(out)} is an index made with the model {shown(head.model)}, "
            f"not {shown(index.model)}"
        )
        raise ValueError(
            f"{changed if head.model == index.model else other}; give another --out, or delete it"
        )
    all_named = set(head.sources) <= set(index.sources)
    sources, name_all = shown(listed(head.sources)), "name everything that it should hold"
    damage = ""
    try:
        old = load_index(out)
        if old.embeddings.shape[1] != index.embeddings.shape[1]:
            rows = f"have {old.embeddings.shape[1]} values each, not {index.embeddings.shape[1]}"
            damage = f"embeddings in {shown(out)} {rows}"
    except DamagedIndexError as error:
        damage = error.damage
    if damage and not all_named:
        raise ValueError(
            f"{damage}, and {shown(out)} is an index of {sources}: {name_all}, or give another "
            "--out"
        )
    if damage:
        logger.warning("%s; what it held is embedded again", damage)
        return None
    if not all_named:
        named = {(clip.path, clip.start, clip.end) for clip in wanted}
        others = [c for c in old.clips if (c.path, c.start, c.end) not in named and _remains(c)]
        if others:
            raise ValueError(
                f"{shown(out)} is an index of {sources}; {len(others)} of its clips would be "
                f"lost, as they are not named now (the first: {shown(others[0].path)}): "
                f"{name_all}, or give another --out, or delete it"
            )
    return old


def _remains(clip: IndexedClip) -> bool:
    """Whether the clip's file is not known to be deleted; its disk may just not be mounted."""
    return os.path.lexists(clip.path) or not os.path.isdir(os.path.dirname(clip.path))


def _embed(
    model: Any,
    processor: Any,
    clips: list[IndexedClip],
    batch_size: int,
    workers: int,
    decoder: str,
    bad_files: list[dict[str, str]],
) -> Iterator[dict[IndexedClip, Tensor]]:
    """Yield the unit vectors, float32 [P], of a batch of clips at a time; at the end, append to
    bad_files."""
    from clipvip.embedding import embed_clips

    if not clips:
        return
    given = [Clip(Path(clip.path), clip.start, clip.end) for clip in clips]
    unread: list[BadFile] = []
    batches = embed_clips(
        *(model, processor, given, unread),
        batch_size=batch_size,
        num_workers=min(workers, len(clips)),
        decoder=decoder,
    )
    for features in batches:
        yield {clips[place]: row for place, row in features.items()}
    bad_files += [{"path": bad.path, "reason": bad.reason} for bad in unread]


def _load(
    model: str | Path, device: str | torch.device, *, local_files_only: bool = False
) -> tuple[Any, Any]:
    from transformers.utils import logging

    from clipvip.embedding import load_for_embedding

    logging.disable_progress_bar()  # of loading weights; it would break our own
    network: Any
    network, processor = load_for_embedding(model, local_files_only=local_files_only)
    return network.to(device), processor


def _fingerprint(model: Any, processor: Any) -> str:
    """Hash all weights and how videos are read and frames pooled: the same for the same model
    wherever it lies."""
    reading = {name: value for name, value in processor.loading().items() if name != "text_length"}
    colours = processor.image_mean, processor.image_std
    whole = sorted(reading.items()), colours, model.config.vision_config.frame_pooling
    digest = hashlib.sha256(f"{whole};".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _model_here(model: str, sources: Sequence[str]) -> str:
    """Find an index's model on this machine: the folder of that absolute path, or of a hub name in
    the cache. Raises ValueError where it is not here."""
    if os.path.isabs(model):
        if not os.path.exists(model):
            raise ValueError(
                f"the model {shown(model)} that this index was made with is no longer there; put "
                "it back, or give its new place as MODEL, which embeds nothing again: "
                f"{embed_command('MODEL', sources, 'INDEX')}"
            )
        return model
    from huggingface_hub import try_to_load_from_cache

    try:
        # hf_hub_download may call the hub even with local_files_only. A path stops transformers.
        config = try_to_load_from_cache(model, "config.json")
    except ValueError:
        raise ValueError(
            f"the index names no model that may be loaded: {shown(model)!r}; expected an absolute "
            "path or a name on the Hugging Face hub: make the index again with clipvip embed"
        ) from None
    except OSError:
        config = None
    if isinstance(config, str):
        return os.path.dirname(os.path.abspath(config))
    raise ValueError(
        f"the model {shown(model)} that this index was made with is not on this machine, and "
        "search fetches none; if you trust it, fetch it: "
        f"hf download {shown(shlex.quote(model))}"
    )
