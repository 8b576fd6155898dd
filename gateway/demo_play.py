"""One invitation, played over real sockets, with every event that each party received.

The two parties are users of their own, so the demo page begins with nothing done.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import httpx
import msgspec
from rich.text import Text
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from gateway.demo_page import DemoUser
from statemachine.receivers import preview_channel, streamer_channels

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from rich.console import Console

    from gateway.server import RunningGateway

_MIRA: Final = DemoUser("mira", "Mira", "streamer")
_THEO: Final = DemoUser("theo", "Theo", "viewer")
_AMOUNT_MINOR: Final = 2500
_PREPAID_S: Final = 120
_STEP_TIMEOUT_S: Final = 10.0


class PlayError(Exception):
    """Something that had to be received was not, or a command was refused."""


class Received(NamedTuple):
    """One event on one socket; `at_s` on the process's monotonic clock."""

    who: str
    event: str
    channel: str
    data: Any
    at_s: float


class _Frame(msgspec.Struct, frozen=True):
    event: str
    channel: str = ""
    data: Any = None


class _Party:
    """One user on one socket; what it receives goes into the inbox of the play."""

    def __init__(
        self, user: DemoUser, socket: ClientConnection, inbox: asyncio.Queue[Received | PlayError]
    ) -> None:
        self.user = user
        self._socket = socket
        self._inbox = inbox

    async def read(self) -> None:
        """Reads until the socket is closed."""
        with contextlib.suppress(ConnectionClosed):
            async for text in self._socket:
                at_s = time.perf_counter()
                frame = msgspec.json.decode(text, type=_Frame)
                data = frame.data
                if isinstance(data, str):
                    data = msgspec.json.decode(data)
                self._inbox.put_nowait(
                    Received(self.user.id, frame.event, frame.channel, data, at_s)
                )
        self._inbox.put_nowait(PlayError(f"the socket of {self.user.id} was closed"))

    async def subscribe(self, channels: Iterable[str]) -> None:
        """Asks for channels; the JWT of the connection is all the proof it needs."""
        for channel in channels:
            await self._send("pusher:subscribe", {"channel": channel})

    async def command(self, event: str, **data: object) -> None:
        """Sends a goal command on one's own channel."""
        own = f"private-user@{self.user.id}"
        await self._send(event, {"request_id": secrets.token_hex(8), **data}, own)

    async def _send(self, event: str, data: dict[str, object], channel: str | None = None) -> None:
        frame: dict[str, object] = {"event": event, "data": data}
        if channel is not None:
            frame["channel"] = channel
        await self._socket.send(msgspec.json.encode(frame).decode())


class _Play:
    """The script's state: who waits for what, and since when."""

    def __init__(self, inbox: asyncio.Queue[Received | PlayError], console: Console) -> None:
        self._inbox = inbox
        self._console = console
        self._since_s = time.perf_counter()

    def step(self, sentence: str) -> None:
        """Begins a step: latencies count from here."""
        self._console.print(Text(f"\n{sentence}", style="bold"))
        self._since_s = time.perf_counter()

    async def expect(self, *wanted: tuple[DemoUser, str, str]) -> list[Received]:
        """Waits until each (user, event, channel) has come; prints all that comes meanwhile.

        Raises:
            PlayError: One did not come in time, a command was refused or a socket closed.
        """
        missing = {(user.id, event, channel) for user, event, channel in wanted}
        received: list[Received] = []
        try:
            async with asyncio.timeout(_STEP_TIMEOUT_S):
                while missing:
                    one = await self._inbox.get()
                    if isinstance(one, PlayError):
                        raise one
                    self._print(one)
                    self._check(one)
                    received.append(one)
                    missing.discard((one.who, one.event, one.channel))
        except TimeoutError:
            who, event, channel = min(missing)
            raise PlayError(
                f"{who} did not receive {event} on {channel} within {_STEP_TIMEOUT_S:.0f} s"
            ) from None
        return received

    def _print(self, one: Received) -> None:
        if one.event.startswith(("pusher:", "pusher_internal:")):
            return
        line = Text(f"{(one.at_s - self._since_s) * 1000:8.1f} ms  ", style="dim")
        line.append(f"{one.who:<6}", style="cyan" if one.who == _MIRA.id else "magenta")
        line.append(f"{one.event:<19}", style="bold default not dim")
        line.append(one.channel, style="default not dim")
        self._console.print(line)

    @staticmethod
    def _check(one: Received) -> None:
        if one.event == "goal.reply" and not one.data["ok"]:
            raise PlayError(f"{one.who} was refused: {one.data['error']['message']}")
        if one.event in {"pusher:error", "pusher:subscription_error"}:
            raise PlayError(f"{one.who} was refused: {one.data}")


async def play(gateway: RunningGateway, console: Console) -> None:
    """Plays one invitation from going live to the end of the show.

    Raises:
        PlayError: It did not go as it should.
    """
    inbox: asyncio.Queue[Received | PlayError] = asyncio.Queue()
    now = gateway.parts.clock.now()
    headers = {"Authorization": f"Bearer {_MIRA.token(now)}"}
    console.print(Text("One invitation, played over real sockets", style="bold"))
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers) as api:
        session_id = (await _call(api, "POST", "/sessions"))["id"]
        async with (
            _Door.open(gateway, inbox) as door,
            door.party(_MIRA) as mira,
            door.party(_THEO) as theo,
        ):
            await _script(_Play(inbox, console), mira, theo, session_id)
        await _call(api, "DELETE", f"/sessions/{session_id}")


async def _script(play_: _Play, mira: _Party, theo: _Party, session_id: str) -> None:
    private_stream, presence_stream, private_mira = streamer_channels(_MIRA.id)
    private_theo = f"private-user@{_THEO.id}"
    preview = preview_channel(_MIRA.id, _THEO.id)
    both = (_MIRA, _THEO)

    play_.step("Mira (streamer) and Theo (viewer) connect and subscribe")
    await mira.subscribe((private_mira, private_stream, presence_stream))
    await theo.subscribe((private_theo, preview, presence_stream))
    joined = "pusher_internal:subscription_succeeded"
    await play_.expect(
        *((_MIRA, joined, channel) for channel in (private_stream, presence_stream)),
        *((_THEO, joined, channel) for channel in (preview, presence_stream)),
        (_MIRA, "goal.snapshot", private_mira),
        (_THEO, "goal.snapshot", private_theo),
    )

    play_.step(f"Theo invites: {_AMOUNT_MINOR / 100:.2f}, {_PREPAID_S} s prepaid")
    await theo.command(
        "client-goal.invite",
        session_id=session_id,
        prepaid_duration=_PREPAID_S,
        amount=_AMOUNT_MINOR,
    )
    received = await play_.expect(
        (_THEO, "goal.reply", private_theo),
        (_THEO, "escrow.held", private_theo),
        (_MIRA, "goal.added", private_mira),
        (_MIRA, "goal.added", private_stream),
    )
    goal_id = next(one.data["goal"]["id"] for one in received if one.event == "goal.reply")

    play_.step("Mira agrees")
    await mira.command("client-goal.agree", goal_id=goal_id)
    await play_.expect(
        (_MIRA, "goal.reply", private_mira),
        *((_MIRA, "goal.ended", channel) for channel in streamer_channels(_MIRA.id)),
        (_THEO, "stream.authorized", preview),
        (_THEO, "goal.ended", presence_stream),
    )

    play_.step("Mira starts the show")
    await mira.command("client-exclusive.start", goal_id=goal_id)
    await play_.expect(
        (_MIRA, "goal.reply", private_mira),
        (_MIRA, "exclusive.started", private_stream),
        *((user, "exclusive.started", presence_stream) for user in both),
        (_THEO, "escrow.captured", private_theo),
    )

    play_.step("Mira finishes the show")
    await mira.command("client-exclusive.finish", goal_id=goal_id)
    await play_.expect(
        (_MIRA, "goal.reply", private_mira),
        (_MIRA, "exclusive.ended", private_stream),
        *((user, "exclusive.ended", presence_stream) for user in both),
        # The show is a goal of its own, and the room may watch again once it has ended.
        *((_MIRA, "goal.ended", channel) for channel in streamer_channels(_MIRA.id)),
        (_THEO, "goal.ended", presence_stream),
        (_THEO, "stream.authorized", preview),
    )


class _Door:
    """Lets parties in, and owns the tasks that read for them."""

    def __init__(
        self,
        gateway: RunningGateway,
        inbox: asyncio.Queue[Received | PlayError],
        readers: asyncio.TaskGroup,
    ) -> None:
        self._gateway = gateway
        self._inbox = inbox
        self._readers = readers

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, gateway: RunningGateway, inbox: asyncio.Queue[Received | PlayError]
    ) -> AsyncIterator[Self]:
        """A door for the time of the block."""
        try:
            async with asyncio.TaskGroup() as readers:
                yield cls(gateway, inbox, readers)
        except* PlayError as group:
            raise group.exceptions[0] from None

    @contextlib.asynccontextmanager
    async def party(self, user: DemoUser) -> AsyncIterator[_Party]:
        """Connects a user.

        Raises:
            PlayError: The gateway does not take the connection.
        """
        parts = self._gateway.parts
        token = user.token(parts.clock.now())
        address = (
            f"{self._gateway.ws_url}/app/{parts.apps.first.key}"
            f"?protocol=7&client=duet-demo&version=1.0&token={token}"
        )
        try:
            socket = await connect(address, compression=None, open_timeout=_STEP_TIMEOUT_S)
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise PlayError(f"{user.id} could not connect: {error}") from None
        async with socket:
            party = _Party(user, socket, self._inbox)
            self._readers.create_task(party.read())
            yield party


async def _call(api: httpx.AsyncClient, method: str, path: str) -> dict[str, Any]:
    response = await api.request(method, path, json={} if method == "POST" else None)
    if response.is_error:
        raise PlayError(f"{method} {path} answered {response.status_code}: {response.text}")
    answer: dict[str, Any] = response.json()
    return answer
