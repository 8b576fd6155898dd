"""A replica set of three that loses its primary in every way, under load, judged by the checker."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from pymongo.errors import PyMongoError

from persistence.embedded_mongod import mongod_path, start_replica_set
from tests.conftest import require
from tests.faults.chaos import Chaos, ChaosOptions

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from persistence.embedded_mongod import Mongod, ReplicaSet
    from persistence.embedded_process import ServerGuard
    from tests.e2e.books import Books
    from tests.e2e.gateway_process import Stores
    from tests.faults.chaos_stream import Stream
    from tests.faults.forked_gateway import ForkedGateway

# What a command has, and what it may take with all that a busy machine adds to it.
COMMAND_TIMEOUT_S = 1.0
ANSWER_WITHIN_S = 1.8

ELECTED_WITHIN_S = 30.0
# At the same time, and so many of them are over before the next fault.
STREAMS = 6
STREAMS_BETWEEN = 1

pytestmark = pytest.mark.timeout(120)


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
            try:
                with member.client() as client:
                    if client.admin.command("hello")["isWritablePrimary"]:
                        return member
            except PyMongoError:
                continue
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
        with old.client() as client:
            alone_since_s = time.monotonic()
            while await asyncio.to_thread(
                lambda: client.admin.command("hello")["isWritablePrimary"]
            ):
                assert time.monotonic() < alone_since_s + ELECTED_WITHIN_S
        old.process.pause()
        for other in others:
            other.process.resume()
        try:
            await self.primary(but=old)
        finally:
            old.process.resume()


class Trouble(Chaos):
    """The streams of a chaos run: the gateway lives on, and its MongoDB does not.

    Attributes:
        faults: what happens, one after the other, amid the streams.
        slowest_answer_s: what a client had to wait for an answer, of whatever kind.
    """

    faults: Sequence[Callable[[], Awaitable[None]]]
    slowest_answer_s = 0.0
    _judged = asyncio.Event()

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


async def test_every_promise_is_kept_while_primaries_die_resign_freeze_and_are_cut_off(
    server_guard: ServerGuard, stores: Stores, apps_file: Path, tmp_path: Path
) -> None:
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    members = Members(start_replica_set(server_guard, 3, name="load"))
    stores = replace(stores, mongodb_url=members.servers.url)
    options = ChaosOptions(
        kills=0, gateways=1, streams=STREAMS, command_timeout_s=COMMAND_TIMEOUT_S
    )
    trouble = Trouble(options, stores, apps_file, tmp_path / "log")
    trouble.faults = [members.killed, members.stepped_down, members.frozen, members.cut_off]

    result = await trouble.run()

    assert result.violations == []
    assert result.streams > len(trouble.faults) * STREAMS_BETWEEN
    assert trouble.slowest_answer_s < ANSWER_WITHIN_S
