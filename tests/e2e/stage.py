"""A streamer, their viewers and what each of them has to have received."""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Protocol, Self

from tests.e2e.party import Party
from tests.e2e.wire_socket import WireSocket

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tests.e2e.books import Books
    from tests.e2e.gateway_process import Gateway

AMOUNT_MINOR = 2_500
PREPAID_S = 300

Push = tuple[str, str]


class Stage:
    """The parties of one test; their ids are unlike those of every other test."""

    def __init__(self, gateway: Gateway, books: Books) -> None:
        self.gateway = gateway
        self.books = books
        self.parties: list[Party] = []
        self.session_id = ""
        self.marks: dict[str, int] = {}
        self._suffix = uuid.uuid4().hex[:8]
        self._stack = AsyncExitStack()
        self._barriers = itertools.count(1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def user(self, name: str) -> str:
        """A user id that no other test has."""
        return f"{name}-{self._suffix}"

    async def party(
        self, name: str, role: str, *, gateway: Gateway | None = None, by: str = "endpoint"
    ) -> Party:
        """A connected party without subscriptions."""
        party = await self._stack.enter_async_context(Party(self.user(name), role))
        await party.connect(gateway or self.gateway, by=by)
        self.parties.append(party)
        return party

    async def socket(self, name: str, role: str, *, gateway: Gateway | None = None) -> WireSocket:
        """A bare socket of a user, subscribed to the channel that takes commands."""
        socket = await self._stack.enter_async_context(
            WireSocket(gateway or self.gateway, self.user(name), role)
        )
        await socket.subscribe_own()
        return socket

    async def open_session(
        self, streamer_id: str, *, gateway: Gateway | None = None, patience_s: float = 0.0
    ) -> str:
        """Lets a streamer go live; asks again for so long while the gateway can't say."""
        give_up_at_s = time.monotonic() + patience_s
        told = {201}
        while True:
            response = await (gateway or self.gateway).call(
                "POST", "/sessions", user_id=streamer_id, role="streamer", body={}
            )
            if response.status_code != 503 or time.monotonic() >= give_up_at_s:
                break
            # He may be live already.
            told = {200, 201}
        assert response.status_code in told, response.text
        session_id: str = response.json()["id"]
        self.session_id = session_id
        return session_id

    async def streamer(
        self, name: str = "streamer", *, gateway: Gateway | None = None, by: str = "endpoint"
    ) -> Party:
        """A streamer who is live and listens to each of the three channels."""
        party = await self.party(name, "streamer", gateway=gateway, by=by)
        await self.open_session(party.user_id, gateway=gateway)
        await party.subscribe(party.own_channel)
        await party.expect("goal.snapshot", party.own_channel)
        await party.subscribe(party.stream_channel)
        await party.subscribe(party.audience_channel)
        return party

    async def viewer(
        self,
        name: str,
        streamer: Party,
        *,
        gateway: Gateway | None = None,
        by: str = "endpoint",
    ) -> Party:
        """A viewer of `streamer` who listens to everything a viewer may hear."""
        party = await self.party(name, "viewer", gateway=gateway, by=by)
        await party.subscribe(party.own_channel)
        await party.expect("goal.snapshot", party.own_channel)
        await party.subscribe(streamer.audience_channel)
        await party.subscribe(streamer.preview_channel(party))
        return party

    def terms(self, **changes: Any) -> dict[str, Any]:
        """What an invitation asks for."""
        return {
            "session_id": self.session_id,
            "prepaid_duration": PREPAID_S,
            "amount": AMOUNT_MINOR,
            **changes,
        }

    async def invited(self, viewer: Party, **changes: Any) -> dict[str, Any]:
        """Lets a viewer invite the streamer and returns the goal."""
        return await viewer.succeed("client-goal.invite", **self.terms(**changes))

    async def settle(self) -> None:
        """Returns when every push that is under way has arrived.

        Every outbox is empty, so everything is published; and each channel keeps its order, so
        what was published before the barrier has arrived before it.
        """
        await self.books.until_delivered()
        barrier = f"barrier.{next(self._barriers)}"
        channels = sorted({channel for party in self.parties for channel in party.channels})
        response = await self.gateway.publish(channels, barrier, {})
        assert response.status_code == 200, response.text
        for party in self.parties:
            for channel in party.channels:
                await party.expect(barrier, channel)

    async def mark(self) -> None:
        """Forgets what was received so far, once all of it is there."""
        await self.settle()
        self.marks = {party.name: party.mark() for party in self.parties}

    async def assert_received(self, expected: Mapping[Party, Iterable[Push]]) -> None:
        """Each party received exactly these pushes since the mark, no other and none twice.

        On the wire and in the app alike.
        """
        await self.settle()
        for party in self.parties:
            wanted = Counter(expected.get(party, ()))
            since = self.marks.get(party.name, 0)
            for kind in ("event", "frame"):
                assert party.pushes(since, kind=kind) == wanted, (party.name, kind)

    def received(self, party: Party, event: str) -> list[Any]:
        """The data of each such event since the mark."""
        return party.all_of(event, since=self.marks.get(party.name, 0))


class StageBuilder(Protocol):
    """Starts a gateway with these settings and puts a stage in front of it."""

    async def __call__(self, **settings: str) -> Stage: ...


_HEARD_BY_STREAMER = {
    "goal.added": ("stream_channel", "own_channel"),
    "goal.ended": ("stream_channel", "audience_channel", "own_channel"),
    "exclusive.started": ("stream_channel", "audience_channel"),
    "exclusive.ended": ("stream_channel", "audience_channel"),
}


def to_streamer(event: str, streamer: Party) -> list[Push]:
    """The event on each of the streamer's channels on which it goes."""
    return [(event, getattr(streamer, channel)) for channel in _HEARD_BY_STREAMER[event]]


def to_audience(event: str, streamer: Party) -> list[Push]:
    """The event as those hear it who watch the stream."""
    return [(event, streamer.audience_channel)]


def to_viewer(event: str, viewer: Party) -> list[Push]:
    """The event on the viewer's own channel."""
    return [(event, viewer.own_channel)]


def authorized(streamer: Party, viewer: Party) -> list[Push]:
    return [("stream.authorized", streamer.preview_channel(viewer))]


def reply(party: Party) -> list[Push]:
    return [("goal.reply", party.own_channel)]
