"""A stage on which everything is written down, and judged by the checker when the play is over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import pytest_asyncio
from redis.asyncio import Redis

from tests.e2e.books import Books
from tests.e2e.gateway_process import APP_ID, DUET_SERVE, Gateway
from tests.e2e.inbox import Inbox
from tests.e2e.stage import Stage
from tests.faults.checker import judge
from tests.faults.evidence import Run, Timing
from tests.faults.players import decoded, read_truth, see
from tests.faults.transcript import (
    opened_sessions,
    pushes,
    subscribed,
    was_open_throughout,
    written,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from pathlib import Path

    from persistence.embedded_process import ServerGuard
    from tests.e2e.gateway_process import Stores
    from tests.e2e.party import Party
    from tests.e2e.wire_socket import WireSocket
    from tests.faults.checker import Violation
    from tests.faults.history import History, Truth

EAR = "ear"
_BARRIER = "barrier"
# The command's own two seconds and what a busy machine adds to them.
ANSWER_WITHIN_S = 3.5
# No promise: as long as a machine may take on which everybody is busy.
COMES_BACK_WITHIN_S = 90.0


class Ear(Inbox):
    """Hears all that the gateways of a test publish; no crash of theirs disconnects it."""

    def __init__(self, stores: Stores) -> None:
        super().__init__(EAR)
        # It waits for a publication as long as there is none.
        self._redis: Redis = Redis.from_url(stores.redis_url, socket_timeout=None)
        self._names = f"{stores.prefix}:{APP_ID}:c:"
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        await self.expect(kind="listens")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reader is not None
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        await self._redis.aclose()

    async def _read(self) -> None:
        async with self._redis.pubsub() as pubsub:
            await pubsub.psubscribe(f"{self._names}*")
            async for message in pubsub.listen():
                if message["type"] == "psubscribe":
                    self.put("listens", {})
                    continue
                publication: bytes = message["data"]
                # Version, length of the excluded socket's id, that id, the body.
                told = json.loads(publication[2 + publication[1] :])
                channel = message["channel"].decode().removeprefix(self._names)
                data = decoded(told["data"])
                self.put("event", {"channel": channel, "event": told["event"], "data": data})


class JudgedStage(Stage):
    """A stage that is left only with the checker's consent.

    Args:
        deaf: Without an ear at the gateways' Redis, where that is what fails; the sockets tell
            then what was delivered, those that are subscribed from the beginning and stay open.
    """

    def __init__(self, gateway: Gateway, books: Books, *, deaf: bool = False) -> None:
        super().__init__(gateway, books)
        self.ear = None if deaf else Ear(gateway.stores)
        self.sockets: list[WireSocket] = []
        self._listening = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if self.ear is not None:
            await self._listening.enter_async_context(self.ear)
        return await super().__aenter__()

    async def __aexit__(self, kind: object = None, *error: object) -> None:
        try:
            if kind is None:
                violations = await self.verdict()
                assert not violations, "\n".join(map(str, violations))
        finally:
            await super().__aexit__(kind, *error)
            await self._listening.aclose()

    async def socket(self, name: str, role: str, *, gateway: Gateway | None = None) -> WireSocket:
        socket = await super().socket(name, role, gateway=gateway)
        self.sockets.append(socket)
        return socket

    async def verdict(self) -> list[Violation]:
        """What the checker says of everything so far, once it has come to rest."""
        calls = [call for call in self.gateway.calls if (call.user_id or "").endswith(self._suffix)]
        truth = await self._at_rest(opened_sessions(calls))
        sockets = [*self.parties, *self.sockets]
        await self._until_heard([socket for socket in sockets if was_open_throughout(socket)])
        history = written(calls, sockets, self.books.moved)
        if self.ear is not None:
            published = pushes(EAR, self.ear)
            history.heard += [one for one in published if self._suffix in one.channel]
            run = Run(history, truth, Timing())
            for one in run.invitations.values():
                history.watch(EAR, {channel for channel, _, _ in one.pushes()})
        await self._look(history, truth)
        return judge(history, truth)

    async def _at_rest(self, sessions: Collection[str]) -> Truth:
        """Waits until nothing is left to do for these Sessions."""
        truth = await read_truth(self.books, sessions)

        async def holds() -> bool:
            nonlocal truth
            truth = await read_truth(self.books, sessions)
            return not any(row["state"] == "declined" or row.get("outbox") for row in truth.goals)

        await self.books.until("all is at rest", holds, timeout_s=COMES_BACK_WITHIN_S)
        return truth

    async def _until_heard(self, sockets: Sequence[Inbox]) -> None:
        """Waits until what was published has come to the ear and to these sockets."""
        ears = {socket: subscribed(socket) for socket in sockets}
        if self.ear is not None:
            ears[self.ear] = {_BARRIER}
        barrier = f"{_BARRIER}.{next(self._barriers)}"
        channels = {_BARRIER}.union(*ears.values())
        response = await self.gateway.publish(sorted(channels), barrier, {})
        assert response.status_code == 200, response.text
        for inbox, own in ears.items():
            for channel in own:
                await inbox.expect(barrier, channel)

    async def _look(self, history: History, truth: Truth) -> None:
        """Lets everyone read what stands, now that everything is at rest."""
        for session in truth.sessions:
            await see(history, self.gateway, session["user"]["id"], "streamer", final=True)
        viewers = {goal["conditions"]["exclusive_to"] for goal in truth.goals}
        for viewer in sorted(viewers):
            await see(history, self.gateway, viewer, "viewer", final=True)


@asynccontextmanager
async def judged_stage(
    guard: ServerGuard,
    stores: Stores,
    apps_file: Path,
    settings: Mapping[str, str] | None = None,
    argv: tuple[str, ...] = DUET_SERVE,
    *,
    deaf: bool = False,
) -> AsyncIterator[JudgedStage]:
    """A stage in front of a gateway of its own, which soon takes over what was left behind."""
    gateway = Gateway(guard, stores, apps_file, {"DUET_LEASE_S": "1", **(settings or {})}, argv)
    try:
        await asyncio.to_thread(gateway.start)
        async with Books(stores) as books, JudgedStage(gateway, books, deaf=deaf) as stage:
            yield stage
    finally:
        await asyncio.to_thread(gateway.kill)


async def insist(
    socket: WireSocket | Party, name: str, request_id: str | None = None, **data: Any
) -> list[dict[str, Any]]:
    """Sends a command again, under one `request_id`, until the answer is final; returns them all.

    Every answer but the last is an error that may be asked again.
    """
    request_id = request_id or uuid.uuid4().hex
    give_up_at_s = time.monotonic() + COMES_BACK_WITHIN_S
    answers = []
    while True:
        answers.append(
            await socket.command(name, request_id=request_id, timeout_s=COMES_BACK_WITHIN_S, **data)
        )
        if answers[-1]["ok"] or not answers[-1]["error"]["retryable"]:
            return answers
        assert time.monotonic() < give_up_at_s, answers[-1]


def slowest_answer_s(socket: WireSocket) -> float:
    """The longest that a socket had to wait for the answer to a command."""
    replies = [record for record in socket.received if record.event == "goal.reply"]
    return max(reply.at_s - sent.at_s for sent, reply in zip(socket.sent, replies, strict=True))


@pytest_asyncio.fixture
async def stage(shared_gateway: Gateway) -> AsyncIterator[JudgedStage]:
    """Parties in front of the gateway with the default settings."""
    async with Books(shared_gateway.stores) as books, JudgedStage(shared_gateway, books) as judged:
        yield judged
