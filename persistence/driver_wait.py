"""Mends how PyMongo waits for its pool and for a server on Python 3.11.

PyMongo waits by `asyncio.wait_for(condition.wait(), timeout)`. Before Python 3.12 that runs `wait`
in a task of its own. When the caller is cancelled while that task takes its lock again, as happens
when the driver's deadline and ours come close together, the task is left behind: it gets the lock,
and nobody ever gives it back. From then on every call of the process waits for ever, and only a
restart helps. Python 3.12 waits in the caller's own task, and so does this.

`duet bench chaos` met it as gateways that ran and never became ready.

That `wait_for` also loses a cancellation that comes together with what it waited for. PyMongo sends
and connects by it: one cancelled call in twenty of those that connected went on as if nothing had
been asked, and a task that was to stop did not.
"""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import pymongo.lock
import pymongo.network_layer
import pymongo.pool_shared

if TYPE_CHECKING:
    from collections.abc import Awaitable

T = TypeVar("T")


def mend_driver_wait() -> None:
    """Lets PyMongo wait as on Python 3.12; there and later it does nothing."""
    if sys.version_info >= (3, 12):
        return
    mended = ModuleType("asyncio")
    vars(mended).update(vars(asyncio), wait_for=_wait_for)
    pymongo.lock.wait_for = _wait_for  # type: ignore[attr-defined, assignment]
    for module in (pymongo.network_layer, pymongo.pool_shared):
        module.asyncio = mended  # type: ignore[attr-defined]


async def _wait_for(awaitable: Awaitable[T], timeout: float | None) -> T:
    """As `asyncio.wait_for` of Python 3.12: without a task of its own."""
    async with asyncio.timeout(timeout):
        return await awaitable
