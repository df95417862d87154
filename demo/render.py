"""The demo's data: short H.264 clips of a moving coloured shape, their texts, and films of them.

Every clip plays as likely forwards as backwards: a motion and its reverse show the same frames
in the opposite order, so a model that ignores the order of frames cannot tell them apart.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import cos, pi, sin, sqrt
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

SIZE, FRAMES, RATE = 96, 16, 4  # pixels per side, frames per clip, frames per second
COLOURS = {
    "red": (226, 48, 52),
    "green": (52, 178, 82),
    "blue": (58, 104, 236),
    "yellow": (250, 214, 52),
    "purple": (168, 70, 206),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "triangle", "cross")
MOTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up and to the right": (sqrt(0.5), -sqrt(0.5)),
    "up and to the left": (-sqrt(0.5), -sqrt(0.5)),
    "down and to the right": (sqrt(0.5), sqrt(0.5)),
    "down and to the left": (-sqrt(0.5), sqrt(0.5)),
}
FILMS = ("one.mp4", "two.mp4", "three.mkv")
SHOT_FRAMES = (15, 20)  # fewest and most frames of a film's shot
SPLITS = {"train": 8, "validation": 1, "heldout": 1}  # clips of each sentence
WANDER = 0.1  # largest distance of a path's middle from the centre, as a share of the side
FILLERS = ("um", "uh", "so", "okay", "you see", "look", "over here", "I think", "and now")


@dataclass(frozen=True)
class Scene:
    """Contents of a clip, and the seed of all its random choices."""

    colour: str
    shape: str
    motion: str
    seed: int

    @property
    def text(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.motion}"


def scenes(seed: int) -> dict[str, list[Scene]]:
    """Scenes of each split: each sentence equally often, each scene with a seed of its own."""
    sentences = list(product(COLOURS, SHAPES, MOTIONS))
    numbers: Iterator[int] = iter(range(seed * 1_000_000, (seed + 1) * 1_000_000))
    return {
        split: [Scene(*words, next(numbers)) for words in sentences for _ in range(copies)]
        for split, copies in SPLITS.items()
    }


def render_all(out: Path, seed: int, processes: int) -> dict[str, Path]:
    """Render every split into `out`. Returns the annotations file of each split."""
    annotations = {}
    with ProcessPoolExecutor(processes) as pool:
        for split, wanted in scenes(seed).items():
            folder = out / split
            folder.mkdir(parents=True, exist_ok=True)
            names = [scene.text.removeprefix("a ").replace(" ", "-") for scene in wanted]
            paths = [folder / f"{i:03}-{name}.mp4" for i, name in enumerate(names)]
            records = pool.map(render, wanted, paths, chunksize=16)
            annotations[split] = out / f"{split}.jsonl"
            annotations[split].write_text(
                "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
            )
    return annotations


def render_films(out: Path, seed: int) -> Path:
    """Join the held-out scenes into films in `out`/films, each scene once, in random order.

    Every shot has a length of its own, so that cuts come at irregular times.
    Returns the annotations file, with a line per shot that gives its start and end.
    """
    (out / "films").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    heldout = scenes(seed)["heldout"]
    shares = np.array_split(rng.permutation(len(heldout)), len(FILMS))
    lines = []
    for name, share in zip(FILMS, shares, strict=True):
        film = [heldout[number] for number in share]
        counts = rng.integers(*SHOT_FRAMES, len(film), endpoint=True)
        shots = [
            draw(s, np.random.default_rng(s.seed), n)[0] for s, n in zip(film, counts, strict=True)
        ]
        encode(np.concatenate(shots), out / "films" / name)
        ends = (np.cumsum(counts) / RATE).tolist()
        for scene, start, end in zip(film, [0.0, *ends], ends, strict=False):
            lines.append({"video": f"films/{name}", "start": start, "end": end, "text": scene.text})
    annotations = out / "films.jsonl"
    annotations.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return annotations


def render(scene: Scene, path: Path) -> dict[str, str]:
    """Write one clip. Returns its annotation, with the path relative to the folder above."""
    rng = np.random.default_rng(scene.seed)
    frames, middle = draw(scene, rng)
    encode(frames, path)
    return {
        "video": f"{path.parent.name}/{path.name}",
        "text": scene.text,
        "subtitle": speak(scene, rng),
        "caption": f"a {scene.colour} {scene.shape} {place(middle)}",
    }


def encode(frames: NDArray[np.uint8], path: Path) -> None:
    """Write frames [n, SIZE, SIZE, 3] as H.264, in the container that the path's ending names."""
    with av.open(str(path), "w") as container:
        # x264's macroblock tree gives different bytes in each run, even on one thread.
        coding = {"crf": "18", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=RATE, options=coding)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def draw(
    scene: Scene, rng: np.random.Generator, count: int = FRAMES
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw a scene in `count` frames.

    Returns frames uint8 [count, SIZE, SIZE, 3], and the shape's place half way, in [0, 1]².
    """
    direction = np.array(MOTIONS[scene.motion])
    middle = 0.5 + rng.uniform(-WANDER, WANDER, 2)
    distance, radius = rng.uniform(0.45, 0.6), rng.uniform(0.17, 0.22)
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE
    from_colour, to_colour = rng.uniform(15, 75, (2, 3))
    angle = rng.uniform(0, 2 * pi)
    slope = ((x - 0.5) * cos(angle) + (y - 0.5) * sin(angle) + 0.7) / 1.4
    background = from_colour + (to_colour - from_colour) * slope[..., None]
    paint = np.array(COLOURS[scene.colour]) + rng.normal(0, 6, 3)
    frames = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for number, time in enumerate(np.linspace(-0.5, 0.5, count)):
        at = middle + direction * distance * time
        inside = 0.5 - SIZE * distance_to(scene.shape, x - at[0], y - at[1], radius)
        cover = np.clip(inside, 0, 1)[..., None]  # antialiased edge, one pixel wide
        frames[number] = np.clip(background * (1 - cover) + paint * cover, 0, 255)
    return frames, middle


def distance_to(
    shape: str, x: NDArray[np.float64], y: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Signed distance to the shape's edge, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "triangle":
        y = y - 0.2 * radius
        return np.maximum(sqrt(0.75) * np.abs(x) - 0.5 * y, y) - 0.62 * radius
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(
            np.maximum(x - radius, y - radius / 3), np.maximum(y - radius, x - radius / 3)
        )
    raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")


def speak(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence as speech recognition might give it, with fillers and lost words."""

    def heard(words: str, otherwise: str = "") -> str:
        return words if rng.random() < 0.9 else otherwise

    def filler() -> str:
        return str(rng.choice(FILLERS)) if rng.random() < 0.4 else ""

    verb = rng.choice(["moves", "goes", "is moving", "is going"])
    parts = [
        filler(),
        rng.choice(["here", "this time", "there", "now"]),
        rng.choice(["the", "a", "this"]),
        heard(scene.colour),
        heard(scene.shape, "thing"),
        filler(),
        heard(f"{verb} {scene.motion}"),
        filler(),
    ]
    return " ".join(part for part in map(str, parts) if part)


def place(middle: NDArray[np.float64]) -> str:
    """A place in the picture in words, which do not say where the shape is going."""
    third = WANDER / 3
    column = ["left", "", "right"][int(np.searchsorted([0.5 - third, 0.5 + third], middle[0]))]
    row = ["upper", "", "lower"][int(np.searchsorted([0.5 - third, 0.5 + third], middle[1]))]
    if not row and not column:
        return "in the middle"
    return " ".join(word for word in ("in the", row, column, "part") if word)
