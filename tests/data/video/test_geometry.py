"""One geometry: a frame gives the same pixels from a path, as an array, and from a shard."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clipvip.data.shards import write_shards
from clipvip.data.video import Blob, read_frames
from clipvip.ops.resize_crop import RESIZES, resize_frames

SIZE = 48
UPRIGHT = (1, 0, 0, 1)
TURNS = {  # display matrix → as numpy turns the picture
    UPRIGHT: lambda pixels: pixels,
    (0, 1, -1, 0): lambda pixels: np.rot90(pixels, -1),
    (-1, 0, 0, -1): lambda pixels: np.rot90(pixels, 2),
    (0, -1, 1, 0): lambda pixels: np.rot90(pixels, 1),
}


def pictures(width: int, height: int) -> list[np.ndarray]:
    """Two pictures whose grey says where a pixel lies: it grows to the right, or downwards."""
    rows, columns = np.mgrid[0:height, 0:width]
    greys = [columns / (width - 1), rows / (height - 1)]
    return [
        np.repeat((25 + 200 * grey).round().astype(np.uint8)[..., None], 3, 2) for grey in greys
    ]


def brightness(frames: Tensor) -> Tensor:
    """Luma, [N, H, W]: what coding changes least."""
    return (frames.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def in_shard(path: Path, folder: Path) -> Blob:
    """The video as it is stored in a shard that is written with --size."""
    annotations = folder / "clips.jsonl"
    annotations.write_text(json.dumps({"video": str(path), "text": "a"}))
    write_shards(annotations, folder / "shards", size=SIZE, num_workers=0)
    (path,) = (folder / "shards").glob("*.tar")
    with tarfile.open(path) as tar:
        (name,) = (name for name in tar.getnames() if name.endswith(".mp4"))
        return Blob(name, tar.extractfile(name).read())


@pytest.mark.parametrize("matrix", TURNS, ids=str)
@pytest.mark.parametrize("width, height", [(320, 240), (97, 61), (61, 97), (83, 81)])
def test_a_path_an_array_and_a_shard_give_the_same_pixels(
    width: int, height: int, matrix, write_video, turn, tmp_path: Path
) -> None:
    frames = pictures(width, height)
    lossless = {"codec": "libx264", "pixel_format": "yuv444p", "options": {"qp": "0"}}
    path = turn(write_video(tmp_path / "a.mp4", frames, **lossless), matrix)
    shard = in_shard(path, tmp_path)
    upright = torch.from_numpy(np.stack(list(map(TURNS[matrix], frames)))).permute(0, 3, 1, 2)
    for resize in RESIZES:
        array = brightness(resize_frames(upright, SIZE, resize))
        decoded = brightness(read_frames(path, 2, size=SIZE, resize=resize))
        stored = brightness(read_frames(shard, 2, size=SIZE, resize=resize))
        assert (decoded - array).abs().max() <= 2  # rounding to YUV and back
        # A side of odd length is stored one pixel longer, which may move the border of "pad".
        inside = (array > 10) & (stored > 10)
        assert inside.sum() > 0.95 * (array > 10).sum()
        assert (stored - array)[inside].abs().mean() < 1.5  # half a pixel: one makes 3 to 4
