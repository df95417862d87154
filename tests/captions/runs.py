"""Runs in processes of their own, forked after the imports, which take seconds.

python runs.py MODEL ANNOTATIONS SHARDS OUT captions the annotations to OUT/NAME.jsonl, and the
shards to OUT/NAME, where NAME is
    one     by a run that nothing disturbs
    kill    by runs that are killed at random moments, after each of which the journal has one line
            per clip, and the folder whole shards, and by one that is not
    ranks   by two ranks, as torchrun starts them, that are killed once, and by three that are not
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from clipvip import distributed
from clipvip.captions import Asking, Captioner, caption
from clipvip.data.shards import load_manifest

torch.set_num_threads(1)
MODEL, ANNOTATIONS, SHARDS, OUT = sys.argv[1:]
SLOW = 0.05  # seconds per batch while runs are killed
OPTIONS = {"batch_size": 2, "mixed_precision": "no", "device": "cpu", "max_bad_share": 0.2}


def start(source, out, slow=0.0, workers=0, **environment):
    """Start a run, which ends with 100 + the number of clips that it called the model for."""
    process = os.fork()
    if process:
        return process
    os.environ.update(environment)
    status = 1
    clips = 0
    answer = Captioner.answer

    def slowly(self, inputs, counts):
        nonlocal clips
        clips += len(counts)
        time.sleep(slow)
        return answer(self, inputs, counts)

    Captioner.answer = slowly
    try:
        os.setpgid(0, 0)
        caption(MODEL, source, out, asking=Asking(length=8), num_workers=workers, **OPTIONS)
        sys.stderr.flush()
        status = 100 + clips
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def ranks(source, out, count, slow=0.0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    meet["LOCAL_WORLD_SIZE"] = str(count)
    return [
        start(source, out, slow, **meet, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(count)
    ]


def wait_for_work(out):
    """Wait until a run has begun to write."""
    journal = Path(f"{out}.journal")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if out.suffix and [*journal.glob("0*.jsonl")]:
            return
        if not out.suffix and [*out.glob("*.tar*")]:
            return
        time.sleep(0.005)
    raise AssertionError(f"no run began to write {out}")


def check(out):
    """Check what a killed run left; return how many clips are captioned."""
    if not out.suffix:
        whole = [json.loads(x) for f in out.glob(".finished*") for x in whole_lines(f)]
        for shard in whole:
            assert (out / shard["shard"]).stat().st_size == shard["bytes"]
        assert not (out / "manifest.jsonl").exists()
        return sum(shard["clips"] for shard in whole)
    assert not out.exists()
    lines = [json.loads(x) for f in Path(f"{out}.journal").glob("0*.jsonl") for x in whole_lines(f)]
    final = [line["place"] for line in lines if line.get("left_out") != "unreadable"]
    assert len(final) == len({*final}), final
    return len(final)


def whole_lines(path):
    return path.read_bytes().rpartition(b"\n")[0].splitlines()


def kill_and_resume(source, out):
    held = 0
    for attempt in range(3):
        process = start(source, out, SLOW, workers=attempt % 2)
        wait_for_work(out)
        time.sleep(random.random() * 0.15)
        os.kill(process, signal.SIGKILL)
        status(process)
        if (out.exists() and out.suffix) or (out / "manifest.jsonl").exists():
            return  # it was quick
        now = check(out)
        assert now >= held
        held = now
    done = status(start(source, out)) - 100
    assert 0 <= done <= 20 - held, (done, held)
    assert status(start(source, out)) == 100  # nothing is left


def run_by_ranks(source, out):
    killed = ranks(source, out, 2, SLOW)
    wait_for_work(out)
    for process in killed:
        os.kill(process, signal.SIGKILL)
    assert [status(process) for process in killed] == [-signal.SIGKILL] * 2
    check(out)
    done = [status(process) for process in ranks(source, out, 3)]
    assert min(done) >= 100, done


assert distributed.world_size() == 1
for source, ending in ((ANNOTATIONS, ".jsonl"), (SHARDS, "")):
    assert status(start(source, Path(OUT, f"one{ending}"))) >= 100
    kill_and_resume(source, Path(OUT, f"kill{ending}"))
    run_by_ranks(source, Path(OUT, f"ranks{ending}"))
    print(ending or "shards", len(load_manifest(SHARDS)), flush=True)
