"""PyMongo's pool survives calls that are cancelled while they wait for it, however often."""

from __future__ import annotations

import asyncio

import pymongo.lock
import pytest

from persistence.driver_wait import mend_driver_wait


async def test_a_wait_that_is_cancelled_twice_leaves_the_lock_to_its_owner() -> None:
    mend_driver_wait()
    lock = pymongo.lock._async_create_lock()
    condition = pymongo.lock._async_create_condition(lock)

    async def wait() -> None:
        async with condition:
            await pymongo.lock._async_cond_wait(condition, 60)

    waiting = asyncio.ensure_future(wait())
    await turns_of_the_loop()
    async with lock:
        # It wants the lock back before it ends; meanwhile it is cancelled once more.
        waiting.cancel()
        await turns_of_the_loop()
        waiting.cancel()
        await turns_of_the_loop()
        assert not waiting.done()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert not lock.locked()


async def turns_of_the_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
