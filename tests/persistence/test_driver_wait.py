"""PyMongo's calls may be cancelled whenever: its pool survives it, and they do end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pymongo.lock
import pymongo.network_layer
import pymongo.pool_shared
import pytest

from persistence.driver_wait import mend_driver_wait

if TYPE_CHECKING:
    from types import ModuleType


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


@pytest.mark.parametrize("module", [pymongo.network_layer, pymongo.pool_shared])
async def test_a_cancellation_that_comes_with_the_answer_is_not_lost(module: ModuleType) -> None:
    mend_driver_wait()
    answer = asyncio.get_running_loop().create_future()

    async def call() -> None:
        await answer

    waiting = asyncio.ensure_future(module.asyncio.wait_for(call(), 60))
    await turns_of_the_loop()
    answer.set_result(None)
    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting


async def turns_of_the_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
