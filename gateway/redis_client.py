"""The pooled Redis client, for what is neither pub/sub nor presence: the session-token views."""

from __future__ import annotations

from typing import TypeAlias

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError

# The client's type, for those who hand it on without knowing redis-py.
RedisClient: TypeAlias = Redis


def redis_client(url: str, timeout_s: float) -> RedisClient:
    """A client that connects when it is first used; no call waits longer than `timeout_s`.

    A connection that the server closed meanwhile, or that leads to a replica since a failover, is
    replaced once, silently; a server that does not answer is not asked again.

    Raises:
        ValueError: `url` is no address of a Redis.
    """
    return Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError, ReadOnlyError)),
    )
