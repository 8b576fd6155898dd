"""PyMongo's calls may be cancelled whenever: its pool survives it, and they do end."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pymongo
import pymongo.asynchronous.pool
import pymongo.lock
import pymongo.network_layer
import pymongo.pool_shared
import pytest
from pymongo import AsyncMongoClient
from pymongo.errors import AutoReconnect, NetworkTimeout

from persistence.driver_wait import mend_driver_wait

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable
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


def test_a_driver_whose_inside_is_not_known_reads_as_it_always_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = object()
    monkeypatch.setattr(pymongo.asynchronous.pool, "async_receive_message", own)
    monkeypatch.setattr(pymongo, "version_tuple", (4, 99, 0))

    mend_driver_wait()

    assert pymongo.asynchronous.pool.async_receive_message is own  # type: ignore[attr-defined]


@pytest.fixture
async def client(mongodb_url: str) -> AsyncIterator[AsyncMongoClient[dict[str, Any]]]:
    """A client with one connection, so that each call must leave it usable or give it up."""
    mend_driver_wait()
    client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
        mongodb_url, maxPoolSize=1, retryReads=False
    )
    await client.admin.command("ping")
    yield client
    await client.close()


def slow(client: AsyncMongoClient[dict[str, Any]], seconds: float) -> Awaitable[Any]:
    """A call that MongoDB answers only after so long."""
    body = f"function() {{ sleep({seconds * 1000}); }}"
    waits = {"$function": {"body": body, "args": [], "lang": "js"}}
    return client.admin.aggregate([{"$documents": [{}]}, {"$set": {"waited": waits}}])


async def test_a_slow_answer_is_waited_for_without_a_task_of_its_own(
    client: AsyncMongoClient[dict[str, Any]],
) -> None:
    before = asyncio.all_tasks()
    calling = asyncio.ensure_future(slow(client, 1.2))
    await asyncio.sleep(0.2)
    meanwhile = asyncio.all_tasks()

    assert len(await (await calling).to_list()) == 1
    assert meanwhile - before == {calling}


async def test_an_answer_that_comes_too_late_is_a_timeout_and_never_anothers_answer(
    client: AsyncMongoClient[dict[str, Any]],
) -> None:
    with pytest.raises(NetworkTimeout, match="timed out"), pymongo.timeout(0.2):
        await slow(client, 1.0)

    assert "localTime" in await client.admin.command("hello")


async def test_a_call_that_is_cancelled_ends_and_its_answer_is_never_anothers(
    client: AsyncMongoClient[dict[str, Any]],
) -> None:
    calling = asyncio.ensure_future(slow(client, 1.0))
    await asyncio.sleep(0.2)
    calling.cancel()

    with pytest.raises(asyncio.CancelledError):
        await calling
    assert "localTime" in await client.admin.command("hello")


async def test_an_answer_that_came_while_the_process_stood_still_is_read(
    client: AsyncMongoClient[dict[str, Any]],
) -> None:
    """What stood in its way was not MongoDB, and a commit that is done is not told as unknown."""
    asyncio.get_running_loop().call_later(0.2, time.sleep, 0.8)

    with pymongo.timeout(0.7):
        answer = await slow(client, 0.5)

    assert len(await answer.to_list()) == 1


async def test_a_connection_that_the_pool_gives_up_ends_the_wait_for_its_answer(
    client: AsyncMongoClient[dict[str, Any]],
) -> None:
    """As when MongoDB's other connections show that its machine is gone."""
    calling = asyncio.ensure_future(slow(client, 30.0))
    await asyncio.sleep(0.2)
    [server] = client._topology._servers.values()
    for context in server.pool.active_contexts:
        context.cancel()

    with pytest.raises(AutoReconnect, match="cancelled"):
        async with asyncio.timeout(5):
            await calling


async def turns_of_the_loop() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
