"""One run at a time in a folder: the second is told of the first, whose lock dies with it."""

import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from clipvip import files
from clipvip.files import OtherRunError, only_run
from clipvip.training.checkpoint import alone_in
from clipvip.training.config import ConfigError
from clipvip.training.trainer import train

HOLD = """
import os, sys, time
from pathlib import Path
from clipvip.files import only_run

with only_run(Path(sys.argv[1]), "trains"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(files, "HERE_WAIT", 0.2)


@contextmanager
def another_run(folder):
    """A process in only_run, and a worker that it forked: their numbers."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as run:
        worker = int(run.stdout.readline())
        try:
            yield run.pid, worker
        finally:
            os.killpg(run.pid, signal.SIGKILL)


def refuse(folder, error, message):
    with pytest.raises(error, match=re.escape(message)), only_run(folder, "trains", error):
        pass


def test_the_second_run_is_refused_and_names_the_first(tmp_path):
    folder = tmp_path / "runs" / "a"
    with another_run(folder) as (process, _):
        with pytest.raises(OtherRunError) as refused, only_run(folder, "trains"):
            pass
        host = re.escape(socket.gethostname())
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d"
        assert re.fullmatch(
            rf"{re.escape(str(folder))}: another run trains there "
            rf"\(host {host}, process {process}, since {since}\); "
            "wait for it or give another out",
            str(refused.value),
        )
    with only_run(folder, "trains"), only_run(tmp_path / "runs" / "b", "trains"):
        refuse(folder, ConfigError, f"process {os.getpid()}, since")
    with only_run(folder, "trains"):
        pass


def test_a_folder_is_one_however_it_is_reached(tmp_path, monkeypatch):
    """By a link or a relative path, and its checkpoints by a link from another run's folder."""
    run, other = tmp_path / "run", tmp_path / "other"
    with alone_in(run):
        other.mkdir()
        (other / "checkpoints").symlink_to(run / "checkpoints")
        (tmp_path / "link").symlink_to("run")
        monkeypatch.chdir(tmp_path)
        for folder in (Path("run"), Path("run/../link"), tmp_path / "link", other):
            with pytest.raises(ConfigError, match=f"process {os.getpid()}, since"):
                alone_in(folder).__enter__()
    with alone_in(other):
        pass


def test_a_killed_run_leaves_no_lock_even_while_its_workers_live(tmp_path):
    with another_run(tmp_path) as (process, worker):
        os.kill(process, signal.SIGKILL)
        with only_run(tmp_path, "trains"):
            os.kill(worker, 0)  # it lives


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HERE_WAIT", 20.0)
    entered, leave = threading.Event(), threading.Event()

    def first():
        with only_run(tmp_path, "trains"):
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(20)
    threading.Timer(0.3, leave.set).start()
    began = time.monotonic()
    with only_run(tmp_path, "trains"):
        assert leave.is_set() and time.monotonic() - began < 10
    thread.join()


def test_a_run_of_another_machine_is_waited_for_longer_and_named(tmp_path, monkeypatch):
    """Its machine may be gone, and its lock still be kept by the server for a while."""
    monkeypatch.setattr(files, "HERE_WAIT", 0.0)
    monkeypatch.setattr(files, "ELSEWHERE_WAIT", 0.3)
    with only_run(tmp_path, "trains"):
        note = "host gpu7, process 4121, since 2026-11-30 03:50\n"
        (tmp_path / files.LOCK).write_text(note)
        began = time.monotonic()
        refuse(tmp_path, OtherRunError, f"({note.strip()})")
        assert time.monotonic() - began > 0.3
    with only_run(tmp_path, "trains"):  # what a note says locks nobody out
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_where_a_file_system_has_no_locks_runs_run(tmp_path, monkeypatch, number):
    def refused(*given):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    with only_run(tmp_path, "trains"), only_run(tmp_path, "trains"):
        pass


def test_a_full_disk_keeps_no_run_out(tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, unlimited[1]))
    try:
        with only_run(tmp_path, "trains"):
            refuse(tmp_path, OtherRunError, "another run trains there; wait for it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_a_training_is_refused_on_all_ranks_and_leaves_the_firsts_folder_alone(
    make_config, tmp_path
):
    out = tmp_path / "run"
    with only_run(out, "trains"):
        for resume in ("never", "latest"):
            with pytest.raises(ConfigError, match=f"another run trains there .*{os.getpid()}, "):
                train(make_config("max_steps=1", f"resume={resume}"))
        forks = [sys.executable, str(Path(__file__).with_name("forks.py")), "refused"]
        said = subprocess.run(
            [*forks, str(make_config.path), "max_steps=1", "resume=latest"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        ).stdout
        assert [path.name for path in out.iterdir()] == [files.LOCK]
    assert "ended with [1, 1]" in said
    (line,) = [line for line in said.splitlines() if "another run" in line]
    assert line.startswith("clipvip: error: ") and f"process {os.getpid()}, since" in line
    assert train(make_config("max_steps=1"))["step"] == 1
