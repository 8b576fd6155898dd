"""What two gateways on the same stores tell a backend, as its sockets come and go."""

from __future__ import annotations

import contextlib
import json
import secrets
from typing import TYPE_CHECKING, Any

import httpx
import pusher
import pytest
import pytest_asyncio

from gateway.apps import App, Apps, Webhook
from gateway.server import running_gateway
from tests.gateway.member import Member
from tests.gateway.receiver import Receiver, receiving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.server import RunningGateway
    from gateway.settings import Settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVERY = (
    "channel_occupied",
    "channel_vacated",
    "member_added",
    "member_removed",
    "client_event",
    "cache_miss",
    "subscription_count",
)
DELAY_S = 0.4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


class Cluster:
    """Two gateways, and what the backend of their app has been told."""

    def __init__(self, gateways: list[RunningGateway], receiver: Receiver) -> None:
        self.gateways = gateways
        self.app = gateways[0].parts.apps.first
        self.receiver = receiver
        self._stack = contextlib.AsyncExitStack()

    async def member(self, node: int = 0, app: App | None = None) -> Member:
        """A socket on one of the gateways."""
        connecting = Member.connected(self.gateways[node], app or self.app)
        return await self._stack.enter_async_context(connecting)

    async def close(self) -> None:
        await self._stack.aclose()

    def told(self, *channels: str, path: str = "/hooks") -> list[dict[str, Any]]:
        """The events about these channels, in order."""
        return [event for event in self.receiver.events(path) if event["channel"] in channels]

    async def until_told(self, count: int, *channels: str, path: str = "/hooks") -> None:
        await self.receiver.until(lambda: len(self.told(*channels, path=path)) >= count)

    async def settle(self) -> None:
        """Returns when whatever counted before has been told: a mark went round behind it."""
        mark = f"mark-{secrets.token_hex(4)}"
        member = await self.member()
        await member.subscribe(mark)
        # A channel that comes and goes within one flush was never there.
        await self.until_told(1, mark)
        await member.leave(mark)
        await self.until_told(1, mark, path="/ends")
        await self.receiver.until(
            lambda: "channel_vacated" in [event["name"] for event in self.told(mark)]
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateways(settings: Settings, receiver: Receiver) -> AsyncIterator[list[RunningGateway]]:
    apps = Apps(
        [
            App(
                id="1",
                key="app-key",
                secret="app-s3cret",
                subscription_count=True,
                webhooks=(
                    Webhook(url=receiver.url(), events=EVERY),
                    Webhook(url=receiver.url("/ends"), events=("channel_vacated",)),
                ),
            ),
            App(
                id="2",
                key="other-key",
                secret="other-s3cret",
                webhooks=(Webhook(url=receiver.url("/other"), events=EVERY),),
            ),
        ]
    )
    quick = settings.model_copy(update={"webhook_delay_s": DELAY_S, "poll_interval_s": 0.02})
    async with running_gateway(quick, apps) as one, running_gateway(quick, apps) as two:
        yield [one, two]


@pytest_asyncio.fixture(loop_scope="module")
async def cluster(gateways: list[RunningGateway], receiver: Receiver) -> AsyncIterator[Cluster]:
    running = Cluster(gateways, receiver)
    yield running
    await running.close()


@pytest.fixture
def name() -> Callable[[str], str]:
    suffix = secrets.token_hex(4)
    return lambda base: f"{base}-{suffix}"


def without_counts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["name"] != "subscription_count"]


@pytest.mark.pusher("2.3", "channel_occupied and channel_vacated tell of the whole cluster")
async def test_a_channel_is_occupied_by_the_first_and_vacated_by_the_last_of_all_nodes(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    one, two = await cluster.member(0), await cluster.member(1)
    await one.subscribe(name("a"))
    await cluster.until_told(1, name("a"))
    await two.subscribe(name("a"))
    await one.close()
    await cluster.settle()

    before = without_counts(cluster.told(name("a")))
    await two.close()
    await cluster.until_told(1, name("a"), path="/ends")
    await cluster.settle()

    assert before == [{"name": "channel_occupied", "channel": name("a")}]
    assert without_counts(cluster.told(name("a"))) == [
        {"name": "channel_occupied", "channel": name("a")},
        {"name": "channel_vacated", "channel": name("a")},
    ]
    assert cluster.told(name("a"), path="/ends") == [
        {"name": "channel_vacated", "channel": name("a")}
    ]


@pytest.mark.pusher("2.3", "member_added and member_removed tell of users, not of sockets")
async def test_a_member_is_added_by_the_first_and_removed_by_the_last_socket_of_all_nodes(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    room, user = name("presence-room"), 'ada "é" \\ b'
    one, two = await cluster.member(0), await cluster.member(1)
    await one.subscribe(room, user)
    await cluster.until_told(2, room)
    await two.subscribe(room, user)
    await one.close()
    await cluster.settle()
    before = [event for event in cluster.told(room) if event["name"].startswith("member")]
    await two.leave(room)
    await cluster.until_told(4, room)
    await cluster.settle()

    added = {"name": "member_added", "channel": room, "user_id": user}
    assert before == [added]
    told = cluster.told(room)
    assert [event for event in told if event["name"].startswith("member")] == [
        added,
        {"name": "member_removed", "channel": room, "user_id": user},
    ]
    assert {event["name"] for event in told} == {
        "channel_occupied",
        "channel_vacated",
        "member_added",
        "member_removed",
    }


@pytest.mark.pusher("2.3", "channel_vacated and member_removed are cancelled by a return")
async def test_who_comes_back_in_time_has_never_left(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    room = name("presence-room")
    one = await cluster.member(0)
    await one.subscribe(room, "ada")
    await cluster.until_told(2, room)
    for node in (1, 0, 1):
        await one.close()
        one = await cluster.member(node)
        await one.subscribe(room, "ada")
    await cluster.settle()
    stayed = cluster.told(room)

    await one.leave(room)
    await cluster.until_told(4, room)

    assert [event["name"] for event in stayed if event["name"].startswith("member")] == [
        "member_added"
    ]
    assert [event["name"] for event in stayed if event["name"].startswith("channel")] == [
        "channel_occupied"
    ]
    assert sorted(event["name"] for event in cluster.told(room)) == [
        "channel_occupied",
        "channel_vacated",
        "member_added",
        "member_removed",
    ]


async def test_an_end_is_told_no_sooner_than_its_delay(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    member = await cluster.member()
    await member.subscribe(name("a"))
    await cluster.until_told(1, name("a"))
    clock = cluster.gateways[0].parts.clock
    left_ms = clock.now().timestamp() * 1000
    await member.leave(name("a"))
    await cluster.until_told(1, name("a"), path="/ends")

    [told] = [
        told
        for told in cluster.receiver.told
        if told.path == "/ends" and told.events[0]["channel"] == name("a")
    ]
    assert json.loads(told.body)["time_ms"] - left_ms >= DELAY_S * 1000 - 50


@pytest.mark.pusher("2.3", "client_event has channel, event, data, socket_id and user_id")
async def test_client_events_are_told_with_who_sent_them(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    room, private = name("presence-room"), name("private-room")
    member = await cluster.member()
    await member.subscribe(room, "ada")
    await member.subscribe(private)
    await member.trigger("client-typed", room, {"text": "Grüße \u2028"})
    await member.trigger("client-typed", private, "as it is")
    await member.trigger("client-empty", private, None)
    await cluster.receiver.until(
        lambda: cluster.receiver.names("/hooks").count("client_event") >= 3
    )

    told = [one for one in cluster.told(room, private) if one["name"] == "client_event"]
    texts = [one.pop("data") for one in told]
    assert json.loads(texts[0]) == {"text": "Grüße \u2028"}
    assert texts[1:] == ["as it is", "null"]
    common = {"name": "client_event", "socket_id": member.socket_id}
    assert told == [
        common | {"channel": room, "event": "client-typed", "user_id": "ada"},
        common | {"channel": private, "event": "client-typed"},
        common | {"channel": private, "event": "client-empty"},
    ]


@pytest.mark.pusher("2.3", "cache_miss is told once for all who missed, until it is filled")
async def test_a_cache_miss_is_told_once_for_many_subscribers_on_all_nodes(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    for node in (0, 1, 0):
        await (await cluster.member(node)).subscribe(name("cache-a"))
    await cluster.settle()

    told = without_counts(cluster.told(name("cache-a")))
    assert sorted(event["name"] for event in told) == ["cache_miss", "channel_occupied"]
    assert {"name": "cache_miss", "channel": name("cache-a")} in told


@pytest.mark.pusher("2.3", "subscription_count tells the cluster's number of subscriptions")
async def test_the_number_of_subscriptions_is_told(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    first = await cluster.member(0)
    await first.subscribe(name("a"))
    await cluster.until_told(2, name("a"))
    await (await cluster.member(1)).subscribe(name("a"))
    await cluster.until_told(3, name("a"))

    counts = [one for one in cluster.told(name("a")) if one["name"] == "subscription_count"]
    assert counts == [
        {"name": "subscription_count", "channel": name("a"), "subscription_count": count}
        for count in (1, 2)
    ]


async def test_an_apps_backend_hears_of_its_own_app_alone(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    other = cluster.gateways[0].parts.apps.by_id("2")
    assert other is not None
    theirs = await cluster.member(app=other)
    await theirs.subscribe(name("presence-a"), "ada")
    await cluster.until_told(2, name("presence-a"), path="/other")
    await cluster.settle()

    assert cluster.told(name("presence-a")) == []
    assert {
        told.headers["x-pusher-key"] for told in cluster.receiver.told if told.path == "/other"
    } == {"other-key"}


async def test_a_signed_in_users_own_way_is_not_told_of(cluster: Cluster) -> None:
    member = await cluster.member()
    await member.sign_in("zoe")
    await member.subscribe("#server-to-user-zoe")
    await cluster.settle()

    assert not [one for one in cluster.receiver.events() if one["channel"].startswith("#")]


@pytest.mark.pusher("2.3", "pusher for Python accepts the signature, time and body")
async def test_the_python_library_accepts_every_call(
    cluster: Cluster, name: Callable[[str], str]
) -> None:
    await (await cluster.member()).subscribe(name("a"))
    await cluster.until_told(1, name("a"))
    library = pusher.Pusher(app_id="1", key=cluster.app.key, secret=cluster.app.secret)
    wrong = pusher.Pusher(app_id="1", key=cluster.app.key, secret="wrong")

    calls = [told for told in cluster.receiver.told if told.path != "/other"]
    assert calls
    for told in calls:
        given = (told.headers["x-pusher-key"], told.headers["x-pusher-signature"])
        text = told.body.decode()
        assert library.validate_webhook(*given, text) == json.loads(text)
        assert wrong.validate_webhook(*given, text) is None


async def test_what_webhooks_do_is_measured(cluster: Cluster, name: Callable[[str], str]) -> None:
    await (await cluster.member()).subscribe(name("a"))
    await cluster.until_told(1, name("a"))
    await cluster.settle()

    sent = 0.0
    async with httpx.AsyncClient() as http:
        for gateway in cluster.gateways:
            text = (await http.get(f"{gateway.url}/metrics")).text
            for line in text.splitlines():
                if line.startswith('duet_webhook_events_sent_total{app="1"}'):
                    sent += float(line.rpartition(" ")[2])

    assert sent > 0
