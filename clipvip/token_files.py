"""Write the tokens of a video collection to files, for language models and other programs.

`save_tokens` embeds the clips that `clipvip.collection` finds. It writes a folder:

    tokens.json                 model, its fingerprint, layer and dtype of all files below
    clips.jsonl                 a line per clip: its video, start and end (seconds, null for the
                                video's own), file, and the times of its frames in that video
    3f/3fc0….safetensors        tokens of one clip: "proxies" [M, C], "patches" [N, L, C] and
                                "times" float64 [N]; the metadata are one JSON text, "clip":
                                video, start, end, model and layer
    bad_files.jsonl             files that the last run could not use, and why

With frame_pooling="mean", every frame has proxies of its own: [N, M, C].

A file's name is a hash of the clip and of the size and modification time of its video. Files are
complete or absent. So the same command after any interruption finds what was written, even what
clips.jsonl does not list yet, and resumes from there.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clipvip.collection import IndexedClip, clips_of, listed
from clipvip.data.annotations import Clip
from clipvip.data.loading import COUNTED_FROM, BadFile
from clipvip.embedding import autocast, fingerprint, load_for_embedding, read_clips
from clipvip.files import (
    LIST_BYTES,
    check_folder,
    json_line,
    only_run,
    read_own,
    shown,
    write_whole,
)
from clipvip.model import CLIPViPModel, CLIPViPProcessor
from clipvip.terminal import progress

FORMAT = 1
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SAVE_SECONDS = 60.0  # least time between two saves of the list of clips

_HEAD, _CLIPS, _BAD_FILES = "tokens.json", "clips.jsonl", "bad_files.jsonl"
_FILE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}\.safetensors")

Record = dict[str, Any]  # a line of clips.jsonl


class Head(NamedTuple):
    """Contents of tokens.json: how all files of a folder were made.

    model, fingerprint: absolute path or hub name of the model, and its hash. layer: number of
    layers that the tokens went through. dtype: a key of DTYPES.
    """

    model: str
    fingerprint: str
    layer: int
    dtype: str


def save_tokens(
    model: str | Path,
    videos: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    layer: int = -1,
    dtype: str = "fp16",
    batch_size: int = 16,
    num_workers: int | None = None,
    decoder: str = "auto",
    device: str | torch.device | None = None,
    mixed_precision: str = "auto",
) -> list[Record]:
    """Write the tokens of videos to files in the folder `out`, one per clip.

    Clips that the folder holds already, with unchanged files (same size and modification time), are
    skipped. Tokens of a changed video are replaced. Clips of earlier runs stay, whether `videos`
    names them or not. Files that cannot be used are listed in bad_files.jsonl.

    model, videos, batch_size, num_workers, decoder, device, mixed_precision: see
        `clipvip.index.build.build`.
    out: a new or empty folder, or one that this function made with the same model, layer and dtype.
    layer: see CLIPViPModel.get_video_tokens.
    dtype: "fp16", "bf16" or "fp32", in which tokens are stored. A clip whose tokens are too large
        for fp16 counts as unusable.

    Returns the lines of clips.jsonl for the clips of `videos` that have tokens. Raises ValueError
    if there are none, if a name in `videos` matches nothing, if there is no such layer or dtype,
    and if `out` is refused; OSError if a file cannot be written.
    """
    if not os.fspath(out):
        raise ValueError("out is empty; expected the folder of token files")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    out, workers = Path(out), os.cpu_count() or 1 if num_workers is None else num_workers
    given = [videos] if isinstance(videos, str | os.PathLike) else videos
    sources = [os.fspath(source) for source in given]
    wanted, bad_files = clips_of(sources)
    _check_out(out)
    network, processor = load_for_embedding(model)
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    precision = autocast(network, mixed_precision)
    name = str(Path(model).resolve()) if Path(model).exists() else str(model)
    layer = network.vision_model.layer_index(layer)
    head = Head(name, fingerprint(network, processor), layer, dtype)
    options = {"batch_size": batch_size, "num_workers": workers, "decoder": decoder}
    with only_run(out, "embeds"), precision, torch.inference_mode():
        run = _Run(out, head, bad_files)
        run.write(network, processor, wanted, options)
    found = [run.records[key] for key in map(_key, wanted) if key in run.records]
    if not found:
        first = bad_files[0]
        raise ValueError(
            f"none of {len(wanted)} clips in {shown(listed(sources))} gave tokens; the first: "
            f"{shown(first['path'])}: {shown(first['reason'])}"
        )
    bad = f"; {len(bad_files)} unusable files, see {out / _BAD_FILES}" if bad_files else ""
    print(shown(f"{out}: tokens of {len(run.records)} clips{bad}"), file=sys.stderr)
    return found


class _Run:
    """A run that adds clips to a folder. records: lines of clips.jsonl by clip."""

    def __init__(self, out: Path, head: Head, bad_files: list[dict[str, str]]) -> None:
        self.out, self.head, self.bad_files = out, head, bad_files
        old = _check_out(out)
        if old is not None:
            _check_alike(out, old, head)
        self.is_new = old is None
        self.records = {} if self.is_new else _read_list(out)
        self.replaced: list[str] = []  # files of changed videos

    def write(
        self,
        network: CLIPViPModel,
        processor: CLIPViPProcessor,
        wanted: list[IndexedClip],
        options: dict[str, Any],
    ) -> None:
        """Write the tokens of the wanted clips that have none."""
        todo = [clip for clip in wanted if not self._has(clip)]
        there = f", {len(wanted) - len(todo)} are there already" if len(todo) < len(wanted) else ""
        if todo:
            print(self._size(network, processor, len(todo)), file=sys.stderr)
        written, unfit = 0, {}
        due = time.monotonic() + SAVE_SECONDS
        with progress(f"writing tokens of {len(todo)} clips{there}", len(todo)) as advance:
            for clips in self._computed(network, processor, todo, options):
                for clip, tensors in clips:
                    if reason := self._add(clip, tensors):
                        unfit[clip.path] = reason
                    else:
                        written += 1
                advance(len(clips))
                if len(unfit) >= COUNTED_FROM and not written:
                    path, reason = next(iter(unfit.items()))
                    raise ValueError(
                        f"none of the first {len(unfit)} clips gave tokens, and others were not "
                        f"tried; the first: {shown(path)}: {shown(reason)}"
                    )
                if (started := time.monotonic()) > due:
                    self._save_list()
                    # However long the list grows, saving takes at most a twentieth of the time.
                    due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - started))
        self.bad_files += [{"path": path, "reason": reason} for path, reason in unfit.items()]
        if not self.is_new:
            self._save_list()
            _write_changed(self.out / _BAD_FILES, self.bad_files)

    def _has(self, clip: IndexedClip) -> bool:
        """Whether the clip's file is there; list it if a killed run did not get to that."""
        name, record = _name(clip), self.records.get(_key(clip))
        file = self.out / name
        if record is not None and record["file"] == name:
            return file.is_file() and file.stat().st_size == record["bytes"]
        try:
            data = read_own(file)
            self._list(clip, load(data)["times"], len(data))
        except (OSError, SafetensorError, ValueError, KeyError):
            return False
        return True

    def _size(self, network: CLIPViPModel, processor: CLIPViPProcessor, clips: int) -> str:
        """Say how much the tokens of some clips will take, and if the disk has less."""
        tower, frames = network.vision_model, processor.num_frames
        proxies = tower.config.num_proxies * (frames if _is_pooled_by_mean(network) else 1)
        tokens, width = proxies + frames * tower.patches_per_frame, tower.config.hidden_size
        each = tokens * width * DTYPES[self.head.dtype].itemsize
        free = shutil.disk_usage(self.out).free
        lack = f"; only {_bytes(free)} are free there" if free < each * clips else ""
        return (
            f"{frames} frames give {tokens} tokens of {width} values in {self.head.dtype}: "
            f"at most {_bytes(each)} per clip, {_bytes(each * clips)} in all{lack}"
        )

    def _computed(
        self,
        network: CLIPViPModel,
        processor: CLIPViPProcessor,
        clips: list[IndexedClip],
        options: dict[str, Any],
    ) -> Iterator[list[tuple[IndexedClip, dict[str, Tensor]]]]:
        """Yield batches of clips, each clip with proxies, patches and times, as computed.

        Appends the files that could not be decoded to `bad_files` at the end.
        """
        if not clips:
            return
        options = options | {"num_workers": min(options["num_workers"], len(clips))}
        given = [Clip(Path(clip.path), clip.start, clip.end) for clip in clips]
        unread: list[BadFile] = []
        for batch, frames, offsets in read_clips(network, processor, given, unread, **options):
            tokens: Any = network.get_video_tokens(frames, offsets, layer=self.head.layer)
            lengths = batch["frame_offsets"].diff().tolist()
            by_mean = _is_pooled_by_mean(network)
            proxies = tokens.proxies.split(lengths) if by_mean else tokens.proxies.unbind()
            others = tokens.patches.split(lengths), batch["frame_times"].split(lengths)
            names, places = ("proxies", "patches", "times"), batch["clip_index"].tolist()
            yield [
                (clips[place], dict(zip(names, own, strict=True)))
                for place, *own in zip(places, proxies, *others, strict=True)
            ]
        self.bad_files += [{"path": bad.path, "reason": bad.reason} for bad in unread]

    def _add(self, clip: IndexedClip, tensors: dict[str, Tensor]) -> str | None:
        """Write a clip's file and list it, or return why its tokens cannot be stored."""
        dtype, stored = DTYPES[self.head.dtype], {"times": tensors.pop("times").cpu()}
        for name, tensor in tensors.items():
            stored[name] = tensor.to(dtype).cpu()
            if not stored[name].isfinite().all():
                if not tensor.isfinite().all():
                    return "the model gives no finite tokens for it"
                return f"its tokens are too large for {self.head.dtype}: store them in bf16 or fp32"
        about = {"video": clip.path, "start": clip.start, "end": clip.end}
        about |= {"model": self.head.model, "layer": self.head.layer}
        # Several keys would be saved in random order, and JSON in ASCII holds any name.
        data = save(stored, {"clip": json.dumps(about)})
        try:
            if self.is_new:
                content = json.dumps({"format": FORMAT, **self.head._asdict()}, indent=1)
                write_whole(self.out / _HEAD, content + "\n")
                self.is_new = False
            write_whole(self.out / _name(clip), data)
        except OSError as error:
            raise OSError(
                f"{shown(self.out)} cannot be written to ({error.strerror or error}); the clips "
                "that are there stay: correct that and run the same command again"
            ) from error
        self._list(clip, stored["times"], len(data))
        return None

    def _list(self, clip: IndexedClip, times: Tensor, size: int) -> None:
        """Make the line of a clip whose file is there."""
        old = self.records.get(_key(clip))
        if old is not None and old["file"] != _name(clip):
            self.replaced.append(old["file"])
        self.records[_key(clip)] = {
            "video": clip.path,
            "start": clip.start,
            "end": clip.end,
            "file": _name(clip),
            "bytes": size,
            "frames": len(times),
            "times": [round(seconds, 6) for seconds in times.tolist()],
        }

    def _save_list(self) -> None:
        _write_changed(self.out / _CLIPS, list(self.records.values()))
        for name in self.replaced:
            with suppress(OSError):
                os.unlink(self.out / name)
        self.replaced.clear()


def _check_out(out: Path) -> Head | None:
    """Read tokens.json, if there is one. Raises ValueError if the folder holds something else."""
    check_folder(out, "tokens", lambda: _read_head(out) is not None)
    return _read_head(out)


def _read_head(out: Path) -> Head | None:
    file = out / _HEAD
    try:
        content = json.loads(read_own(file, LIST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{shown(file)}: {error.strerror}; give another --out") from None
    except (ValueError, RecursionError):
        content = None
    kinds = {"model": str, "fingerprint": str, "layer": int, "dtype": str}
    if (
        not isinstance(content, dict)
        or content.pop("format", None) != FORMAT
        or {name: type(value) for name, value in content.items()} != kinds
    ):
        raise ValueError(
            f"{shown(file)} is damaged or from another version of clipvip embed --tokens; give "
            "another --out, or delete the folder"
        )
    return Head(**content)


def _check_alike(out: Path, old: Head, new: Head) -> None:
    """Raise ValueError if a folder's files were made in another way than new ones would be."""
    here, advice = shown(out), "give another --out, or delete it"
    if old.fingerprint != new.fingerprint:
        changed = f"the model {shown(new.model)} has changed since {here} was made with it"
        other = f"{here} holds tokens of the model {shown(old.model)}, not {shown(new.model)}"
        raise ValueError(f"{changed if old.model == new.model else other}; {advice}")
    if (old.layer, old.dtype) != (new.layer, new.dtype):
        raise ValueError(
            f"{here} holds tokens of layer {old.layer} in {shown(old.dtype)}, not of layer "
            f"{new.layer} in {new.dtype}; {advice}"
        )


def _read_list(out: Path) -> dict[tuple[Any, ...], Record]:
    """Read clips.jsonl. Raises ValueError if it is damaged."""
    try:
        lines = read_own(out / _CLIPS).splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{shown(out / _CLIPS)}: {error.strerror}; give another --out") from None
    records = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            # Files of changed videos are deleted, so their names must be such as this module gives.
            if not _FILE.fullmatch(record["file"]) or type(record["bytes"]) is not int:
                raise ValueError
            records[record["video"], record["start"], record["end"]] = record
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(
                f"{shown(out / _CLIPS)} is damaged (line {number}); delete this file and run the "
                "same command again: clips whose tokens are there are listed again"
            ) from None
    return records


def _write_changed(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON Lines unless the file holds them already."""
    data = b"".join(map(json_line, records))
    with suppress(OSError):
        if read_own(path) == data:
            return
    write_whole(path, data)


def _key(clip: IndexedClip) -> tuple[str, float | None, float | None]:
    return clip.path, clip.start, clip.end


def _name(clip: IndexedClip) -> str:
    """Name of a clip's file, which differs if the video has changed."""
    digest = hashlib.sha256(json_line([*_key(clip), clip.size, clip.mtime_ns])).hexdigest()[:32]
    return f"{digest[:2]}/{digest}.safetensors"


def _is_pooled_by_mean(network: CLIPViPModel) -> bool:
    return network.config.vision_config.frame_pooling == "mean"


def _bytes(number: float) -> str:
    """Format a number of bytes, such as 0.909 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size / 2:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"
