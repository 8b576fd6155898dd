"""Clients that write everything down, and a witness that misses no publication.

The witness is a broker of its own on the gateways' Redis: it hears what every node hears, and no
crash of a gateway disconnects it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from bson import ObjectId
from pymongo.read_concern import ReadConcern

from gateway.broker import Publication
from gateway.frames import push_body
from gateway.redis_broker import RedisBroker
from tests.e2e.gateway_process import APP_ID
from tests.e2e.inbox import PATIENCE_S
from tests.e2e.wire_socket import WireSocket
from tests.faults.forked_gateway import DIED
from tests.faults.history import TIMER, History, Truth

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.e2e.books import Books
    from tests.e2e.gateway_process import Stores
    from tests.e2e.wire_socket import Door
    from tests.faults.forked_gateway import ForkedGateway
    from tests.faults.history import Answered

# How soon it has to be is another test's business (test_recovery_time.py).
SETTLES_WITHIN_S = 30.0
AMOUNT_MINOR = 2_500
PREPAID_S = 3_600
WITNESS = "witness"

# The refund check of an agreed goal, the end of a show, the expiry: what a test may let come.
DEADLINES = frozenset({"expire", "refund", "finish_due"})


class Witness:
    """Hears the channels that it is told to, and writes them into the history in force."""

    def __init__(self, stores: Stores) -> None:
        self._broker = RedisBroker(stores.redis_url, stores.prefix, "witness", PATIENCE_S)
        self._channels: dict[str, History] = {}
        self._barriers: dict[str, asyncio.Event] = {}
        self._numbers = itertools.count(1)
        self.gaps = 0

    async def __aenter__(self) -> Self:
        await self._broker.start(self._hear, lambda _body: None, self._gap)
        await self._broker.subscribe(APP_ID, "barrier")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._broker.stop()

    async def watch(self, history: History, channels: Iterable[str]) -> None:
        """Listens to more channels, for this history."""
        for channel in channels:
            self._channels[channel] = history
            await self._broker.subscribe(APP_ID, channel)
            history.watch(WITNESS, [channel])

    async def unwatch(self, channels: Iterable[str]) -> None:
        """Stops listening to them."""
        for channel in channels:
            del self._channels[channel]
            await self._broker.unsubscribe(APP_ID, channel)

    async def barrier(self, channels: Iterable[str] = ()) -> str:
        """Returns when everything that was published before has been heard here.

        Args:
            channels: where sockets are to receive the barrier too.

        Returns:
            The event that they receive.
        """
        name = f"barrier.{next(self._numbers)}"
        passed = self._barriers[name] = asyncio.Event()
        await self._broker.publish(
            [
                Publication(APP_ID, channel, push_body(name, channel, {}))
                for channel in [*channels, "barrier"]
            ]
        )
        async with asyncio.timeout(PATIENCE_S):
            await passed.wait()
        return name

    def _gap(self) -> None:
        self.gaps += 1

    def _hear(self, _app_id: str, channel: str, body: bytes, _excluded: str | None) -> None:
        message = json.loads(body)
        if channel == "barrier":
            self._barriers.pop(message["event"]).set()
            return
        history = self._channels.get(channel)
        if history is not None:
            history.hear(WITNESS, channel, message["event"], decoded(message["data"]))


def decoded(data: Any) -> Any:
    """What is in `data`, which the protocol carries as a text within the text."""
    return json.loads(data) if isinstance(data, str) else data


@dataclass(frozen=True, slots=True)
class Act:
    """One command that somebody sends until it has an answer."""

    command: str
    user_id: str
    role: str
    session_id: str
    goal_id: str | None = None
    request_id: str | None = None
    amount: int = AMOUNT_MINOR
    prepaid_s: int = PREPAID_S

    def call(self) -> tuple[str, str, Any]:
        """The HTTP call: method, path, body."""
        session = f"/sessions/{self.session_id}"
        match self.command:
            case "invite":
                terms = {
                    "session_id": self.session_id,
                    "prepaid_duration": self.prepaid_s,
                    "amount": self.amount,
                }
                return "POST", "/goals", terms
            case "agree" | "disagree":
                return "DELETE", f"/goals/{self.goal_id}", {"agree": self.command == "agree"}
            case "withdraw":
                return "POST", f"/goals/{self.goal_id}/withdraw", None
            case "start":
                return "POST", f"{session}/exclusive", {"goal_id": self.goal_id}
            case "finish":
                return "DELETE", f"{session}/exclusive", {"goal_id": self.goal_id}
            case "close":
                return "DELETE", session, None
            case other:
                raise AssertionError(other)


async def ask(history: History, gateway: ForkedGateway, act: Act) -> Answered | None:
    """Sends a command once; none when the gateway died over it."""
    number = history.ask(
        act.user_id,
        act.command,
        request_id=act.request_id,
        goal_id=act.goal_id,
        session_id=act.session_id if act.command in {"invite", "close"} else None,
        amount=act.amount if act.command == "invite" else None,
    )
    method, path, body = act.call()
    try:
        response = await gateway.call(
            method,
            path,
            user_id=act.user_id,
            role=act.role,
            body=body,
            request_id=act.request_id,
        )
    except DIED:
        return None
    said = response.json()
    if response.status_code < 300:
        history.answer(number, ok=True, goal=None if act.command == "close" else said)
    else:
        history.answer(
            number,
            ok=False,
            goal=said.get("goal"),
            code=said["code"],
            retryable=said["retryable"],
        )
    return history.answered[-1]


async def insist(history: History, gateway: ForkedGateway, act: Act) -> Answered:
    """Sends a command until the answer is final."""
    async with asyncio.timeout(2 * PATIENCE_S):
        while True:
            assert gateway.is_running, f"{gateway.process}\n{gateway.log_text()}"
            answer = await ask(history, gateway, act)
            if answer is not None and not answer.retryable:
                return answer


@dataclass(slots=True)
class Scene:
    """A streamer and two viewers of their own, and the history of what they did."""

    books: Books
    witness: Witness
    history: History = field(default_factory=History)
    session_id: str = ""
    suffix: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def streamer(self) -> str:
        return f"streamer-{self.suffix}"

    @property
    def viewers(self) -> tuple[str, str]:
        return f"viewer-{self.suffix}", f"rival-{self.suffix}"

    @property
    def channels(self) -> list[str]:
        """Every channel on which anything about this scene can be told."""
        streamer = self.streamer
        return [
            f"private-stream@{streamer}",
            f"presence-stream@{streamer}",
            *(f"private-user@{user_id}" for user_id in (streamer, *self.viewers)),
            *(f"presence-stream-viewer@{streamer}.preview.{viewer}" for viewer in self.viewers),
        ]

    async def open(self, gateway: ForkedGateway) -> None:
        """Goes live, heard by the witness."""
        await self.witness.watch(self.history, self.channels)
        response = await gateway.call(
            "POST", "/sessions", user_id=self.streamer, role="streamer", body={}
        )
        assert response.status_code == 201, response.text
        self.session_id = response.json()["id"]

    def act(self, command: str, goal_id: str | None = None, viewer: int = 0) -> Act:
        """A command of the one whose turn it is."""
        by_viewer = command in {"invite", "withdraw"}
        return Act(
            command,
            user_id=self.viewers[viewer] if by_viewer else self.streamer,
            role="viewer" if by_viewer else "streamer",
            session_id=self.session_id,
            goal_id=goal_id,
            request_id=None if command == "close" else secrets.token_hex(8),
        )

    async def done(
        self, gateway: ForkedGateway, command: str, goal_id: str | None = None, viewer: int = 0
    ) -> str:
        """Carries out a command that has to succeed; returns the goal's id."""
        answer = await insist(self.history, gateway, self.act(command, goal_id, viewer))
        assert answer.ok, answer
        assert answer.goal is not None
        goal: str = answer.goal["id"]
        return goal

    async def prepare(self, gateway: ForkedGateway, command: str) -> Act:
        """Plays what comes before a command, to the last delivery, and returns the command."""
        await self.open(gateway)
        goal_id = None
        live = command in {"finish", "finish_due", "close_live", "invite_live"}
        if command != "invite":
            goal_id = await self.done(gateway, "invite")
        if command in {"agree", "close"}:
            await self.done(gateway, "invite", viewer=1)
        if live or command in {"start", "refund"}:
            await self.done(gateway, "agree", goal_id)
        if live:
            await self.done(gateway, "start", goal_id)
        await self.books.until_delivered(timeout_s=SETTLES_WITHIN_S)
        match command:
            case "close" | "close_live":
                return self.act("close")
            case "invite_live":
                return self.act("invite", viewer=1)
        return self.act(command, goal_id)

    async def let_come(self, act: Act) -> None:
        """Moves a goal's deadline into the past."""
        assert act.goal_id is not None
        command = "finish" if act.command == "finish_due" else act.command
        self.history.ask(TIMER, command, goal_id=act.goal_id)
        past = datetime.now(UTC) - timedelta(hours=1)
        await self.books.database["goals"].update_one(
            {"_id": ObjectId(act.goal_id)}, {"$set": {"due_at": past, "exp": past}}
        )

    async def settled(self) -> None:
        """Waits until nothing is left to do, in MongoDB and on the way."""
        await self.books.until_delivered(timeout_s=SETTLES_WITHIN_S)
        await self.witness.barrier()

    async def final_snapshots(self, gateway: ForkedGateway) -> None:
        """Lets everyone read what stands, now that everything has settled."""
        for user_id, role in (
            (self.streamer, "streamer"),
            *((viewer, "viewer") for viewer in self.viewers),
        ):
            await see(self.history, gateway, user_id, role, final=True)

    async def truth(self) -> Truth:
        """What MongoDB holds of this scene."""
        return await read_truth(self.books, [self.session_id])


async def see(
    history: History, gateway: Door, user_id: str, role: str, *, final: bool = False
) -> None:
    """Connects, as a client that was away, and writes down its snapshot."""
    async with WireSocket(gateway, user_id, role) as socket:
        asked_at_s = time.monotonic()
        snapshot = await socket.subscribe_own()
        history.see(user_id, asked_at_s, snapshot.data, final=final)


async def read_truth(books: Books, session_ids: Iterable[str]) -> Truth:
    """Everything that a majority of MongoDB's members holds of these Sessions."""
    texts = list(session_ids)
    keys = {"$in": [ObjectId(text) for text in texts]}
    # What a primary alone has, in the belief that it still leads, may be undone.
    database = books.database.with_options(read_concern=ReadConcern("majority"))
    return Truth(
        goals=await database["goals"].find({"conditions.session_id": keys}).to_list(),
        sessions=await database["sessions"].find({"_id": keys}).to_list(),
        postings=await database["escrow"].find({"session_id": keys}).to_list(),
        records=await database["goal_records"].find({"session_id": {"$in": texts}}).to_list(),
    )
