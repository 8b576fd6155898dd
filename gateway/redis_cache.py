"""The cache of cache channels in Redis; `RedisBroker.publish` fills it.

Names, behind the prefix: `{app}:last:{channel}`, the body of the last event, and
`{app}:last:{channel}:missed`, which stands while a miss has been told.

Source: `gateway.cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.broker import BrokerUnavailable
from gateway.cache import MISS_TOLD_AGAIN_S, data_of, seconds_left
from gateway.redis_broker import last_event_name
from gateway.redis_commands import Script
from gateway.redis_link import packed
from gateway.webhooks import BEHIND, event_bytes

if TYPE_CHECKING:
    from gateway.redis_broker import RedisBroker
    from gateway.webhooks import Webhooks

_READ: Final = Script.load("cache_read", 2, BEHIND)


class RedisCache:
    """See `gateway.cache` for what it promises."""

    __slots__ = ("_broker", "_hooks", "_prefix")

    def __init__(self, broker: RedisBroker, prefix: str, hooks: Webhooks) -> None:
        self._broker = broker
        broker.commands.use_scripts(_READ)
        self._prefix = prefix
        self._hooks = hooks

    async def last(self, app_id: str, channel: str) -> bytes | None:
        """See `Cache`."""
        name = last_event_name(self._prefix, app_id, channel)
        hook = self._hooks.hook(app_id, "cache_miss")
        event = event_bytes("cache_miss", channel) if hook else b""
        body = await self._broker.commands.run_script(
            _READ, name, f"{name}:missed", int(MISS_TOLD_AGAIN_S * 1000), hook, event
        )
        if body is None:
            return None
        # What is kept was published before: it has come when this has come round.
        await self._broker.fence()
        kept: bytes = body
        return kept

    async def cached(self, app_id: str, channel: str) -> tuple[str, int] | None:
        """See `Cache`."""
        name = last_event_name(self._prefix, app_id, channel)
        question = packed("GET", name) + packed("PTTL", name)
        body, left_ms = await self._broker.commands.run(question, 2)
        if body is None or left_ms == -2:
            return None
        if not isinstance(body, bytes) or not isinstance(left_ms, int):
            raise BrokerUnavailable(f"Redis refused to tell a channel's last event: {body}")
        return data_of(body), seconds_left(left_ms)
