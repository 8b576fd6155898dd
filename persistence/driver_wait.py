"""Mends how PyMongo waits: for an answer, and on Python 3.11 for its pool and for a server.

For each answer PyMongo makes two tasks, one that reads and one that looks twice a second whether
the connection was given up. One in the caller's own task and a timer do the same; a tenth of what
a command costs a process is saved. Only the release whose inside is known is mended so.

On Python 3.11 PyMongo waits for its pool by `asyncio.wait_for(condition.wait(), timeout)`. Before
Python 3.12 that runs `wait` in a task of its own. When the caller is cancelled while that task
takes its lock again, as happens when the driver's deadline and ours come close together, the task
is left behind: it gets the lock, and nobody ever gives it back. From then on every call of the
process waits for ever, and only a restart helps. Python 3.12 waits in the caller's own task, and
so does this.

`duet bench chaos` met it as gateways that ran and never became ready.

That `wait_for` also loses a cancellation that comes together with what it waited for. PyMongo sends
and connects by it: one cancelled call in twenty of those that connected went on as if nothing had
been asked, and a task that was to stop did not.
"""

from __future__ import annotations

import asyncio
import sys
import time
from types import ModuleType
from typing import TYPE_CHECKING, Final, TypeVar

import pymongo
import pymongo.asynchronous.pool
import pymongo.lock
import pymongo.network_layer
import pymongo.pool_shared
from pymongo import _csot
from pymongo.common import MAX_MESSAGE_SIZE
from pymongo.errors import ProtocolError, _OperationCancelled
from pymongo.message import _UNPACK_REPLY

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from pymongo.asynchronous.pool import AsyncConnection
    from pymongo.message import _OpMsg

T = TypeVar("T")

# The release of PyMongo whose reading is known here.
_KNOWN: Final = (4, 20)
# How often PyMongo looks whether a connection that waits for an answer was given up.
_LOOK_S: Final = 0.5
# How long an answer that is late may still take to be read.
_GRACE_S: Final = 0.01


def mend_driver_wait() -> None:
    """Lets PyMongo wait in the caller's own task."""
    if pymongo.version_tuple[:2] == _KNOWN:
        pool = pymongo.asynchronous.pool
        pool.async_receive_message = _receive_message  # type: ignore[attr-defined]
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


async def _receive_message(
    conn: AsyncConnection, request_id: int | None, max_message_size: int = MAX_MESSAGE_SIZE
) -> _OpMsg:
    """Reads one answer, within the connection's timeout or the deadline in force.

    Raises:
        TimeoutError: it did not come in time.
        _OperationCancelled: the pool has given the connection up.
    """
    timeout_s = conn.conn.gettimeout
    if _csot.get_timeout():
        timeout_s = max(_csot.get_deadline() - time.monotonic(), 0)
    try:
        async with asyncio.timeout(None) as patience:
            watch = _Watch(conn, patience, timeout_s)
            try:
                data, op_code = await conn.conn.get_conn.read(request_id, max_message_size)
            finally:
                watch.stop()
    except TimeoutError as error:
        if conn.cancel_context.cancelled:
            raise _OperationCancelled("operation cancelled") from error
        raise TimeoutError("timed out") from error
    unpack = _UNPACK_REPLY.get(op_code)
    if unpack is None:
        raise ProtocolError(f"the answer has the unknown opcode {op_code!r}")
    return unpack(data)


class _Watch:
    """Ends the patience for an answer: in time, or when the pool gives its connection up."""

    __slots__ = ("_conn", "_loop", "_over_at_s", "_patience", "_timer")

    def __init__(
        self, conn: AsyncConnection, patience: asyncio.Timeout, timeout_s: float | None
    ) -> None:
        self._conn = conn
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._over_at_s = None if timeout_s is None else self._loop.time() + timeout_s
        self._look()

    def _look(self) -> None:
        left_s = _LOOK_S if self._over_at_s is None else self._over_at_s - self._loop.time()
        if left_s <= 0 or self._conn.cancel_context.cancelled:
            # Where the loop has stood still, the answer may be here, and is read first.
            self._timer = self._loop.call_later(_GRACE_S, self._over)
        else:
            self._timer = self._loop.call_later(min(left_s, _LOOK_S), self._look)

    def _over(self) -> None:
        self._patience.reschedule(self._loop.time())

    def stop(self) -> None:
        self._timer.cancel()
