"""Time and recall of searches: `pytest bench/bench_search.py -s`, with -k 10k, 1M or 10M for one.

Indexes hold generated moments: films of 500 windows, each a walk through directions near one of
1,000 topics. Sentences are embedded by a model of ViT-B/32's size with random weights, and vectors
near topics are searched for. Printed and written to search.json in --bench-out are

    shell      `clipvip search` from start to exit, and its parts
    disk       a search of the opened index by a vector
    memory     the same in memory, as a server does, up to EXACT_ROWS moments
    server     the same with a sentence
    recall     of the 10 nearest moments, by the index on disk, asked for 10; a search asks for more

An index of 10M moments takes 26 GB of disk while it is made, and about half an hour.
"""

import gzip
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `clipvip search` and `serve` do

import numpy as np
import pytest
import records
import torch
from machine import machine
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from clipvip.embedding import fingerprint, load_for_embedding
from clipvip.index import VideoIndex
from clipvip.index.hits import best_hits
from clipvip.index.query import files_of, note_model
from clipvip.index.rows import About, FileState
from clipvip.index.store import EXACT_ROWS, Store
from clipvip.model import CLIPViPProcessor

SIZES = {"10k": 10_000, "1M": 1_000_000, "10M": 10_000_000}
WIDTH, FILM, AT_ONCE, TOPICS = 512, 500, 100_000, 1000
ROUNDS, QUERIES = 5, 40
SENTENCE = "a dog catches a ball on the beach"
PARTS = """
import time; clock = time.perf_counter; times = {}; began = clock()
def part(name):
    global began
    times[name] = clock() - began; began = clock()
import clipvip.cli; part("command")
from clipvip.index import VideoIndex; part("numpy and ours")
import lancedb; part("lancedb")
index = VideoIndex(WHERE); index.store; part("open")
vector = index._encoder_of_index().vector(SENTENCE); part("sentence")
from clipvip.index.hits import best_hits
best_hits(index._source(), vector, 10, None); part("search")
import json; print(json.dumps(times))
"""


def make_model(folder: Path) -> About:
    """Save a model and note it; its tokenizer is CLIP's."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 49406, "eos_token_id": 49407}
    CLIPModel(CLIPConfig(text_config=ends)).save_pretrained(folder)
    CLIPViPProcessor(clip_tokenizer()).save_pretrained(folder)
    files = files_of(folder)
    loaded = load_for_embedding(folder)
    hashed = fingerprint(*loaded)
    note_model(folder, files, *loaded, hashed)
    return About(str(folder), hashed, WIDTH)


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own, from the merges that open_clip brings along."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        pytest.skip("open_clip_torch is not installed, whose tokenizer this needs: `make setup`")
    source = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(source.read_bytes()).decode().splitlines()
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = sorted(ByteLevel.alphabet())  # which are CLIP's, in its order
    words = [*letters, *(x + "</w>" for x in letters), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77
    )


def topics() -> np.ndarray:
    return unit(np.random.default_rng(0).standard_normal((TOPICS, WIDTH), np.float32))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def blocks(rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first film of each block, and float32 unit vectors [films, FILM, WIDTH]."""
    centres = topics()
    for block in range(0, rows, AT_ONCE):
        draw = np.random.default_rng(block + 1)
        films = min(AT_ONCE, rows - block) // FILM
        of_film = centres[draw.integers(TOPICS, size=films)]
        steps = draw.standard_normal((films, FILM, WIDTH), np.float32) * 0.008
        walk = np.cumsum(steps, axis=1)
        own = draw.standard_normal((films, 1, WIDTH), np.float32) * 0.02
        moments = draw.standard_normal((films, FILM, WIDTH), np.float32) * 0.01
        yield block // FILM, unit(of_film[:, None] + own + walk + moments)


def queries() -> np.ndarray:
    draw = np.random.default_rng(7)
    near = topics()[draw.integers(TOPICS, size=QUERIES)]
    return unit(near + draw.standard_normal((QUERIES, WIDTH), np.float32) * 0.05)


def path_of(film: int) -> str:
    return f"/videos/{film % 97:02d}/{film:07d}.mp4"


def make_index(where: Path, about: About, rows: int) -> dict[str, float]:
    store = Store.create(where, about)
    spans = [(5.0 * i, 5.0 * i + 10) for i in range(FILM)]
    began = time.perf_counter()
    for first, vectors in blocks(rows):
        files = []
        for film, own in enumerate(vectors, start=first):
            state = FileState(path_of(film), 1, 1, str(film), "", 5.0 * FILM + 5, 86400.0 * film)
            files.append((state, spans, own))
        store.put(files)
    put = time.perf_counter() - began
    store.tidy()
    size = sum(file.stat().st_size for file in where.rglob("*") if file.is_file())
    tidied = time.perf_counter() - began - put
    return {"put_seconds": put, "tidy_seconds": tidied, "bytes": size}


def exact_nearest(rows: int, k: int) -> list[set[tuple[str, float]]]:
    """The k nearest moments of each query, by comparing all."""
    best = [(np.empty(0), np.empty(0, np.int64))] * QUERIES
    given = queries()
    for first, vectors in blocks(rows):
        stored = vectors.astype(np.float16).astype(np.float32).reshape(-1, WIDTH)
        for number, scores in enumerate(given @ stored.T):
            top = np.argpartition(-scores, k)[:k]
            values = np.concatenate([best[number][0], scores[top]])
            places = np.concatenate([best[number][1], top + first * FILM])
            order = np.argsort(-values)[:k]
            best[number] = values[order], places[order]
    return [{(path_of(row // FILM), 5.0 * (row % FILM)) for row in rows} for _, rows in best]


def timed(run: Callable[[np.ndarray], object]) -> dict[str, float]:
    """Milliseconds per query: median, and the slowest of twenty."""
    taken = []
    for vector in queries():
        began = time.perf_counter()
        run(vector)
        taken.append(1000 * (time.perf_counter() - began))
    warm = sorted(taken[3:])
    return {"median_ms": statistics.median(warm), "p95_ms": warm[int(0.95 * len(warm))]}


def shell(where: Path) -> dict[str, float]:
    """Seconds of the command, medians over processes, and of its parts."""
    command = [sys.executable, "-m", "clipvip.cli", "search", SENTENCE, "--index", str(where)]
    program = f"WHERE, SENTENCE = {str(where)!r}, {SENTENCE!r}\n{PARTS}"
    rows = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        row = {"whole": time.perf_counter() - began}
        ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        rows.append(row | json.loads(ran.stdout))
    return {f"{name}_seconds": statistics.median(row[name] for row in rows) for name in rows[0]}


def measure(size: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = SIZES[size]
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setenv("XDG_CACHE_HOME", str(Path(name, "cache")))
        where = Path(name, "index")
        result: dict[str, object] = {}
        about = make_model(Path(name, "model"))
        result["make"] = make_index(where, about, rows)
        result["shell"] = shell(where)
        on_disk = VideoIndex(where)
        result["disk"] = timed(lambda vector: best_hits(on_disk._source(), vector, 10, None))
        recalls = []
        for vector, expected in zip(queries(), exact_nearest(rows, 10), strict=True):
            found, _ = on_disk.store.nearest(vector, 10)
            recalls.append(len(expected & {(x.file.path, x.start or 0.0) for x in found}) / 10)
        result["recall_at_10"] = statistics.mean(recalls)
        if rows <= EXACT_ROWS:
            server = VideoIndex(where, in_memory=True)
            result["memory"] = timed(lambda vector: best_hits(server._source(), vector, 10, None))
            sentences = iter(range(QUERIES))  # each another, as a server keeps the last products
            result["server"] = timed(lambda _: server.search(f"{SENTENCE} {next(sentences)}"))
    print(f"\n{size}: {json.dumps(result, indent=1)}")
    path = request.config.getoption("--bench-out") / "search.json"
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    results = {known: before[known] for known in SIZES if known in before} | {size: result}
    records.write(path, {"rounds": ROUNDS, "results": results, "machine": machine()})


def test_10k(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    measure("10k", request, monkeypatch)


def test_1M(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    measure("1M", request, monkeypatch)


def test_10M(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    measure("10M", request, monkeypatch)
