"""Every route of the Pusher HTTP API, signed by hand: statuses, bodies, bounds, who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio
import redis.asyncio

from gateway.apps import App, Apps
from gateway.server import running_gateway
from tests.gateway.backend import Backend
from tests.gateway.member import PATIENCE_S, Member

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gateway.server import RunningGateway
    from gateway.settings import Settings

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def apps() -> Apps:
    """Two that know nothing of each other, one that is disabled, one that may ask five a second."""
    return Apps(
        [
            App(id="1", key="app-key", secret="app-s3cret"),
            App(id="2", key="other-key", secret="other-s3cret"),
            App(id="3", key="off-key", secret="off-s3cret", enabled=False),
            App(id="4", key="slow-key", secret="slow-s3cret", api_rate_per_s=5),
            # Nobody but the test of forged calls has called it before.
            App(id="5", key="rested-key", secret="rested-s3cret", api_rate_per_s=5),
        ]
    )


@pytest_asyncio.fixture(loop_scope="module")
async def member(gateway: RunningGateway) -> AsyncIterator[Callable[..., Any]]:
    """member() is a connected socket of the first app, or of the one that is given."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(app: App | None = None) -> Member:
            app = app or gateway.parts.apps.first
            return await stack.enter_async_context(Member.connected(gateway, app))

        yield make


@pytest.fixture
def backend(http: httpx.AsyncClient, gateway: RunningGateway) -> Callable[[str], Backend]:
    """backend("2") asks as that app."""

    def make(app_id: str) -> Backend:
        app = gateway.parts.apps.by_id(app_id)
        assert app is not None
        return Backend(http, gateway, app)

    return make


@pytest.fixture
def own(backend: Callable[[str], Backend]) -> Backend:
    return backend("1")


@pytest.fixture
def name() -> Callable[[str], str]:
    """name("news") is a channel that no other test uses."""
    suffix = secrets.token_hex(4)
    return lambda base: f"{base}-{suffix}"


@pytest_asyncio.fixture(loop_scope="module")
async def room(member: Callable[..., Any], name: Callable[[str], str]) -> str:
    """A presence channel with three sockets of two users."""
    channel = name("presence-room")
    for user in ("ada", "ada", "bob"):
        await (await member()).subscribe(channel, user)
    return channel


def event(channel: str, data: str = "hello", **more: Any) -> dict[str, Any]:
    return {"name": "greeting", "channel": channel, "data": data, **more}


class TestBatch:
    @pytest.mark.pusher("2.2", "a batch publishes each event to its channel, and is answered {}")
    async def test_events_arrive_in_order_and_the_answer_is_an_empty_object(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        listener = await member()
        await listener.subscribe(name("a"))
        await listener.subscribe(name("b"))

        answer = await own.post(
            "batch_events",
            {"batch": [event(name("a"), "1"), event(name("b"), "2"), event(name("a"), "3")]},
        )

        assert (answer.status_code, answer.content) == (200, b"{}")
        assert answer.headers["content-type"] == "application/json"
        received = [await listener.next() for _ in range(3)]
        of_a = [one["data"] for one in received if one["channel"] == name("a")]
        assert of_a == ["1", "3"]
        assert {one["channel"]: one["data"] for one in received}[name("b")] == "2"

    async def test_a_socket_can_be_left_out_of_one_event(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        listener = await member()
        await listener.subscribe(name("a"))
        first = event(name("a"), "1", socket_id=listener.socket_id)

        await own.post("batch_events", {"batch": [first, event(name("a"), "2")]})

        assert (await listener.next())["data"] == "2"

    @pytest.mark.pusher("2.2", "a batch has at most ten events")
    @pytest.mark.parametrize(("count", "status"), [(0, 400), (1, 200), (10, 200), (11, 400)])
    async def test_a_batch_has_one_to_ten_events(
        self, own: Backend, count: int, status: int
    ) -> None:
        batch = [event("c")] * count

        assert (await own.post("batch_events", {"batch": batch})).status_code == status

    @pytest.mark.parametrize(
        ("wrong", "status"),
        [
            ({"channel": "a b"}, 400),
            ({"name": ""}, 400),
            ({"name": "pusher:ping"}, 400),
            ({"data": {"no": "string"}}, 400),
            ({"socket_id": "x"}, 400),
            ({"info": "colour"}, 400),
            ({"data": "x" * 10_241}, 413),
        ],
    )
    async def test_one_wrong_event_is_named_and_nothing_is_published(
        self,
        own: Backend,
        member: Callable[..., Any],
        name: Callable[[str], str],
        wrong: dict[str, Any],
        status: int,
    ) -> None:
        listener = await member()
        await listener.subscribe(name("a"))

        answer = await own.post(
            "batch_events", {"batch": [event(name("a"), "1"), event("c") | wrong]}
        )
        await own.post("events", event(name("a"), "2"))

        assert answer.status_code == status
        assert (await listener.next())["data"] == "2"

    @pytest.mark.parametrize(
        "body", [b"", b"[]", b'{"batch": {}}', b'{"batch": [1]}', b'{"batch": "\xff"}']
    )
    async def test_a_body_that_is_no_batch_is_refused(self, own: Backend, body: bytes) -> None:
        assert (await own.ask("POST", "batch_events", body)).status_code == 400


class TestInfo:
    @pytest.mark.pusher("2.2", "info on a publication answers the channels' counts")
    async def test_a_publication_may_ask_for_counts(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str], room: str
    ) -> None:
        plain = name("plain")
        await (await member()).subscribe(plain)

        answer = await own.post(
            "events",
            {
                "name": "e",
                "data": "",
                "channels": [room, plain, name("empty")],
                "info": "user_count,subscription_count",
            },
        )

        assert answer.status_code == 200
        assert answer.json() == {
            "channels": {
                room: {"user_count": 2, "subscription_count": 3},
                plain: {"subscription_count": 1},
                name("empty"): {"subscription_count": 0},
            }
        }

    @pytest.mark.pusher("2.2", "info on a batch is answered by index")
    async def test_a_batch_may_ask_for_counts_of_some_of_its_events(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        await (await member()).subscribe(name("a"))

        answer = await own.post(
            "batch_events",
            {"batch": [event("c"), event(name("a"), info="subscription_count"), event("c")]},
        )

        assert answer.json() == {"batch": [{}, {"subscription_count": 1}, {}]}

    async def test_info_that_there_is_none_of_is_refused(self, own: Backend) -> None:
        assert (await own.post("events", event("c", info="cache"))).status_code == 400


class TestChannels:
    @pytest.mark.pusher("2.2", "GET /channels lists the occupied channels by prefix")
    async def test_occupied_channels_are_listed_by_prefix(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        listener = await member()
        for channel in ("a1", "a2", "b"):
            await listener.subscribe(name(channel))

        one = await own.get("channels", filter_by_prefix=name("a1"))
        every = await own.get("channels")

        assert one.json() == {"channels": {name("a1"): {}}}
        assert {name("a1"), name("a2"), name("b")} <= set(every.json()["channels"])

    @pytest.mark.pusher("2.2", "without a channel the map is an empty object")
    async def test_no_channel_is_an_empty_object(
        self, own: Backend, name: Callable[[str], str]
    ) -> None:
        answer = await own.get("channels", filter_by_prefix=name("nobody"))

        assert (answer.status_code, answer.content) == (200, b'{"channels":{}}')

    @pytest.mark.pusher("2.2", "GET /channels has user_count for presence prefixes alone")
    async def test_counts_are_listed_where_they_apply(self, own: Backend, room: str) -> None:
        counted = await own.get(
            "channels", filter_by_prefix=room, info="user_count,subscription_count"
        )
        refusals = [
            await own.get("channels", info="user_count"),
            await own.get("channels", info="user_count", filter_by_prefix="pres"),
            await own.get("channels", info="cache"),
            await own.get("channels", info="colour"),
        ]

        assert counted.json() == {"channels": {room: {"user_count": 2, "subscription_count": 3}}}
        assert [answer.status_code for answer in refusals] == [400] * 4

    @pytest.mark.parametrize("prefix", ["*", "?", "[a-z]", "\\", "^"])
    async def test_a_prefix_is_taken_literally(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str], prefix: str
    ) -> None:
        await (await member()).subscribe(name("a"))

        answer = await own.get("channels", filter_by_prefix=prefix)

        assert answer.json() == {"channels": {}}

    async def test_a_signed_in_users_own_way_is_no_channel_of_the_app(
        self, own: Backend, member: Callable[..., Any]
    ) -> None:
        signed_in = await member()
        await signed_in.sign_in("zoe")
        await signed_in.subscribe("#server-to-user-zoe")

        answer = await own.get("channels", filter_by_prefix="#")

        assert answer.json() == {"channels": {}}


class TestOneChannel:
    @pytest.mark.pusher("2.2", "GET /channels/NAME tells whether it is occupied, and its counts")
    async def test_a_channel_is_occupied_or_not(
        self, own: Backend, name: Callable[[str], str], room: str
    ) -> None:
        answers = [
            await own.get(f"channels/{room}"),
            await own.get(f"channels/{room}", info="user_count,subscription_count"),
            await own.get(f"channels/{name('empty')}"),
            await own.get(f"channels/{name('empty')}", info="subscription_count"),
            await own.get(f"channels/{name('presence-empty')}", info="user_count"),
        ]

        assert [answer.status_code for answer in answers] == [200] * 5
        assert [answer.json() for answer in answers] == [
            {"occupied": True},
            {"occupied": True, "subscription_count": 3, "user_count": 2},
            {"occupied": False},
            {"occupied": False, "subscription_count": 0},
            {"occupied": False, "user_count": 0},
        ]

    @pytest.mark.pusher("2.2", "an info attribute that does not apply to the channel is a 400")
    @pytest.mark.parametrize(
        ("channel", "info"),
        [("plain", "user_count"), ("plain", "cache"), ("presence-x", "cache"), ("plain", "x")],
    )
    async def test_what_does_not_apply_is_refused(
        self, own: Backend, channel: str, info: str
    ) -> None:
        assert (await own.get(f"channels/{channel}", info=info)).status_code == 400

    @pytest.mark.pusher("2.2", "info=cache is the last event's data and seconds to live, or null")
    @pytest.mark.parametrize(
        "family", ["cache-", "private-cache-", "private-encrypted-cache-", "presence-cache-"]
    )
    async def test_the_cached_event_is_told(
        self, own: Backend, name: Callable[[str], str], family: str
    ) -> None:
        channel = family + name("x")
        before = await own.get(f"channels/{channel}", info="cache")
        await own.post("events", event(channel, '{"n": 1}'))
        await own.post("events", event(channel, '{"n": 2}'))

        after = await own.get(f"channels/{channel}", info="cache")

        assert before.json() == {"occupied": False, "cache": None}
        assert after.json()["cache"]["data"] == '{"n": 2}'
        assert 1790 < after.json()["cache"]["ttl"] <= 1800

    async def test_every_letter_of_a_name_may_come_escaped(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        channel = name("a=b@c,d.e;f")
        await (await member()).subscribe(channel)

        plain = await own.get(f"channels/{channel}")
        escaped = await own.get(f"channels/{quote(channel, safe='')}")

        assert plain.json() == escaped.json() == {"occupied": True}

    @pytest.mark.parametrize("channel", ["a b", "a%2Fb", "é", "x" * 201, "#other"])
    async def test_a_name_that_no_channel_has_is_refused(self, own: Backend, channel: str) -> None:
        path = f"/apps/1/channels/{quote(channel, safe='%')}"

        assert (await own.get(path)).status_code == 400

    @pytest.mark.pusher("2.2", "deprecated: GET /channels/NAME/stats")
    async def test_stats_are_every_count_without_asking(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        await (await member()).subscribe(name("presence-a"), "ada")

        room = await own.get(f"channels/{name('presence-a')}/stats")
        plain = await own.get(f"channels/{name('plain')}/stats")

        assert room.json() == {"occupied": True, "subscription_count": 1, "user_count": 1}
        assert plain.json() == {"occupied": False, "subscription_count": 0}

    @pytest.mark.pusher("2.2", "deprecated: POST /channels/NAME/events is answered 202")
    async def test_the_body_of_the_deprecated_form_is_the_data(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        listener = await member()
        await listener.subscribe(name("a"))
        address = f"channels/{name('a')}/events"

        left_out = await own.ask(
            "POST", address, b"1", name="greeting", socket_id=listener.socket_id
        )
        answer = await own.ask("POST", address, b'{"n": "2"}', name="greeting")
        refusals = [
            await own.ask("POST", address, b"3"),
            await own.ask("POST", address, b"\xff", name="e"),
            await own.ask("POST", address, b"x" * 10_241, name="e"),
            await own.ask("POST", address, b"4", name="e", socket_id="x"),
        ]

        assert (left_out.status_code, answer.status_code, answer.content) == (202, 202, b"{}")
        assert await listener.next() == {
            "event": "greeting",
            "channel": name("a"),
            "data": '{"n": "2"}',
        }
        assert [refusal.status_code for refusal in refusals] == [400, 400, 413, 400]


class TestUsers:
    @pytest.mark.pusher("2.2", "GET /channels/NAME/users lists a presence channel's user ids")
    async def test_the_users_of_a_presence_channel_are_listed_once_each(
        self, own: Backend, name: Callable[[str], str], room: str
    ) -> None:
        users = await own.get(f"channels/{room}/users")
        nobody = await own.get(f"channels/{name('presence-empty')}/users")

        assert sorted(user["id"] for user in users.json()["users"]) == ["ada", "bob"]
        assert (nobody.status_code, nobody.content) == (200, b'{"users":[]}')

    @pytest.mark.pusher("2.2", "users of a channel without presence are a 400")
    async def test_other_channels_have_no_users(self, own: Backend) -> None:
        assert (await own.get("channels/private-room/users")).status_code == 400

    @pytest.mark.pusher("2.2", "terminate_connections closes the user's sockets with 4009")
    @pytest.mark.parametrize(
        "path", ["/apps/1/users/{}/terminate_connections", "/users/{}/terminate_connections"]
    )
    @pytest.mark.parametrize("user", ["ada", "a/b c@é"])
    async def test_a_users_connections_are_terminated(
        self,
        own: Backend,
        backend: Callable[[str], Backend],
        member: Callable[..., Any],
        path: str,
        user: str,
    ) -> None:
        other_app = backend("2").app
        theirs, bystander, namesake = await member(), await member(), await member(other_app)
        await theirs.sign_in(user)
        await bystander.sign_in("bob")
        await namesake.sign_in(user)

        answer = await own.ask("POST", path.format(quote(user, safe="")), b"{}")
        nobody = await own.ask("POST", path.format("nobody"), b"{}")

        assert (answer.status_code, answer.content) == (200, b"{}")
        assert (nobody.status_code, nobody.content) == (200, b"{}")
        assert await theirs.closed() == 4009
        await bystander.subscribe("still-there")
        await namesake.subscribe("still-there")

    @pytest.mark.parametrize("user", ["ada", "auth0|5f7c", "ann+news@example.com", 'Zoë {"}/ b'])
    async def test_an_event_reaches_a_user_whatever_the_id_is(
        self, own: Backend, member: Callable[..., Any], user: str
    ) -> None:
        channel = f"#server-to-user-{user}"
        theirs, bystander = await member(), await member()
        await theirs.sign_in(user)
        await theirs.subscribe(channel)
        await bystander.sign_in("bob")

        sent = {"name": "e", "data": "for you", "channels": [channel]}
        answer = await own.post("events", sent)
        await bystander.send("pusher:subscribe", channel=channel)

        assert (answer.status_code, answer.content) == (200, b"{}")
        assert await theirs.next() == {"event": "e", "channel": channel, "data": "for you"}
        assert (await bystander.next())["event"] == "pusher:subscription_error"


class TestIdempotency:
    @pytest.mark.parametrize("header", ["X-Idempotency-Key", "Idempotency-Key"])
    async def test_the_same_key_publishes_once_and_is_answered_the_same(
        self,
        own: Backend,
        member: Callable[..., Any],
        name: Callable[[str], str],
        header: str,
    ) -> None:
        listener = await member()
        await listener.subscribe(name("a"))
        key = {header: f"key {name('k')}"}
        asked = event(name("a"), "1", info="subscription_count")

        first = await own.post("events", asked, key)
        await (await member()).subscribe(name("a"))
        second = await own.post("events", asked, key)
        await own.post("events", event(name("a"), "2"))

        assert first.json() == {"channels": {name("a"): {"subscription_count": 1}}}
        assert (second.status_code, second.content) == (first.status_code, first.content)
        assert second.headers["content-type"] == "application/json"
        assert [(await listener.next())["data"] for _ in range(2)] == ["1", "2"]

    async def test_a_hundred_calls_at_once_publish_once(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        listener = await member()
        await listener.subscribe(name("a"))
        key = {"Idempotency-Key": name("k")}

        answers = await asyncio.gather(
            *(own.post("events", event(name("a"), "1"), key) for _ in range(100))
        )
        await own.post("events", event(name("a"), "2"))

        assert {(answer.status_code, answer.content) for answer in answers} == {(200, b"{}")}
        assert [(await listener.next())["data"] for _ in range(2)] == ["1", "2"]

    async def test_a_batch_and_the_deprecated_form_take_a_key_too(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        listener = await member()
        await listener.subscribe(name("a"))
        for _ in range(2):
            batch = {"batch": [event(name("a"), "1"), event(name("a"), "2")]}
            answer = await own.post("batch_events", batch, {"Idempotency-Key": name("batch")})
            old = await own.ask(
                "POST",
                f"channels/{name('a')}/events",
                b"3",
                headers={"Idempotency-Key": name("old")},
                name="e",
            )
            assert (answer.status_code, answer.content) == (200, b"{}")
            assert (old.status_code, old.content) == (202, b"{}")

        await own.post("events", event(name("a"), "4"))

        assert [(await listener.next())["data"] for _ in range(4)] == ["1", "2", "3", "4"]

    async def test_two_apps_may_use_the_same_key(
        self,
        own: Backend,
        backend: Callable[[str], Backend],
        member: Callable[..., Any],
        name: Callable[[str], str],
    ) -> None:
        other = backend("2")
        listener = await member(other.app)
        await listener.subscribe(name("a"))
        key = {"Idempotency-Key": name("k")}

        await own.post("events", event(name("a"), "1"), key)
        await other.post("events", event(name("a"), "2"), key)

        assert (await listener.next())["data"] == "2"

    async def test_a_call_that_was_refused_leaves_its_key_free(
        self, own: Backend, member: Callable[..., Any], name: Callable[[str], str]
    ) -> None:
        listener = await member()
        await listener.subscribe(name("a"))
        key = {"Idempotency-Key": name("k")}

        refused = await own.post("events", event(name("a"), "x" * 10_241), key)
        answer = await own.post("events", event(name("a"), "1"), key)

        assert (refused.status_code, answer.status_code) == (413, 200)
        assert (await listener.next())["data"] == "1"

    async def test_a_key_is_remembered_for_two_minutes(
        self, own: Backend, settings: Settings, name: Callable[[str], str]
    ) -> None:
        await own.post("events", event("c"), {"Idempotency-Key": name("k")})

        assert settings.redis_url is not None
        async with redis.asyncio.Redis.from_url(settings.redis_url) as admin:
            left_ms = await admin.pttl(f"{settings.redis_prefix}:1:once:{name('k')}")
        assert 110_000 < left_ms <= 120_000

    async def test_the_last_event_of_a_cache_channel_is_kept_with_a_key_as_well(
        self, own: Backend, name: Callable[[str], str]
    ) -> None:
        channel = name("cache-a")
        await own.post("events", event(channel, "1"), {"Idempotency-Key": name("k")})

        answer = await own.get(f"channels/{channel}", info="cache")

        assert answer.json()["cache"]["data"] == "1"

    @pytest.mark.parametrize("key", ["", "x" * 129, "caf\xe9", "a\tb"])
    async def test_a_key_that_is_none_is_refused(self, own: Backend, key: str) -> None:
        headers = {"Idempotency-Key": key.encode("latin-1")}

        answer = await own.post("events", event("c"), headers)  # type: ignore[arg-type]

        assert answer.status_code == 400


class TestRates:
    @pytest.mark.pusher("2.2", "over its rate an app gets 429, Retry-After and its rate")
    async def test_over_its_rate_an_app_gets_429_and_comes_again_later(
        self, backend: Callable[[str], Backend]
    ) -> None:
        slow = backend("4")

        answers = [await slow.post("events", event("c")) for _ in range(8)]

        statuses = [answer.status_code for answer in answers]
        assert statuses[:5] == [200] * 5
        assert 429 in statuses[5:]
        assert answers[0].headers["x-ratelimit-limit"] == "5"
        assert answers[0].headers["x-ratelimit-remaining"] == "4"
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-ratelimit-remaining"] == "0"
        async with asyncio.timeout(PATIENCE_S):
            while (await slow.get("channels/c")).status_code == 429:
                pass

    async def test_the_rate_of_one_app_is_not_anothers(
        self, backend: Callable[[str], Backend], own: Backend
    ) -> None:
        slow = backend("4")
        statuses = {(await slow.post("events", event("c"))).status_code for _ in range(20)}

        answers = [await own.post("events", event("c")) for _ in range(20)]

        assert 429 in statuses
        assert {answer.status_code for answer in answers} == {200}
        assert "x-ratelimit-limit" not in answers[0].headers

    async def test_calls_that_nobody_signed_cost_an_app_nothing(
        self, backend: Callable[[str], Backend]
    ) -> None:
        rested = backend("5")
        for _ in range(20):
            forged = await rested.ask("POST", "events", b"{}", secret="guess")
            assert forged.status_code == 401

        answer = await rested.get("channels/c")

        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining"] == "4"


ADDRESSES = [
    ("POST", "events"),
    ("POST", "batch_events"),
    ("GET", "channels"),
    ("GET", "channels/c"),
    ("GET", "channels/presence-c/users"),
    ("GET", "channels/c/stats"),
    ("POST", "channels/c/events"),
    ("POST", "users/ada/terminate_connections"),
]


class TestWhoMayAsk:
    @pytest.mark.pusher("2.1", "who can't sign learns nothing: unknown app and key are a 401")
    @pytest.mark.parametrize(("method", "address"), ADDRESSES)
    async def test_who_signed_nothing_learns_nothing_of_any_app(
        self, own: Backend, http: httpx.AsyncClient, method: str, address: str
    ) -> None:
        forged = [
            await Backend(http, own._gateway, app).ask(method, f"/apps/{app_id}/{address}")
            for app in (
                App(id="1", key="app-key", secret="guess"),
                App(id="1", key="nobodys-key", secret="guess"),
                App(id="3", key="off-key", secret="guess"),
            )
            for app_id in ("1", "2", "3", "99")
        ]

        assert {(answer.status_code, answer.content) for answer in forged} == {
            (401, b"auth_key and auth_signature don't match this call\n")
        }

    @pytest.mark.pusher(
        "2.1", "an app that asks for another one's path gets 404, whether it exists"
    )
    @pytest.mark.parametrize(("method", "address"), ADDRESSES)
    async def test_an_app_learns_nothing_of_another_one(
        self, own: Backend, method: str, address: str
    ) -> None:
        answers = [
            await own.ask(method, f"/apps/{app_id}/{address}") for app_id in ("2", "3", "99")
        ]

        assert len({(answer.status_code, answer.content) for answer in answers}) == 1
        assert answers[0].status_code == 404

    async def test_an_app_sees_its_own_channels_and_users_alone(
        self,
        own: Backend,
        backend: Callable[[str], Backend],
        member: Callable[..., Any],
        name: Callable[[str], str],
    ) -> None:
        room, cached = name("presence-room"), name("cache-x")
        await (await member()).subscribe(room, "ada")
        await own.post("events", event(cached))
        other = backend("2")

        assert (await other.get("channels", filter_by_prefix=room)).json() == {"channels": {}}
        assert (await other.get(f"channels/{room}")).json() == {"occupied": False}
        assert (await other.get(f"channels/{room}/users")).json() == {"users": []}
        answer = await other.get(f"channels/{cached}", info="cache")
        assert answer.json() == {"occupied": False, "cache": None}

    @pytest.mark.pusher("2.2", "a disabled app gets 403")
    @pytest.mark.parametrize(("method", "address"), ADDRESSES)
    async def test_a_disabled_app_is_told_so(
        self, backend: Callable[[str], Backend], method: str, address: str
    ) -> None:
        assert (await backend("3").ask(method, address)).status_code == 403

    @pytest.mark.parametrize(("method", "address"), ADDRESSES)
    async def test_another_method_is_refused_with_the_right_one(
        self, own: Backend, method: str, address: str
    ) -> None:
        for other in {"GET", "POST", "PUT", "DELETE"} - {method}:
            answer = await own.ask(other, address)
            assert (answer.status_code, answer.headers["allow"]) == (405, method)

    @pytest.mark.parametrize(
        "path",
        [
            "/apps/1",
            "/apps/1/",
            "/apps/1/nothing",
            "/apps/1/events/",
            "/apps/1/channels/",
            "/apps/1/channels//users",
            "/apps/1/channels/c/nothing",
            "/apps/1/users/ada",
            "/users/ada",
            "/users/",
            "/users/ada/nothing",
            "/users/ada/terminate_connections/more",
        ],
    )
    async def test_other_addresses_are_nothing(self, own: Backend, path: str) -> None:
        assert (await own.get(path)).status_code == 404
        assert (await own.ask("POST", path)).status_code == 404

    async def test_an_encrypted_event_goes_to_one_channel(self, own: Backend) -> None:
        one, two = "private-encrypted-a", "private-encrypted-b"

        single = await own.post("events", {"name": "e", "data": "", "channels": [one, one]})
        several = await own.post("events", {"name": "e", "data": "", "channels": [one, two]})

        assert (single.status_code, several.status_code) == (200, 400)


@pytest.mark.pusher("2.1", "the path may be signed with or without a proxy's prefix")
async def test_below_a_prefix_every_address_works_and_either_path_may_be_signed(
    settings: Settings, apps: Apps
) -> None:
    below = settings.model_copy(update={"path_prefix": "/duet"})
    async with (
        running_gateway(below, apps) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=10) as http,
    ):
        backend = Backend(http, gateway, apps.first)
        answers = [
            await backend.ask(method, address, body, sent_to=sent_to)
            for method, address, body in (
                ("GET", "/apps/1/channels/a%2Cb", b""),
                ("POST", "/apps/1/events", json.dumps(event("c")).encode()),
                ("POST", "/users/ada/terminate_connections", b"{}"),
            )
            for address, sent_to in ((address, f"/duet{address}"), (f"/duet{address}", None))
        ]
        outside = await backend.get("/apps/1/channels")

    assert [answer.status_code for answer in answers] == [200] * 6
    assert outside.status_code == 404
