"""Annotations (clipvip.data.annotations) from data sets as their makers publish them.

| set | what is read | split |
|---|---|---|
| msrvtt | JSON files with `videos` and `sentences`; MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv (1k-A) where they lie beside them | train: the 9k or 7k CSV, else the JSON's; test: 1k-A, else the JSON's; val: the JSON's |
| didemo | {train,val,test}_data.json | all descriptions of a video, in their order |
| lsmdc | LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_challenge_1000_publictect.csv | |
| activitynet | train.json, val_1.json (papers test on it: val and test both mean it) | all sentences of a video |
| hdvila | .jsonl of clips (`clip_id`, perhaps `text`) or of videos (`video_id`, `clip`: spans); LMDBs from clip_id to text, whose folders have "subtitle" or "caption" in their names | |
| folder | videos and images with a .txt beside them, a text a line | |

Videos are found by name anywhere in the source's folder, whatever their container. Several texts
of a clip stand as a list: alternatives, or with `data.paragraph: true` one paragraph.
"""  # noqa: E501

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from clipvip.data.annotations import Clip, write_annotations
from clipvip.data.container import IMAGE_SUFFIXES, VIDEO_SUFFIXES

SPLITS = ("train", "val", "test")


class PrepareError(ValueError):
    """A source that cannot be converted; one line that says what was looked for."""


NOWHERE = Path()  # a video that was looked for already


class Item(NamedTuple):
    """What a data set says of a clip; `key` names its video as the set does."""

    key: str
    texts: tuple[str, ...] = ()
    subtitle: str | None = None
    caption: str | None = None
    start: float | None = None
    end: float | None = None
    video: Path | None = None
    """Where it lies, if that is known; else it is looked for by its key."""


@dataclass
class Prepared:
    """How many clips were written, and which had no video or no words."""

    clips: int = 0
    missing: list[str] = field(default_factory=list)
    mute: list[str] = field(default_factory=list)


def prepare(
    kind: str, source: Path, out: Path, *, videos: Path | None = None, split: str = "train"
) -> Prepared:
    """Write the annotations of one split. videos: where the videos lie, if not in the source.

    Clips whose video is missing, or of which nothing is said, are left out.
    Raises PrepareError: files not found or not as published, or no clip is left.
    """
    if kind not in SETS:
        raise PrepareError(f"no data set {kind!r}; known: {', '.join(SETS)}")
    if split not in SPLITS:
        raise PrepareError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    if not source.exists():
        raise PrepareError(f"{source}: no such file or folder")
    folder = videos or (source if source.is_dir() else source.parent)
    find = _Finder(folder)
    done = Prepared()

    def clips() -> Iterator[Clip]:
        for item in SETS[kind](source, split, folder):
            texts = tuple(dict.fromkeys(text.strip() for text in item.texts if text.strip()))
            subtitle, caption = (item.subtitle or "").strip(), (item.caption or "").strip()
            video = find(item.key) if item.video is None else item.video
            if not (texts or subtitle or caption):
                done.mute.append(item.key)
            elif video in (None, NOWHERE):
                done.missing.append(item.key)
            else:
                done.clips += 1
                times = (item.start, item.end)
                yield Clip(video, *times, texts, subtitle or None, caption or None)
        if not done.clips:
            raise PrepareError(
                f"none of {len(done.missing)} videos named in {source} was found in {folder}"
                + (f"; the first: {done.missing[0]}" if done.missing else "")
                + (f"; of {len(done.mute)} nothing is said" if done.mute else "")
            )

    try:
        write_annotations(out, clips())
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise PrepareError(f"{source}: not as {kind} is published ({what})") from error
    return done


class _Finder:
    """Videos of a folder by the names that data sets give them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Path] | None = None

    def __call__(self, key: str) -> Path | None:
        if self.names is None:  # not before it must be: there may be a hundred million
            self.names = {}
            for path in sorted(self.folder.rglob("*")):
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    for name in (path.name, path.stem):
                        self.names.setdefault(name, path)
        bare = Path(key).stem if Path(key).suffix.lower() in VIDEO_SUFFIXES else key
        found = (self.names.get(name) for name in (key, bare, bare.removeprefix("v_")))
        return next((path for path in found if path is not None), None)


def _file(source: Path, *names: str) -> Path:
    """The first of these that the source is or holds."""
    for name in names:
        if source.is_file() and source.name == name:
            return source
        found = sorted(source.rglob(name)) if source.is_dir() else []
        if found:
            return found[0]
    raise PrepareError(f"{source}: no {' or '.join(names)} there")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PrepareError(f"{path}: not JSON ({error})") from error


def _msrvtt(source: Path, split: str, videos: Path) -> Iterator[Item]:
    given = [source] if source.is_file() else sorted(source.rglob("*.json"))
    texts: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for path in given:
        content = _json(path)
        if isinstance(content, dict) and {"videos", "sentences"} <= content.keys():
            splits |= {video["video_id"]: video["split"] for video in content["videos"]}
            for sentence in content["sentences"]:
                texts.setdefault(sentence["video_id"], []).append(sentence["caption"])
    names = {"train": ("MSRVTT_train.9k.csv", "MSRVTT_train.7k.csv"), "val": ()}
    tables = names.get(split, ("MSRVTT_JSFUSION_test.csv",))
    folder = source if source.is_dir() else source.parent
    found = next((path for name in tables for path in sorted(folder.rglob(name))), None)
    if found is not None:
        with found.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                video = row["video_id"]
                said = [row["sentence"]] if "sentence" in row else texts.get(video, [])
                yield Item(video, tuple(said))
        return
    if not splits:
        raise PrepareError(f"{source}: no JSON with videos and sentences there")
    wanted = "validate" if split == "val" else split
    for video, its in splits.items():
        if its == wanted:
            yield Item(video, tuple(texts.get(video, ())))


def _didemo(source: Path, split: str, videos: Path) -> Iterator[Item]:
    texts: dict[str, list[str]] = {}
    for moment in _json(_file(source, f"{split}_data.json")):
        texts.setdefault(moment["video"], []).append(moment["description"])
    for video, said in texts.items():
        yield Item(video, tuple(said))


def _lsmdc(source: Path, split: str, videos: Path) -> Iterator[Item]:
    name = {
        "train": "LSMDC16_annos_training.csv",
        "val": "LSMDC16_annos_val.csv",
        "test": "LSMDC16_challenge_1000_publictect.csv",
    }[split]
    texts: dict[str, list[str]] = {}
    path = _file(source, name)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")  # no quoting: sentences hold quotation marks of their own
        if len(fields) < 6:
            raise PrepareError(f"{path}:{number}: {len(fields)} fields, expected 6 between tabs")
        texts.setdefault(fields[0], []).append(fields[5])
    for clip, said in texts.items():
        yield Item(clip, tuple(said))


def _activitynet(source: Path, split: str, videos: Path) -> Iterator[Item]:
    path = _file(source, "train.json" if split == "train" else "val_1.json")
    for video, content in _json(path).items():
        yield Item(video, tuple(content["sentences"]))


def _hdvila(source: Path, split: str, videos: Path) -> Iterator[Item]:
    given = [source] if source.is_file() else sorted(source.rglob("*.jsonl"))
    if not given:
        raise PrepareError(f"{source}: no .jsonl there")
    folder = source if source.is_dir() else source.parent
    with ExitStack() as stack:
        databases = {name: _database(folder, name, stack) for name in ("subtitle", "caption")}
        for path in given:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        raise PrepareError(f"{path}:{number}: not JSON ({error})") from error
                    for clip in record.get("clip") or [record]:
                        key = clip["clip_id"]
                        start, end = map(_seconds, clip.get("span") or (None, None))
                        said = {name: find(key) for name, find in databases.items()}
                        said["subtitle"] = said["subtitle"] or clip.get("text")
                        item = Item(key, subtitle=said["subtitle"], caption=said["caption"])
                        video = _hdvila_video(videos, key)
                        if video is None and start is not None:
                            video = _hdvila_video(videos, key.partition(".")[0])
                            item = item._replace(start=start, end=end)
                        yield item._replace(video=video or NOWHERE)


def _hdvila_video(videos: Path, key: str) -> Path | None:
    """A cut clip lies in a folder of its video's name, or with the others."""
    names = (
        [key] if Path(key).suffix in VIDEO_SUFFIXES else [f"{key}.mp4", f"{key}.mkv", f"{key}.webm"]
    )
    folders = (videos / key.partition(".")[0], videos)
    return next((p for f in folders for n in names if (p := f / n).is_file()), None)


def _database(folder: Path, name: str, stack: ExitStack) -> Callable[[str], str | None]:
    """Looks a clip_id up in the LMDB whose folder has `name` in its own; None where none is."""
    found = [path.parent for path in sorted(folder.rglob("data.mdb")) if name in path.parent.name]
    if not found:
        return lambda key: None
    try:
        import lmdb
    except ImportError:
        raise PrepareError(f"{found[0]} is an LMDB: `pip install clipvip[lmdb]`") from None
    environment = stack.enter_context(
        lmdb.open(str(found[0]), readonly=True, lock=False, readahead=False)
    )
    transaction = stack.enter_context(environment.begin())

    def find(key: str) -> str | None:
        value = transaction.get(key.encode())
        return None if value is None else bytes(value).decode()

    return find


def _seconds(time: str | None) -> float | None:
    """Of "00:04:52.140"."""
    if time is None:
        return None
    hours, minutes, seconds = time.split(":")
    return round(int(hours) * 3600 + int(minutes) * 60 + float(seconds), 3)


def _folder(source: Path, split: str, videos: Path) -> Iterator[Item]:
    for path in sorted(videos.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            beside = path.with_suffix(".txt")
            lines = beside.read_text(encoding="utf-8").splitlines() if beside.is_file() else []
            yield Item(str(path.relative_to(videos)), tuple(lines), video=path)


SETS: dict[str, Callable[[Path, str, Path], Iterator[Item]]] = {
    "msrvtt": _msrvtt,
    "didemo": _didemo,
    "lsmdc": _lsmdc,
    "activitynet": _activitynet,
    "hdvila": _hdvila,
    "folder": _folder,
}
