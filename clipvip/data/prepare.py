"""Make annotations (clipvip.data.annotations) from data sets as they are published.

| set | files read | texts of a clip |
|---|---|---|
| msrvtt | lists of a split's videos (see clipvip.data.msrvtt), and JSON files with `videos` and `sentences` or, in frozen-in-time's form, `images` and `annotations` | all captions; one in 1k-A |
| didemo | {train,val,test}_data.json | all descriptions of a video, in their order |
| lsmdc | LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_challenge_1000_publictect.csv | its sentence |
| activitynet | train.json, val_1.json (val and test both mean it, as papers test on it) | all sentences of a video |
| hdvila | .jsonl of clips (`clip_id`, perhaps `text`) or of videos (`video_id`, `clip`: spans); LMDBs from clip_id to text, in folders with "subtitle" or "caption" in their names | a subtitle, a caption |
| captions | JSON Lines, or a JSON list, of {`clip_id`, `text`} (CLIP-ViP authors) or {`video`, `caption`} (ALPRO, LAVIS, VindLU) | all texts of its video |
| folder | videos and images, each with a .txt file beside it | one text per line |

Videos are found by name anywhere in the source's folder, with any video suffix. Several texts of a
clip become a list: alternatives, or one paragraph if `data.paragraph` is true.
"""  # noqa: E501

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import starmap
from pathlib import Path
from typing import Any

from clipvip.data.annotations import Clip, parse_json, parse_record, write_annotations
from clipvip.data.msrvtt import LISTS, msrvtt_items
from clipvip.data.published import (
    Item,
    Prepared,
    PrepareError,
    Request,
    as_kind,
    is_media,
    is_video,
    lines_in,
    lines_of,
    merge,
    needed,
    open_file,
    texts_of,
    value_of,
)
from clipvip.files import TEXT_BYTES

SPLITS = ("train", "val", "test")
NOWHERE = Path()  # stands for a video that was searched for and not found


def prepare(
    kind: str,
    source: Path,
    out: Path,
    *,
    videos: Path | None = None,
    split: str = "train",
    first_30s: bool = False,
) -> Prepared:
    """Write the annotations of one split, without clips that lack a video or any text.

    videos: folder of the videos, if it is not the source.
    first_30s: end each clip after 30 seconds; for DiDeMo, whose annotators saw no more of a video.
    Raises PrepareError if files are missing or not as published, or if no clip is left.
    """
    if kind not in SETS:
        raise PrepareError(f"no data set {kind!r}; known: {', '.join(SETS)}")
    splits = tuple(dict.fromkeys([*SPLITS, *LISTS])) if kind == "msrvtt" else SPLITS
    if split not in splits:
        raise PrepareError(f"split is {split!r}; {kind} has {', '.join(splits)}")
    if first_30s and kind not in ("didemo", "captions"):
        raise PrepareError(f"first_30s is for didemo (or captions of it), not for {kind}")
    if not source.exists():
        raise PrepareError(f"{source}: no such file or folder")
    folder = videos or (source if source.is_dir() else source.parent)
    if not folder.is_dir():
        raise PrepareError(f"{folder}: no such folder of videos")
    done = Prepared()
    request = Request(source, split, folder, out, done)
    items = SETS[kind](request)

    def clips() -> Iterator[Clip]:
        for item in items:
            if clip := _clip(item._replace(end=30.0) if first_30s else item, request):
                done.clips += 1
                yield clip
        if not done.clips:
            raise PrepareError(f"{source}: no clip is left; {_losses(done, folder)}")

    write_annotations(out, clips())
    return done


def _clip(item: Item, request: Request) -> Clip | None:
    """Return the clip of an item, or None and note the reason."""
    done = request.done
    texts = [text.strip() for text in item.texts]
    record = {
        "start": item.start,
        "end": item.end,
        "text": [text for text in dict.fromkeys(texts) if text] or None,
        "subtitle": (item.subtitle or "").strip() or None,
        "caption": (item.caption or "").strip() or None,
    }
    video = request.video(item.key) if item.video is None else item.video
    if not (record["text"] or record["subtitle"] or record["caption"]):
        done.mute.append(item.key)
    elif video in (None, NOWHERE):
        done.missing.append(item.key)
    else:
        # Checked like a line of annotations, so that the file can be read back.
        with done.tolerate(item.key):
            clip = parse_record(record | {"video": str(video)}, Path())
            if clip.repaired:
                done.repaired.append(item.key)
            return clip
    return None


def _losses(done: Prepared, folder: Path) -> str:
    lost = {
        f"videos were not found in {folder}": done.missing,
        "clips have no text": done.mute,
        "lines or files cannot be used": done.bad,
    }
    reasons = [f"{len(some)} {what}, the first: {some[0]}" for what, some in lost.items() if some]
    return "; ".join(reasons) or "the source names no clips"


def _captions(request: Request) -> Iterator[Item]:
    path = request.source
    if path.is_dir():
        word = re.compile(rf"(?<![a-z]){request.split}(?![a-z])", re.IGNORECASE)
        found = [p for p in request.find("*.jsonl", "*.json") if word.search(p.stem)]
        if len(found) != 1:
            names = ": " + ", ".join(path.name for path in found[:5]) if found else ""
            raise PrepareError(
                f"{path}: {len(found)} files .jsonl or .json have {request.split!r} in their "
                f"names{names}; expected one: give the file itself as the source, and --videos"
            )
        path = found[0]
    with needed(path):
        texts = request.done.captioned(path)
    request.done.notes.append(f"read {path}")
    yield from starmap(Item, texts.items())


def _didemo(request: Request) -> Iterator[Item]:
    path = request.file(f"{request.split}_data.json")

    def parse(moment: Any) -> tuple[str, list[str]]:
        return value_of(moment, "video", str), [value_of(moment, "description", str)]

    moments = request.done.load_json(path, list)
    texts = merge(request.done.entries(moments, f"{path}: entry ", parse))
    yield from starmap(Item, texts.items())


def _lsmdc(request: Request) -> Iterator[Item]:
    names = {"train": "annos_training", "val": "annos_val", "test": "challenge_1000_publictect"}
    path = request.file(f"LSMDC16_{names[request.split]}.csv")

    def parse(line: str) -> tuple[str, list[str]] | None:
        fields = line.split("\t")  # not quoted: quotation marks belong to the sentences
        if not line.strip():
            return None
        if len(fields) < 6:
            raise ValueError(f"{len(fields)} fields, expected 6 between tabs")
        return fields[0], [fields[5]]

    with needed(path):
        lines = lines_of(request.done.read_text(path))
    texts = merge(request.done.entries(lines, f"{path}:", parse))
    yield from starmap(Item, texts.items())


def _activitynet(request: Request) -> Iterator[Item]:
    path = request.file("train.json" if request.split == "train" else "val_1.json")
    for video, content in request.done.load_json(path, dict).items():
        with request.done.tolerate(f"{path}: {video}"):
            yield Item(video, texts_of(content, "sentences"))


def _hdvila(request: Request) -> Iterator[Item]:
    given = request.find("*.jsonl") if request.source.is_dir() else [request.source]
    if not given:
        raise PrepareError(f"{request.source}: holds no .jsonl file")
    done = request.done
    with ExitStack() as stack:
        find = {name: _database(request, name, stack) for name in ("subtitle", "caption")}
        for path in given:
            with needed(path):
                file = stack.enter_context(open_file(path))
            for number, line in enumerate(lines_in(file), 1):
                clips: list[Any] = []
                with done.tolerate(f"{path}:{number}"):
                    if len(line) > TEXT_BYTES:
                        raise ValueError(f"a line of more than {TEXT_BYTES} bytes")
                    if line.strip():
                        record = as_kind(parse_json(line.decode("utf-8-sig")), dict)
                        clips = as_kind(record.get("clip") or [record], list)
                for clip in clips:
                    with done.tolerate(f"{path}:{number}"):
                        yield _hdvila_item(clip, find, request.videos)


def _hdvila_item(clip: Any, find: dict[str, Callable[[str], str | None]], videos: Path) -> Item:
    key = value_of(clip, "clip_id", str)
    span = as_kind(clip.get("span") or [None, None], list)
    if len(span) != 2:
        raise ValueError(f"span of {len(span)} times, expected 2")
    start, end = map(_seconds, span)
    subtitle = find["subtitle"](key)
    if subtitle is None and clip.get("text") is not None:
        subtitle = value_of(clip, "text", str)
    item = Item(key, subtitle=subtitle, caption=find["caption"](key))
    video = _hdvila_video(videos, key)
    if video is None and start is not None:
        video = _hdvila_video(videos, key.partition(".")[0])
        item = item._replace(start=start, end=end)
    return item._replace(video=video or NOWHERE)


def _hdvila_video(videos: Path, key: str) -> Path | None:
    """Find a clip that was cut from its video: in a folder named after that, or in `videos`."""
    names = [key] if is_video(key) else [f"{key}.mp4", f"{key}.mkv", f"{key}.webm"]
    folders = (videos / key.partition(".")[0], videos)
    return next((p for f in folders for n in names if (p := f / n).is_file()), None)


def _database(request: Request, name: str, stack: ExitStack) -> Callable[[str], str | None]:
    """Return a function from clip_id to its text, if any, in the LMDB with `name` in its folder."""
    files = [path for path in request.find("data.mdb") if os.path.isfile(path)]
    folder = next((path.parent for path in files if name in path.parent.name), None)
    if folder is None:
        return lambda key: None
    try:
        import lmdb
    except ImportError:
        raise PrepareError(
            f'{folder} is an LMDB; to read it: pip install "clipvip[lmdb]"'
        ) from None
    try:
        opened = lmdb.open(os.fsencode(folder), readonly=True, lock=False, readahead=False)
        environment = stack.enter_context(opened)
        transaction = stack.enter_context(environment.begin())
    except Exception as error:
        raise PrepareError(f"{folder}: not an LMDB that can be read ({error})") from error

    def find(key: str) -> str | None:
        encoded = key.encode()
        if not 0 < len(encoded) <= environment.max_key_size():
            raise ValueError(f"clip_id of {len(encoded)} bytes")
        try:
            value = transaction.get(encoded)
        except lmdb.Error as error:
            raise ValueError(f"{folder}: {error}") from error
        return None if value is None else bytes(value).decode()

    return find


def _seconds(time: Any) -> float | None:
    """Return a time such as "00:04:52.140" in seconds."""
    if time is None:
        return None
    try:
        hours, minutes, seconds = as_kind(time, str).split(":")
        return round(int(hours) * 3600 + int(minutes) * 60 + float(seconds), 3)
    except ValueError as error:
        raise ValueError(f"span: expected times such as 00:04:52.140, got {time!r}") from error


def _folder(request: Request) -> Iterator[Item]:
    media: list[Path] = []
    texts: dict[str, Path] = {}
    others: Counter[str] = Counter()
    for path in request.all_in(request.videos, lambda name: True):
        stem, suffix = os.path.splitext(path)
        if is_media(path.name):
            media.append(path)
        elif suffix.lower() == ".txt":
            texts[stem] = path
        else:
            others[suffix.lower() or "without a suffix"] += 1
    if alone := len(texts.keys() - {os.path.splitext(path)[0] for path in media}):
        others[".txt"] = alone
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        request.done.notes.append(f"{others.total()} files of other kinds skipped: {kinds}")

    def items() -> Iterator[Item]:
        for path in media:
            beside = texts.get(os.path.splitext(path)[0])
            with request.done.tolerate(beside):
                text = request.done.read_text(beside, TEXT_BYTES) if beside else ""
                key = str(path.relative_to(request.videos))
                yield Item(key, lines_of(text), video=path)

    return items()


SETS: dict[str, Callable[[Request], Iterator[Item]]] = {
    "msrvtt": msrvtt_items,
    "didemo": _didemo,
    "lsmdc": _lsmdc,
    "activitynet": _activitynet,
    "hdvila": _hdvila,
    "captions": _captions,
    "folder": _folder,
}
