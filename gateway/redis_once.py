"""Publishing at most once under an idempotency key: one script, so nothing can come in between.

Names in Redis, behind the prefix: `{app}:once:{key}`, the answer that was given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.broker import BrokerUnavailable
from gateway.channels import is_cache_channel
from gateway.redis_broker import encoded, last_event_name, redis_name
from gateway.redis_commands import Script

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.broker import Publication
    from gateway.redis_broker import RedisBroker
    from gateway.redis_link import Argument

KEPT_S: Final = 120.0

_PUBLISH_ONCE: Final = Script.load("publish_once", 1)


class PublishOnce:
    """Answers given under idempotency keys, of every app for itself."""

    __slots__ = ("_broker", "_kept_ms", "_prefix")

    def __init__(self, broker: RedisBroker, prefix: str, kept_s: float = KEPT_S) -> None:
        self._broker = broker
        self._prefix = prefix
        self._kept_ms = int(kept_s * 1000)
        broker.commands.use_scripts(_PUBLISH_ONCE)

    async def publish(
        self, app_id: str, key: str, publications: Sequence[Publication], answer: bytes
    ) -> bytes | None:
        """Publishes all and remembers `answer`; the remembered one if the key was used before.

        Raises:
            BrokerUnavailable: Not known to be accepted in time. Asking again with the same key is
                what this is for.
        """
        if not self._broker.alive:
            raise BrokerUnavailable("Redis can't be reached")
        arguments: list[Argument] = [f"{self._prefix}:{app_id}:once:{key}", self._kept_ms, answer]
        arguments.append(self._broker.cache_ttl_ms)
        for one in publications:
            kept = is_cache_channel(one.channel)
            last = last_event_name(self._prefix, one.app_id, one.channel) if kept else ""
            arguments += (redis_name(self._prefix, one.app_id, one.channel), encoded(one), last)
        given = await self._broker.commands.run_script(_PUBLISH_ONCE, *arguments)
        return given if isinstance(given, bytes) else None
