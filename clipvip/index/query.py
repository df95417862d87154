"""Queries to unit vectors, with the model that an index was made with, and only with that.

An index may come from a stranger, and it names its model. Two rules keep that safe:

- The model is an absolute path, or a name on the Hugging Face hub that is in this machine's cache.
  Search downloads nothing and reads nothing from the current folder, so a foreign index can neither
  choose what is downloaded nor bring a model along. Loading a model runs no code from its folder.
- A model is used only if its fingerprint, a hash of all its weights, equals that in the index.

A fingerprint needs the whole model by torch, which takes seconds. So it is noted, in a folder of
the user's own (`notes`), together with the state of the model's files: name, size, times and
inode. As long as these files are unchanged, so is the fingerprint. The note also holds what the
text tower in NumPy needs (`clipvip.index.tower`), so that a sentence is embedded without torch.
"""

import hashlib
import json
import os
import shlex
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipvip.files import shown, write_whole
from clipvip.index.rows import About
from clipvip.index.tower import (
    Description,
    TextTower,
    UnusualModel,
    describe,
    load_description,
    save_description,
)
from clipvip.sentences import sentence

LONGEST_QUERY = 10_000  # characters: far more than a model reads; tokenizing more is slow
MOST_SOURCES = 3  # of an index, that a message names
NOTES_FORMAT = 1  # changes with what a note holds and with how a fingerprint is computed
LEAST_SUM = 1e-3  # norm of a weighted sum of unit vectors that still has a direction

# A query is a sentence, the path of an image or video, or a PIL image.
Query = Any
# Files of a model: name, size, times of modification and change in ns, device and inode.
Files = list[list[str | int]]


class Encoder:
    """Turns queries into vectors with the model of an index, which is loaded when first needed.

    Several threads may use it. Raises ValueError, in each method, if the model is not on this
    machine or has changed.
    """

    def __init__(self, about: About, by_torch: bool = False) -> None:
        self.about, self._by_torch = about, by_torch
        self._loading = threading.RLock()

    def combined(self, queries: Sequence[Query], weights: Sequence[float] | None) -> np.ndarray:
        """Return the unit vector of several queries, float32 [P]: that of the weighted sum of
        their unit vectors.

        weights: one per query, also negative ones; by default all are 1.
        Raises ValueError for a query that cannot be read, and if the sum has no direction.
        """
        if not queries:
            raise ValueError("there is no query; expected a sentence, an image or a video")
        shares = np.ones(len(queries)) if weights is None else np.array(weights, np.float64)
        if shares.shape != (len(queries),):
            raise ValueError(
                f"{shares.size} weights are given for {len(queries)} queries; expected one for each"
            )
        if not np.isfinite(shares).all() or np.abs(shares).max() > 1e6:
            raise ValueError(f"weights are {shares.tolist()}; expected numbers of -1e6 to 1e6")
        if len(queries) == 1 and shares[0] > 0:
            return self.vector(queries[0])
        total = shares @ np.stack([self.vector(query) for query in queries]).astype(np.float64)
        norm = np.linalg.norm(total)
        if not norm > LEAST_SUM * np.abs(shares).max():
            raise ValueError(
                "the weighted queries cancel each other out, so there is nothing to search for; "
                "change --weights"
            )
        return (total / norm).astype(np.float32)

    def vector(self, query: Query) -> np.ndarray:
        """Return the unit vector of one query, float32 [P]."""
        if isinstance(query, str):
            return self._checked(self._text(sentence(query, "the query")), shown(repr(query[:80])))
        if isinstance(query, os.PathLike):
            path = Path(query)
            return self._checked(self._file(path), shown(path))
        if hasattr(query, "convert"):  # a PIL image, without importing PIL
            return self._checked(self._image(query), "the image")
        raise TypeError(
            f"the query is a {type(query).__name__}; expected a sentence, the Path of an image or "
            "video, or a PIL image"
        )

    def _checked(self, vector: np.ndarray, what: str) -> np.ndarray:
        if not (np.isfinite(vector).all() and abs(np.linalg.norm(vector) - 1) < 1e-3):
            raise ValueError(
                f"the model {shown(self.about.model)} gives no finite features for {what}; its "
                "weights are damaged: download or train it again"
            )
        if len(vector) != self.about.width:
            raise ValueError(
                f"the index is damaged: its vectors have {self.about.width} values each, those of "
                f"its model {len(vector)}; make it again with clipvip embed"
            )
        return vector

    def _text(self, text: str) -> np.ndarray:
        text = text[:LONGEST_QUERY]
        with self._loading:
            tower = self._tower
        if tower is not None:
            try:
                return tower.embed(text)
            except (UnusualModel, OSError):  # its file went away, which the whole model reports
                self.__dict__["_tower"] = None
        import torch

        model, processor = self._loaded()
        with torch.inference_mode():
            return _unit(model.get_text_features(**processor(text=text)))

    def _file(self, path: Path) -> np.ndarray:
        if not path.is_file():  # before the imports, which take seconds
            raise ValueError(f"{shown(path)} is no file; expected an image or video to search with")
        from clipvip.data.annotations import Clip
        from clipvip.data.loading import BadFile
        from clipvip.embedding import embed_clips

        model, processor = self._loaded()
        bad: list[BadFile] = []
        options: dict[str, Any] = {"batch_size": 1, "num_workers": 0, "decoder": "pyav"}
        for features in embed_clips(model, processor, [Clip(path)], bad, **options):
            return features[0].numpy()
        reason = bad[0].reason if bad else "it shows nothing"
        raise ValueError(
            f"{shown(path)} cannot be searched with: {shown(reason)}; expected an image or video"
        )

    def _image(self, image: Any) -> np.ndarray:
        import torch

        model, processor = self._loaded()
        with torch.inference_mode():
            return _unit(model.get_video_features(**processor(videos=[image])))

    @cached_property
    def _folder(self) -> Path:
        return Path(model_here(self.about.model, self.about.sources))

    @cached_property
    def _tower(self) -> TextTower | None:
        """The text tower in NumPy; None if only the whole model will do."""
        files = files_of(self._folder)
        note = _read_note(self._folder, files)
        if note is None:
            return self._tower_of_loaded()
        self._check(note.fingerprint)
        if note.tower is None:
            return None
        try:
            tower = TextTower(note.tower, self._folder, self._by_torch)
        except (UnusualModel, OSError):
            return None
        # What was read belongs to the noted fingerprint only if it was not replaced meanwhile.
        return tower if files_of(self._folder) == files else None

    def _tower_of_loaded(self) -> TextTower | None:
        """Load the whole model, which also notes it; it then embeds this process's sentences."""
        _ = self._whole
        return None

    def _loaded(self) -> tuple[Any, Any]:
        with self._loading:
            return self._whole

    @cached_property
    def _whole(self) -> tuple[Any, Any]:
        """The model and its processor, by torch."""
        from clipvip.embedding import fingerprint, load_for_embedding

        files = files_of(self._folder)
        model: Any
        model, processor = load_for_embedding(self._folder, local_files_only=True)
        note = _read_note(self._folder, files)
        if note is not None and files_of(self._folder) == files:
            self._check(note.fingerprint)
        else:
            found = fingerprint(model, processor)
            note_model(self._folder, files, model, processor, found)
            self._check(found)
        return model, processor

    def _check(self, fingerprint: str) -> None:
        if fingerprint != self.about.fingerprint:
            again = embed_command(self.about.model, self.about.sources, "NEW_INDEX")
            raise ValueError(
                f"the model {shown(self.about.model)} has changed since this index was made with "
                f"it; make the index again: {again}"
            )


def _unit(features: Any) -> np.ndarray:
    """Return the unit vector of features [1, P] of torch."""
    import torch.nn.functional as F

    return F.normalize(features.float(), dim=-1)[0].numpy()


def embed_command(model: str, sources: Sequence[str], out: object) -> str:
    """Return the shell command that embeds these sources, with VIDEOS in place of many."""
    videos = shlex.join(sources) if 0 < len(sources) <= MOST_SOURCES else "VIDEOS"
    return shown(f"clipvip embed {shlex.quote(model)} {videos} --out {shlex.quote(str(out))}")


def model_here(model: str, sources: Sequence[str]) -> str:
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


class Note(NamedTuple):
    """A note about a model: its fingerprint, and its text tower if NumPy computes it."""

    fingerprint: str
    tower: Description | None


def notes() -> Path | None:
    """Return the folder of notes: $XDG_CACHE_HOME/clipvip or ~/.cache/clipvip; None without a home.

    A note is trusted as much as the user's own files.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "clipvip"
    return None


def files_of(folder: str | Path) -> Files:
    """Return the state of every file in a model folder, sorted; empty if it is no folder.

    Compare it before and after a model is loaded: only if it is equal, nothing was replaced.
    """
    found: Files = []
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(OSError):
                file = entry.stat()  # of what a link leads to, as in the hub's cache
                if stat.S_ISREG(file.st_mode):
                    times = file.st_mtime_ns, file.st_ctime_ns
                    found.append([entry.name, file.st_size, *times, file.st_dev, file.st_ino])
    return sorted(found)


def noted_fingerprint(folder: str | Path) -> str | None:
    """Return the fingerprint of the model in a folder, if it is noted and no file has changed."""
    note = _read_note(Path(folder), files_of(folder))
    return note and note.fingerprint


def note_model(
    folder: str | Path, files: Files, model: Any, processor: Any, fingerprint: str
) -> None:
    """Note a model, so that the next search need not load it whole.

    Nothing is noted if the folder has changed since `files`, or if no note can be written.

    folder: of the model. files: result of `files_of` before the model was loaded from it.
    model, processor: as loaded, on the CPU. fingerprint: clipvip.embedding.fingerprint of them.
    """
    path = _note_path(Path(folder))
    if path is None or not files:
        return
    tower = describe(model, processor, Path(folder))
    if files_of(folder) != files:
        return
    content = {
        "format": NOTES_FORMAT,
        "folder": os.path.realpath(folder),
        "files": files,
        "fingerprint": fingerprint,
        "tower": tower and save_description(tower),
    }
    with suppress(OSError, UnicodeError):  # a full or read-only disk only makes the next one slow
        write_whole(path, json.dumps(content))


def _note_path(folder: Path) -> Path | None:
    home = notes()
    if home is None:
        return None
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    return home / "models" / f"{name}.json"


def _read_note(folder: Path, files: Files) -> Note | None:
    """Return the note of a model whose files are in this state; None if there is none."""
    path = _note_path(folder)
    if path is None or not files:
        return None
    try:
        content = json.loads(path.read_bytes())
        expected = NOTES_FORMAT, os.path.realpath(folder), files
        if tuple(content[name] for name in ("format", "folder", "files")) != expected:
            return None
        fingerprint, tower = content["fingerprint"], content["tower"]
        if not isinstance(fingerprint, str):
            return None
        return Note(fingerprint, None if tower is None else load_description(tower))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or a damaged one
        return None
