"""Read MSR-VTT as its makers and later projects publish it.

A split's videos are listed in one of the files that LISTS names, or in the JSON of the makers.
"""

import csv
import io
import pickletools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clipvip.data.annotations import parse_json
from clipvip.data.published import (
    Item,
    Prepared,
    PrepareError,
    Request,
    bare_name,
    lines_of,
    merge,
    needed,
    open_file,
    reason_of,
    texts_of,
    value_of,
)

# Splits, and the files that may list each of them, in order of preference.
LISTS = {
    "train-9k": (
        "MSRVTT_train.9k.csv",
        "train_list_jsfusion.txt",
        "train_list_9k.txt",
        "msrvtt_ret_train9k.json",
        "train9k.jsonl",
    ),
    "train-7k": ("MSRVTT_train.7k.csv", "train_list_7k.txt", "msrvtt_ret_train7k.json"),
    "train-full": ("train_list_full.txt",),
    "val": ("val_list_full.txt", "msrvtt_ret_val*.json"),
    "test-1k": (  # also known as 1k-A
        "MSRVTT_JSFUSION_test.csv",
        "val_list_jsfusion.txt",
        "msrvtt_ret_test1k.json",
        "test1ka.jsonl",
    ),
    "test-full": ("test_list_full.txt",),
}
# Plain names of splits: the first of these that is present.
PLAIN = {"train": ("train-9k", "train-7k", "train-full"), "test": ("test-1k", "test-full")}
PICKLE_BYTES = 1 << 24
# Splits as the JSON of the makers, with `videos` and `sentences`, names them.
MAKERS = {"train": "train-full", "validate": "val", "test": "test-full"}


class _Listed(NamedTuple):
    """The videos of a split, and their texts if the list has them."""

    split: str
    path: Path
    texts: dict[str, list[str] | None]


def msrvtt_items(request: Request) -> Iterator[Item]:
    """Yield the videos of a split, each with its captions."""
    done = request.done
    texts, numbered, makers = _read_captions(request)
    wanted = PLAIN.get(request.split, (request.split,))
    found = (_read_list(request, split, makers, done) for split in wanted)
    listed = next((one for one in found if one is not None), None)
    if listed is None:
        names = ", ".join(name for split in wanted for name in LISTS[split])
        raise PrepareError(
            f"{request.source} holds no list of {request.split}; expected {names}, or a JSON with "
            "videos and sentences; give another --split, or the folder with the lists"
            + "".join(f"; {bad}" for bad in done.bad[:1])
        )
    done.notes.append(f"{request.split}: {listed.split} as {listed.path} lists it")
    _warn_of_shared(request, listed, makers)
    picked = None
    if listed.path.name == "val_list_jsfusion.txt":
        picked = _read_picked(request)
        texts = numbered
    for video, said in listed.texts.items():
        said = texts.get(bare_name(video), []) if said is None else said
        with done.tolerate(f"{listed.path}: {video}"):
            if picked is not None:
                if video not in picked:
                    raise ValueError("the number of its caption is missing")
                if not 0 <= (number := picked[video]) < len(said):
                    raise ValueError(f"caption {number} of {len(said)}")
                said = [said[number]]
            yield Item(video, said)


def _read_captions(
    request: Request,
) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, _Listed]]:
    """Read all captions by video, those of frozen-in-time's JSON alone, and the makers' splits."""
    done = request.done
    numbered: list[tuple[str, list[str]]] = []
    others: list[tuple[str, list[str]]] = []
    makers: dict[str, _Listed] = {}

    def split(video: Any) -> tuple[str, str]:
        return value_of(video, "video_id", str), value_of(video, "split", str)

    def captions_by(key: str) -> Callable[[Any], tuple[str, list[str]]]:
        return lambda record: (value_of(record, key, str), texts_of(record, "caption"))

    for path in request.find("*.json") if request.source.is_dir() else [request.source]:
        with done.tolerate(path):
            content = parse_json(done.read_text(path))
            keys = content.keys() if isinstance(content, dict) else set()
            if {"videos", "sentences"} <= keys:
                records = content["sentences"]
                others += done.entries(records, f"{path}: sentence ", captions_by("video_id"))
                for video, name in done.entries(content["videos"], f"{path}: video ", split):
                    name = MAKERS.get(name, name)
                    makers.setdefault(name, _Listed(name, path, {})).texts[video] = None
            elif {"images", "annotations"} <= keys:
                records = content["annotations"]
                numbered += done.entries(records, f"{path}: annotation ", captions_by("image_id"))
    return merge(others + numbered), merge(numbered), makers


def _read_list(
    request: Request, split: str, makers: dict[str, _Listed], done: Prepared
) -> _Listed | None:
    path = next(iter(request.find(*LISTS[split])), None)
    if path is None:
        return makers.get(split)
    texts: dict[str, list[str] | None] = {}
    with needed(path):
        if path.suffix == ".csv":
            for video, said in _rows(path, done):
                texts[video] = None if said is None else [*(texts.get(video) or []), said]
        elif path.suffix == ".txt":
            texts = dict.fromkeys(filter(None, map(str.strip, lines_of(done.read_text(path)))))
        else:
            texts |= done.captioned(path)
    return _Listed(split, path, texts)


def _warn_of_shared(request: Request, listed: _Listed, makers: dict[str, _Listed]) -> None:
    """Warn of videos in both training and evaluation splits, such as those of val in 9k."""
    videos = set(map(bare_name, listed.texts))
    trains = listed.split.startswith("train")
    for split in LISTS:
        if split.startswith("train") == trains:
            continue
        try:
            other = _read_list(request, split, makers, Prepared())
        except PrepareError:
            continue
        if other and (shared := videos & set(map(bare_name, other.texts))):
            request.done.notes.append(
                f"warning: {len(shared)} of the {len(videos)} videos of {listed.split} are in "
                f"{split} too ({other.path.name}): do not train on one and evaluate on the other"
            )


# Operations in the pickle of a plain dictionary: those that hold values, and those that join them.
VALUES = frozenset(
    ("BINSTRING", "BINUNICODE", "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1")
    + ("SHORT_BINSTRING", "SHORT_BINUNICODE", "STRING", "UNICODE")
)
JOINS = frozenset(
    ("BINPUT", "DICT", "EMPTY_DICT", "FRAME", "LONG_BINPUT", "MARK", "MEMOIZE", "PROTO", "PUT")
    + ("SETITEM", "SETITEMS", "STOP")
)


def _numbers(data: bytes) -> dict[str, int]:
    """Read numbers by names from a pickle; executing it could run any code, use any memory."""
    values = []
    for operation, value, _ in pickletools.genops(data):
        if operation.name in VALUES:
            values.append(value)
        elif operation.name not in JOINS:
            raise ValueError(f"it holds something else ({operation.name})")
    names = [value for value in values[::2] if isinstance(value, str)]
    numbers = [value for value in values[1::2] if type(value) is int]
    if not len(names) == len(numbers) == len(values) / 2 > 0:
        raise ValueError("it holds something else")
    return dict(zip(names, numbers, strict=True))


def _read_picked(request: Request) -> dict[str, int]:
    """Read which caption of each video 1k-A uses."""
    name, instead = "jsfusion_val_caption_idx.pkl", "or MSRVTT_JSFUSION_test.csv instead"
    path = next(iter(request.find(name)), None)
    if path is None:
        raise PrepareError(
            f"{request.source}: val_list_jsfusion.txt without {name}, which says which caption of "
            f"each video to use; put it there, {instead}"
        )
    try:
        with open_file(path, PICKLE_BYTES) as file:
            return _numbers(file.read())
    except Exception as error:  # a damaged pickle can raise anything
        reason = reason_of(error) or type(error).__name__
        raise PrepareError(
            f"{path}: expected the number of a caption by video, but {reason}; put the published "
            f"file there, {instead}"
        ) from error


def _rows(path: Path, done: Prepared) -> Iterator[tuple[str, str | None]]:
    """Yield video_id and sentence of each row of a CSV; None if it has no column of sentences."""
    text = done.read_text(path)
    rows: list[Any]
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error:  # such as a quotation mark without its partner, which hides later rows
        rows = lines_of(text)

    def fields(row: Any) -> list[str]:
        return next(csv.reader([row], strict=True), []) if isinstance(row, str) else row

    columns = fields(rows[0]) if rows else []
    if "video_id" not in columns:
        raise ValueError(f"no column video_id; it has {', '.join(columns) or 'none'}")

    def take(row: Any) -> tuple[str, str | None] | None:
        given = fields(row)
        if given in ([], columns):
            return None
        if len(given) != len(columns):
            raise ValueError(f"{len(given)} fields, expected {len(columns)}")
        named = dict(zip(columns, given, strict=True))
        return named["video_id"].strip(), named.get("sentence")

    return done.entries(rows, f"{path}: row ", take)
