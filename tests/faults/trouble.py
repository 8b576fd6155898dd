"""A replica set that loses its primary under load, while every stream is judged."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pymongo.errors import PyMongoError

from tests.faults.chaos import Chaos, ChaosOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from persistence.embedded_mongod import Mongod, ReplicaSet
    from tests.e2e.books import Books
    from tests.e2e.gateway_process import Stores
    from tests.faults.chaos_stream import Stream
    from tests.faults.forked_gateway import ForkedGateway

# What a command has, and what it may take with all that a busy machine adds to it.
COMMAND_TIMEOUT_S = 1.0
ANSWER_WITHIN_S = 3.0

ELECTED_WITHIN_S = 60.0
# At the same time, and so many of them are over before the next fault.
STREAMS = 6
STREAMS_BETWEEN = 1


@dataclass(frozen=True, slots=True)
class Members:
    """The members of a set, and who of them leads it."""

    servers: ReplicaSet

    async def primary(self, *, but: Mongod | None = None) -> Mongod:
        """Waits for a member that takes writes."""
        give_up_at_s = time.monotonic() + ELECTED_WITHIN_S
        while True:
            primary = await asyncio.to_thread(self._primary, but)
            if primary is not None:
                return primary
            assert time.monotonic() < give_up_at_s, "no new primary"

    def _primary(self, but: Mongod | None) -> Mongod | None:
        for member in self.servers.members:
            if member is but:
                continue
            with contextlib.suppress(PyMongoError):
                if takes_writes(member):
                    return member
        return None

    async def killed(self) -> None:
        old = await self.primary()
        old.process.kill()
        await self.primary(but=old)
        await asyncio.to_thread(old.start)

    async def stepped_down(self) -> None:
        old = await self.primary()
        with old.client() as client:
            client.admin.command("replSetStepDown", 20, secondaryCatchUpPeriodSecs=10)
        await self.primary(but=old)

    async def frozen(self) -> None:
        """It wakes up in the belief that it still leads."""
        old = await self.primary()
        old.process.pause()
        try:
            await self.primary(but=old)
        finally:
            old.process.resume()

    async def cut_off(self) -> None:
        """It goes on alone for a while; what it writes there, the others never see."""
        old = await self.primary()
        others = [member for member in self.servers.members if member is not old]
        for other in others:
            other.process.pause()
        alone_since_s = time.monotonic()
        while await asyncio.to_thread(takes_writes, old):
            assert time.monotonic() < alone_since_s + ELECTED_WITHIN_S
        old.process.pause()
        for other in others:
            other.process.resume()
        try:
            await self.primary(but=old)
        finally:
            old.process.resume()


def choose_primary(candidates: Sequence[Mongod]) -> Mongod:
    """Lets one of these members lead; who has seen less than another is not elected."""
    give_up_at_s = time.monotonic() + ELECTED_WITHIN_S
    for candidate in itertools.cycle(candidates):
        assert time.monotonic() < give_up_at_s, "no new primary"
        with contextlib.suppress(PyMongoError), candidate.client() as client:
            client.admin.command("replSetStepUp")
        for member in candidates:
            with contextlib.suppress(PyMongoError):
                if takes_writes(member):
                    return member
    raise AssertionError("no candidates")


def takes_writes(member: Mongod) -> bool:
    """Whether a member believes that it leads."""
    with member.client() as client:
        return bool(client.admin.command("hello")["isWritablePrimary"])


class Trouble(Chaos):
    """The streams of a chaos run: the gateway lives on, and its MongoDB does not.

    Attributes:
        faults: what happens, one after the other, amid the streams.
        slowest_answer_s: what a client had to wait for an answer, of whatever kind.
    """

    faults: Sequence[Callable[[], Awaitable[None]]]
    slowest_answer_s = 0.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Of this run, whose loop it belongs to.
        self._judged = asyncio.Event()

    async def _kill_again_and_again(self, gateway: ForkedGateway) -> None:
        for fault in self.faults:
            await fault()
            for _ in range(STREAMS_BETWEEN):
                self._judged.clear()
                await self._judged.wait()

    async def _judge(self, books: Books, stream: Stream) -> None:
        await super()._judge(books, stream)
        asked_at_s = {asked.ask: asked.at_s for asked in stream.history.asked}
        self.slowest_answer_s = max(
            self.slowest_answer_s,
            *(answer.at_s - asked_at_s[answer.ask] for answer in stream.history.answered),
        )
        self._judged.set()


async def assert_every_promise_is_kept(
    servers: ReplicaSet,
    faults: Sequence[Callable[[], Awaitable[None]]],
    stores: Stores,
    apps_file: Path,
    log: Path,
) -> None:
    """Lets the faults happen one after the other amid the streams."""
    options = ChaosOptions(
        kills=0, gateways=1, streams=STREAMS, command_timeout_s=COMMAND_TIMEOUT_S
    )
    trouble = Trouble(options, replace(stores, mongodb_url=servers.url), apps_file, log)
    trouble.faults = faults

    result = await trouble.run()

    assert result.violations == []
    assert result.streams > len(faults) * STREAMS_BETWEEN
    assert trouble.slowest_answer_s < ANSWER_WITHIN_S, trouble.slowest_answer_s
