"""Whatever valid frames come from whatever connections: what the nodes know equals a model."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.apps import App, Apps
from gateway.auth import sign_channel, sign_user
from gateway.broker import MemoryBroker, MemoryBus
from gateway.fallback_connection import FallbackConnection
from gateway.fallback_lines import messages_line
from gateway.node import Node
from gateway.occupancy import MemoryTotals
from gateway.presence import MemoryPresence, MemoryStore
from gateway.telemetry import Telemetry
from persistence.clock import Clock
from tests.gateway.harness import (
    CommandsForTests,
    TokensForTests,
    memory_shared,
    settings_for_tests,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

# The same names in both apps.
APPS = (
    App(id="1", key="one", secret="s-1", client_events=True),
    App(id="2", key="two", secret="s-2", client_events=False),
)
CHANNELS = ("private-a", "presence-a", "presence-cache-b", "cache-c")
USERS = ("ana", "ben")
CONNECTIONS = 4
MEMBERS_MOST = 1
# What a watchlist subscribes to.
HIDDEN = "#"
# Tasks of a node that only its end ends.
ENDLESS = {"quotas"}

Act: TypeAlias = tuple[Literal["come", "go", "join", "leave", "event", "sign_in", "ping"], int, Any]

numbers = st.integers(0, CONNECTIONS - 1)
acts: st.SearchStrategy[Act] = st.one_of(
    st.tuples(st.just("come"), numbers, st.tuples(st.sampled_from([0, 1]), st.sampled_from(APPS))),
    st.tuples(st.just("go"), numbers, st.none()),
    st.tuples(
        st.just("join"), numbers, st.tuples(st.sampled_from(CHANNELS), st.sampled_from(USERS))
    ),
    st.tuples(st.just("leave"), numbers, st.sampled_from(CHANNELS)),
    st.tuples(st.just("event"), numbers, st.sampled_from(CHANNELS)),
    st.tuples(st.just("sign_in"), numbers, st.sampled_from(USERS)),
    st.tuples(st.just("ping"), numbers, st.none()),
)


# Long ones: what goes wrong takes somebody who joins, somebody else, and somebody who leaves.
scripts = st.integers(5, 50).flatmap(lambda size: st.lists(acts, min_size=size, max_size=size))


@dataclass
class Known:
    """What the model knows of one connection.

    Attributes:
        joined: channel -> the user that it shows there, None without presence.
    """

    node: int
    app: App
    joined: dict[str, str | None] = field(default_factory=dict)
    user: str | None = None


@dataclass
class Model:
    """The rules, as short as they can be said."""

    connections: dict[int, Known] = field(default_factory=dict)

    def apply(self, act: Act) -> None:
        kind, number, what = act
        known = self.connections.get(number)
        if kind == "come" and known is None:
            self.connections[number] = Known(*what)
        elif known is None:
            return
        elif kind == "go":
            del self.connections[number]
        elif kind == "join":
            channel, user = what
            if channel in known.joined:
                return
            if not channel.startswith("presence-"):
                known.joined[channel] = None
            elif self.members(known.app, channel) <= {user}:
                known.joined[channel] = user
        elif kind == "leave":
            known.joined.pop(what, None)
        elif kind == "sign_in":
            known.user = known.user or what

    def members(self, app: App, channel: str) -> set[str]:
        return {
            user
            for known in self.connections.values()
            if known.app is app and (user := known.joined.get(channel)) is not None
        }

    def occupancy(self, app: App) -> dict[str, int]:
        counts: dict[str, int] = {}
        for known in self.connections.values():
            if known.app is app:
                for channel in known.joined:
                    counts[channel] = counts.get(channel, 0) + 1
        return counts

    def online(self, app: App) -> dict[str, int]:
        """How many nodes each user is signed in on."""
        pairs = {
            (known.user, known.node)
            for known in self.connections.values()
            if known.app is app and known.user is not None
        }
        return {user: sum(1 for one, _ in pairs if one == user) for user, _ in pairs}


class Cluster:
    """Two nodes over memory, and their connections."""

    def __init__(self) -> None:
        bus, store, totals = MemoryBus(), MemoryStore(), (MemoryTotals(), MemoryTotals())
        apps = Apps(APPS)
        limits = settings_for_tests(presence_max_members=MEMBERS_MOST)
        self.nodes: list[Node] = []
        for name in ("n0", "n1"):
            broker = MemoryBroker(bus)
            shared = memory_shared(broker, apps, name, totals)
            self.nodes.append(
                Node(
                    limits,
                    apps,
                    broker,
                    MemoryPresence(broker, name, MEMBERS_MOST, store),
                    Clock(),
                    TokensForTests(),
                    CommandsForTests(),
                    Telemetry(),
                    **shared._asdict(),
                )
            )
        self.connections: dict[int, FallbackConnection] = {}

    async def apply(self, act: Act) -> None:
        kind, number, what = act
        connection = self.connections.get(number)
        if kind == "come" and connection is None:
            node, app = what
            self.connections[number] = FallbackConnection(
                self.nodes[node], app, None, messages_line, lambda _: None
            )
        elif connection is None:
            return
        elif kind == "go":
            self.connections.pop(number).abort()
        else:
            await connection.receive([json.dumps(message(connection, kind, what))])
        await self.settle()

    async def settle(self) -> None:
        """Every task that an act has started has ended."""
        for node in self.nodes:
            while {task.get_name() for task in node._tasks._running} - ENDLESS:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def stop(self) -> None:
        for connection in self.connections.values():
            connection.abort()
        await self.settle()
        for node in self.nodes:
            await node.stop(0)

    def subscriptions(self, number: int) -> dict[str, str | None]:
        return {
            channel: None if member is None else member.user_id
            for channel, member in self.connections[number].pusher.subscriptions.items()
            if not channel.startswith(HIDDEN)
        }


def message(connection: FallbackConnection, kind: str, what: Any) -> dict[str, Any]:
    """The frame that a client sends for it."""
    pusher = connection.pusher
    match kind:
        case "join":
            channel, user = what
            shown = json.dumps({"user_id": user}) if channel.startswith("presence-") else None
            auth = sign_channel(pusher.app, pusher.socket_id, channel, shown)
            data = {"channel": channel, "auth": auth, "channel_data": shown}
            return {"event": "pusher:subscribe", "data": data}
        case "leave":
            return {"event": "pusher:unsubscribe", "data": {"channel": what}}
        case "event":
            return {"event": "client-e", "channel": what, "data": {}}
        case "sign_in":
            user_data = json.dumps({"id": what, "watchlist": list(USERS)})
            auth = sign_user(pusher.app, pusher.socket_id, user_data)
            return {"event": "pusher:signin", "data": {"auth": auth, "user_data": user_data}}
        case _:
            return {"event": "pusher:ping", "data": {}}


async def play(script: Iterable[Act]) -> None:
    cluster, model = Cluster(), Model()
    for node in cluster.nodes:
        await node.start()
    try:
        for act in script:
            await cluster.apply(act)
            model.apply(act)
            await compare(cluster, model)
    finally:
        await cluster.stop()


async def compare(cluster: Cluster, model: Model) -> None:
    assert set(cluster.connections) == set(model.connections)
    for number, known in model.connections.items():
        assert cluster.subscriptions(number) == known.joined
    for index, node in enumerate(cluster.nodes):
        here = [known for known in model.connections.values() if known.node == index]
        assert len(node.hub.connections) == len(here)
        in_channels = {
            (*channel.key, connection)
            for channel in node.hub.channels()
            for connection in channel.live
        }
        assert in_channels == {
            (connection.pusher.app.id, name, connection)
            for connection in node.hub.connections
            for name in connection.pusher.subscriptions
        }
        assert not [channel for channel in node.hub.channels() if channel.gates]
    for app in APPS:
        for node in cluster.nodes:
            for channel in CHANNELS:
                if channel.startswith("presence-"):
                    members = await node.presence.members(app.id, channel)
                    assert set(members) == model.members(app, channel)
            occupied = await node.occupancy.occupied(app.id)
            visible = {name: n for name, n in occupied.items() if not name.startswith(HIDDEN)}
            assert visible == model.occupancy(app)
            assert await node.online.occupied(app.id) == model.online(app)


@pytest.mark.pusher("1.6", "whatever frames come, nodes, presence and occupancy equal a model")
@settings(max_examples=60)
@given(st.lists(st.sampled_from(APPS), min_size=CONNECTIONS, max_size=CONNECTIONS), scripts)
def test_any_sequence_of_valid_frames_leaves_what_the_model_says(
    apps: list[App], script: list[Act]
) -> None:
    arrivals: list[Act] = [("come", n, (n % 2, app)) for n, app in enumerate(apps)]

    asyncio.run(play([*arrivals, *script]))
