"""Work in threads that do not keep the server from stopping."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from clipvip.serve.errors import Busy

Result = TypeVar("Result")


class Threads:
    """At most `at_once` threads; others wait, at most `most` in all."""

    def __init__(self, at_once: int, most: int) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._most = most
        self._given = 0

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Return work(*arguments). Raises Busy if too many wait."""
        if self._given >= self._most:
            raise Busy("the server has too much to do; try again in a moment")
        self._given += 1
        try:
            async with self._free:
                return await _in_thread(work, arguments)
        finally:
            self._given -= 1


async def _in_thread(work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def tell(set_it: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the server has stopped
            loop.call_soon_threadsafe(lambda: None if future.done() else set_it(value))

    def do() -> None:
        try:
            result = work(*arguments)
        except Exception as error:
            tell(future.set_exception, error)
        except BaseException as error:  # a panic of code in Rust is one: nobody may wait for ever
            tell(future.set_exception, RuntimeError(f"{type(error).__name__}: {error}"))
        else:
            tell(future.set_result, result)

    threading.Thread(target=do, daemon=True).start()
    return await future
