"""Results in memory, up to a number of bytes, each computed once however many ask for it."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable


class Cache:
    """The results used last, `most` bytes of them in all."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._results: OrderedDict[Hashable, bytes] = OrderedDict()
        self._coming: dict[Hashable, asyncio.Task[bytes]] = {}

    async def get(self, key: Hashable, compute: Callable[[], Awaitable[bytes]]) -> bytes:
        """Return the result of a key. Raises what `compute` raises; errors are not kept."""
        if key in self._results:
            self._results.move_to_end(key)
            return self._results[key]
        if key not in self._coming:
            self._coming[key] = asyncio.ensure_future(self._compute(key, compute))
        # One who asks may leave while others wait.
        return await asyncio.shield(self._coming[key])

    async def _compute(self, key: Hashable, compute: Callable[[], Awaitable[bytes]]) -> bytes:
        try:
            result = await compute()
        finally:
            del self._coming[key]
        self._results[key] = result
        self._size += len(result)
        while self._size > self._most:
            _, oldest = self._results.popitem(last=False)
            self._size -= len(oldest)
        return result
