"""Presence: which users are in a channel, with one entry per connection. Contract and memory.

What every implementation promises:

- A member is a user; it stands as long as one of its entries (node, socket) does. Joining twice
  with one entry and leaving without one change nothing, in any order.
- `member_added` is published exactly when a user's first entry comes and `member_removed` exactly
  when the last one goes, in the same atomic step as the change itself, with the bodies that the
  caller has built. The one who joins doesn't get its own `member_added`.
- The members that `join` returns are those right after it, the joiner included.
- A node's entries are held by a lease that the node renews. When it runs out, the surviving nodes
  remove them, each once, even if a node dies while doing so.
- When the store comes back without its data, each node enters its own entries again.

Source: docs/architecture.md, docs/pusher-compatibility.md 1.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gateway import frames
from gateway.broker import Publication

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.broker import MemoryBroker
    from gateway.messages import Member


class ChannelFull(Exception):
    """The channel has as many members as it may have, and the user is none of them."""


@dataclass(frozen=True, slots=True)
class Joined:
    """What a join brought.

    Attributes:
        first: Whether the user was not a member before.
        members: user id -> JSON of its `user_info`.
    """

    first: bool
    members: dict[str, bytes]


class Presence(Protocol):
    """The members of presence channels; see the module's promises."""

    async def start(self) -> None:
        """Takes the node's lease and begins to renew it."""

    async def stop(self) -> None:
        """Ends the node's lease; its entries that are left are the survivors' to remove."""

    async def join(self, app_id: str, channel: str, member: Member, socket_id: str) -> Joined:
        """Adds this node's entry for a connection.

        Raises:
            ChannelFull: There is no room for another member.
            BrokerUnavailable: The store did not answer in time; the entry is removed later if
                it was made.
        """

    async def leave(self, app_id: str, channel: str, user_id: str, socket_id: str) -> bool:
        """Removes an entry; returns whether it was the user's last.

        Never fails: when the store can't be reached it is tried again until it can.
        """

    async def members(self, app_id: str, channel: str) -> dict[str, bytes]:
        """The members now: user id -> JSON of its `user_info`.

        Raises:
            BrokerUnavailable: The store did not answer in time.
        """

    async def user_counts(self, app_id: str, channels: Sequence[str]) -> dict[str, int]:
        """How many members each of `channels` has.

        Raises:
            BrokerUnavailable: The store did not answer in time.
        """


def added(app_id: str, channel: str, member: Member, socket_id: str) -> Publication:
    """The publication of a first entry."""
    body = frames.member_added_body(channel, member.user_id, member.user_info)
    return Publication(app_id, channel, body, socket_id)


def removed(app_id: str, channel: str, user_id: str) -> Publication:
    """The publication of a last entry."""
    return Publication(app_id, channel, frames.member_removed_body(channel, user_id))


class MemoryStore:
    """What the memory presences of several nodes of one process share.

    Attributes:
        entries: (app id, channel) -> user id -> set of (node id, socket id).
        infos: (app id, channel) -> user id -> JSON of `user_info`.
    """

    __slots__ = ("entries", "infos")

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], dict[str, set[tuple[str, str]]]] = {}
        self.infos: dict[tuple[str, str], dict[str, bytes]] = {}


class MemoryPresence:
    """Presence inside one process, for unit tests; `expire` stands for a lease's end."""

    __slots__ = ("_broker", "_max_members", "_node_id", "_store")

    def __init__(
        self,
        broker: MemoryBroker,
        node_id: str,
        max_members: int,
        store: MemoryStore | None = None,
    ) -> None:
        self._broker = broker
        self._node_id = node_id
        self._max_members = max_members
        self._store = store or MemoryStore()

    async def start(self) -> None:
        """Memory needs no lease."""

    async def stop(self) -> None:
        """Memory needs no lease."""

    async def join(self, app_id: str, channel: str, member: Member, socket_id: str) -> Joined:
        """See `Presence`."""
        key = (app_id, channel)
        users = self._store.entries.setdefault(key, {})
        infos = self._store.infos.setdefault(key, {})
        first = member.user_id not in users
        if first and len(users) >= self._max_members:
            raise ChannelFull
        users.setdefault(member.user_id, set()).add((self._node_id, socket_id))
        infos[member.user_id] = member.user_info
        if first:
            self._broker.publish_now([added(app_id, channel, member, socket_id)])
        return Joined(first, dict(infos))

    async def leave(self, app_id: str, channel: str, user_id: str, socket_id: str) -> bool:
        """See `Presence`."""
        return self._remove((app_id, channel), user_id, (self._node_id, socket_id))

    async def members(self, app_id: str, channel: str) -> dict[str, bytes]:
        """See `Presence`."""
        return dict(self._store.infos.get((app_id, channel), {}))

    async def user_counts(self, app_id: str, channels: Sequence[str]) -> dict[str, int]:
        """See `Presence`."""
        infos = self._store.infos
        return {channel: len(infos.get((app_id, channel), {})) for channel in channels}

    def expire(self, node_id: str) -> None:
        """Removes a dead node's entries, as its lease's end does."""
        for key, users in list(self._store.entries.items()):
            for user_id, entries in list(users.items()):
                for entry in [entry for entry in entries if entry[0] == node_id]:
                    self._remove(key, user_id, entry)

    def _remove(self, key: tuple[str, str], user_id: str, entry: tuple[str, str]) -> bool:
        users = self._store.entries.get(key, {})
        entries = users.get(user_id, set())
        if entry not in entries:
            return False
        entries.remove(entry)
        if entries:
            return False
        del users[user_id]
        del self._store.infos[key][user_id]
        if not users:
            del self._store.entries[key], self._store.infos[key]
        self._broker.publish_now([removed(*key, user_id)])
        return True
