"""How processes that train together find one another, agree, and exchange Python objects.

In a single process each function does the same without any exchange.
"""

import os
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


def all_gather_objects(value: Any) -> list[Any]:
    """Any picklable value of every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


Result = TypeVar("Result")


_store: dist.Store | None = None  # in which the ranks met


def start(timeout: float) -> Any:
    """Join the processes that a launcher started with this one; be alone where none did."""
    from accelerate import PartialState

    cpu = not torch.accelerator.is_available()  # without it, torchrun's ranks are strangers
    met = {}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        met = {"timeout": timedelta(seconds=timeout), **meet(timeout)}
    return PartialState(cpu=cpu, **met)


def meet(timeout: float) -> dict[str, Any]:
    """What init_process_group takes of ranks that a launcher started: store, rank, world_size.

    The launcher's store outlives the processes that it starts again, and with it the addresses
    that those before them left there. So they agree on a part of the store that is theirs: each
    rank shows a sign of its own, and the first answers each sign until it has been heard.
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
                    sign = store.get(f"clipvip-here-{other}").decode()
                    store.set(f"clipvip-answer-{sign}", own)
            awaited -= {other for other in awaited if store.check([f"{own}-{other}"])}
            if time.monotonic() > until:
                raise RuntimeError(f"ranks {sorted(awaited)} did not come within {timeout:.0f} s")
            time.sleep(0.02)
    else:
        answer = f"clipvip-answer-{own}"
        while not store.check([answer]) and time.monotonic() < until:
            time.sleep(0.02)  # waiting in the store would hold back signals
        token = store.get(answer).decode()
        store.set(f"{token}-{rank}", "")
    _store = dist.PrefixStore(token, store)
    return {"store": _store, "rank": rank, "world_size": world}


def meeting_store() -> dist.Store | None:
    """The store in which the ranks met; None for a process that is alone."""
    return _store


def first_does(work: Callable[[], Result]) -> Result:
    """What `work` returns on the first rank, or the error it raises there, on every rank."""
    result: Result | None = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, error = all_gather_objects((result, error))[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@contextmanager
def first_enters(manager: AbstractContextManager[None]) -> Iterator[None]:
    """A context that the first rank alone is in; an error on its way in is raised on every rank."""
    with ExitStack() as entered:
        first_does(lambda: entered.enter_context(manager))
        yield


def on_any(flags: Tensor) -> Tensor:
    """Bools [n], each True where it is so on any rank. Nothing waits for a GPU that they are on."""
    if world_size() > 1:
        given = flags.int()
        dist.all_reduce(given, dist.ReduceOp.MAX)
        flags = given.bool()
    return flags
