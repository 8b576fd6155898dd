"""What a node missed while its subscriptions were broken, told to it when they stand again.

The events of commits are published by a script that also appends them to one bounded Redis Stream,
`{prefix}:recoverable`. A node knows the position up to which it has heard them all: the id of the
last one that came, or one that it has read from the stream before a heartbeat of its own came
round. When its subscriptions stand again it reads what came behind that position and hands on what
is for its channels, in order and once; what comes live meanwhile waits its turn.

Other publications are at most once. What Redis itself has lost with its data is lost here, too.

Source: docs/decisions.md.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import structlog

from gateway.backoff import Backoff
from gateway.broker import BrokerUnavailable
from gateway.redis_commands import Script
from gateway.redis_link import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gateway.redis_commands import RedisCommands

log = structlog.get_logger(__name__)

# 18 MB of Redis' memory with bodies of 700 bytes: half a minute of 100 agreements a second.
_ENTRIES_MAX: Final = 20_000
# Who was away longer has its snapshots alone. Nor does an installation that ended leave anything.
_OUTLIVES_LAST_MS: Final = 600_000
# Handed on in one turn of the loop.
_PAGE: Final = 200
# While the command link can't be had, what comes live is kept waiting.
_GIVE_UP_S: Final = 5.0
_RETRY_LEAST_S: Final = 0.05
_RETRY_MOST_S: Final = 1.0
_PUBLISH: Final = Script.load("publish_recoverable", 1)


class Position(NamedTuple):
    """An id of the stream: milliseconds of Redis' clock and a number within them."""

    ms: int
    number: int

    @classmethod
    def of(cls, entry_id: bytes) -> Position:
        """Reads an id."""
        ms, _, number = entry_id.partition(b"-")
        return cls(int(ms), int(number))


_BEGINNING: Final = Position(0, 0)
# An id, and the Redis name of a pub/sub channel with a body.
_Entry: TypeAlias = tuple[bytes, tuple[bytes, bytes]]


class Recovery:
    """The position of one node, and what it does at a gap.

    Attributes:
        latest: The id of the stream's last entry when it was last asked for; a heartbeat carries
            it, so that the node learns that it has heard everything up to there.
    """

    __slots__ = ("_commands", "_hand_on", "_held", "_key", "_position", "_whole", "latest")

    def __init__(
        self, commands: RedisCommands, prefix: str, hand_on: Callable[[bytes, bytes], None]
    ) -> None:
        """Takes `hand_on`, called with the Redis name of a pub/sub channel and a body."""
        commands.use_scripts(_PUBLISH)
        self._commands = commands
        self._key = f"{prefix}:recoverable"
        self._hand_on = hand_on
        self._position: Position | None = None
        # False from the loss of the subscriptions until what was missed has been handed on.
        self._whole = True
        self._held: list[tuple[Position, bytes, bytes]] = []
        self.latest = b""

    def call(self, publications: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The packed command that publishes (Redis name, body) and keeps them."""
        arguments = [part for publication in publications for part in publication]
        return _PUBLISH.call(self._key, _ENTRIES_MAX, _OUTLIVES_LAST_MS, *arguments)

    def heard(self, entry_id: bytes, name: bytes, body: bytes) -> None:
        """Takes a recoverable publication that came live."""
        position = Position.of(entry_id)
        if self._whole:
            self._position = position
            self._hand_on(name, body)
        else:
            self._held.append((position, name, body))

    def look(self) -> None:
        """Asks for the id of the last entry, which the heartbeat after the next one carries."""
        try:
            asked = self._commands.send(self._newest())
        except BrokerUnavailable:
            return
        asked.add_done_callback(self._looked)

    def _looked(self, asked: asyncio.Future[Any]) -> None:
        if asked.cancelled() or asked.exception() is not None:
            return
        [entries] = asked.result()
        if isinstance(entries, list):
            # A stream without entries has carried nothing that could be missed.
            self.latest = entries[0][0] if entries else b"0-0"

    def came_round(self, latest: bytes) -> None:
        """Takes what a heartbeat of this node carried: all up to there has been heard."""
        if self._whole and latest:
            self._position = max(self._position or _BEGINNING, Position.of(latest))

    def broken(self) -> None:
        """From here on something may be missed."""
        self._whole = False
        self._held.clear()

    async def catch_up(self) -> None:
        """Hands on what was missed, then what came live meanwhile.

        Cancelling is safe: what has not been handed on by then is the next call's.
        """
        told = 0
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                told = await self._hand_on_missed()
        except TimeoutError:
            log.error("broker_gap_not_filled", why="Redis does not answer")  # noqa: TRY400
        for position, name, body in self._held:
            if self._position is None or position > self._position:
                self._position = position
                self._hand_on(name, body)
        self._held.clear()
        self._whole = True
        if told:
            log.info("broker_gap_filled", publications=told)

    async def _hand_on_missed(self) -> int:
        """Hands on what stands in the stream behind the position; returns how many they are."""
        if self._position is None:
            return 0
        told = 0
        backoff = Backoff(_RETRY_LEAST_S, _RETRY_MOST_S)
        while True:
            try:
                entries = await self._behind(self._position)
            except BrokerUnavailable:
                await backoff.pause()
                continue
            for entry_id, (name, body) in entries:
                self._position = Position.of(entry_id)
                self._hand_on(name, body)
            told += len(entries)
            if len(entries) < _PAGE:
                return told

    async def _behind(self, position: Position) -> list[_Entry]:
        """The next entries behind a position; from the first on where the stream began anew."""
        after = packed(
            "XRANGE", self._key, f"({position.ms}-{position.number}", "+", "COUNT", _PAGE
        )
        oldest_one = packed("XRANGE", self._key, "-", "+", "COUNT", 1)
        length_of_it = packed("XLEN", self._key)
        asked = self._commands.send(
            self._newest() + oldest_one + length_of_it + after, 4, all_or_none=True
        )
        newest: list[_Entry]
        oldest: list[_Entry]
        entries: list[_Entry]
        newest, oldest, length, entries = await asked
        if newest and Position.of(newest[0][0]) < position:
            # Another Redis, or one whose clock was set back: nothing in it was heard here.
            self._position = _BEGINNING
            return await self._behind(_BEGINNING)
        if length >= _ENTRIES_MAX and Position.of(oldest[0][0]) > position:
            log.error("broker_gap_not_filled", why="more was told meanwhile than Redis keeps")
        return entries

    def _newest(self) -> bytes:
        return packed("XREVRANGE", self._key, "+", "-", "COUNT", 1)
