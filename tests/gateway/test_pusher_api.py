from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pusher
import pusher.errors
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect

from gateway.auth import hmac_hex

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from gateway.apps import App, Apps
    from gateway.server import RunningGateway

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Deeper than a decoder goes.
NESTED = b'{"more": ' + b"[" * 5_000 + b"]" * 5_000 + b"}"


class Caller:
    """A backend that signs its calls by hand."""

    def __init__(self, http: httpx.AsyncClient, gateway: RunningGateway, app: App) -> None:
        self._http = http
        self._gateway = gateway
        self.app = app

    async def post(
        self,
        body: bytes,
        *,
        secret: str | None = None,
        path: str | None = None,
        **changes: str,
    ) -> httpx.Response:
        path = path or f"/apps/{self.app.id}/events"
        now = int(self._gateway.parts.clock.now().timestamp())
        query = {
            "auth_key": self.app.key,
            "auth_timestamp": str(now),
            "auth_version": "1.0",
            "body_md5": hashlib.md5(body).hexdigest(),
        } | changes
        text = "&".join(f"{key}={query[key]}" for key in sorted(query))
        signature = hmac_hex(secret or self.app.secret, f"POST\n{path}\n{text}".encode())
        query["auth_signature"] = signature
        return await self._http.post(f"{path}?{urlencode(query)}", content=body)

    async def publish(self, **event: Any) -> httpx.Response:
        base = {"name": "greeting", "channels": ["public"], "data": "hello"}
        kept = {key: value for key, value in (base | event).items() if value is not None}
        return await self.post(json.dumps(kept).encode())


@pytest.fixture
def caller(http: httpx.AsyncClient, gateway: RunningGateway, apps: Apps) -> Caller:
    return Caller(http, gateway, apps.first)


class Listener:
    """A socket that has subscribed to a channel."""

    def __init__(self, socket: Any, socket_id: str) -> None:
        self._socket = socket
        self.socket_id = socket_id

    async def next(self) -> dict[str, Any]:
        async with asyncio.timeout(10):
            event: dict[str, Any] = json.loads(await self._socket.recv())
        return event

    async def subscribe(self, channel: str) -> None:
        await self._socket.send(
            json.dumps({"event": "pusher:subscribe", "data": {"channel": channel}})
        )
        assert (await self.next())["event"] == "pusher_internal:subscription_succeeded"


@pytest_asyncio.fixture(loop_scope="module")
async def listener(gateway: RunningGateway, apps: Apps) -> AsyncIterator[Listener]:
    async with connect(f"{gateway.ws_url}/app/{apps.first.key}?protocol=7") as socket:
        greeting = json.loads(await socket.recv())
        socket_id = json.loads(greeting["data"])["socket_id"]
        yield Listener(socket, socket_id)


class TestPublishing:
    @pytest.mark.pusher("2.2", "an event is answered {} and goes out exactly as published")
    @pytest.mark.pusher("2.2", "POST /events publishes to channels, and is answered {}")
    async def test_an_event_reaches_the_channels_subscriber_exactly_as_published(
        self, caller: Caller, listener: Listener
    ) -> None:
        await listener.subscribe("news")
        data = '{"text": "Grüße \\u0000 \\" 😀"}'

        answer = await caller.publish(name="my-event", channels=["news"], data=data)

        assert (answer.status_code, answer.content) == (200, b"{}")
        assert answer.headers["content-type"] == "application/json"
        assert await listener.next() == {"event": "my-event", "channel": "news", "data": data}

    @pytest.mark.pusher("2.2", "POST /events with channel instead of channels")
    async def test_one_channel_may_be_named_by_itself(
        self, caller: Caller, listener: Listener
    ) -> None:
        await listener.subscribe("alone")

        await caller.publish(channels=None, channel="alone")

        assert (await listener.next())["channel"] == "alone"

    async def test_a_channel_that_is_named_twice_gets_the_event_once(
        self, caller: Caller, listener: Listener
    ) -> None:
        await listener.subscribe("twice")

        await caller.publish(channels=["twice", "twice"], data="1")
        await caller.publish(channels=["twice"], data="2")

        assert [(await listener.next())["data"], (await listener.next())["data"]] == ["1", "2"]

    @pytest.mark.pusher("2.2", "socket_id leaves a socket out")
    @pytest.mark.pusher("2.2", "socket_id leaves a socket out")
    async def test_the_socket_that_caused_the_event_can_be_left_out(
        self, caller: Caller, listener: Listener
    ) -> None:
        await listener.subscribe("echo")

        await caller.publish(channels=["echo"], data="1", socket_id=listener.socket_id)
        await caller.publish(channels=["echo"], data="2", socket_id="1.1")

        assert (await listener.next())["data"] == "2"

    @pytest.mark.pusher("2.2", "an event goes to at most 100 channels")
    @pytest.mark.pusher("2.2", "an event goes to 100 channels at most")
    async def test_a_hundred_channels_are_the_most(self, caller: Caller) -> None:
        most = await caller.publish(channels=[f"c{n}" for n in range(100)])
        over = await caller.publish(channels=[f"c{n}" for n in range(101)])

        assert (most.status_code, over.status_code) == (200, 400)

    @pytest.mark.pusher("2.2", "an event that is none is a 400 with a reason")
    @pytest.mark.pusher("2.2", "a malformed event is a 400 with its reason")
    @pytest.mark.parametrize(
        "event",
        [
            {"name": None},
            {"name": ""},
            {"name": 5},
            {"name": "x" * 201},
            {"name": "pusher:ping"},
            {"name": "pusher_internal:member_added"},
            {"data": None},
            {"data": {"not": "a string"}},
            {"channels": None},
            {"channels": []},
            {"channels": "news"},
            {"channels": [5]},
            {"channels": ["a b"]},
            {"channels": [""]},
            {"channels": ["x" * 201]},
            {"channels": ["é"]},
            {"channels": ["#news"]},
            {"socket_id": "1"},
            {"socket_id": 1.2},
            {"socket_id": "1.2.3"},
        ],
    )
    async def test_an_event_that_is_none_is_refused_with_a_reason(
        self, caller: Caller, event: dict[str, Any]
    ) -> None:
        answer = await caller.publish(**event)

        assert answer.status_code == 400
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.text.strip()

    @pytest.mark.parametrize(
        "body",
        [b"", b"[]", b"null", b"{", b"\xff", b'{"name": "\xff"}', b'{"name": "\\ud800"}', NESTED],
        ids=lambda body: repr(body[:20]),
    )
    async def test_a_body_that_is_no_event_is_refused(self, caller: Caller, body: bytes) -> None:
        answer = await caller.post(body)

        assert (answer.status_code, answer.text[:8]) == (400, "the body")

    @pytest.mark.pusher("2.2", "data over the limit is a 413")
    async def test_the_data_of_an_event_has_a_bound_in_bytes(self, caller: Caller) -> None:
        fits = await caller.publish(data="ä" * 5_120)
        over = await caller.publish(data="ä" * 5_120 + "a")

        assert (fits.status_code, over.status_code) == (200, 413)

    @pytest.mark.pusher("2.2", "a body over its bound is a 413")
    async def test_a_body_has_a_bound_that_is_kept_while_reading(self, caller: Caller) -> None:
        assert (await caller.post(b" " * 262_145)).status_code == 413

    async def test_an_event_can_be_sent_to_one_user(self, caller: Caller) -> None:
        answer = await caller.publish(channels=["#server-to-user-ada"])

        assert answer.status_code == 200


class TestWhoMayPublish:
    async def test_an_unknown_app_is_not_found(self, caller: Caller) -> None:
        assert (await caller.post(b"{}", path="/apps/99/events")).status_code == 404

    async def test_a_disabled_app_is_forbidden(
        self, http: httpx.AsyncClient, gateway: RunningGateway, apps: Apps
    ) -> None:
        disabled = apps.by_id("2")
        assert disabled is not None

        assert (await Caller(http, gateway, disabled).publish()).status_code == 403

    async def test_a_call_without_a_signature_is_refused(
        self, http: httpx.AsyncClient, apps: Apps
    ) -> None:
        assert (await http.post(f"/apps/{apps.first.id}/events", json={})).status_code == 401

    @pytest.mark.pusher("2.1", "a wrong signature is a 401 that never tells the right one")
    async def test_a_wrong_signature_is_refused_and_the_right_one_not_told(
        self, caller: Caller
    ) -> None:
        answer = await caller.post(b"{}", secret="another")

        assert answer.status_code == 401
        assert answer.text == "auth_key and auth_signature don't match this call\n"

    @pytest.mark.pusher("2.1", "auth_timestamp may be 600 s off")
    @pytest.mark.pusher("2.1", "auth_timestamp within 600 s")
    async def test_a_call_from_another_time_is_refused(self, caller: Caller) -> None:
        assert (await caller.post(b"{}", auth_timestamp="1353088179")).status_code == 401

    async def test_while_the_secret_is_rotated_both_are_valid(
        self, http: httpx.AsyncClient, gateway: RunningGateway, apps: Apps
    ) -> None:
        rotating = apps.by_id("3")
        assert rotating is not None
        body = b'{"name": "n", "channel": "c", "data": ""}'
        caller = Caller(http, gateway, rotating)

        statuses = [
            (await caller.post(body, secret=secret)).status_code
            for secret in ("new-s3cret", "old-s3cret", "older-s3cret")
        ]

        assert statuses == [200, 200, 401]

    async def test_other_addresses_and_methods_are_told_apart(
        self, http: httpx.AsyncClient, apps: Apps
    ) -> None:
        path = f"/apps/{apps.first.id}"

        assert (await http.get(f"{path}/events")).status_code == 405
        assert (await http.get(f"{path}/nothing")).status_code == 404
        assert (await http.get("/apps/")).status_code == 404


class TestTheOfficialLibrary:
    @pytest.fixture
    def client(self, gateway: RunningGateway, apps: Apps) -> pusher.Pusher:
        return self._client(gateway, apps.first, apps.first.secret)

    @staticmethod
    def _client(gateway: RunningGateway, app: App, secret: str) -> pusher.Pusher:
        return pusher.Pusher(
            app_id=app.id,
            key=app.key,
            secret=secret,
            host=gateway.host,
            port=gateway.port,
            ssl=False,
            timeout=10,
        )

    async def test_trigger_delivers(self, client: pusher.Pusher, listener: Listener) -> None:
        await listener.subscribe("from-python")

        answer = await asyncio.to_thread(
            client.trigger, ["from-python", "elsewhere"], "my-event", {"text": "hé"}
        )

        assert answer == {}
        event = await listener.next()
        assert event["event"] == "my-event"
        assert json.loads(event["data"]) == {"text": "hé"}

    async def test_trigger_leaves_out_a_socket(
        self, client: pusher.Pusher, listener: Listener
    ) -> None:
        await listener.subscribe("from-python")

        await asyncio.to_thread(
            client.trigger, "from-python", "first", "1", socket_id=listener.socket_id
        )
        await asyncio.to_thread(client.trigger, "from-python", "second", "2")

        assert (await listener.next())["event"] == "second"

    async def test_a_wrong_secret_is_what_the_library_calls_bad_auth(
        self, gateway: RunningGateway, apps: Apps
    ) -> None:
        client = self._client(gateway, apps.first, "wrong")

        with pytest.raises(pusher.errors.PusherBadAuth):
            await asyncio.to_thread(client.trigger, "public", "event", "data")

    @pytest.mark.pusher("clients", "pusher for Python authorizes channels")
    async def test_its_channel_authorization_opens_a_private_channel(
        self, client: pusher.Pusher, gateway: RunningGateway, apps: Apps
    ) -> None:
        async with connect(f"{gateway.ws_url}/app/{apps.first.key}?protocol=7") as socket:
            socket_id = json.loads(json.loads(await socket.recv())["data"])["socket_id"]
            auth = client.authenticate(channel="private-room", socket_id=socket_id)
            await socket.send(
                json.dumps(
                    {"event": "pusher:subscribe", "data": {"channel": "private-room"} | auth}
                )
            )

            answer = json.loads(await socket.recv())

        assert answer["event"] == "pusher_internal:subscription_succeeded"
