"""The parts of one process that speak to Redis, built over one broker and one lease."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.occupancy import counted_channels
from gateway.redis_broker import RedisBroker
from gateway.redis_cache import RedisCache
from gateway.redis_client import redis_client
from gateway.redis_lease import RedisLease
from gateway.redis_occupancy import RedisOccupancy
from gateway.redis_once import PublishOnce
from gateway.redis_passes import PassCache
from gateway.redis_presence import RedisPresence
from gateway.redis_rates import ApiRates
from gateway.redis_webhooks import HookTiming, RedisWebhooks
from gateway.settings import SettingsError
from gateway.users import online_announcements

if TYPE_CHECKING:
    from gateway.apps import Apps
    from gateway.redis_client import RedisClient
    from gateway.settings import Settings

# How long a Session's cached views are kept after the last one was stored.
_VIEW_TTL_S: Final = 60


class RedisParts(NamedTuple):
    """Everything that speaks to Redis."""

    client: RedisClient
    broker: RedisBroker
    presence: RedisPresence
    occupancy: RedisOccupancy
    online: RedisOccupancy
    app_connections: RedisOccupancy
    cache: RedisCache
    passes: PassCache
    once: PublishOnce
    rates: ApiRates
    webhooks: RedisWebhooks


def redis_parts(settings: Settings, apps: Apps) -> RedisParts:
    """Built, not yet connected: they begin to try when the node starts.

    Raises:
        SettingsError: There is no address, or none that a Redis can have.
    """
    if settings.redis_url is None:
        raise SettingsError(["DUET_REDIS_URL: must be the address of a Redis or Valkey"])
    prefix, node_id = settings.redis_prefix, _new_node_id(settings)
    try:
        client = redis_client(settings.redis_url, settings.redis_timeout_s)
        broker = RedisBroker(
            settings.redis_url, prefix, node_id, settings.redis_timeout_s, settings.cache_ttl_s
        )
    except ValueError as error:
        raise SettingsError([f"DUET_REDIS_URL: {error}"]) from None
    lease = RedisLease(broker.commands, prefix, node_id, settings.node_lease_s)
    hooks = RedisWebhooks(broker.commands, prefix, apps.by_id, _hook_timing(settings))
    presence = RedisPresence(broker.commands, prefix, lease, settings.presence_max_members, hooks)
    return RedisParts(
        client=client,
        broker=broker,
        presence=presence,
        occupancy=RedisOccupancy(
            broker.commands, prefix, lease, "occupancy", counted_channels(apps.by_id), hooks=hooks
        ),
        online=RedisOccupancy(broker.commands, prefix, lease, "online", online_announcements),
        app_connections=RedisOccupancy(broker.commands, prefix, lease, "connections"),
        cache=RedisCache(broker, prefix, hooks),
        passes=PassCache(client, prefix, _VIEW_TTL_S),
        once=PublishOnce(broker, prefix),
        rates=ApiRates(broker.commands, prefix),
        webhooks=hooks,
    )


def _new_node_id(settings: Settings) -> str:
    """A name for this process's life: a restart is another node, whose leases are its own."""
    return f"{settings.node_name or 'node'}~{secrets.token_hex(6)}"


def _hook_timing(settings: Settings) -> HookTiming:
    return HookTiming(
        delay_s=settings.webhook_delay_s,
        give_up_s=settings.webhook_give_up_s,
        # A call, reading before it, noting behind it; then the node that made it is dead.
        claim_s=settings.webhook_timeout_s + 3 * settings.redis_timeout_s,
    )
