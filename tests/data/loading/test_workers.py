import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clipvip.data.loading import in_worker, workers
from clipvip.data.loading.in_worker import report_progress, set_place
from clipvip.data.loading.workers import WorkerError, Workers

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")
BIG = in_worker.SMALL * 4


def results(work: Callable[..., Any], tasks: Any, count: int = 1, **options: Any) -> list[Any]:
    return [result for _, result in Workers(work, count, **options).run(tasks)]


INTERRUPTED = """
import os, signal
from clipvip.data.loading.workers import Workers
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    Workers(lambda task, excluded: task, 1)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_a_process_starts_is_not_lost() -> None:
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60
    )
    assert (run.stdout, run.stderr) == ("interrupted\n", "")


KILLED = """
import os, signal, sys, threading, torch
from clipvip.data.loading.workers import Workers
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGKILL)).start()
for _ in Workers(lambda task, excluded: [torch.zeros(99_999)] * 20, 3).run(range(10**9)):
    pass
"""


@pytest.mark.parametrize("after", ["0.2", "0.5", "0.7"])
def test_processes_whose_parent_was_killed_end_silently(after: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, after], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == -9 and run.stderr == ""


# --- starting -------------------------------------------------------------------------------

GARBAGE = """
import gc, os, threading, time
from clipvip.data.loading.workers import Workers

class Pool:
    def __init__(self):
        self.itself = self
    def __del__(self):  # as of one that waits for threads, which a forked process does not have
        if os.getpid() != owner:
            time.sleep(1000)

owner = os.getpid()
gc.set_threshold(20, 1, 1)
os.register_at_fork(before=Pool)
print([result for _, result in Workers(lambda task, excluded: task, 1).run(range(2))])
"""


def test_garbage_of_the_parent_is_not_collected_in_a_new_process() -> None:
    run = subprocess.run(
        [sys.executable, "-c", GARBAGE], capture_output=True, text=True, timeout=20
    )
    assert (run.stdout, run.stderr) == ("[0, 1]\n", "")


def test_garbage_collection_continues_in_both_processes() -> None:
    assert results(lambda task, excluded: gc.isenabled(), [0]) == [True]
    assert gc.isenabled()


def test_a_process_that_does_not_begin_is_replaced(monkeypatch, caplog) -> None:
    with monkeypatch.context() as patched:  # hangs after the fork, as for a lock
        patched.setattr(torch, "set_num_threads", lambda count: time.sleep(1000))
        pool = Workers(lambda task, excluded: task, 1)
    monkeypatch.setattr(workers, "START", 0.5)
    with caplog.at_level(logging.WARNING):
        assert [result for _, result in pool.run(range(3))] == [0, 1, 2]
    (message,) = caplog.messages
    assert "did not start within 0 s" in message


@linux
def test_a_process_is_ended_for_memory_before_its_parent() -> None:
    score = Path("/proc/self/oom_score_adj")
    (own,) = results(lambda task, excluded: int(score.read_text()), [0])
    assert own > int(score.read_text()) or own == 1000


# --- passing on -----------------------------------------------------------------------------

TENSORS = [
    torch.arange(1, BIG, dtype=torch.int64),
    torch.arange(BIG + 1).add(1).to(torch.uint8),
    torch.arange(BIG).to(torch.bfloat16)[::2],
    torch.arange(BIG) % 3 == 0,
    torch.randn(3, BIG // 8, 5).transpose(0, 2),
    torch.tensor(2.5),
    torch.empty(0, 3),
    torch.arange(7, dtype=torch.uint8),
]


@pytest.mark.parametrize("named", [False, True])
def test_tensors_arrive_as_they_were_and_can_be_written_to(named: bool, monkeypatch) -> None:
    if named:  # as on other systems than Linux
        monkeypatch.setattr(in_worker, "_memory_file", None)
    alone = results(lambda task, excluded: TENSORS[task], range(len(TENSORS)))
    ((first, rest),) = results(lambda task, excluded: (TENSORS[0], {"rest": TENSORS[1:]}), [0])
    for got, sent in zip([first, *rest["rest"], *alone], TENSORS * 2, strict=True):
        assert got.dtype == sent.dtype and torch.equal(got, sent)
        got.zero_()
        assert not got.any()


def held() -> tuple[int, int]:
    """Open files and bytes of shared memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return len(os.listdir("/proc/self/fd")), int(status["RssShmem"].split()[0]) << 10


@linux
def test_a_result_takes_no_open_file_and_its_memory_goes_with_it() -> None:
    size = 1 << 20
    pool = Workers(lambda task, excluded: [torch.ones(size, dtype=torch.uint8)] * 3, 2)
    kept: list[Tensor] = []
    for number, (_, result) in enumerate(pool.run(range(200))):
        assert all(part[::4096].all() for part in result)
        if number == 20:
            files, memory = held()
        if number >= 20:
            assert held()[0] <= files + 2 and held()[1] <= memory + 20 * size
        kept = result if number < 20 else []
    assert not kept


@linux
def test_a_small_tensor_that_is_kept_does_not_keep_its_batch() -> None:
    size = 1 << 22
    pool = Workers(lambda task, excluded: (torch.ones(size), torch.tensor([task])), 1)
    before = held()[1]
    kept = [result[1] for _, result in pool.run(range(20))]
    assert torch.cat(kept).tolist() == list(range(20))
    assert held()[1] <= before + 3 * 4 * size


SMALL_SHM = """
mount -t tmpfs -o size=64m,$1 tmpfs /dev/shm && cat /dev/zero 2> /dev/null > /dev/shm/full
exec "$0" -c '
import torch
from clipvip.data.loading.workers import Workers
work = lambda task, excluded: torch.full((40 << 20,), task, dtype=torch.uint8)
print(sum(int(result[-1]) for _, result in Workers(work, 3).run(range(12))))
'
"""


@linux
@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_a_full_dev_shm_is_no_hindrance(mode: str) -> None:
    unshare = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    run = subprocess.run(
        [*unshare, "sh", "-c", SMALL_SHM, sys.executable, mode],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.stdout, run.stderr) == ("66\n", "")


FEW_FILES = """
import os, resource, torch
from clipvip.data.loading.workers import Workers
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
kept = [result for _, result in Workers(lambda *given: torch.ones(1 << 20), 4).run(range(200))]
print(len(kept))
pool = Workers(lambda *given: torch.ones(1 << 20), 1).run(range(200))
next(pool)
files = []
try:
    while True:
        files.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    list(pool)
except RuntimeError as error:
    print(error)
"""


@linux
def test_few_files_may_be_open() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FEW_FILES], capture_output=True, text=True, timeout=60
    )
    count, error = run.stdout.splitlines()
    assert count == "200" and "Too many open files" in error and "ulimit -n" in error


@linux
def test_no_room_for_a_result_is_an_error_that_says_what_to_do(monkeypatch) -> None:
    def full(file: int, data: Any, start: int) -> int:
        if start:
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WorkerError, match=r"of 2 MB \(No space left on device\).*fewer workers"):
        results(lambda task, excluded: [torch.zeros(BIG)] * 2, [0])


def test_a_process_that_dies_while_it_passes_a_result_on_is_replaced(
    tmp_path: Path, monkeypatch
) -> None:
    whole = in_worker.send

    def part(connection: Any, message: Any) -> None:
        if message.size and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            connection.send_bytes = lambda data: os.kill(os.getpid(), signal.SIGKILL)
        whole(connection, message)

    monkeypatch.setattr(in_worker, "send", part)
    pool = Workers(lambda task, excluded: torch.full((BIG,), task), 1)
    assert [int(result[-1]) for _, result in pool.run(range(5))] == list(range(5))
    assert (tmp_path / "died").exists()


def test_the_rest_of_an_interrupted_message_is_not_read(monkeypatch) -> None:
    whole = in_worker._mapped

    def interrupted(files: list[int], size: int) -> Tensor:
        monkeypatch.setattr(in_worker, "_mapped", whole)
        raise KeyboardInterrupt

    pool = Workers(lambda task, excluded: torch.full((BIG,), task), 1)
    monkeypatch.setattr(in_worker, "_mapped", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(pool.run(range(5)))
    assert [int(result[-1]) for _, result in pool.run(range(5))] == list(range(5))


# --- what work may do -----------------------------------------------------------------------


class Particular(Exception):
    """Cannot be unpickled."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(name)


class Untold(Exception):
    def __str__(self) -> str:
        raise ValueError


def raising(error: Any) -> Callable[..., Any]:
    def work(task: int, excluded: frozenset[int]) -> int:
        set_place(task)
        if task == 1:
            raise error
        return task

    return work


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (KeyError("k"), KeyError, "k"),
        (Particular("said", 1), WorkerError, "Particular: said"),
        (RuntimeError(threading.Lock()), WorkerError, "RuntimeError: <"),
        (Untold(), Untold, ""),
        (MemoryError(), MemoryError, ""),
        (RecursionError("deep"), RecursionError, "deep"),
    ],
)
def test_any_error_of_work_is_raised_and_logged_with_its_place(
    error: Exception, kind: type[Exception], words: str, caplog
) -> None:
    with pytest.raises(kind) as caught:
        results(raising(error), range(3), name=lambda place: f"clip {place}")
    assert words in "".join(map(str, caught.value.args))
    assert "at clip 1" in str(caught.value.__cause__) and "in work" in str(caught.value.__cause__)
    assert [text for text in caplog.messages if "at clip 1" in text]


def test_an_error_in_this_process_is_logged_with_its_place_too(caplog) -> None:
    with pytest.raises(KeyError):
        results(raising(KeyError()), range(3), 0, name=lambda place: f"clip\n{place}")
    assert caplog.messages == ["KeyError at clip\\n1"]


@pytest.mark.parametrize("result", [lambda: 0, iter([]), threading.Lock()])
def test_a_result_that_cannot_be_passed_on_is_an_error_of_its_task(result: Any) -> None:
    def work(task: int, excluded: frozenset[int]) -> Any:
        return [torch.zeros(BIG), (number for number in [result]) if task else 0]

    pool = Workers(work, 1)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        list(pool.run([0, 1]))
    assert len(list(pool.run([0, 0]))) == 2  # and the next run is as if that had not been


class Panic(BaseException):
    """Stands for the panic of a library written in Rust."""


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("no"), KeyboardInterrupt(), Panic()])
def test_what_wants_to_end_the_process_counts_as_its_death(
    error: BaseException, caplog, capfd
) -> None:
    def work(task: int, excluded: frozenset[int]) -> str:
        set_place(task)
        if task == 1 and task not in excluded:
            raise error
        return "left out" if task in excluded else "done"

    assert results(work, range(3)) == ["done", "left out", "done"]
    assert sum("ended with exit status 1 at 1" in text for text in caplog.messages) == 2


# --- time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_place_that_never_ends_is_named_and_left_out(count: int, monkeypatch, caplog) -> None:
    monkeypatch.setattr(workers, "TIMEOUT", 0.5)

    def work(task: int, excluded: frozenset[int]) -> str:
        for place in (2 * task, 2 * task + 1):
            set_place(place)
            report_progress(1)
            if place == 3 and place not in excluded:
                while True:
                    time.sleep(0.01)
        return "left out" if place in excluded else "done"

    done = results(work, range(4), count, name=lambda place: f"clip {place}")
    assert done == ["done", "left out", "done", "done"]
    assert sum("did not respond within 0 s at clip 3" in text for text in caplog.messages) == 2


def test_a_long_task_that_goes_from_place_to_place_is_not_stuck(monkeypatch, caplog) -> None:
    monkeypatch.setattr(workers, "TIMEOUT", 0.6)

    def work(task: int, excluded: frozenset[int]) -> int:
        for place in range(6):
            set_place(place)
            time.sleep(0.2)
        return task

    assert results(work, [7]) == [7] and not caplog.messages


def test_workers_started_at_the_same_time_do_not_hold_each_others_pipes(monkeypatch) -> None:
    """A process that dies is noticed although another was forked at the same time."""
    whole, started = workers.multiprocessing.Process.start, []

    def start(process: Any) -> None:
        if not started:
            started.append(1)
            other = threading.Thread(target=lambda: kept.append(Workers(forever, 1)))
            other.start()
            other.join(0.3)
        whole(process)

    def forever(task: int, excluded: frozenset[int]) -> int:
        return task

    def dying(task: int, excluded: frozenset[int]) -> int:
        if task not in excluded:
            set_place(task)
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    kept: list[Any] = []
    monkeypatch.setattr(workers.multiprocessing.Process, "start", start)
    assert results(dying, [1]) == [1]
