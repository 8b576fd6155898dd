"""Whatever happens to its subscriptions, each client reads each channel in order and whole.

One node in memory whose loop is turned by hand, so that clients come and go between two slices of
a batch; what is checked is what a client could check: the frames that it was sent.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.auth import sign_channel
from gateway.broker import Publication
from gateway.cache import MemoryCache
from gateway.fallback_lines import bodies_of
from gateway.frames import json_bytes, published_body
from tests.gateway.harness import masked_frame
from tests.guard.stage import APP, Stage, Wire, connection_of

if TYPE_CHECKING:
    from collections.abc import Iterator

CHANNELS = ("news", "cache-news", "presence-news", "private-cache-news")
CLIENTS = 7
TURNS = 5

Act: TypeAlias = tuple[
    Literal["join", "leave", "publish", "turn", "pass", "lag", "abort"], int, Any
]

numbers = st.integers(0, CLIENTS - 1)
channels = st.sampled_from(CHANNELS)
acts: st.SearchStrategy[Act] = st.one_of(
    st.tuples(st.just("join"), numbers, channels),
    st.tuples(st.just("leave"), numbers, channels),
    st.tuples(st.just("publish"), numbers, st.tuples(channels, st.booleans())),
    st.tuples(st.just("publish"), numbers, st.tuples(channels, st.just(False))),
    st.tuples(st.just("turn"), numbers, st.none()),
    st.tuples(st.just("turn"), numbers, st.none()),
    st.tuples(st.just("pass"), numbers, st.none()),
    st.tuples(st.just("lag"), numbers, st.booleans()),
    st.tuples(st.just("abort"), numbers, st.none()),
)
scripts = st.integers(5, 60).flatmap(lambda size: st.lists(acts, min_size=size, max_size=size))


class TurningCache(MemoryCache):
    """Takes some turns of the loop for an answer, as Redis does; meanwhile events come."""

    __slots__ = ()

    async def last(self, app_id: str, channel: str) -> bytes | None:
        found = await super().last(app_id, channel)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        return found


class Watched(Wire):
    """A transport that knows at once when an event comes that nobody is subscribed to any more."""

    def __init__(self) -> None:
        super().__init__()
        self.write = self._write

    def _write(self, data: bytes) -> None:
        if self.written:
            for event in map(json.loads, bodies_of(data)):
                if event["event"] == "e":
                    assert event["channel"] in connection_of(self).pusher.subscriptions
        self.written.append(data)


@dataclass
class Client:
    """What one client has asked for, and what it has to be sent.

    Attributes:
        asked: Channels that it wants to be on.
        owed: channel -> publications since its subscription to it succeeded, in order.
    """

    wire: Wire
    asked: set[str] = field(default_factory=set)
    owed: dict[str, list[int]] = field(default_factory=dict)

    def events(self) -> Iterator[dict[str, Any]]:
        """Everything that it was sent, from the first frame on."""
        # The first write begins with the answer to the upgrade.
        written = b"".join(self.wire.written).partition(b"\r\n\r\n")[2]
        return map(json.loads, bodies_of(written))


class Scene:
    """Some clients of one node, and what is published to them."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.clients = [self.come() for _ in range(CLIENTS)]
        self.published: list[str] = []
        self.excluded: dict[int, Wire] = {}
        for number in range(CLIENTS):
            self.act(("join", number, CHANNELS[0]))

    def come(self) -> Client:
        wire = Watched()
        self.stage.connect(wire)
        return Client(wire)

    def act(self, act: Act) -> None:
        kind, number, what = act
        client = self.clients[number]
        if kind == "join" and what not in client.asked:
            client.asked.add(what)
            self.send(client, "pusher:subscribe", **self.signed(client, number, what))
        elif kind == "leave" and what in client.asked:
            client.asked.discard(what)
            client.owed.pop(what, None)
            self.send(client, "pusher:unsubscribe", channel=what)
        elif kind == "publish":
            channel, to_all = what
            self.publish(channel, None if to_all else client)
        elif kind == "turn":
            self.turn()
        elif kind == "pass":
            self.stage.loop.now_s += 0.001
            self.turn()
        elif kind == "lag":
            connection = connection_of(client.wire)
            (connection.pause_writing if what else connection.resume_writing)()
        elif kind == "abort":
            self.stage.loop.call_soon(client.wire.abort)
            self.turn()
            self.stage.wires.remove(client.wire)
            self.check(client)
            self.clients[number] = self.come()

    def signed(self, client: Client, number: int, channel: str) -> dict[str, str]:
        socket_id = connection_of(client.wire).pusher.socket_id
        if channel.startswith("presence-"):
            member = json.dumps({"user_id": f"u{number}"})
            auth = sign_channel(APP, socket_id, channel, member)
            return {"channel": channel, "auth": auth, "channel_data": member}
        return {"channel": channel, "auth": sign_channel(APP, socket_id, channel)}

    def send(self, client: Client, event: str, **data: str) -> None:
        frame = masked_frame(1, json_bytes({"event": event, "data": data}))
        self.stage.loop.call_soon(client.wire.protocol.data_received, frame)
        self.turn()

    def publish(self, channel: str, without: Client | None) -> None:
        number = len(self.published)
        self.published.append(channel)
        for client in self.clients:
            self.note_successes(client)
            if client is not without and channel in client.owed:
                client.owed[channel].append(number)
        if without is not None:
            self.excluded[number] = without.wire
        publication = Publication(
            APP.id,
            channel,
            published_body("e", channel, str(number)),
            None if without is None else connection_of(without.wire).pusher.socket_id,
        )
        self.stage.loop.call_soon(self.stage.node.send, [publication])
        self.turn()

    def note_successes(self, client: Client) -> None:
        """Begins to count what the client is owed where its last subscription stands by now."""
        connection = connection_of(client.wire)
        if connection.pusher._inbox:
            # It may have to leave again what it is on.
            return
        for channel in client.asked:
            known = self.stage.node.hub.channel((APP.id, channel))
            if known is not None and connection in known.live:
                client.owed.setdefault(channel, [])

    def turn(self) -> None:
        """Turns the loop once: what is put off until the next turn stays so."""
        self.stage.loop.call_soon(self.stage.loop.stop)
        self.stage.loop.run_forever()

    def check(self, client: Client) -> dict[str, list[int]]:
        """What the client was sent since its last subscription to each channel."""
        heard: dict[str, list[int]] = {}
        for event in client.events():
            channel = event.get("channel", "")
            if event["event"] == "pusher_internal:subscription_succeeded":
                heard[channel] = []
            elif event["event"] == "e":
                number = int(event["data"])
                assert channel in heard, f"{number} came before the subscription to {channel}"
                before = heard[channel]
                if before:
                    assert number == self.next_of(channel, before[-1], client), (before, number)
                before.append(number)
        return heard

    def next_of(self, channel: str, number: int, client: Client) -> int | None:
        """The publication that follows on the channel, of those that are for the client."""
        for later in range(number + 1, len(self.published)):
            if self.published[later] == channel and self.excluded.get(later) is not client.wire:
                return later
        return None

    def end(self) -> None:
        """Lets everything come to rest, and looks whether every client has what it is owed."""
        self.stage.loop.settle()
        for _ in range(8):
            self.stage.loop.pass_s(0.01)
        for client in self.clients:
            heard = self.check(client)
            for channel, owed in client.owed.items():
                missing = [number for number in owed if number not in heard[channel]]
                assert not missing, f"{missing} never came on {channel}"


@pytest.fixture
def faults(stage: Stage) -> list[dict[str, Any]]:
    """What a callback of the loop has raised."""
    faults: list[dict[str, Any]] = []
    stage.loop.set_exception_handler(lambda _loop, context: faults.append(context))
    return faults


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    # One socket for each turn of the loop.
    stage.node._fan_out._slice_size = 1
    stage.node.cache = TurningCache(stage.node._broker.bus)  # type: ignore[attr-defined]
    yield stage
    stage.close()


@settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(scripts)
def test_a_client_reads_each_channel_in_order_and_whole(
    stage: Stage, faults: list[dict[str, Any]], script: list[Act]
) -> None:
    scene = Scene(stage)
    try:
        for act in script:
            scene.act(act)
        scene.end()
        assert not faults
    finally:
        faults.clear()
        for client in scene.clients:
            stage.loop.do(client.wire.abort)
            stage.wires.remove(client.wire)
        stage.loop.pass_s(5)
        stage.node._broker.bus.last.clear()  # type: ignore[attr-defined]
