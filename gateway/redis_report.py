"""What Redis says of itself, for `duet doctor` and before `duet serve` starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError

if TYPE_CHECKING:
    from collections.abc import Awaitable

# Something of each kind that the scripts of `gateway/lua` do; leaves nothing. A Redis that is full
# refuses none of it to a script that has removed something first.
_TRY: Final = """
-- KEYS[1] a name that nothing else has; ARGV[1] a pub/sub channel that nobody hears
redis.call('DEL', KEYS[1])
for _, call in ipairs({
  {'SET', ''}, {'HSET', '', ''}, {'SADD', ''}, {'ZADD', 1, ''}, {'XADD', '*', '', ''},
}) do
  redis.call(call[1], KEYS[1], unpack(call, 2))
  redis.call('PEXPIRE', KEYS[1], 1000)
  redis.call('DEL', KEYS[1])
end
return redis.call('PUBLISH', ARGV[1], '')
"""


@dataclass(frozen=True, slots=True)
class RedisReport:
    """What answered at an address, or why nothing did.

    Attributes:
        fault: One line, when there was no usable answer.
        name: `Redis` or `Valkey`.
        persistent: Whether it would have its data after a restart; none when it won't say.
        evicts: Whether it may throw keys away when its memory is full.
        refused: What it says to a user who may not do all that Duet does.
    """

    fault: str | None = None
    name: str = "Redis"
    version: str = ""
    cluster: bool = False
    persistent: bool | None = None
    evicts: bool = False
    refused: str | None = None


async def examine_redis(url: str, prefix: str, timeout_s: float) -> RedisReport:
    """Asks the server at `url`; never raises for what it finds there.

    Tries what the user may do with names behind `prefix`.
    """
    try:
        client = Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    except ValueError as error:
        return RedisReport(fault=_no_address(error))
    try:
        info: dict[str, Any] = await client.info()
        persistent = bool(info.get("aof_enabled")) or await _saves(client)
        refused = await _refused(client, prefix)
    except NoPermissionError as error:
        return RedisReport(refused=_line(error))
    except (RedisError, OSError) as error:
        return RedisReport(fault=_line(error))
    finally:
        await client.aclose()
    valkey = info.get("valkey_version")
    return RedisReport(
        name="Valkey" if valkey else "Redis",
        version=str(valkey or info.get("redis_version", "")),
        cluster=bool(info.get("cluster_enabled")),
        persistent=persistent,
        evicts=info.get("maxmemory_policy", "noeviction") != "noeviction",
        refused=refused,
    )


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


async def _refused(client: Redis, prefix: str) -> str | None:
    """What the server says to a user who may not do all that Duet does, None when he may."""
    name = f"{prefix}:doctor"
    try:
        async with client.pubsub() as listening:
            await listening.subscribe(name)
            await listening.get_message(timeout=1.0)
        await client.script_load(_TRY)
        await cast("Awaitable[int]", client.eval(_TRY, 1, name, name))
    except ResponseError as error:
        # What a script is refused has no code of its own in every version.
        if isinstance(error, NoPermissionError) or "executing the script" in str(error):
            return _line(error)
        # A server that can't save, or a replica, says so by itself.
        return _line(error) if "NOPERM" in str(error) else None
    return None


def _no_address(error: ValueError) -> str:
    """The library's own sentence if it has one; Python's would tell a part of the password."""
    if "schemes" in str(error):
        return str(error)
    return "no such address; in a password the characters / ? # @ : % are written %2F %3F … %25"


async def _saves(client: Redis) -> bool | None:
    """Whether snapshots are written; hosted Redis often forbids the question."""
    try:
        config = await client.config_get("save")
    except ResponseError:
        return None
    return any(config.values())
