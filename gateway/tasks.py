"""The one place that owns asyncio tasks.

Every task has a name and ids for the log, is kept alive until it ends, has its failure logged
once, and is cancelled and awaited when its owner stops.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
log = structlog.get_logger(__name__)

# Before a loop is begun again that has failed.
_PAUSE_S: Final = 1.0


async def for_ever(loop: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
    """Runs a loop that must not end: what nobody foresaw is logged, and it begins anew."""
    while True:
        try:
            await loop()
        except Exception:
            log.exception("loop_failed", loop=name)
        await asyncio.sleep(_PAUSE_S)


class Tasks:
    """Owns tasks until they end or `stop` ends them."""

    __slots__ = ("_running", "_stopping")

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str, **ids: object) -> asyncio.Task[T]:
        """Starts a task that this owner keeps; `ids` are logged if it fails.

        A task asked for while the owner stops is cancelled before it begins.
        """
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._running.add(task)
        if ids:
            task.add_done_callback(lambda done: self._ended(done, ids))
        else:
            task.add_done_callback(self._ended)
        if self._stopping:
            task.cancel()
        return task

    def _ended(self, task: asyncio.Task[Any], ids: dict[str, object] | None = None) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("task_failed", task=task.get_name(), exc_info=error, **(ids or {}))

    async def stop(self, grace_s: float = 0.0) -> None:
        """Gives the tasks `grace_s` to end, cancels the rest and waits for every one."""
        if self._running and grace_s > 0:
            await asyncio.wait(self._running, timeout=grace_s)
        self._stopping = True
        while self._running:
            for task in self._running:
                task.cancel()
            await asyncio.wait(self._running)
            # The done callbacks that empty the set run in the loop's next turn.
            await asyncio.sleep(0)
