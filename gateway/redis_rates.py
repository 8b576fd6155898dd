"""How often an app may call the HTTP API, over all nodes, without a question on a call's way.

Each node judges calls by a bucket of its own and, every `SHARE_EVERY_S`, tells the others how many
it has let through and takes from its bucket what they have. So one node is exact. Several together
let through what one would, and at most one second's calls more for each node: what they do between
two tellings is paid back afterwards.

While Redis can't be reached each node holds the limit by itself.

Name in Redis, behind the prefix: `{app}:calls`, the calls that all nodes have let through.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import hiredis

from gateway.broker import BrokerUnavailable
from gateway.rates import Rate
from gateway.redis_link import packed
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from gateway.apps import App
    from gateway.redis_commands import RedisCommands
    from gateway.redis_link import Answer

SHARE_EVERY_S: Final = 0.25

# What others did while this node stood still for longer is not taken: its bucket has been refilled
# for all of that time at its first call, and holds no more than a second's calls.
_STALE_S: Final = 4 * SHARE_EVERY_S
# An app that has not called for so long is forgotten: its bucket is long full again.
_KEPT_S: Final = 60.0


class _Calls:
    """One app's calls on this node.

    Attributes:
        untold: Let through since the others were told.
        total: Let through by all nodes as this one knows; none when it knew nothing to compare.
        called_at: When the last call came, in monotonic seconds.
    """

    __slots__ = ("called_at", "rate", "total", "untold")

    def __init__(self, per_s: float, now: float) -> None:
        self.rate = Rate(per_s, now)
        self.untold = 0
        self.total: int | None = None
        self.called_at = now


class ApiRates:
    """The buckets of apps that have a limit and are calling this node."""

    __slots__ = ("_calls", "_commands", "_prefix", "_shared_at", "_someone_calls", "_tasks")

    def __init__(self, commands: RedisCommands, prefix: str) -> None:
        self._commands = commands
        self._prefix = prefix
        # App id -> its calls.
        self._calls: dict[str, _Calls] = {}
        self._shared_at = float("-inf")
        self._someone_calls = asyncio.Event()
        self._tasks = Tasks()

    def start(self) -> None:
        """Begins to share with the other nodes."""
        self._tasks.spawn(self._keep_sharing(), "api_rates")

    async def stop(self) -> None:
        """Ends the sharing."""
        await self._tasks.stop()

    def allow(self, app: App, now: float) -> tuple[bool, int]:
        """Counts a call at `now` (monotonic seconds).

        Returns whether it is within the app's rate, and how many more would be.
        """
        calls = self._calls.get(app.id)
        if calls is None:
            calls = self._calls[app.id] = _Calls(app.api_rate_per_s, now)
            self._someone_calls.set()
        calls.called_at = now
        allowed = calls.rate.allow(app.api_rate_per_s, now)
        calls.untold += allowed
        return allowed, calls.rate.left

    async def _keep_sharing(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            await self._someone_calls.wait()
            await self.share(now())
            await asyncio.sleep(SHARE_EVERY_S)

    async def share(self, now: float) -> None:
        """Tells the other nodes of this one's calls, and learns of theirs."""
        stale = now - self._shared_at > _STALE_S
        self._shared_at = now
        late = now - _KEPT_S
        self._calls = {one: calls for one, calls in self._calls.items() if calls.called_at >= late}
        if not self._calls:
            self._someone_calls.clear()
            return
        told = [(app_id, calls, calls.untold) for app_id, calls in self._calls.items()]
        question = b"".join(
            packed("INCRBY", self._name(app_id), count)
            + packed("PEXPIRE", self._name(app_id), int(2 * _KEPT_S * 1000))
            for app_id, _, count in told
        )
        for _, calls, _ in told:
            calls.untold = 0
            if stale:
                calls.total = None
        try:
            answers = await self._commands.run(question, 2 * len(told))
        except BrokerUnavailable:
            # Whether they were counted nobody knows, so the next comparison would be wrong.
            for _, calls, _ in told:
                calls.total = None
            return
        for (_, calls, count), total in zip(told, answers[::2], strict=True):
            _learn(calls, count, total)

    def _name(self, app_id: str) -> str:
        return f"{self._prefix}:{app_id}:calls"


def _learn(calls: _Calls, told: int, total: Answer) -> None:
    """Takes from the bucket what other nodes have let through since the last time."""
    if isinstance(total, hiredis.ReplyError):
        calls.total = None
        return
    if calls.total is not None:
        # A Redis that has lost its data counts from the beginning.
        calls.rate.take(max(0, total - calls.total - told))
    calls.total = total
