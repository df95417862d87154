"""Properties of the jobs that run on a Ray cluster: the same results as on this machine, whatever
dies meanwhile."""

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from clipvip import cli
from clipvip.captions import Asking, Job, caption
from clipvip.data.loading import in_actor, ray_cluster
from clipvip.data.loading.in_worker import WorkerError, report_progress, set_place
from clipvip.data.loading.on_ray import RayWorkers, start_workers
from clipvip.data.loading.ray_cluster import Cluster
from clipvip.data.shards import (
    ShardCopies,
    verify,
    verify_files,
    verify_shards,
    write,
    write_shards,
)
from clipvip.index.build import build
from clipvip.index.store import Store

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "clipvip[ray]"')
COUNT = 24


def children(process: int) -> list[int]:
    """Processes that a process has started and that live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == process and state != "Z":
                found.append(int(folder.name))
    return found


def named(process: int, name: bytes) -> bool:
    with suppress(OSError):
        return name in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def actors() -> list[int]:
    """Processes of the actors of the cluster that this process has started."""
    return [
        process
        for child in children(os.getpid())
        if named(child, b"raylet")
        for process in children(child)
        if named(process, b"ray::Actor")
    ]


def ends(processes: Callable[[], list[int]]) -> bool:
    """Whether all processes end within half a minute."""
    deadline = time.monotonic() + 30
    while processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Ray on this machine, with two CPUs; its address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    before, own = signal.getsignal(signal.SIGTERM), children(os.getpid())
    with ray_cluster._quiet():
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=80 << 20,
        )
        signal.signal(signal.SIGTERM, before)
        yield ray.get_runtime_context().gcs_address
        assert ends(actors)
        ray.shutdown()
    assert ends(lambda: [child for child in children(os.getpid()) if child not in own])


class KillOne:
    """Kill an actor at the first call, and then do as `function` does."""

    def __init__(self, function: Callable[..., Any] = lambda *given: None) -> None:
        self.function = function
        self.killed: list[int] = []

    def __call__(self, *given: Any) -> Any:
        if not self.killed:
            self.killed.append(actors()[0])
            os.kill(self.killed[0], signal.SIGKILL)
        return self.function(*given)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- the mechanism --------------------------------------------------------------------------------


def work(task: tuple[str, int], excluded: frozenset[int]) -> int | str:
    """Square a number, after what the task says."""
    what, place = task
    set_place(place)
    if place in excluded:
        return "excluded"
    if what == "kill the process":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill the actor":
        time.sleep(1.5 * in_actor.TELL_SECONDS)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(100)
    if what == "fail":
        raise OSError("the disk is full")
    if what == "log":
        logging.getLogger("clipvip.data").warning("%d is odd", place)
    report_progress(1)
    return place**2


@pytest.fixture(scope="class")
def counted() -> list[int]:
    return []


@pytest.fixture(scope="class")
def pool(cluster: str, counted: list[int]) -> Iterator[Any]:
    """Two workers, which some tests share, since they take seconds to start."""
    name = lambda place: f"clip {place}"  # noqa: E731
    with start_workers("ray", work, 2, 99, name, counted.append) as workers:
        yield workers


def run(pool: Any, tasks: list[tuple[str, int]]) -> list[Any]:
    return sorted(((task[1], result) for task, result in pool.run(tasks, ordered=False)))


class TestWorkers:
    def test_each_task_is_done_once_and_counted_once(
        self, pool: Any, counted: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        counted.clear()
        with caplog.at_level(logging.WARNING, "clipvip"):
            done = run(pool, [("log" if place % 2 else "", place) for place in range(50)])
        assert done == [(place, place**2) for place in range(50)]
        assert sum(counted) == 50
        assert sorted(caplog.messages) == sorted(f"{place} is odd" for place in range(1, 50, 2))

    @pytest.mark.parametrize(("what", "bad"), [("kill the process", 103), ("kill the actor", 203)])
    def test_a_clip_that_kills_its_worker_twice_is_excluded(
        self, what: str, bad: int, pool: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        places = range(bad - 3, bad + 5)
        with caplog.at_level(logging.WARNING, "clipvip"):
            done = run(pool, [(what if place == bad else "", place) for place in places])
        assert done == [(place, "excluded" if place == bad else place**2) for place in places]
        deaths = [text for text in caplog.messages if f"at clip {bad}" in text]
        assert len(deaths) == 2 and "the second to die there" in deaths[1]

    def test_a_run_that_failed_or_was_left_can_be_followed_by_another(
        self, pool: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(OSError, match="the disk is full"):
            run(pool, [("fail", 7)])
        assert "OSError at clip 7" in caplog.text
        for _ in pool.run([("", place) for place in range(20)], ordered=False):
            break
        assert run(pool, [("", place) for place in range(5)]) == [(i, i**2) for i in range(5)]


def run_alone(work: Any, tasks: int = 1, workers: int = 1, **options: Any) -> list[Any]:
    with start_workers("ray", work, workers, tasks, **options) as started:
        return [*started.run([("", place) for place in range(tasks)], ordered=False)]


def always_dies(task: Any, excluded: frozenset[int]) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(100)


def test_workers_that_all_die_end_the_run(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipvip.data.loading.on_ray.TASK_DEATHS", 1)
    with pytest.raises(WorkerError, match=r"died .*use fewer workers"):
        run_alone(always_dies)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_path_that_workers_do_not_see_is_named(
    kind: str, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the workers were on another machine."""
    if kind == "file":
        path = tmp_path / "clip.mp4"
        exists = os.path.exists
        monkeypatch.setattr(os.path, "exists", lambda given: given == str(path) or exists(given))
        options: dict[str, Any] = {"sees": lambda: [path]}
    else:  # a folder of that name exists there, but is another
        path = tmp_path
        (tmp_path / ".lock").write_bytes(b"another")
        read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda given: read(given) + b" run")
        options = {"writes": tmp_path}
        monkeypatch.setattr(in_actor, "SEE_SECONDS", 0.5)
    with pytest.raises(WorkerError, match=f"does not see {path} of this machine") as caught:
        run_alone(work, **options)
    assert "share under the same paths" in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "given", "expected"),
    [
        ([(2, 0)], None, (1, 2, 0)),
        ([(2, 0)], 2, (2, 1, 0)),
        ([(1, 0), (64, 0)], None, (16, 4, 0)),
        ([(8, 0), (64, 8), (64, 4)], None, (12, 8, 1)),
        ([(64, 8)], 3, (3, 8, 1)),
        ([(4, 0)], 9, (9, 1, 0)),
    ],
)
def test_workers_with_a_model_share_what_the_nodes_have(nodes: Any, given: Any, expected: Any):
    assert Cluster(nodes).for_model(given) == expected


def test_bad_options_are_told_in_one_line(
    cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="on is 'dask'; expected local or ray"):
        run_on: Any = "dask"
        with start_workers(run_on, work, 1, 1):
            pass
    with pytest.raises(ValueError, match="--workers is 0; expected at least 1"):
        run_alone(work, workers=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run it without torchrun"):
        run_alone(work)


@pytest.mark.parametrize(
    ("address", "left", "said"),
    [
        ("127.0.0.1:1", None, "no Ray cluster answers at 127.0.0.1:1, which is RAY_ADDRESS; start"),
        ("", "127.0.0.1:1", "127.0.0.1:1, which is what `ray start` left on this machine; start"),
        ("ray://head:10001", None, "RAY_ADDRESS is ray://head:10001; expected host:port"),
    ],
)
def test_a_cluster_that_does_not_answer_is_told(
    address: str, left: str | None, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if left is not None:
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(left)
    with pytest.raises(ValueError, match=re.escape(said)), ray_cluster.joined_cluster():
        pass


# --- the jobs -------------------------------------------------------------------------------------


def write_clip(path: Path, number: int, frames: int = 30, size: int = 64) -> None:
    generator = np.random.default_rng(number)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for _ in range(frames):
            image = generator.integers(0, 255, (size, size, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations of COUNT clips, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        write_clip(folder / f"{number}.mp4", number)
    (folder / "bad.mp4").write_bytes(b"no video")
    records: list[dict[str, Any]] = [
        {"video": f"{i % 4}.mp4", "start": 0.05 * i, "text": f"text {i}"} for i in range(COUNT)
    ]
    records[11]["video"] = "bad.mp4"
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def shards(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    write_shards(clips, out, clips_per_shard=2, size=32, num_workers=0)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_shards_are_the_same_bytes_though_a_worker_is_killed(
    cluster: str,
    clips: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(write, "append_to_manifest", KillOne(write.append_to_manifest))
    write_shards(clips, tmp_path, clips_per_shard=2, size=32, on="ray")
    assert "another one takes over its tasks" in caplog.text
    assert content(tmp_path) == content(shards)


KILLED = """
import os, pkgutil, signal, sys
from clipvip import cli
from clipvip.index import build

build.SAVE_SECONDS = 0.0
owner, name, times, *sys.argv[1:] = sys.argv[1:]
owner, left = pkgutil.resolve_name(owner), [None] * int(times)
function = getattr(owner, name)

def kill(*given):
    result = function(*given)
    left.pop()
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, kill)
cli.main()
"""


def killed(cluster: str, function: str, times: int, *command: object) -> None:
    """Run a command on the cluster until it is killed after some calls of a function; no process
    of it stays."""
    words = [*function.rsplit(".", 1), times, *command, "--on", "ray", "--workers", 2]
    gone = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, words)],
        env={**os.environ, "RAY_ADDRESS": cluster},
        timeout=120,
    )
    assert gone.returncode == -signal.SIGKILL
    assert ends(actors)


def test_shards_of_a_killed_command_are_kept(
    cluster: str, clips: Path, shards: Path, tmp_path: Path
) -> None:
    options = "--clips-per-shard", 2, "--size", 32
    function = "clipvip.data.shards.write.append_to_manifest"
    killed(cluster, function, 2, "shard", clips, tmp_path, *options)
    assert lines_of(tmp_path / "manifest.jsonl") == 2
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    write_shards(clips, tmp_path, clips_per_shard=2, size=32, on="ray")
    assert content(tmp_path) == content(shards)
    assert sum(path.stat().st_mtime_ns == time for path, time in finished.items()) >= 2


def test_verifying_reports_the_same_though_a_worker_is_killed(
    cluster: str,
    clips: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    expected = verify_files(clips, here, num_workers=0)
    monkeypatch.setattr(verify, "CLIPS_PER_TASK", 3)
    monkeypatch.setattr(verify, "check_seen", kill := KillOne())
    assert verify_files(clips, there, on="ray") == expected
    assert kill.killed and expected.bad and there.read_bytes() == here.read_bytes()
    expected = verify_shards(str(shards), here, num_workers=0)
    assert verify_shards(str(shards), there, on="ray") == expected
    assert there.read_bytes() == here.read_bytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    from clipvip.model import CLIPViPConfig, CLIPViPModel, CLIPViPProcessor

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tower = {"hidden_size": 32, "intermediate_size": 48}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = CLIPViPConfig(
        text_config={**tower, **ends, "vocab_size": len(words), "max_position_embeddings": 20},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=16,
        num_frames=2,
        attention_backend="reference",
    )
    folder = tmp_path_factory.mktemp("model")
    CLIPViPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    CLIPViPProcessor(tokenizer, image_size=32, num_frames=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos of different content, one that cannot be read, and one of twenty moments."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(12):
        write_clip(folder / f"{number}.mp4", 10 + number, 8)
    write_clip(folder / "film.mp4", 99, 110)
    shutil.copy2(clips.parent / "bad.mp4", folder)
    return folder


OPTIONS: dict[str, Any] = {"window": 1.0, "mixed_precision": "no"}


def vectors(where: Path) -> dict[tuple[str, Any, Any], np.ndarray]:
    store = Store.open(str(where))
    moments, rows = store.of_files(sorted(store.files()))
    return {
        (moment.file.path, moment.start, moment.end): row
        for moment, row in zip(moments, rows, strict=True)
    }


def assert_close(expected: dict[Any, np.ndarray], got: dict[Any, np.ndarray]) -> None:
    assert expected.keys() == got.keys()
    for key, row in expected.items():
        np.testing.assert_allclose(row, got[key], atol=5e-4)  # a step of fp16


def test_an_index_is_the_same_though_a_worker_is_killed(
    cluster: str, model: Path, videos: Path, tmp_path: Path
) -> None:
    here = build(tmp_path / "here", model, videos, device="cpu", num_workers=0, **OPTIONS)
    kill = KillOne()
    options = {**OPTIONS, "on": "ray", "num_workers": 2}
    progress = lambda progress: kill() if progress.done else None  # noqa: E731
    there = build(tmp_path / "there", model, videos, progress=progress, **options)
    assert kill.killed and here == there and len(here.bad_files) == 1
    assert_close(vectors(tmp_path / "here"), vectors(tmp_path / "there"))
    again = build(tmp_path / "there", model, videos, **options)
    assert (again.embedded, again.unchanged) == (0, 13)


def test_vectors_of_a_killed_command_are_kept(
    cluster: str, model: Path, videos: Path, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    command = "embed", model, videos, "--out", there, "--window", 1.0, "--mixed-precision", "no"
    killed(cluster, "clipvip.index.store.Store.put", 1, *command)
    kept = len(vectors(there))
    resumed = build(there, model, videos, on="ray", num_workers=2, **OPTIONS)
    assert resumed.unchanged == 13 - resumed.embedded > 0 and kept > 0
    build(here, model, videos, device="cpu", num_workers=0, **OPTIONS)
    assert_close(vectors(here), vectors(there))


def test_a_model_of_other_weights_is_refused(cluster: str, model: Path) -> None:
    from clipvip.index.on_ray import EmbedFiles

    job = EmbedFiles(str(model), "of another", "no", "cpu", {})
    with pytest.raises(ValueError, match="finds other weights"):
        workers = RayWorkers(job, 1)
        try:
            [*workers.run([[]], ordered=False)]
        finally:
            workers.close()


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small image-to-text model."""
    path = Path(__file__).parent / "captions" / "conftest.py"
    spec = importlib.util.spec_from_file_location("captioners", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.blip(tmp_path_factory.mktemp("captioner"))


@pytest.mark.parametrize("kind", ["annotations", "shards"])
def test_captions_are_the_same_though_a_worker_is_killed(
    kind: str,
    cluster: str,
    captioner: Path,
    clips: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = clips if kind == "annotations" else shards
    here, there = (
        tmp_path / (f"{name}.jsonl" if kind == "annotations" else name)
        for name in ("here", "there")
    )
    options: dict[str, Any] = {"asking": Asking(length=8), "batch_size": 2}
    expected = caption(
        str(captioner), source, here, device="cpu", mixed_precision="no", num_workers=0, **options
    )
    kill = KillOne()
    add, finish = Job.add, ShardCopies.finish
    monkeypatch.setattr(Job, "add", lambda *given: [add(*given), kill()])
    monkeypatch.setattr(ShardCopies, "finish", lambda *given: [finish(*given), kill()])
    options |= {"on": "ray", "num_workers": 2, "mixed_precision": "no"}
    found = caption(str(captioner), source, there, **options)
    assert kill.killed and found == expected and found.clips > found.captioned > 0
    assert found.most_common()[1] == expected.most_common()[1]
    if kind == "annotations":
        assert there.read_bytes().replace(b"there", b"here") == here.read_bytes()
    else:
        assert content(there) == content(here)


@pytest.mark.parametrize("kind", ["annotations", "shards"])
def test_captions_of_a_killed_command_are_kept(
    kind: str, cluster: str, captioner: Path, clips: Path, shards: Path, tmp_path: Path
) -> None:
    source = clips if kind == "annotations" else shards
    ending = ".jsonl" * (kind == "annotations")
    function = "run.Job.add" if kind == "annotations" else "shards.ShardCopies.finish"
    here, there = tmp_path / f"here{ending}", tmp_path / f"there{ending}"
    command: list[object] = ["caption", captioner, source, there, "--length", 8, "--batch-size", 2]
    killed(cluster, f"clipvip.captions.{function}", 3, *command, "--mixed-precision", "no")
    options: dict[str, Any] = {"asking": Asking(length=8), "batch_size": 2}
    options["mixed_precision"] = "no"
    resumed = caption(str(captioner), source, there, on="ray", num_workers=2, **options)
    expected = caption(str(captioner), source, here, device="cpu", num_workers=0, **options)
    if kind == "annotations":
        assert resumed == expected
        assert there.read_bytes().replace(b"there", b"here") == here.read_bytes()
    else:
        assert resumed.earlier >= 3 * 2 - 1  # one of the clips cannot be read
        assert content(there) == content(here)


def test_the_commands_pass_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Any] = []
    monkeypatch.setattr("clipvip.data.shards.write_shards", lambda *a, **k: given.append(k) or [])
    monkeypatch.setattr("clipvip.index.build.build_and_leave", lambda *a, **k: given.append(k))
    cli.shard(tmp_path, tmp_path, on="ray", workers=3)
    cli.embed("model", ("videos",), on="ray", workers=3)
    assert [(each["on"], each["num_workers"]) for each in given] == [("ray", 3)] * 2
