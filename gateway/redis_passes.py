"""The cached session-token view in Redis: one hash a Session, one field a user.

Nobody reads a stale pass. A commit drops the view before its reply or event can be seen, and a
reader who looked the Session up before that commit can't put his old view back: every drop moves
the Session's generation on, and a view is only stored under the generation that was read first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from redis.exceptions import RedisError

from gateway.broker import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from redis.asyncio import Redis

# Long enough that no reader is still under way, short enough that nothing is kept for ever.
_GENERATION_TTL_S = 3600

_DROP = """
-- KEYS[1] views, KEYS[2] generation; ARGV[1] seconds that the generation is kept
redis.call('DEL', KEYS[1])
redis.call('INCR', KEYS[2])
redis.call('EXPIRE', KEYS[2], ARGV[1])
return 1
"""

_STORE = """
-- KEYS[1] views, KEYS[2] generation; ARGV[1] generation that was read, ARGV[2] user,
-- ARGV[3] view, ARGV[4] seconds that the views are kept
if (redis.call('GET', KEYS[2]) or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return 1
"""


class PassCache:
    """Views of passes; every method raises `BrokerUnavailable` when Redis does not answer."""

    def __init__(self, redis: Redis, prefix: str, ttl_s: int) -> None:
        self._redis = redis
        self._prefix = prefix
        self._ttl_s = ttl_s
        self._drop = redis.register_script(_DROP)
        self._store = redis.register_script(_STORE)

    async def read(self, session_id: str, user_id: str) -> tuple[bytes | None, str]:
        """The cached view, if there is one, and the generation under which to store a new one."""
        views, generation = self._keys(session_id)
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hget(views, user_id)
        pipeline.get(generation)
        try:
            view, found = await pipeline.execute()
        except (RedisError, OSError) as error:
            raise BrokerUnavailable(str(error)) from error
        return view, (found or b"").decode()

    async def store(self, session_id: str, user_id: str, view: bytes, generation: str) -> bool:
        """Keeps a view, unless it was dropped since `generation` was read."""
        keys = list(self._keys(session_id))
        try:
            kept = await cast(
                "Awaitable[int]",
                self._store(keys=keys, args=[generation, user_id, view, self._ttl_s]),
            )
        except (RedisError, OSError) as error:
            raise BrokerUnavailable(str(error)) from error
        return bool(kept)

    async def drop(self, session_id: str) -> None:
        """Drops every user's view of a Session, on every node at once."""
        try:
            await cast(
                "Awaitable[int]",
                self._drop(keys=list(self._keys(session_id)), args=[_GENERATION_TTL_S]),
            )
        except (RedisError, OSError) as error:
            raise BrokerUnavailable(str(error)) from error

    def _keys(self, session_id: str) -> tuple[str, str]:
        # The braces keep both keys on one node of a Redis Cluster.
        base = f"{self._prefix}:{{pass:{session_id}}}"
        return f"{base}:views", f"{base}:generation"
