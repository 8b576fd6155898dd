"""Presence in Redis: members and entries, changed only by the scripts in `gateway/lua`.

Names, behind the prefix: `{app}:presence:{channel}:users` (user id -> user_info),
`…:counts` (user id -> entries), `presence:node:{node}` (that node's entries, under its lease).

Leaves that could not be made are kept and made at the next renewal of the lease. After a loss of
Redis' data they are entered again first, like what stands, so that their end is announced.

Source: docs/architecture.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import hiredis
import structlog

from gateway.broker import BrokerUnavailable
from gateway.messages import Member
from gateway.presence import ChannelFull, Joined, added, removed
from gateway.redis_broker import encoded, redis_name
from gateway.redis_commands import Script
from gateway.redis_lease import EPOCH_IS_ANOTHER, NODE_IS_ALIVE, Entering
from gateway.redis_link import packed
from gateway.webhooks import BEHIND, NoWebhooks, event_bytes, fact_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.redis_commands import RedisCommands
    from gateway.redis_lease import RedisLease
    from gateway.redis_link import Answer, Argument
    from gateway.webhooks import Webhooks

log = structlog.get_logger(__name__)

_JOIN: Final = Script.load("presence_join", 4, BEHIND)
_LEAVE: Final = Script.load("presence_leave", 5, BEHIND)

_COMING: Final = "member_added"

# Entries in one pipeline when many are made or removed at once.
_AT_ONCE: Final = 200
_ANY_EPOCH: Final = b""


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


class RedisPresence:
    """See `gateway.presence` for what it promises."""

    __slots__ = (
        "_commands",
        "_hooks",
        "_joining",
        "_lease",
        "_max_members",
        "_mine",
        "_owed",
        "_prefix",
    )

    def __init__(
        self,
        commands: RedisCommands,
        prefix: str,
        lease: RedisLease,
        max_members: int,
        hooks: Webhooks | None = None,
    ) -> None:
        self._commands = commands
        commands.use_scripts(_JOIN, _LEAVE)
        self._prefix = prefix
        self._lease = lease
        lease.add(self)
        self._max_members = max_members
        self._hooks = hooks or NoWebhooks()
        # What this node has entered, to enter it again; entry -> user_info.
        self._mine: dict[_Entry, bytes] = {}
        # Entries whose join is under way: it makes them, and announces them, itself.
        self._joining: set[_Entry] = set()
        # Entries that are to leave and may not have -> whether they are known to have been made.
        self._owed: dict[_Entry, bool] = {}

    async def start(self) -> None:
        """See `Presence`; when Redis can't be reached the lease is taken later."""
        await self._lease.start(self)

    async def stop(self) -> None:
        """See `Presence`."""
        try:
            await self._pay_owed()
        except BrokerUnavailable as error:
            log.warning("presence_leaves_left", entries=len(self._owed), error=str(error))
        await self._lease.stop(self)

    async def join(self, app_id: str, channel: str, member: Member, socket_id: str) -> Joined:
        """See `Presence`."""
        entry = _Entry(app_id, channel, socket_id, member.user_id)
        made = self._owed.pop(entry, False) or entry in self._mine
        self._mine[entry] = member.user_info
        self._joining.add(entry)
        try:
            answer = await self._make(entry, member.user_info)
        except BaseException:
            # Unknown whether it was made; also when the caller is cancelled.
            self._mine.pop(entry, None)
            self._owed[entry] = made
            raise
        finally:
            self._joining.discard(entry)
        if answer[0] == -1:
            self._mine.pop(entry, None)
            raise ChannelFull
        return Joined(answer[0] == 1, _members(answer[1]))

    async def _make(self, entry: _Entry, user_info: bytes) -> Answer:
        """Joins when everybody's entries stand: whoever joins is told of all members, once."""
        while True:
            await self._lease.when_settled()
            call = self._join_call(
                entry, user_info, self._max_members, self._lease.epoch, announced=True
            )
            answer = await self._commands.run_script(_JOIN, *call)
            if answer[0] != EPOCH_IS_ANOTHER:
                return answer
            await self._lease.lost()

    async def leave(self, app_id: str, channel: str, user_id: str, socket_id: str) -> bool:
        """See `Presence`."""
        entry = _Entry(app_id, channel, socket_id, user_id)
        made = self._owed.get(entry, entry in self._mine and entry not in self._joining)
        self._mine.pop(entry, None)
        self._owed[entry] = made
        if not self._lease.settled:
            return False
        try:
            call = self._leave_call(entry, self._lease.epoch)
            answer = await self._commands.run_script(_LEAVE, *call)
        except BrokerUnavailable:
            return False
        if entry not in self._mine and answer != EPOCH_IS_ANOTHER:
            self._owed.pop(entry, None)
        return bool(answer == 1)

    async def members(self, app_id: str, channel: str) -> dict[str, bytes]:
        """See `Presence`."""
        [answer] = await self._ask(packed("HGETALL", self._users(app_id, channel)), 1)
        return _members(answer)

    async def user_counts(self, app_id: str, channels: Sequence[str]) -> dict[str, int]:
        """See `Presence`."""
        questions = [packed("HLEN", self._users(app_id, channel)) for channel in channels]
        answers = await self._ask(b"".join(questions), len(questions))
        return dict(zip(channels, answers, strict=True))

    async def _ask(self, questions: bytes, count: int) -> list[Answer]:
        """What Redis answers when everybody's entries stand."""
        lease = self._lease
        while True:
            await lease.when_settled()
            # A renewal may learn of the next epoch while the answer is on its way.
            known = lease.epoch
            first = packed("GET", lease.epoch_key)
            epoch, *answers = await self._commands.run(first + questions, 1 + count)
            for answer in answers:
                if isinstance(answer, hiredis.ReplyError):
                    raise BrokerUnavailable(f"Redis refused to tell members: {answer}")
            if not known or epoch == known:
                return answers
            await lease.lost()

    # Under the lease

    def node_key(self, node_id: str) -> str:
        """See `Tenant`."""
        return f"{self._prefix}:presence:node:{node_id}"

    async def enter_again(self, entering: Entering) -> None:
        """See `Tenant`."""
        announced = entering is Entering.ANNOUNCED
        # Those who are about to leave, too, unless survivors have announced it: clients still show
        # them. Whoever begins to between two portions is among them by then. A join that was given
        # up is not: entered in silence, its next attempt would be no coming.
        for entries in _in_chunks([*(() if announced else self._owed), *self._mine]):
            calls = [
                # No limit: these members were let in before.
                self._join_call(
                    entry,
                    self._mine.get(entry, b"{}"),
                    0,
                    _ANY_EPOCH,
                    announced=announced,
                    told=entering is not Entering.UNTOLD and entry in self._mine,
                )
                for entry in entries
                if entry not in self._joining
                and (entry in self._mine or (not announced and self._owed.get(entry)))
            ]
            if calls:
                await self._commands.run_scripts(_JOIN, calls)
        await self._owe_strays()

    async def _owe_strays(self) -> None:
        """Finds entries of this node that Redis still has, or has again, and that have left."""
        question = packed("SMEMBERS", self.node_key(self._lease.node_id))
        [standing] = await self._commands.send(question, all_or_none=True)
        entries = (_Entry.of(text.decode()) for text in standing)
        self._owed.update({entry: True for entry in entries if entry not in self._mine})

    async def catch_up(self) -> None:
        """See `Tenant`."""
        await self._pay_owed()

    async def _pay_owed(self) -> None:
        epoch = self._lease.epoch
        for entries in _in_chunks(list(self._owed)):
            due = [entry for entry in entries if entry in self._owed]
            if not due:
                continue
            calls = [self._leave_call(entry, epoch) for entry in due]
            answers = await self._commands.run_scripts(_LEAVE, calls)
            for entry, answer in zip(due, answers, strict=True):
                if answer != EPOCH_IS_ANOTHER and entry not in self._mine:
                    self._owed.pop(entry, None)

    async def reap(self, node_id: str) -> bool:
        """See `Tenant`."""
        key = self.node_key(node_id)
        while True:
            question = packed("SRANDMEMBER", key, _AT_ONCE)
            [some] = await self._commands.send(question, all_or_none=True)
            if not some:
                return True
            calls = [
                self._leave_call(_Entry.of(text.decode()), _ANY_EPOCH, dead=node_id)
                for text in some
            ]
            answers = await self._commands.run_scripts(_LEAVE, calls)
            if NODE_IS_ALIVE in answers:
                return False
            log.info("presence_reaped", dead_node=node_id, entries=len(some))

    # Calls

    def _users(self, app_id: str, channel: str) -> str:
        return f"{self._prefix}:{app_id}:presence:{channel}:users"

    def _counts(self, app_id: str, channel: str) -> str:
        return f"{self._prefix}:{app_id}:presence:{channel}:counts"

    def _join_call(
        self,
        entry: _Entry,
        user_info: bytes,
        limit: int,
        epoch: bytes,
        *,
        announced: bool,
        told: bool = True,
    ) -> list[Argument]:
        app_id, channel, socket_id, user_id = entry
        publication = added(app_id, channel, Member(user_id, user_info), socket_id)
        return [
            self._users(app_id, channel),
            self._counts(app_id, channel),
            self.node_key(self._lease.node_id),
            self._lease.epoch_key,
            entry.text(),
            user_id,
            user_info,
            limit,
            redis_name(self._prefix, app_id, channel) if announced else b"",
            encoded(publication),
            epoch,
            self._hooks.hook(app_id, _COMING),
            fact_text(app_id, _COMING, channel, user_id),
            event_bytes(_COMING, channel, user_id) if told else b"",
        ]

    def _leave_call(
        self, entry: _Entry, epoch: bytes, *, dead: str | None = None
    ) -> list[Argument]:
        app_id, channel, _, user_id = entry
        return [
            self._users(app_id, channel),
            self._counts(app_id, channel),
            self.node_key(dead or self._lease.node_id),
            self._lease.key,
            self._lease.epoch_key,
            entry.text(),
            user_id,
            redis_name(self._prefix, app_id, channel),
            encoded(removed(app_id, channel, user_id)),
            dead or "",
            epoch,
            self._hooks.hook(app_id, _COMING),
            fact_text(app_id, _COMING, channel, user_id),
        ]


def _members(flat: Answer) -> dict[str, bytes]:
    """A flat HGETALL as a mapping."""
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}


def _in_chunks(entries: list[_Entry]) -> Iterable[list[_Entry]]:
    return (entries[start : start + _AT_ONCE] for start in range(0, len(entries), _AT_ONCE))
