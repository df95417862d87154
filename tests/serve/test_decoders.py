"""Properties of the processes that decode: a bad file ends one of them, and nothing else."""

import os
import signal
import time

import anyio
import pytest

from clipvip.data.video import DecodeError
from clipvip.serve.decoders import Decoders
from clipvip.serve.threads import Threads


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    while True:
        pass


def fail() -> None:
    raise RuntimeError("no\x1bt good")


def use_memory() -> int:
    return len(bytearray(1 << 46))


def test_crashes_hangs_and_errors_leave_the_others_working():
    decoders = Decoders(2)

    async def run(work, seconds=20.0, *arguments):
        return await decoders.run(work, *arguments, seconds=seconds)

    async def all_of_them():
        for work, reason in ((crash, "SIGSEGV"), (fail, "no\\x1bt good"), (use_memory, "Memory")):
            with pytest.raises(DecodeError) as raised:
                await run(work)
            assert reason in raised.value.reason
        async with anyio.create_task_group() as group:
            began = time.monotonic()

            async def hanging():
                with pytest.raises(DecodeError) as raised:
                    await run(hang, 1.0)
                assert "more than 1 s" in raised.value.reason

            group.start_soon(hanging)
            assert await run(os.getpid) != os.getpid()  # beside the one that hangs
        assert time.monotonic() - began < 8
        assert await run(abs, 20.0, -3) == 3

    try:
        anyio.run(all_of_them)
    finally:
        decoders.close()


def test_work_in_a_thread_always_ends():
    def panic():
        raise KeyboardInterrupt("no Exception")

    async def run():
        with anyio.fail_after(5), pytest.raises(RuntimeError, match="KeyboardInterrupt"):
            await Threads(1, 1).run(panic)

    anyio.run(run)
