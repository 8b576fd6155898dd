"""Which channels this node asks the broker for.

The first subscriber makes the node subscribe, and all who come meanwhile wait for that one attempt
and share its outcome: with a frozen broker a thousand sockets fail in one timeout, not in a
thousand. When the last one has gone the node lingers a second before it unsubscribes, because most
who leave a channel are about to come back (a reload, a route change).

Subscribing and unsubscribing one channel never overlap.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from gateway.broker import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from gateway.broker import Broker
    from gateway.hub import Channel, ChannelKey, Hub
    from gateway.tasks import Tasks

LINGER_S: Final = 1.0

# What a change of interest came to; a failure is a value because several wait for it.
_Outcome = BrokerUnavailable | None


class Interest:
    """The broker subscriptions of one node."""

    __slots__ = ("_broker", "_changes", "_hub", "_linger_s", "_lingering", "_tasks")

    def __init__(self, hub: Hub, broker: Broker, tasks: Tasks, linger_s: float = LINGER_S) -> None:
        self._hub = hub
        self._broker = broker
        self._tasks = tasks
        self._linger_s = linger_s
        # The per-channel lock: whoever wants a change waits for the one under way.
        self._changes: dict[ChannelKey, asyncio.Task[_Outcome]] = {}
        self._lingering: deque[tuple[float, Channel]] = deque()

    async def hear(self, channel: Channel) -> None:
        """Returns when this node gets the channel's publications.

        Cancelling one caller leaves the attempt to the others.

        Raises:
            BrokerUnavailable: The attempt that this caller waited for failed.
        """
        while not channel.heard:
            change = self._changes.get(channel.key)
            if change is None:
                change = self._change(channel, self._subscribe(channel))
            outcome = await asyncio.shield(change)
            if outcome is not None:
                raise BrokerUnavailable(*outcome.args)

    def linger(self, channel: Channel) -> None:
        """Ends the node's interest after a while, unless somebody has come by then."""
        loop = asyncio.get_running_loop()
        if not self._lingering:
            loop.call_later(self._linger_s, self._settle)
        self._lingering.append((loop.time() + self._linger_s, channel))

    def _settle(self) -> None:
        loop = asyncio.get_running_loop()
        lingering = self._lingering
        # A timer may fire a clock's resolution early.
        now = loop.time() + 0.001
        while lingering and lingering[0][0] <= now:
            _, channel = lingering.popleft()
            # A change under way looks after the channel itself when it ends.
            if channel.empty and channel.key not in self._changes:
                if channel.heard:
                    self._change(channel, self._unsubscribe(channel))
                else:
                    self._hub.forget(channel)
        if lingering:
            loop.call_at(lingering[0][0], self._settle)

    def _change(
        self, channel: Channel, coroutine: Coroutine[None, None, _Outcome]
    ) -> asyncio.Task[_Outcome]:
        change = self._tasks.spawn(coroutine, "interest", app=channel.app_id, channel=channel.name)
        self._changes[channel.key] = change
        return change

    async def _subscribe(self, channel: Channel) -> _Outcome:
        try:
            await self._broker.subscribe(*channel.key)
        except BrokerUnavailable as error:
            return error
        else:
            channel.heard = True
            return None
        finally:
            del self._changes[channel.key]
            if channel.empty:
                self.linger(channel)

    async def _unsubscribe(self, channel: Channel) -> _Outcome:
        channel.heard = False
        try:
            await self._broker.unsubscribe(*channel.key)
        finally:
            del self._changes[channel.key]
            self._hub.forget(channel)
        return None
