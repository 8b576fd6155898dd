"""What a user of Redis needs: the rights that the documentation names, and no fewer."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from gateway.apps import App, Apps, Webhook
from gateway.broker import Publication
from gateway.frames import published_body
from gateway.messages import Member
from gateway.redis_parts import redis_parts
from gateway.redis_report import examine_redis
from tests.gateway.harness import settings_for_tests

if TYPE_CHECKING:
    from persistence.embedded_redis import RedisServer

RIGHTS = re.search(
    r"^ACL SETUSER duet on >… (.*)$", Path("docs/operations.md").read_text(), re.MULTILINE
)


async def url_of_user(server: RedisServer, *more: str) -> str:
    """The address for a user with the documented rights and `more`."""
    assert RIGHTS is not None
    async with redis.asyncio.Redis.from_url(server.url) as admin:
        rules = [*RIGHTS[1].split(), *more]
        # Untyped there.
        set_user: Any = admin.execute_command
        await set_user("ACL", "SETUSER", "duet", "reset", "on", ">pw", *rules)
    return server.url.replace("://", "://duet:pw@")


async def test_with_the_documented_rights_everything_is_allowed(own_redis: RedisServer) -> None:
    url = await url_of_user(own_redis)
    hook = Webhook(url="http://127.0.0.1:9/", events=("channel_occupied", "client_event"))
    app = App(id="1", key="k", secret="s", webhooks=(hook,), api_rate_per_s=9)
    settings = settings_for_tests(redis_url=url, redis_prefix="duet")
    parts = redis_parts(settings, Apps([app]))
    await parts.broker.start(lambda *_: None, lambda _: None, lambda: None)
    await parts.presence.start()
    await parts.occupancy.start()

    for channel in ("c", "cache-c"):
        await parts.broker.subscribe("1", channel)
        publication = Publication("1", channel, published_body("e", channel, "x"))
        await parts.broker.publish([publication])
        await parts.broker.publish_recoverable([publication])
        await parts.once.publish("1", "key", [publication], b"answer")
    told = parts.webhooks.hook("1", "client_event")
    await parts.broker.publish_told(Publication("1", "c", b"x"), told, b"{}")
    await parts.cache.last("1", "cache-c")
    await parts.cache.cached("1", "cache-c")
    await parts.presence.join("1", "presence-c", Member("u", b"{}"), "1.1")
    await parts.presence.user_counts("1", ["presence-c"])
    parts.occupancy.report("1", "c", 1)
    await parts.occupancy.occupied("1", "c")
    [claim] = await parts.webhooks.claim(1)
    batch = await parts.webhooks.read(claim)
    assert batch is not None
    await parts.webhooks.sent(claim, batch)
    _, generation = await parts.passes.read("session", "u")
    await parts.passes.store("session", "u", b"view", generation)
    await parts.passes.drop("session")
    now = asyncio.get_running_loop().time()
    parts.rates.allow(app, now)
    await parts.rates.share(now)
    report = await examine_redis(url, "duet", 1.0)
    await parts.occupancy.stop()
    await parts.presence.stop()
    await parts.broker.stop()
    await parts.client.aclose()

    assert (report.fault, report.refused) == (None, None)
    async with redis.asyncio.Redis.from_url(own_redis.url) as admin:
        refused = {entry["object"] for entry in await admin.acl_log()}
        left = [key async for key in admin.scan_iter("*doctor*")]
    # Of no consequence; before Redis 7 there is no right to a part of a command, such as that by
    # which a client's library tells its name.
    assert refused <= {"config|get", "config", "client"}
    assert left == []


@pytest.mark.parametrize(
    "lacks", ["-info", "resetchannels", "-@scripting", "-publish", "-zadd", "resetkeys"]
)
async def test_what_a_user_may_not_do_is_found(own_redis: RedisServer, lacks: str) -> None:
    url = await url_of_user(own_redis, lacks)

    report = await examine_redis(url, "duet", 1.0)

    assert report.refused
