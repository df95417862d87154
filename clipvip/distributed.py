"""Ranks of one run: how they meet, agree, and exchange Python objects.

Everything also works in a single process, without any exchange.
"""

import atexit
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_here() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def all_gather_objects(value: Any) -> list[Any]:
    """Gather a picklable value from every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


Result = TypeVar("Result")
_store: dist.Store | None = None  # in which the ranks met


def start(timeout: float) -> Any:
    """Join the other ranks if a launcher started any; return accelerate's PartialState.

    timeout: seconds to wait for the other ranks, now and in each collective.
    """
    from accelerate import PartialState

    cpu = not torch.accelerator.is_available()  # without this, torchrun's ranks do not join
    met = {}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        met = {"timeout": timedelta(seconds=timeout), **meet(timeout)}
    return PartialState(cpu=cpu, **met)


def meet(timeout: float) -> dict[str, Any]:
    """Meet the ranks that a launcher started; return init_process_group's arguments for them.

    The launcher's store outlives processes that it restarts, and so do the addresses that earlier
    processes left there. So the ranks agree on a part of the store for themselves: each rank
    writes a token of its own, and the first rank answers each token until its rank has read it.

    timeout: seconds to wait for all ranks. Raises RuntimeError if some do not come.
    """
    global _store
    patience = timedelta(seconds=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=patience))
    store.set_timeout(patience)
    own = token = uuid.uuid4().hex
    store.set(f"clipvip-here-{rank}", own)
    until = time.monotonic() + timeout
    if rank == 0:
        awaited = set(range(1, world))
        while awaited:
            for other in sorted(awaited):
                if store.check([f"clipvip-here-{other}"]):
                    theirs = store.get(f"clipvip-here-{other}").decode()
                    store.set(f"clipvip-answer-{theirs}", own)
            awaited -= {other for other in awaited if store.check([f"{own}-{other}"])}
            if time.monotonic() > until:
                raise RuntimeError(f"ranks {sorted(awaited)} did not start within {timeout:.0f} s")
            time.sleep(0.02)
    else:
        answer = f"clipvip-answer-{own}"
        while not store.check([answer]) and time.monotonic() < until:
            time.sleep(0.02)  # waiting in the store would delay signals
        token = store.get(answer).decode()
        store.set(f"{token}-{rank}", "")
    _store = dist.PrefixStore(token, store)
    return {"store": _store, "rank": rank, "world_size": world}


def meeting_store() -> dist.Store | None:
    """Return the store in which the ranks met; None in a single process."""
    return _store


def leave(status: int) -> None:
    """End this process if it is a rank of several, without shutting the interpreter down.

    A gloo thread may still have to free the tensors of the last collective (PyTorch 2.13). It would
    then abort the process, and a finished run would fail.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first_does(work: Callable[[], Result]) -> Result:
    """Run `work` on the first rank; return its result, or raise its error, on every rank."""
    outcome: Any = None
    if rank() == 0:
        try:
            outcome = work(), None
        except Exception as raised:
            outcome = None, raised
    result, error = all_gather_objects(outcome)[0]
    if error is not None:
        raise error
    return result


@contextmanager
def first_reports() -> Iterator[None]:
    """Within, all ranks raise the same errors; let only the first rank's process show them."""
    try:
        yield
    except Exception:
        if rank() == 0:
            raise
        raise SystemExit(1) from None


@contextmanager
def first_enters(manager: AbstractContextManager[None]) -> Iterator[None]:
    """Enter a context on the first rank alone; an error on entry is raised on every rank."""
    with ExitStack() as entered:
        first_does(lambda: entered.enter_context(manager))
        yield


def on_any(flags: Tensor) -> Tensor:
    """Combine bools [n] by "or" over ranks, without waiting for a GPU that holds them."""
    if world_size() > 1:
        given = flags.int()
        dist.all_reduce(given, dist.ReduceOp.MAX)
        flags = given.bool()
    return flags
