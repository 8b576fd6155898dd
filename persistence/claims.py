"""Claiming of many: a document that somebody's transaction holds keeps nobody else waiting.

A process that is killed inside a transaction leaves its documents locked until its session is
ended (`persistence.abandoned`). Whoever claims what is due goes round them: what he has claimed
already, and what comes behind, is not for them to hold up.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import pymongo
from pymongo.errors import PyMongoError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pymongo.asynchronous.collection import AsyncCollection

# What a field matches that is set to an instant: a range, so that the first one of all is read
# from the edge of the field's index and no document is touched.
ANY_INSTANT: Final[dict[str, Any]] = {"$gt": datetime(1970, 1, 1, tzinfo=UTC)}

# Many times what an update takes, and a small part of a command's deadline.
_WAIT_S: Final = 0.25


@contextmanager
def skipping_locked() -> Iterator[None]:
    """Gives the database call inside a moment, and goes on without it when that is over.

    A claim whose answer came too late stands, and runs out with its lease.
    """
    try:
        with pymongo.timeout(_WAIT_S):
            yield
    except PyMongoError as error:
        if not error.timeout:
            raise


async def claim(
    collection: AsyncCollection[dict[str, Any]],
    ids: Sequence[object],
    free: dict[str, Any],
    update: Any,
) -> None:
    """Puts a claim on those of the documents that are still free.

    In one write: of several processes that found the same documents each gets those that it came
    to first. When somebody's transaction holds one of them, each is claimed by itself, all at the
    same time: however many are held, the others are claimed within two moments. Whoever asks reads
    what he has then, as a majority has it: while that is slow, answers come too late and the claims
    stand; and a primary that has lost its majority has claims that nobody else knows of.

    Raises:
        PyMongoError: what the first that failed raised.
    """
    locked = True
    with skipping_locked():
        await collection.update_many({"_id": {"$in": ids}, **free}, update)
        locked = False
    if not locked:
        return

    async def one(key: object) -> None:
        with skipping_locked():
            await collection.update_one({"_id": key, **free}, update)

    try:
        async with asyncio.TaskGroup() as group:
            for key in ids:
                group.create_task(one(key))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
