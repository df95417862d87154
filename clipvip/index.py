"""Embed a collection of videos once, then search it by text.

An index is a folder:

    index.json                 model, its fingerprint, sources, the two data files that hold now,
                               and `spare`: those that hold no longer or not yet
    embeddings-*.safetensors   "embeddings": float32 [n, P], unit vectors
    clips-*.jsonl              line i: path, start and end (seconds) of clip i, its file's state
    bad_files.jsonl            files that could not be decoded, and why

index.json is replaced atomically, before data files are written (it names them as spare) and after.
So a reader never sees half an update, a build that is killed resumes from its last save, and what
it leaves is known by name: nothing is deleted or overwritten that index.json does not name. A
reader whose files are replaced while it reads them starts again.

An index may come from somebody else. Then index.json is only believed as far as this goes:

- Data files have names as above, in the folder itself; links are not followed.
- The model is an absolute path, or a name on the Hugging Face hub that is in this machine's cache
  of it. Search fetches nothing and takes nothing from the current folder, so a foreign index can
  neither choose what is downloaded nor bring a model along; one's own indexes need no more, as
  embedding has fetched their model. Loading a model runs no code of its folder.
- A model is used only if its fingerprint, over all of its weights, is that in index.json.

Search is exact: one product of all n embeddings with the query. A million clips at P = 512 are
2 GB, read once per query; up to about that size nothing cleverer pays. Beyond it, hand
`Index.embeddings` to an approximate nearest-neighbour library.
"""

import glob
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shlex
import sys
import time
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipvip.data.bad_files import COUNTED_FROM
from clipvip.data.container import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from clipvip.files import (
    NOT_A_FILE,
    files_in,
    json_line,
    only_run,
    read_own,
    shown,
    write_new,
    write_whole,
)
from clipvip.progress import progress

logger = logging.getLogger(__name__)

FORMAT = 2
SAVE_SECONDS = 60.0
MOST_NAMED = 3  # of many sources or suffixes, in a message
READS = 100  # of an index that is replaced each time while it is read
LONGEST_QUERY = 10_000  # characters, far more than a model reads, which would be tokenised for long
NOT_FINITE = "the model gives it no finite features"

_HEAD, _BAD_FILES = "index.json", "bad_files.jsonl"
_EMBEDDINGS = re.compile(r"embeddings-[0-9a-f]{16}\.safetensors")
_CLIPS = re.compile(r"clips-[0-9a-f]{16}\.jsonl")


class DamagedIndexError(ValueError):
    """A data file of an index is lost; one line that says which and what to do."""

    def __init__(self, damage: str, remedy: str) -> None:
        super().__init__(f"{damage}; {remedy}")
        self.damage = damage


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
        videos = _videos_again(self.sources)
        model, processor = _load(_model_here(self.model, videos), "cpu", local_files_only=True)
        if _fingerprint(model, processor) != self.fingerprint:
            raise ValueError(
                f"the model {shown(self.model)} has changed since this index was made with it; "
                "make the index again: "
                f"clipvip embed {shown(shlex.quote(self.model))} {videos} --out NEW_INDEX"
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
        inputs = processor(text=query.lstrip()[:LONGEST_QUERY])
        features = F.normalize(model.get_text_features(**inputs).float(), dim=-1)
        if not _unit(features).all():
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


@dataclass(frozen=True)
class _Head:
    """What index.json says. embeddings, clips: names of the data files, None until there are any.
    spare: names of data files that hold no longer or not yet; the next build deletes them."""

    model: str
    fingerprint: str
    sources: list[str]
    embeddings: str | None = None
    clips: str | None = None
    spare: list[str] = field(default_factory=list)

    @property
    def data(self) -> list[str]:
        return [name for name in (self.embeddings, self.clips) if name is not None]


def load_index(path: str | Path) -> Index:
    """Read an index folder. Raises ValueError where there is none or it is damaged."""
    folder = Path(path)
    damaged, before = None, None
    for _ in range(READS):
        head = _read_head(folder)
        if head is None:
            raise ValueError(
                f"no index in {shown(folder)}; make one: "
                f"clipvip embed MODEL VIDEOS --out {shown(folder)}"
            )
        if head.embeddings is None or head.clips is None:
            raise ValueError(
                f"{shown(folder)} holds no clips yet: its first build runs, or was ended before it "
                "saved; wait, or run the same clipvip embed again"
            )
        if damaged and head == before:
            break
        try:
            return _read_data(folder, head, head.embeddings, head.clips)
        except DamagedIndexError as error:  # or replaced since index.json was read
            damaged, before = error, head
    assert damaged is not None
    raise damaged


def _read_head(folder: Path) -> _Head | None:
    """Read index.json, None where there is none. Raises ValueError where it is not an index's."""
    file = folder / _HEAD
    another = "give another --out, or the folder of an index"
    try:
        head = json.loads(read_own(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{shown(file)}: {error.strerror}; {another}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(file)} is damaged or no index's ({error}); {another}") from None
    number = head.get("format") if isinstance(head, dict) else None
    if type(number) is int and number != FORMAT:
        raise ValueError(
            f"{shown(folder)} has index format {number}; this version reads {FORMAT}: make "
            "the index again with clipvip embed and another --out, or delete it"
        )
    if number != FORMAT or not _is_sound(head):
        raise ValueError(f"{shown(file)} is damaged or no index's; {another}")
    names = (field.name for field in fields(_Head))
    return _Head(**{name: head[name] for name in names if name in head})


def _is_sound(head: dict[str, Any]) -> bool:
    """Whether what index.json says has the types it must have, and names no file but an index's."""
    sources, spare = head.get("sources"), head.get("spare", [])
    data = head.get("embeddings"), head.get("clips")
    if not (isinstance(sources, list) and isinstance(spare, list)):
        return False
    return (
        all(
            isinstance(text, str) for text in (head.get("model"), head.get("fingerprint"), *sources)
        )
        and all(_is_name(name, _EMBEDDINGS) or _is_name(name, _CLIPS) for name in spare)
        and not any(name in spare for name in data)
        and (data == (None, None) or (_is_name(data[0], _EMBEDDINGS) and _is_name(data[1], _CLIPS)))
    )


def _is_name(value: object, names: re.Pattern[str]) -> bool:
    return isinstance(value, str) and names.fullmatch(value) is not None


def _read_data(folder: Path, head: _Head, embeddings_name: str, clips_name: str) -> Index:
    """Read the data files. Raises DamagedIndexError, which says which of them is lost."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    def damaged(name: str, why: object) -> DamagedIndexError:
        again = f"{shown(shlex.quote(head.model))} {_videos_again(head.sources)} --out"
        return DamagedIndexError(
            f"{shown(folder / name)} is damaged ({why})",
            f"this embeds again what is lost: clipvip embed {again} {shown(folder)}",
        )

    def content(name: str) -> bytes:
        try:
            return read_own(folder / name)
        except OSError as error:
            raise damaged(name, error.strerror) from None
        except MemoryError:
            raise damaged(name, "larger than memory") from None

    data = content(embeddings_name)  # not load_file, which takes names of UTF-8
    try:
        embeddings = load(data)["embeddings"]
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise damaged(embeddings_name, error) from None
    clips = []
    for number, line in enumerate(content(clips_name).splitlines(), start=1):
        try:
            clips.append(_parse_clip(line))
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            raise damaged(clips_name, f"line {number} is no clip's") from None
    if embeddings.dtype != torch.float32 or embeddings.ndim != 2:
        raise damaged(embeddings_name, f"{embeddings.dtype} {list(embeddings.shape)}")
    if len(clips) != len(embeddings) or not clips:
        raise damaged(clips_name, f"{len(clips)} clips but {len(embeddings)} embeddings")
    if not _unit(embeddings).all():
        raise damaged(embeddings_name, "not all rows are unit vectors")
    bad_files: list[dict[str, str]] = []
    with suppress(OSError, ValueError):  # told where it is to be written
        bad_files = _read_bad_files(folder)
    return Index(head.model, head.fingerprint, head.sources, embeddings, clips, bad_files)


def _parse_clip(line: bytes) -> IndexedClip:
    clip = IndexedClip(**json.loads(line))
    times = [time for time in (clip.start, clip.end) if time is not None]
    if not (
        isinstance(clip.path, str)
        and type(clip.size) is type(clip.mtime_ns) is int
        and all(type(time) in (int, float) and math.isfinite(time) for time in times)
    ):
        raise ValueError("wrong types")
    return clip


def _read_bad_files(folder: Path) -> list[dict[str, str]]:
    """Read bad_files.jsonl, [] where there is none. Raises ValueError where it is not an index's,
    such as that of a training run, and OSError."""
    try:
        lines = read_own(folder / _BAD_FILES).splitlines()
    except FileNotFoundError:
        return []
    files = []
    for line in lines:
        with suppress(RecursionError):
            files.append(json.loads(line))
    if not all(isinstance(file, dict) and file.keys() == {"path", "reason"} for file in files):
        raise ValueError("not an index's")
    return files


def _unit(rows: Tensor) -> Tensor:
    """Whether vectors [..., P] have length 1, bool [...]; not so where they are not finite."""
    return (torch.linalg.vector_norm(rows, dim=-1) - 1).abs() <= 1e-3


def _videos_again(sources: Sequence[str]) -> str:
    """The sources, to be given to `clipvip embed` again."""
    return shown(shlex.join(sources)) if len(sources) <= MOST_NAMED else "VIDEOS"


def _model_here(model: str, videos: str) -> str:
    """Find an index's model on this machine: the folder of that absolute path, or of a hub name in
    the cache. Raises ValueError where it is not here."""
    if os.path.isabs(model):
        if not os.path.exists(model):
            raise ValueError(
                f"the model {shown(model)} that this index was made with is no longer there; put "
                "it back, or say where it is now, which embeds nothing again: "
                f"clipvip embed MODEL {videos} --out INDEX"
            )
        return model
    from huggingface_hub import hf_hub_download

    try:
        return os.path.dirname(hf_hub_download(model, "config.json", local_files_only=True))
    except (OSError, ValueError):
        raise ValueError(
            f"the model {shown(model)} that this index was made with is not on this machine, and "
            "search fetches none; if you trust it, fetch it: "
            f"hf download {shown(shlex.quote(model))}"
        ) from None


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
    out: the index folder, a new or empty one at first. What is in it and unchanged (same size and
        modification time) is not embedded again; clips that `videos` no longer lists are dropped.
        An index of videos that are still there and that `videos` does not name is refused, not
        overwritten; so is a folder of something else. Where its data files are damaged, what they
        held is embedded again.
    num_workers: decoding processes; by default one a core. decoder: see
        clipvip.data.loader.build_loader.
    Files that cannot be decoded are left out and listed in bad_files.jsonl.
    Raises ValueError where nothing can be embedded, `videos` names something that matches nothing,
    or `out` is the index of another model or of other videos, or something else; OSError where the
    index cannot be saved, which leaves it as it was.
    """
    out, workers = Path(out), os.cpu_count() or 1 if num_workers is None else num_workers
    given = [videos] if isinstance(videos, str | os.PathLike) else videos
    sources = [os.fspath(source) for source in given]
    wanted, bad_files = _list_clips(sources)
    _check_out(out)
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
            f"none of {len(wanted)} clips in {shown(_listed(sources))} could be read; the first: "
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
    """Fill an index with what `out` holds of these clips already and with what it lacks; save it
    there, now and then and at the end."""
    _check_out(out)
    old = _old_index(out, index, wanted)
    known = dict(zip(old.clips, old.embeddings, strict=True)) if old else {}
    done = {clip: known[clip] for clip in wanted if clip in known}
    todo = [clip for clip in wanted if clip not in known]
    not_finite: list[IndexedClip] = []

    def save() -> None:
        index.clips = [clip for clip in wanted if clip in done]
        if not index.clips:
            return
        index.embeddings = torch.stack([done[clip] for clip in index.clips])
        if old and replace(old, embeddings=index.embeddings) == index:
            return  # nothing is new
        try:
            _write(index, out)
        except OSError as error:
            raise OSError(
                f"{shown(out)} cannot be saved ({error.strerror or error}); it is as it was saved "
                "last: make that possible and run the same again"
            ) from error

    due = time.monotonic() + SAVE_SECONDS
    reused = f", {len(done)} are in the index already" if done else ""
    with progress(f"embedding {len(todo)} clips{reused}", len(todo)) as advance:
        batches = _embed(network, processor, todo, batch_size, workers, decoder, index.bad_files)
        for rows in batches:
            finite = {clip: row for clip, row in rows.items() if _unit(row)}
            not_finite += [clip for clip in rows if clip not in finite]
            done.update(finite)
            advance(len(rows))
            if len(not_finite) >= COUNTED_FROM and not done:
                break  # as the others would be
            if time.monotonic() > due:
                started = time.monotonic()
                save()
                # However large the index grows, saving takes at most a twentieth of the time.
                due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - started))
    if not_finite and not done:
        raise ValueError(
            f"the model's weights give no finite features of any of {len(not_finite)} clips: "
            f"{shown(index.model)}; fetch or train it again"
        )
    paths = dict.fromkeys(clip.path for clip in not_finite)
    index.bad_files += [{"path": path, "reason": NOT_FINITE} for path in paths]
    save()


def _list_clips(sources: Sequence[str]) -> tuple[list[IndexedClip], list[dict[str, str]]]:
    """Every distinct clip, in a stable order, and {"path", "reason"} of what was named and can
    hold none."""
    if not sources:
        raise ValueError("no videos were named; expected files, folders, patterns or lists of them")
    skipped: Counter[str] = Counter()
    real = cache(_real)
    clips: dict[tuple[str, str, float | None, float | None], IndexedClip] = {}
    left: list[tuple[str, str]] = []

    def left_out(path: str, reason: str) -> None:
        left.append((path, reason))

    for source in sources:
        before = len(left)
        spans = list(_spans(source, skipped, left_out))
        if not spans and len(left) == before and not os.path.isfile(source):
            raise ValueError(_no_videos(source, skipped))
        for video, start, end in spans:
            full = os.path.abspath(video)
            folder, name = os.path.split(full)
            key = real(folder), name, start, end  # a folder may be reached through links as well
            if key in clips:
                continue
            try:
                state = os.stat(full)
                clips[key] = IndexedClip(full, start, end, state.st_size, state.st_mtime_ns)
            except (OSError, ValueError):  # told as a bad file when it is to be read
                clips[key] = IndexedClip(full, start, end, 0, 0)
    if not clips and left:
        raise ValueError(": ".join(map(shown, left[0])))
    if not clips:
        raise ValueError(_no_videos(_listed(sources), skipped))
    if skipped:
        print(shown(_counted(skipped)), file=sys.stderr)
    bad = dict(left)
    for path, reason in bad.items():
        logger.warning("left out %s: %s", shown(path), shown(reason))
    files = [{"path": os.path.abspath(path), "reason": bad[path]} for path in bad]
    return list(clips.values()), files


def _real(folder: str) -> str:
    try:
        return os.path.realpath(folder)
    except (OSError, ValueError):  # a name that no folder can have
        return folder


Span = tuple[Path, float | None, float | None]  # start and end in seconds
LeftOut = Callable[[str, str], None]  # is told a path and a reason


def _spans(source: str, skipped: Counter[str], left_out: LeftOut) -> Iterator[Span]:
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
            yield from _spans(match, skipped, left_out)
    elif path.is_dir():
        yield from ((file, None, None) for file in files_in(path, keep, left_out))
    elif path.exists() and not path.is_file():
        left_out(source, NOT_A_FILE)
    elif suffix == ".jsonl":
        yield from _annotated(path, left_out)
    elif suffix == ".txt":
        yield from _in_list(path, left_out)
    elif suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        yield path, None, None
    else:
        skipped[suffix] += 1


def _annotated(path: Path, left_out: LeftOut) -> Iterator[Span]:
    """The clips of annotations; a line that names none costs itself alone."""
    from clipvip.data.annotations import AnnotationError, load_annotations, parse_line

    try:
        clips = load_annotations(path)
    except AnnotationError as error:
        clips, bad = [], []
        with suppress(OSError):
            for number, line in enumerate(_lines(path), start=1):
                try:
                    clips += [parse_line(line, path.parent, number)] if line.strip() else []
                except ValueError as reason:
                    bad.append((f"{path}:{number}", str(reason)))
        for place, why in bad if clips else [(str(path), str(error))]:
            left_out(place, why)
    yield from ((clip.video, clip.start, clip.end) for clip in clips)


def _in_list(path: Path, left_out: LeftOut) -> Iterator[Span]:
    """The files of a list, a path per line; of a list that names none, none."""
    try:
        files = [path.parent / os.fsdecode(line) for line in _lines(path) if line.strip()]
    except OSError as error:
        left_out(str(path), error.strerror or str(error))
        return
    if any(map(os.path.lexists, files)):
        yield from ((file, None, None) for file in files)
    else:
        first = f", not {files[0].name[:100]!r}" if files else ""
        left_out(str(path), f"names no file; expected the path of a video per line{first}")


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().removeprefix(BOM_UTF8).splitlines()


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


def _check_out(out: Path) -> None:
    """Raise ValueError where no index can be written to a folder without harm to what is in it."""
    name, own = shown(out), f"give a new or empty folder, such as {shown(out / 'index')}"
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{name} is a link to nowhere; give another --out, or delete it")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{name} is a file; expected the folder of an index: give another --out")
    if not os.access(out, os.W_OK | os.X_OK):
        raise ValueError(f"{name} cannot be written to; give another --out")
    if _read_head(out) is None:
        ours = re.compile(rf"\..*|.*\.partial|{re.escape(_BAD_FILES)}", re.DOTALL)
        others = sorted(entry for entry in os.listdir(out) if not ours.fullmatch(entry))
        if others:
            raise ValueError(f"{name} holds {shown(others[0])!r} and no index; {own}")
    try:
        _read_bad_files(out)
    except (OSError, ValueError):
        raise ValueError(
            f"{shown(out / _BAD_FILES)} is not an index's; {own}, or move that file away"
        ) from None


def _old_index(out: Path, index: Index, wanted: list[IndexedClip]) -> Index | None:
    """What `out` holds already, where it is an index of the same model that would lose no clips
    of videos that are not named now; None where it holds nothing, or its data are damaged."""
    head = _read_head(out)
    if head is not None:
        _delete(out, head.spare)
    if head is None or not head.data:
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
    sources = shown(_listed(head.sources))
    try:
        old = load_index(out)
        if old.embeddings.shape[1] != index.embeddings.shape[1]:
            damage = f"embeddings in {shown(out)} have {old.embeddings.shape[1]} values each"
            raise DamagedIndexError(damage, "")
    except DamagedIndexError as error:
        if not all_named:
            raise ValueError(
                f"{error.damage}, and {shown(out)} is an index of {sources}: name all that it is "
                "to hold, or give another --out"
            ) from None
        logger.warning("%s; what it held is embedded again", error.damage)
        return None
    if not all_named:
        named = {(clip.path, clip.start, clip.end) for clip in wanted}
        others = [c for c in old.clips if (c.path, c.start, c.end) not in named and _remains(c)]
        if others:
            raise ValueError(
                f"{shown(out)} is an index of {sources}; {len(others)} of its clips would be "
                f"lost, as they are not named now, the first {shown(others[0].path)}: name all "
                "that it is to hold, or give another --out, or delete it"
            )
    return old


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


def _load(
    model: str | Path, device: str | torch.device, *, local_files_only: bool = False
) -> tuple[Any, Any]:
    from transformers.utils import logging

    from clipvip.model import load_for_embedding

    logging.disable_progress_bar()  # of loading a model: breaks our own
    network: Any
    network, processor = load_for_embedding(model, local_files_only=local_files_only)
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

    token = secrets.token_hex(8)
    data = f"embeddings-{token}.safetensors", f"clips-{token}.jsonl"
    head = _Head(index.model, index.fingerprint, index.sources)
    old = _read_head(out) or head
    _delete(out, old.spare)
    spare = [name for name in old.spare if os.path.lexists(out / name)]
    _write_head(replace(old, spare=[*spare, *data]), out)
    try:
        # save_file would make a file that only its owner can read, regardless of the umask.
        embeddings = save({"embeddings": index.embeddings.contiguous()})
        write_new(out / data[0], embeddings)
        write_new(out / data[1], map(_clip_line, index.clips))
        write_whole(out / _BAD_FILES, map(json_line, index.bad_files))
    except BaseException:
        _delete(out, data)
        raise
    spare += old.data
    _write_head(replace(head, embeddings=data[0], clips=data[1], spare=spare), out)
    _delete(out, spare)


def _write_head(head: _Head, out: Path) -> None:
    write_whole(out / _HEAD, json.dumps({"format": FORMAT, **asdict(head)}, indent=1) + "\n")


def _clip_line(clip: IndexedClip) -> bytes:
    return json_line({name: getattr(clip, name) for name in IndexedClip.__slots__})


def _delete(out: Path, names: Iterable[str]) -> None:
    """Delete data files, named by index.json, where they are there; the next build tries again."""
    for name in names:
        with suppress(OSError):
            os.unlink(out / name)
