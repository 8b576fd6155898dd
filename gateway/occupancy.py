"""Occupancy: how many connections of the whole cluster a channel has. Contract and memory.

A node reports its own number for a name, as often as it changes; the sum over all nodes is the
cluster's. The same contract counts the signed-in connections of each user (`gateway.users`): then
a name is a user id.

What every implementation promises:

- **Coalesced.** `report` never waits. What a node reports within `FLUSH_AFTER_S` counts once, with
  its last number, so a name that comes and goes in that time was never there.
- **Exactly once.** Each change of the sum from 0 to more, and back to 0, is told to the handlers
  of one node, and published in the same atomic step as the change, if it is to be published.
- **Throttled.** A published count (`Count`) follows each change; while it is above
  `THROTTLE_ABOVE` at most once in `THROTTLE_S`, cluster-wide, and the last number is always sent.
- **Leased.** A dead node's numbers vanish when its lease runs out, each told once by a survivor.
- When the store comes back without its data each node enters its numbers again, unannounced.

Source: docs/pusher-compatibility.md 1.3 (`subscription_count`), 1.8 (online),
2.3 (`channel_occupied`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from gateway import frames
from gateway.broker import Publication
from gateway.channels import ChannelKind, channel_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from gateway.apps import App
    from gateway.broker import MemoryBroker

FLUSH_AFTER_S: Final = 0.05
THROTTLE_ABOVE: Final = 100
THROTTLE_S: Final = 5.0

Key: TypeAlias = tuple[str, str]  # app id, name


@dataclass(frozen=True, slots=True)
class Count:
    """Every change of the sum is published as `subscription_count` on the channel itself."""


@dataclass(frozen=True, slots=True)
class Turns:
    """The change from 0 and the one to 0 are published on a channel.

    Attributes:
        channel: Where.
        first: The body for 0 to more.
        last: The body for back to 0.
    """

    channel: str
    first: bytes
    last: bytes


if TYPE_CHECKING:
    # App id and name -> what is published about them.
    Announce: TypeAlias = Callable[[str, str], Count | Turns | None]


COUNT: Final = Count()


def counted_channels(app_of: Callable[[str], App | None]) -> Announce:
    """Announces the counts of channels of the apps that want them.

    Not of presence channels, and not of one user's own.
    """
    uncounted = {ChannelKind.PRESENCE, ChannelKind.USER_EVENTS}

    def announce(app_id: str, channel: str) -> Count | None:
        app = app_of(app_id)
        wanted = app is not None and app.subscription_count
        return COUNT if wanted and channel_kind(channel) not in uncounted else None

    return announce


def nothing_announced(_app_id: str, _name: str) -> None:
    """Publishes nothing."""


class Handlers:
    """Whom a node tells of changes. Handlers run in the event loop and must not block."""

    __slots__ = ("_occupied", "_vacated")

    def __init__(self) -> None:
        self._occupied: list[Callable[[str, str], None]] = []
        self._vacated: list[Callable[[str, str], None]] = []

    def on_occupied(self, handler: Callable[[str, str], None]) -> None:
        """Calls `handler(app_id, name)` when a sum that this node changed was 0 before."""
        self._occupied.append(handler)

    def on_vacated(self, handler: Callable[[str, str], None]) -> None:
        """Calls `handler(app_id, name)` when a sum that this node changed is 0 now."""
        self._vacated.append(handler)

    def changed(self, key: Key, before: int, after: int) -> None:
        """Tells of a change of a sum."""
        handlers = self._occupied if before == 0 < after else ()
        if after == 0 < before:
            handlers = self._vacated
        for handler in handlers:
            handler(*key)


class Occupancy(Protocol):
    """Numbers of connections, cluster-wide; see the module's promises."""

    @property
    def handlers(self) -> Handlers:
        """Where to register for changes; before `start`."""

    async def start(self) -> None:
        """Takes part in the node's lease."""

    async def stop(self) -> None:
        """Writes what was reported, and ends this node's part."""

    def report(self, app_id: str, name: str, count: int) -> None:
        """Says how many connections this node has for a name now."""

    async def counts(self, app_id: str, names: Collection[str]) -> dict[str, int]:
        """The sum of each of `names`; what this node has reported is in it.

        Raises:
            BrokerUnavailable: The store did not answer in time.
        """

    async def occupied(self, app_id: str, prefix: str = "") -> dict[str, int]:
        """Every name that begins with `prefix` and has a sum over 0, with the sum.

        Raises:
            BrokerUnavailable: The store did not answer in time.
        """


class MemoryTotals:
    """What the memory occupancies of several nodes of one process share.

    Attributes:
        numbers: (app id, name) -> node id -> number.
        shown: (app id, name) -> when its count was published last (loop time), and which.
    """

    __slots__ = ("numbers", "shown")

    def __init__(self) -> None:
        self.numbers: dict[Key, dict[str, int]] = {}
        self.shown: dict[Key, tuple[float, int]] = {}


class MemoryOccupancy:
    """Occupancy inside one process, for unit tests; a report counts in the loop's next turn.

    Attributes:
        handlers: See `Occupancy`.
    """

    __slots__ = ("_announce", "_broker", "_dirty", "_node_id", "_totals", "handlers")

    def __init__(
        self,
        broker: MemoryBroker,
        node_id: str,
        totals: MemoryTotals | None = None,
        announce: Announce = nothing_announced,
    ) -> None:
        self._broker = broker
        self._node_id = node_id
        self._totals = totals or MemoryTotals()
        self._announce = announce
        self._dirty: dict[Key, int] = {}
        self.handlers = Handlers()

    async def start(self) -> None:
        """Memory needs no lease."""

    async def stop(self) -> None:
        """See `Occupancy`."""
        self._flush()
        self.expire(self._node_id)

    def report(self, app_id: str, name: str, count: int) -> None:
        """See `Occupancy`."""
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._flush)
        self._dirty[app_id, name] = count

    async def counts(self, app_id: str, names: Collection[str]) -> dict[str, int]:
        """See `Occupancy`."""
        self._flush()
        return {name: self._total((app_id, name)) for name in names}

    async def occupied(self, app_id: str, prefix: str = "") -> dict[str, int]:
        """See `Occupancy`."""
        self._flush()
        return {
            name: self._total((app, name))
            for app, name in self._totals.numbers
            if app == app_id and name.startswith(prefix)
        }

    def expire(self, node_id: str) -> None:
        """Removes a dead node's numbers, as its lease's end does."""
        for key, numbers in list(self._totals.numbers.items()):
            if node_id in numbers:
                self._write(key, node_id, 0)

    def _total(self, key: Key) -> int:
        return sum(self._totals.numbers.get(key, {}).values())

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for key, count in dirty.items():
            self._write(key, self._node_id, count)

    def _write(self, key: Key, node_id: str, count: int) -> None:
        before = self._total(key)
        numbers = self._totals.numbers.setdefault(key, {})
        numbers[node_id] = count
        if not count:
            del numbers[node_id]
        if not numbers:
            del self._totals.numbers[key]
        after = self._total(key)
        match self._announce(*key):
            case Count():
                self._show(key)
            case Turns(channel, first, last) if (before == 0) != (after == 0):
                body = first if after else last
                self._broker.publish_now([Publication(key[0], channel, body)])
        self.handlers.changed(key, before, after)

    def _show(self, key: Key) -> None:
        """Publishes the count unless it is shown already, or later if it was shown just now."""
        loop = asyncio.get_running_loop()
        count = self._total(key)
        shown_at, shown = self._totals.shown.get(key, (float("-inf"), 0))
        if count == 0:
            self._totals.shown.pop(key, None)
        elif count != shown:
            wait_s = shown_at + THROTTLE_S - loop.time()
            if count > THROTTLE_ABOVE and wait_s > 0:
                loop.call_later(wait_s, self._show, key)
                return
            self._totals.shown[key] = (loop.time(), count)
            body = frames.subscription_count_body(key[1], count)
            self._broker.publish_now([Publication(*key, body)])
