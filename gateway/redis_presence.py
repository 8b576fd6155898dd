"""Presence in Redis: members and entries, changed only by the scripts in `gateway/lua`.

Names, behind the prefix: `{app}:presence:{channel}:users` (user id -> user_info),
`…:counts` (user id -> entries), `presence:node:{node}` (that node's entries),
`presence:nodes` (node -> end of its lease), `presence:epoch`.

A node renews its lease three times in its length. The same call tells it what to make good:

- another **epoch**: Redis has lost its data. The node enters its entries again, unannounced,
  because every client still shows these members.
- its **lease had run out** (the process was stopped for long): survivors have announced that its
  members left. It enters them again and announces them.
- **dead nodes**: it removes their entries one by one, each in one atomic step, so that survivors
  may do so at the same time and die half-way.

Leaves that could not be made are kept and made at the next renewal.

Source: DESIGN 4 (presence).
"""

from __future__ import annotations

import asyncio
import secrets
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple

import structlog

from gateway.broker import BrokerUnavailable
from gateway.messages import Member
from gateway.presence import ChannelFull, Joined, added, removed
from gateway.redis_broker import encoded, redis_name
from gateway.redis_commands import Script
from gateway.redis_link import packed
from gateway.tasks import Tasks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.redis_commands import RedisCommands
    from gateway.redis_link import Answer, Argument

log = structlog.get_logger(__name__)

_JOIN: Final = Script.load("presence_join", 3)
_LEAVE: Final = Script.load("presence_leave", 4)
_RENEW: Final = Script.load("presence_renew", 2)
_BURY: Final = Script.load("presence_bury", 2)

# Entries in one pipeline when many are made or removed at once.
_AT_ONCE: Final = 200


class _Entry(NamedTuple):
    """One connection of one user in one channel."""

    app_id: str
    channel: str
    socket_id: str
    user_id: str

    def text(self) -> str:
        """The entry as Redis keeps it; only the user id, at the end, may contain spaces."""
        return " ".join(self)

    @classmethod
    def of(cls, text: str) -> _Entry:
        """The entry that `text` says."""
        return cls(*text.split(" ", 3))


class _ToEnter(Enum):
    """What has to be done about this node's entries."""

    NOTHING = 0
    QUIETLY = 1
    ANNOUNCED = 2


class RedisPresence:
    """See `gateway.presence` for what it promises."""

    def __init__(
        self,
        commands: RedisCommands,
        prefix: str,
        node_id: str,
        max_members: int,
        node_lease_s: float,
    ) -> None:
        self._commands = commands
        commands.use_scripts(_JOIN, _LEAVE, _RENEW, _BURY)
        self._prefix = prefix
        self._node_id = node_id
        self._max_members = max_members
        self._lease_s = node_lease_s
        self._leases = f"{prefix}:presence:nodes"
        self._epoch_key = f"{prefix}:presence:epoch"
        self._epoch: bytes | None = None
        # Kept until it has worked: the answer that asks for it comes once.
        self._to_enter = _ToEnter.NOTHING
        self._tasks = Tasks()
        # What this node has entered, to enter it again; entry -> user_info.
        self._mine: dict[_Entry, bytes] = {}
        # Entries that are to leave and may not have.
        self._owed: set[_Entry] = set()

    async def start(self) -> None:
        """See `Presence`; when Redis can't be reached the lease is taken later."""
        await self._renew_or_log()
        self._tasks.spawn(self._keep_renewing(), "presence_lease")

    async def stop(self) -> None:
        """See `Presence`."""
        await self._tasks.stop()
        try:
            if self._owed:
                await self._pay_owed()
            # A lease that is over now: what is left is removed by the others at once.
            await self._commands.run(packed("ZADD", self._leases, "XX", 0, self._node_id))
            await self._bury(self._node_id)
        except BrokerUnavailable as error:
            log.warning("presence_lease_left", error=str(error))

    async def join(self, app_id: str, channel: str, member: Member, socket_id: str) -> Joined:
        """See `Presence`."""
        entry = _Entry(app_id, channel, socket_id, member.user_id)
        self._owed.discard(entry)
        self._mine[entry] = member.user_info
        try:
            call = self._join_call(entry, member.user_info, self._max_members, announced=True)
            answer = await self._commands.run_script(_JOIN, *call)
        except BaseException:
            # Unknown whether it was made; also when the caller is cancelled.
            self._mine.pop(entry, None)
            self._owed.add(entry)
            raise
        if answer[0] == -1:
            self._mine.pop(entry, None)
            raise ChannelFull
        return Joined(answer[0] == 1, _members(answer[1]))

    async def leave(self, app_id: str, channel: str, user_id: str, socket_id: str) -> bool:
        """See `Presence`."""
        entry = _Entry(app_id, channel, socket_id, user_id)
        self._mine.pop(entry, None)
        self._owed.add(entry)
        try:
            answer = await self._commands.run_script(_LEAVE, *self._leave_call(entry))
        except BrokerUnavailable:
            return False
        if entry not in self._mine:
            self._owed.discard(entry)
        return bool(answer == 1)

    async def members(self, app_id: str, channel: str) -> dict[str, bytes]:
        """See `Presence`."""
        [answer] = await self._commands.run(packed("HGETALL", self._users(app_id, channel)))
        if not isinstance(answer, list):
            raise BrokerUnavailable(f"Redis refused to list members: {answer}")
        return _members(answer)

    # The lease

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            await self._renew_or_log()

    async def _renew_or_log(self) -> None:
        try:
            await self.renew()
        except BrokerUnavailable as error:
            log.warning("presence_lease_not_renewed", error=str(error))

    async def renew(self) -> None:
        """Renews the lease and makes good what the answer tells.

        Raises:
            BrokerUnavailable: Redis did not answer in time; the next renewal does the rest.
        """
        lease_ms = int(self._lease_s * 1000)
        arguments = (self._leases, self._epoch_key, self._node_id, lease_ms, secrets.token_hex(8))
        epoch, stood, dead = await self._commands.run_script(_RENEW, *arguments)
        if self._epoch is not None and epoch != self._epoch:
            log.warning("presence_data_lost", entries=len(self._mine))
            self._to_enter = _ToEnter.QUIETLY
        elif self._epoch is not None and not stood:
            log.warning("presence_lease_had_run_out", entries=len(self._mine))
            self._to_enter = _ToEnter.ANNOUNCED
        self._epoch = epoch
        if self._to_enter is not _ToEnter.NOTHING:
            await self._enter_again(announced=self._to_enter is _ToEnter.ANNOUNCED)
            self._to_enter = _ToEnter.NOTHING
        await self._pay_owed()
        for node_id in dead:
            if node_id.decode() != self._node_id:
                await self._reap(node_id.decode())

    async def _enter_again(self, *, announced: bool) -> None:
        for entries in _in_chunks(list(self._mine)):
            calls = [
                # No limit: these members were let in before.
                self._join_call(entry, self._mine[entry], 0, announced=announced)
                for entry in entries
                if entry in self._mine
            ]
            if calls:
                await self._commands.run_scripts(_JOIN, calls)

    async def _pay_owed(self) -> None:
        for entries in _in_chunks(list(self._owed)):
            due = [entry for entry in entries if entry in self._owed]
            if due:
                await self._commands.run_scripts(_LEAVE, [self._leave_call(one) for one in due])
                self._owed.difference_update(one for one in due if one not in self._mine)

    async def _reap(self, node_id: str) -> None:
        """Removes a dead node's entries, unless it turns out to be alive."""
        key = self._node_key(node_id)
        while True:
            [some] = await self._commands.run(packed("SRANDMEMBER", key, _AT_ONCE))
            if not some:
                break
            calls = [
                self._leave_call(_Entry.of(text.decode()), owner=node_id, dead=True)
                for text in some
            ]
            answers = await self._commands.run_scripts(_LEAVE, calls)
            if -1 in answers:
                return
            log.info("presence_reaped", dead_node=node_id, entries=len(some))
        await self._bury(node_id)

    async def _bury(self, node_id: str) -> None:
        await self._commands.run_script(_BURY, self._leases, self._node_key(node_id), node_id)

    # Calls

    def _users(self, app_id: str, channel: str) -> str:
        return f"{self._prefix}:{app_id}:presence:{channel}:users"

    def _counts(self, app_id: str, channel: str) -> str:
        return f"{self._prefix}:{app_id}:presence:{channel}:counts"

    def _node_key(self, node_id: str) -> str:
        return f"{self._prefix}:presence:node:{node_id}"

    def _join_call(
        self, entry: _Entry, user_info: bytes, limit: int, *, announced: bool
    ) -> list[Argument]:
        app_id, channel, socket_id, user_id = entry
        publication = added(app_id, channel, Member(user_id, user_info), socket_id)
        return [
            self._users(app_id, channel),
            self._counts(app_id, channel),
            self._node_key(self._node_id),
            entry.text(),
            user_id,
            user_info,
            limit,
            redis_name(self._prefix, app_id, channel) if announced else b"",
            encoded(publication),
        ]

    def _leave_call(
        self, entry: _Entry, owner: str | None = None, *, dead: bool = False
    ) -> list[Argument]:
        app_id, channel, _, user_id = entry
        node_id = owner or self._node_id
        return [
            self._users(app_id, channel),
            self._counts(app_id, channel),
            self._node_key(node_id),
            self._leases,
            entry.text(),
            user_id,
            redis_name(self._prefix, app_id, channel),
            encoded(removed(app_id, channel, user_id)),
            node_id if dead else "",
        ]


def _members(flat: Answer) -> dict[str, bytes]:
    """A flat HGETALL as a mapping."""
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


def _in_chunks(entries: list[_Entry]) -> Iterable[list[_Entry]]:
    return (entries[start : start + _AT_ONCE] for start in range(0, len(entries), _AT_ONCE))
