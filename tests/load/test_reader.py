"""What one publication costs the process that reads it from Redis: redis-py's reader, and ours.

The figures are CPU time of this process, the two in turn in one run, and are printed
(`pytest -m load -s`); what is asserted is which of them wins. The publisher is another process.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio
import uvloop

from gateway.redis_link import RedisAddress, RedisLink, packed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PUBLICATIONS = 20_000
REPEATS = 5
# As many are under way at a time: one, and a burst.
OUTSTANDING = (1, 64)
BODY = b"x" * 300
CHANNEL = "load-reader"

pytestmark = [pytest.mark.load, pytest.mark.timeout(300)]

PUBLISHER = """
import sys
import redis
server = redis.Redis.from_url(sys.argv[1])
channel, count, at_once = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
body = b"x" * int(sys.argv[5])
for _ in range(0, count, at_once):
    with server.pipeline(transaction=False) as pipeline:
        for _ in range(at_once):
            pipeline.publish(channel, body)
        pipeline.execute()
"""


async def publish(redis_url: str, count: int, at_once: int) -> None:
    arguments = (redis_url, CHANNEL, str(count), str(at_once), str(len(BODY)))
    publisher = await asyncio.create_subprocess_exec(sys.executable, "-c", PUBLISHER, *arguments)
    assert await publisher.wait() == 0


async def read_by_redis_py(redis_url: str, at_once: int) -> float:
    async with (
        redis.asyncio.Redis.from_url(redis_url, socket_timeout=None) as client,
        client.pubsub() as pubsub,
    ):
        await pubsub.subscribe(CHANNEL)
        assert (await anext(pubsub.listen()))["type"] == "subscribe"

        async def read() -> None:
            left = PUBLICATIONS
            async for message in pubsub.listen():
                assert len(message["data"]) == len(BODY)
                left -= 1
                if not left:
                    return

        return await measured(read, redis_url, at_once)


async def read_by_link(redis_url: str, at_once: int) -> float:
    subscribed, done = asyncio.Event(), asyncio.Event()
    left = PUBLICATIONS

    def on_answer(answer: Any) -> None:
        nonlocal left
        kind, _, value = answer
        if kind == b"subscribe":
            subscribed.set()
            return
        assert len(value) == len(BODY)
        left -= 1
        if not left:
            done.set()

    link = await RedisLink.open(RedisAddress.of(redis_url), on_answer, timeout_s=5)
    try:
        link.send(packed("SUBSCRIBE", CHANNEL))
        await subscribed.wait()
        return await measured(done.wait, redis_url, at_once)
    finally:
        link.abort()


async def measured(read: Callable[[], Awaitable[object]], redis_url: str, at_once: int) -> float:
    """CPU of this process for one publication, in µs."""
    before_s = time.process_time()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(publish(redis_url, PUBLICATIONS, at_once))
        await read()
        cpu_s = time.process_time() - before_s
    return cpu_s / PUBLICATIONS * 1e6


def test_reading_publications(redis_url: str) -> None:
    for at_once in OUTSTANDING:
        pairs = [
            (
                uvloop.run(read_by_redis_py(redis_url, at_once)),
                uvloop.run(read_by_link(redis_url, at_once)),
            )
            for _ in range(REPEATS)
        ]
        theirs, ours = (statistics.median(figures) for figures in zip(*pairs, strict=True))
        ratios = sorted(own / other for other, own in pairs)
        sys.stdout.write(
            f"\n{at_once} outstanding: redis-py {theirs:.1f}, RedisLink {ours:.1f} µs CPU each; "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})\n"
        )
        assert ratios[-1] < 1, "redis-py's reader has become as fast: ours is no longer needed"
