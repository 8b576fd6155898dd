"""Streamers and viewers on sockets of their own, each proved by a JWT, and what they ask."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import deque
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from gateway.bench.errors import BenchError
from gateway.bench.http import HttpConnection
from gateway.bench.wire import BenchSocket, Message, client_message, open_socket, within

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from gateway.bench.target import GatewayTarget

PREPAID_S: Final = 300
AMOUNT_MINOR: Final = 2_500
_DEADLINE_S: Final = 30.0
# Longer than MongoDB keeps a transaction that somebody left open (60 s): a command that such a one
# blocks is to be seen in the figures, not to end the run.
_COMMAND_DEADLINE_S: Final = 90.0
# Waits before a command is sent again: doubled each time, so that an overload can end.
_FIRST_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 2.0
_SETTING_UP_AT_ONCE: Final = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """The goal that a command was about, and what the command took.

    Attributes:
        latency_s: From the first time it was sent to the reply that it succeeded.
        retries: How often it was sent again, because it was refused for now.
    """

    goal_id: str
    latency_s: float
    retries: int


class Party:
    """One user on one socket, subscribed to the channel that takes commands."""

    def __init__(self, user_id: str, socket: BenchSocket) -> None:
        self.user_id = user_id
        self.socket = socket
        self._own_channel = f"private-user@{user_id}"
        self._numbers = itertools.count(1)
        self._asked: dict[str, asyncio.Future[tuple[dict[str, Any], float]]] = {}
        socket.on_event["goal.reply"] = self._replied
        socket.on_fault = self._lost

    @classmethod
    async def join(cls, target: GatewayTarget, user_id: str, role: str) -> Party:
        """Connects and subscribes.

        Raises:
            BenchError: It is refused or takes too long.
        """
        path = target.socket_path(target.token(user_id, role))
        socket = await open_socket(target.host, target.port, path, _DEADLINE_S)
        party = cls(user_id, socket)
        snapshot = socket.expect("goal.snapshot")
        await socket.subscribe(target.subscribe_frame(party._own_channel), _DEADLINE_S)
        # Commands count from here on; the snapshot must not arrive among their answers.
        await within(snapshot, _DEADLINE_S, "goal.snapshot")
        return party

    def _replied(self, message: Message) -> None:
        reply = message.content()
        asked = self._asked.pop(reply["request_id"], None)
        if asked is not None and not asked.done():
            asked.set_result((reply, self.socket.arrived_at_s))

    def _lost(self, error: BenchError) -> None:
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(error)
        self._asked.clear()

    async def command(self, name: str, **data: Any) -> Answer:
        """Sends a command, again while it is refused for now, until it has succeeded.

        It does what a good client does: the same `request_id` each time, so there is one effect.

        Raises:
            BenchError: It is refused for good, or there is no success in time.
        """
        request_id = f"{self.user_id}-{next(self._numbers)}"
        frame = client_message(name, {"request_id": request_id, **data}, self._own_channel)
        sent_at_s = time.monotonic()
        retries = 0
        code = "no reply"
        try:
            async with asyncio.timeout(_COMMAND_DEADLINE_S):
                while True:
                    reply, arrived_at_s = await self._ask(request_id, frame)
                    if reply["ok"]:
                        return Answer(reply["goal"]["id"], arrived_at_s - sent_at_s, retries)
                    error = reply["error"]
                    code = error["code"]
                    if not error["retryable"]:
                        raise BenchError(f"{name} was refused: {code}: {error['message']}")
                    await asyncio.sleep(min(_FIRST_WAIT_S * 2**retries, _LONGEST_WAIT_S))
                    retries += 1
        except TimeoutError:
            raise BenchError(
                f"{name} had no success within {_COMMAND_DEADLINE_S:g} s: {code}"
            ) from None

    async def _ask(self, request_id: str, frame: bytes) -> tuple[dict[str, Any], float]:
        """The next reply to that request, and when it arrived."""
        loop = asyncio.get_running_loop()
        asked: asyncio.Future[tuple[dict[str, Any], float]] = loop.create_future()
        self._asked[request_id] = asked
        self.socket.transport.write(frame)
        return await asked


@dataclass(slots=True)
class Pair:
    """A streamer who is live, a viewer, and the invitation between them.

    Attributes:
        goal_id: The invitation that stands; empty when none does.
        authorized_at_s: When `stream.authorized` arrived, in monotonic seconds.
    """

    streamer: Party
    viewer: Party
    session_id: str
    goal_id: str = ""
    authorized_at_s: float = 0.0
    authorized: asyncio.Event = field(default_factory=asyncio.Event)

    def hear_authorized(self, _message: Message) -> None:
        """Notes the arrival at the viewer's socket."""
        self.authorized_at_s = self.viewer.socket.arrived_at_s
        self.authorized.set()

    async def invite(self) -> None:
        """Lets the viewer invite the streamer."""
        answer = await invitation(self.viewer, self.session_id)
        self.goal_id = answer.goal_id
        self.authorized.clear()

    async def play_and_invite(self) -> None:
        """Plays the agreed show and invites again."""
        await show(self.streamer, self.goal_id)
        await self.invite()


async def invitation(viewer: Party, session_id: str) -> Answer:
    """A viewer's invitation."""
    return await viewer.command(
        "client-goal.invite",
        session_id=session_id,
        prepaid_duration=PREPAID_S,
        amount=AMOUNT_MINOR,
    )


async def show(streamer: Party, goal_id: str) -> list[Answer]:
    """Starts and finishes an agreed show, so that the session is free for the next."""
    return [
        await streamer.command(command, goal_id=goal_id)
        for command in ("client-exclusive.start", "client-exclusive.finish")
    ]


class Parties:
    """Everyone who takes part in a run; their ids are unlike those of every other run."""

    def __init__(self, target: GatewayTarget, calls: list[HttpConnection]) -> None:
        self._target = target
        self._calls = deque(calls)
        self._suffix = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._sockets: list[BenchSocket] = []

    async def party(self, role: str) -> Party:
        """A connected user."""
        user_id = f"{role}-{next(self._numbers)}-{self._suffix}"
        party = await Party.join(self._target, user_id, role)
        self._sockets.append(party.socket)
        return party

    async def session(self, streamer: Party) -> str:
        """Lets a streamer go live and returns the session's id.

        Raises:
            BenchError: It is refused or takes too long.
        """
        token = self._target.token(streamer.user_id, "streamer")
        connection = self._calls.popleft()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                status, body = await connection.send(
                    self._target.call("POST", "/sessions", token, {})
                )
        except TimeoutError:
            raise BenchError(f"POST /sessions: no answer within {_DEADLINE_S:g} s") from None
        finally:
            self._calls.append(connection)
        if status != 201:
            raise BenchError(f"POST /sessions: HTTP {status} {body.decode(errors='replace')}")
        session_id: str = msgspec.json.decode(body)["id"]
        return session_id

    async def pair(self) -> Pair:
        """A streamer who is live, and a viewer who listens for `stream.authorized`, invited."""
        streamer = await self.party("streamer")
        pair = Pair(streamer, await self.party("viewer"), await self.session(streamer))
        channel = f"presence-stream-viewer@{streamer.user_id}.preview.{pair.viewer.user_id}"
        pair.viewer.socket.on_event["stream.authorized"] = pair.hear_authorized
        await pair.viewer.socket.subscribe(self._target.subscribe_frame(channel), _DEADLINE_S)
        await pair.invite()
        return pair

    def close(self) -> None:
        """Closes every socket."""
        for socket in self._sockets:
            socket.close()


@asynccontextmanager
async def parties_of(target: GatewayTarget) -> AsyncIterator[Parties]:
    """Parties whose sockets close with the block."""
    async with AsyncExitStack() as stack:
        calls = []
        for _ in range(_SETTING_UP_AT_ONCE):
            connection = await HttpConnection.open(target.host, target.port)
            stack.callback(connection.close)
            calls.append(connection)
        parties = Parties(target, calls)
        stack.callback(parties.close)
        yield parties


async def each(
    works: Iterable[Callable[[], Awaitable[T]]],
    advance: Callable[[float], None],
    at_once: int = _SETTING_UP_AT_ONCE,
) -> list[T]:
    """Does all works, a bounded number at a time, and returns what each gave, in order of ending.

    Raises:
        ExceptionGroup: One failed; the others are cancelled.
    """
    remaining = iter(works)
    results: list[T] = []

    async def work() -> None:
        # One iterator shared by all: whoever is free takes the next.
        for one in remaining:
            results.append(await one())
            advance(1)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
    return results
