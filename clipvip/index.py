"""Embed a collection of videos once, then search it by text.

An index is a folder:

    index.json                 model, its fingerprint, sources, and the two data files that hold now
    embeddings-*.safetensors   "embeddings": float32 [n, P], unit vectors
    clips-*.jsonl              line i: path, start and end (seconds) of clip i, its file's state
    bad_files.jsonl            files that could not be decoded, and why

index.json is replaced last and atomically, so a reader never sees half an update, and a build
that is killed goes on from its last save.

Search is exact: one product of all n embeddings with the query. A million clips at P = 512 are
2 GB, read once per query; up to about that size nothing cleverer pays. Beyond it, hand
`Index.embeddings` to an approximate nearest-neighbour library.
"""

import glob
import hashlib
import json
import os
import shlex
import sys
import time
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.data.container import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from clipvip.files import files_in, json_line, only_run, shown, write_whole
from clipvip.progress import progress

FORMAT = 2
SAVE_SECONDS = 60.0
MOST_NAMED = 3  # of many sources or suffixes, in a message


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

    sources: files, folders, globs and lists that it was made of.
    bad_files: {"path", "reason"} of every file that the last build could not decode.
    """

    model: str
    fingerprint: str
    sources: list[str]
    embeddings: Tensor
    clips: list[IndexedClip]
    bad_files: list[dict[str, str]] = field(default_factory=list)

    @cached_property
    def _encoder(self) -> tuple[Any, Any]:
        videos = shlex.join(self.sources) if len(self.sources) <= MOST_NAMED else "VIDEOS"
        if os.path.isabs(self.model) and not os.path.exists(self.model):
            raise ValueError(
                f"the model {self.model} that this index was made with is no longer there; put it "
                "back, or say where it is now, which embeds nothing again: "
                f"clipvip embed MODEL {videos} --out INDEX"
            )
        model, processor = _load(self.model, "cpu")
        if _fingerprint(model, processor) != self.fingerprint:
            raise ValueError(
                f"the model {self.model} has changed since this index was made with it; make the "
                f"index again: clipvip embed {shlex.quote(self.model)} {videos} --out NEW_INDEX"
            )
        return model, processor

    @torch.inference_mode()
    def search(self, query: str, k: int = 10) -> list[Hit]:
        """The k clips nearest to the query (all of them where k > n), best first.

        The model's text tower is loaded by the first search and kept.
        Raises ValueError for a query that is empty or no text, k < 1, or a model that has changed
        or moved.
        """
        if not query.strip():
            raise ValueError("the query is empty; expected a sentence")
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        try:
            query.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the query {query!r} is not UTF-8; expected a sentence") from None
        model, processor = self._encoder
        features = model.get_text_features(**processor(text=query))
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
        head = json.loads((folder / "index.json").read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"no index in {folder}; make one: clipvip embed MODEL VIDEOS --out {folder}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'index.json'} is damaged ({error})") from None
    if head.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has index format {head.get('format')}; this version reads {FORMAT}: make "
            "the index again with clipvip embed and another --out, or delete it"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = (folder / head["embeddings"]).read_bytes()  # not load_file, which takes names of UTF-8
    try:
        embeddings = load(data)["embeddings"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{folder / head['embeddings']} is damaged ({error}); delete {folder} and make it again"
        ) from error
    clips = [IndexedClip(**record) for record in _read_lines(folder / head["clips"])]
    if len(clips) != len(embeddings):
        raise ValueError(
            f"{folder} is damaged: {len(clips)} clips but {len(embeddings)} embeddings"
        )
    bad = folder / "bad_files.jsonl"
    bad_files = list(_read_lines(bad)) if bad.exists() else []
    return Index(head["model"], head["fingerprint"], head["sources"], embeddings, clips, bad_files)


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
    """Embed videos into an index: files, folders of them, and clips of annotations and lists.

    model: a CLIP-ViP folder or hub name, with its processor; the index remembers it.
    videos: one or more of
        a video, or an image, which is a video of one frame;
        a folder, searched recursively for videos (not images) by VIDEO_SUFFIXES;
        annotations (.jsonl), of which each line is one clip and texts are not used;
        a list (.txt) with the path of a video or image per line, relative to the list;
        a pattern such as "clips/**/*.mkv" of any of these.
        Files with other suffixes are left out and counted in the log.
    out: the index folder. What is in it and unchanged (same size and modification time) is not
        embedded again; clips that `videos` no longer lists are dropped. An index of videos that
        are still there and that `videos` does not name is refused, not overwritten.
    num_workers: decoding processes; by default one a core. decoder: see
        clipvip.data.loader.build_loader.
    Files that cannot be decoded are left out and listed in bad_files.jsonl.
    Raises ValueError where nothing can be embedded, `videos` names something that matches nothing,
    or `out` is the index of another model or of other videos.
    """
    out, workers = Path(out), os.cpu_count() or 1 if num_workers is None else num_workers
    given = [videos] if isinstance(videos, str | os.PathLike) else videos
    sources = [os.fspath(source) for source in given]
    wanted = _list_clips(sources)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network, processor = _load(model, device)
    name = str(Path(model).resolve()) if Path(model).exists() else str(model)
    where = sorted(map(os.path.realpath, sources))
    index = Index(name, _fingerprint(network, processor), where, torch.empty(0), [])
    with only_run(out, "embeds"):
        _update(index, out, wanted, network, processor, batch_size, workers, decoder)
    if not index.clips:
        first = index.bad_files[0]
        raise ValueError(
            f"none of {len(wanted)} clips in {_listed(sources)} could be read; the first: "
            f"{first['path']}: {first['reason']}"
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
    """Fill an index with what `out` holds of these clips already and with what it lacks; save it
    there, now and then and at the end."""
    known = _known_rows(out, index, wanted)

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
        batches = _embed(network, processor, todo, batch_size, workers, decoder, index.bad_files)
        for rows in batches:
            done.update(rows)
            advance(len(rows))
            if time.monotonic() > due:
                started = time.monotonic()
                save()
                # However large the index grows, saving takes at most a twentieth of the time.
                due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - started))
    save()


def _list_clips(sources: Sequence[str]) -> list[IndexedClip]:
    """Every distinct clip, in a stable order."""
    if not sources:
        raise ValueError("no videos were named; expected files, folders, patterns or lists of them")
    skipped: Counter[str] = Counter()
    clips: dict[tuple[str, str, float | None, float | None], IndexedClip] = {}
    real = cache(os.path.realpath)
    for source in sources:
        spans = list(_spans(source, skipped))
        if not spans and not os.path.isfile(source):
            raise ValueError(_no_videos(source, skipped))
        for path, start, end in spans:
            full = os.path.abspath(path)
            folder, name = os.path.split(full)
            key = real(folder), name, start, end  # a folder may be reached through links as well
            if key in clips:
                continue
            try:
                state = os.stat(full)
                clips[key] = IndexedClip(full, start, end, state.st_size, state.st_mtime_ns)
            except OSError:  # told as a bad file when it is to be read
                clips[key] = IndexedClip(full, start, end, 0, 0)
    if not clips:
        raise ValueError(_no_videos(_listed(sources), skipped))
    if skipped:
        print(shown(_counted(skipped)), file=sys.stderr)
    return list(clips.values())


Span = tuple[Path, float | None, float | None]  # start and end in seconds


def _spans(source: str, skipped: Counter[str]) -> Iterator[Span]:
    """The clips that one of the sources names; counts the suffixes of files left out."""
    path = Path(source)
    suffix = path.suffix.lower()

    def keep(name: str) -> bool:
        wanted = (suffix := Path(name).suffix.lower()) in VIDEO_SUFFIXES
        if not wanted:
            skipped[suffix] += 1
        return wanted

    if not os.path.lexists(source):
        matches = _matches(source)
        if not matches:
            expected = "videos, images, folders, annotations (.jsonl) or lists of paths (.txt)"
            what = "matches nothing" if glob.has_magic(source) else "does not exist"
            raise ValueError(f"{source!r} {what}; expected {expected}")
        for match in matches:
            yield from _spans(match, skipped)
    elif path.is_dir():
        yield from ((file, None, None) for file in files_in(path, keep))
    elif suffix == ".jsonl":
        from clipvip.data.annotations import load_annotations

        yield from ((clip.video, clip.start, clip.end) for clip in load_annotations(path))
    elif suffix == ".txt":
        lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
        files = [path.parent / os.fsdecode(line) for line in lines if line.strip()]
        if not any(map(os.path.lexists, files)):
            first = f", not {files[0].name!r}" if files else ""
            raise ValueError(f"{path} names no file; expected the path of a video per line{first}")
        yield from ((file, None, None) for file in files)
    elif suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        yield path, None, None
    else:
        skipped[suffix] += 1


def _matches(pattern: str) -> list[str]:
    """The paths that a pattern matches, sorted; those in folders below `**/` once each."""
    root, below, name = (pattern + "/*" * pattern.endswith("/**")).partition("**/")
    if not below:
        return sorted(glob.glob(pattern))
    # Not glob's own way down, which goes round in links that form a circle.
    folders = [root] if os.path.isdir(root or ".") else sorted(glob.glob(root))
    files = [file for folder in folders for file in files_in(Path(folder))]
    return [os.fspath(file) for file in files if file.match(name or "*")]


def _no_videos(where: str, skipped: Counter[str]) -> str:
    others = f"; {_counted(skipped)}" if skipped else ""
    return f"no videos in {where}; looked for {' '.join(sorted(VIDEO_SUFFIXES))}{others}"


def _counted(skipped: Counter[str]) -> str:
    kinds = [f"{number} {suffix or 'without suffix'}" for suffix, number in skipped.most_common()]
    files = "file" if skipped.total() == 1 else "files"
    return f"{skipped.total()} other {files} skipped: {_listed(kinds)}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _known_rows(out: Path, index: Index, wanted: list[IndexedClip]) -> dict[IndexedClip, Tensor]:
    """What `out` holds already, where it is an index of the same model that would lose no clips
    of videos that are not named now."""
    if not (out / "index.json").exists():
        return {}
    old = load_index(out)
    if old.fingerprint != index.fingerprint:
        changed = f"the model {index.model} has changed since {out} was made with it"
        other = f"{out} is an index made with the model {old.model}, not {index.model}"
        raise ValueError(
            f"{changed if old.model == index.model else other}; give another --out, or delete it"
        )
    if not set(old.sources) <= set(index.sources):
        named = {(clip.path, clip.start, clip.end) for clip in wanted}
        others = [c for c in old.clips if (c.path, c.start, c.end) not in named and _remains(c)]
        if others:
            raise ValueError(
                f"{out} is an index of {_listed(old.sources)}; {len(others)} of its clips would be "
                f"lost, as they are not named now, the first {others[0].path}: name all that it is "
                "to hold, or give another --out, or delete it"
            )
    return dict(zip(old.clips, old.embeddings, strict=True))


def _remains(clip: IndexedClip) -> bool:
    """Whether the clip's file is not known to be deleted; its disk may just not be mounted."""
    return os.path.lexists(clip.path) or not os.path.isdir(os.path.dirname(clip.path))


@torch.inference_mode()
def _embed(
    model: Any,
    processor: Any,
    clips: list[IndexedClip],
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
        task="video",
        batch_size=batch_size,
        training=False,
        seed=0,
        num_workers=min(workers, len(clips)),
        max_bad_share=1.0,
        decoder=decoder,
        **processor.loading(),
    )
    for features in embed_batches(model, processor, loader):
        yield {clips[place]: row for place, row in features.items()}
    bad_files += [{"path": bad.path, "reason": bad.reason} for bad in loader.bad_files]


def _load(model: str | Path, device: str | torch.device) -> tuple[Any, Any]:
    from transformers.utils import logging

    from clipvip.model import load_for_embedding

    logging.disable_progress_bar()  # of loading a model: breaks our own
    network: Any
    network, processor = load_for_embedding(model)
    return network.to(device), processor


def _fingerprint(model: Any, processor: Any) -> str:
    """SHA-256 of all weights and of how videos are read and frames pooled: the same for the same
    model wherever it lies."""
    reading = {name: value for name, value in processor.loading().items() if name != "text_length"}
    colours = processor.image_mean, processor.image_std
    whole = sorted(reading.items()), colours, model.config.vision_config.frame_pooling
    digest = hashlib.sha256(f"{whole};".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(index: Index, out: Path) -> None:
    """Write new data files, point index.json at them, delete the old ones."""
    from safetensors.torch import save

    clips = b"".join(json_line(asdict(clip)) for clip in index.clips)
    # Named by content: writing the same again changes nothing.
    state = hashlib.sha256(index.fingerprint.encode() + clips).hexdigest()[:16]
    head: dict[str, Any] = {
        "format": FORMAT,
        "model": index.model,
        "fingerprint": index.fingerprint,
        "sources": index.sources,
        "embeddings": f"embeddings-{state}.safetensors",
        "clips": f"clips-{state}.jsonl",
    }
    # save_file would make a file that only its owner can read, regardless of the umask.
    write_whole(out / head["embeddings"], save({"embeddings": index.embeddings.contiguous()}))
    write_whole(out / head["clips"], clips)
    write_whole(out / "bad_files.jsonl", map(json_line, index.bad_files))
    write_whole(out / "index.json", json.dumps(head, indent=1) + "\n")
    for pattern in ("embeddings-*.safetensors", "clips-*.jsonl"):
        for path in out.glob(pattern):
            if path.name not in (head["embeddings"], head["clips"]):
                path.unlink()


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        yield from map(json.loads, lines)
