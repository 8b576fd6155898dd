"""What Redis says of itself, for `duet doctor` and before `duet serve` starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError


@dataclass(frozen=True, slots=True)
class RedisReport:
    """What answered at an address, or why nothing did.

    Attributes:
        fault: One line, when there was no usable answer.
        name: `Redis` or `Valkey`.
        persistent: Whether it would have its data after a restart; none when it won't say.
        evicts: Whether it may throw keys away when its memory is full.
    """

    fault: str | None = None
    name: str = "Redis"
    version: str = ""
    cluster: bool = False
    persistent: bool | None = None
    evicts: bool = False


async def examine_redis(url: str, timeout_s: float) -> RedisReport:
    """Asks the server at `url`; never raises for what it finds there."""
    try:
        client = Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    except ValueError as error:
        return RedisReport(fault=str(error))
    try:
        info: dict[str, Any] = await client.info()
        persistent = bool(info.get("aof_enabled")) or await _saves(client)
    except (RedisError, OSError) as error:
        return RedisReport(fault=str(error).partition("\n")[0][:200] or type(error).__name__)
    finally:
        await client.aclose()
    valkey = info.get("valkey_version")
    return RedisReport(
        name="Valkey" if valkey else "Redis",
        version=str(valkey or info.get("redis_version", "")),
        cluster=bool(info.get("cluster_enabled")),
        persistent=persistent,
        evicts=info.get("maxmemory_policy", "noeviction") != "noeviction",
    )


async def _saves(client: Redis) -> bool | None:
    """Whether snapshots are written; hosted Redis often forbids the question."""
    try:
        config = await client.config_get("save")
    except ResponseError:
        return None
    return any(config.values())
