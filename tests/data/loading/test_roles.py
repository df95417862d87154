"""The table of roles.py: which parts of a clip post-pretraining compares."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipvip.data.annotations import Clip, load_annotations
from clipvip.data.loading import COMPARED, LoaderOptions, build_loader, texts_compared
from clipvip.data.shards import Shards, Source, build_shard_loader, write_shards
from clipvip.data.shards.manifest import load_manifest

# Keys of the clip: its frames as a video, its subtitle and its caption, with a loss that compares
# all; of an image, the frames in a loss that compares no frame.
TABLE: dict[str, tuple[dict[str, Any], int, str | None, str | None]] = {
    "video, subtitle": ({"subtitle": "s"}, 2, "s", None),
    "video, caption": ({"caption": "c"}, 2, None, "c"),
    "video, subtitle, caption": ({"subtitle": "s", "caption": "c"}, 2, "s", "c"),
    "video, text": ({"text": "t"}, 2, "t", None),
    "video, text, caption": ({"text": "t", "caption": "c"}, 2, "t", "c"),
    "video, text, subtitle": ({"text": "t", "subtitle": "s"}, 2, "s", None),
    "video, text like the caption": ({"text": "c", "caption": "c"}, 2, None, "c"),
    "video, one text like the caption": ({"text": ["c", "t"], "caption": "c"}, 2, "t", "c"),
    "video, image, text": ({"image": "i.png", "text": "t"}, 2, "t", None),
    "image, caption": ({"video": "i.png", "caption": "c"}, 0, None, "c"),
    "image, text": ({"video": "i.png", "text": "t"}, 0, None, "t"),
    "image, text, caption": ({"video": "i.png", "text": "t", "caption": "c"}, 0, None, "c"),
    "image, subtitle": ({"video": "i.png", "subtitle": "s", "text": "t"}, 1, "s", "t"),
    "image, other image": ({"video": "i.png", "image": "j.png", "text": "t"}, 1, None, "t"),
}


@pytest.fixture(scope="module")
def folder(make_video, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of each row of the table, as annotations and in a shard each."""
    folder = tmp_path_factory.mktemp("roles")
    video = make_video("one.mp4")
    for name in ("i", "j"):
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(folder / f"{name}.png")
    for row, (keys, *_) in TABLE.items():
        line = json.dumps({"video": str(video)} | keys) + "\n"
        (folder / f"{row}.jsonl").write_text(line * 4)
        write_shards(folder / f"{row}.jsonl", folder / row, num_workers=0)
    return folder


def batch_of(folder: Path, row: str, kind: str, tokenizer: Any, compared: tuple[str, ...]) -> Any:
    options = LoaderOptions(
        tokenizer=tokenizer,
        task="omnisource",
        batch_size=4,
        image_size=16,
        num_frames=2,
        text_length=8,
        seed=0,
        compared=compared,
    )
    if kind == "shards":
        loader = build_shard_loader(Shards([Source(str(folder / row))]), options)
    else:
        loader = build_loader(load_annotations(folder / f"{row}.jsonl"), options, training=True)
    (batch,) = loader
    return batch


def text_of(batch: Any, name: str, tokenizer: Any) -> str | None:
    if not batch[f"{name}_present"].any():
        return None
    assert batch[f"{name}_present"].all()
    (text,) = {tokenizer.decode(ids, skip_special_tokens=True) for ids in batch[f"{name}_ids"]}
    return text.strip()


@pytest.mark.parametrize("kind", ["annotations", "shards"])
@pytest.mark.parametrize("row", TABLE)
def test_a_clip_takes_the_parts_of_its_row(
    row: str, kind: str, folder: Path, tokenizer: Any
) -> None:
    _, frames, subtitle, caption = TABLE[row]
    batch = batch_of(folder, row, kind, tokenizer, COMPARED)
    assert set(batch["frame_offsets"].diff().tolist()) == {frames}
    assert batch["video_present"].tolist() == [frames > 0] * 4
    assert len(batch["pixel_values"]) == 4 * frames and len(batch["image"]) == 4
    assert text_of(batch, "subtitle", tokenizer) == subtitle
    assert text_of(batch, "caption", tokenizer) == caption
    clip = load_annotations(folder / f"{row}.jsonl")[0]
    found = texts_compared(clip, clip.video.suffix == ".png", COMPARED)
    given = {"subtitle": subtitle, "caption": caption}
    assert found == {name for name, text in given.items() if text is not None}


@pytest.mark.parametrize("row", [row for row in TABLE if row.startswith("image")])
def test_an_image_is_a_video_of_one_frame_where_no_frame_is_compared(
    row: str, folder: Path, tokenizer: Any
) -> None:
    _, _, subtitle, caption = TABLE[row]
    batch = batch_of(folder, row, "annotations", tokenizer, ("subtitle", "caption"))
    assert set(batch["frame_offsets"].diff().tolist()) == {1} and batch["video_present"].all()
    assert text_of(batch, "subtitle", tokenizer) == subtitle
    assert text_of(batch, "caption", tokenizer) == caption


@pytest.mark.parametrize("row", ["image, text", "video, text like the caption", "video, text"])
def test_a_text_is_a_subtitle_where_no_caption_is_compared(
    row: str, folder: Path, tokenizer: Any
) -> None:
    batch = batch_of(folder, row, "annotations", tokenizer, ("subtitle",))
    assert text_of(batch, "subtitle", tokenizer) == TABLE[row][0]["text"]
    assert batch["video_present"].all()


def test_other_tasks_are_as_they_were(folder: Path, tokenizer: Any) -> None:
    clips = [Clip(folder / "i.png", text=("t",))] * 2
    options = LoaderOptions(
        tokenizer=tokenizer, task="retrieval", batch_size=2, image_size=16, num_frames=2,
        text_length=8, seed=0,
    )  # fmt: skip
    (batch,) = build_loader(clips, options, training=True)
    assert batch["frame_offsets"].tolist() == [0, 1, 2] and "video_present" not in batch


def test_a_manifest_counts_images_and_older_ones_do_not_say(folder: Path, tmp_path: Path) -> None:
    for row in TABLE:
        source = Source(str(folder / row))
        assert source.images == 4 * row.startswith("image")
    lines = (folder / "image, text" / "manifest.jsonl").read_text()
    record = json.loads(lines)
    del record["images"]
    (tmp_path / "manifest.jsonl").write_text(json.dumps(record) + "\n")
    ((_, shard),) = load_manifest(str(tmp_path))
    assert shard.images is None and Source(str(tmp_path)).images is None
