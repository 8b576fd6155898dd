"""The straight way of a plain publication, which may differ from the other in speed alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from starlette.responses import Response
from starlette.routing import Route

from gateway.apps import Apps
from gateway.node import Node
from gateway.pusher_api import PusherApi
from gateway.server import running_gateway
from tests.gateway.caller import APP, Caller
from tests.gateway.harness import until
from tests.gateway.member import PATIENCE_S, Member

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from gateway.server import RunningGateway
    from gateway.settings import Settings
    from persistence.embedded_redis import RedisServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

UPGRADE = (
    b"GET /app/app-key?protocol=7 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"Sec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture(scope="module")
def apps() -> Apps:
    return Apps([APP])


@pytest.fixture
def ordinary_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the calls that went the ordinary way."""
    paths = []
    answer = PusherApi.__call__

    async def counted(self: PusherApi, scope: Scope, receive: Receive, send: Send) -> None:
        paths.append(scope["path"])
        await answer(self, scope, receive, send)

    monkeypatch.setattr(PusherApi, "__call__", counted)
    return paths


@pytest_asyncio.fixture(loop_scope="module")
async def caller(gateway: RunningGateway) -> AsyncIterator[Caller]:
    async with Caller(gateway) as caller:
        yield caller


@pytest_asyncio.fixture(loop_scope="module")
async def listener(gateway: RunningGateway) -> AsyncIterator[Member]:
    async with Member.connected(gateway, APP) as member:
        yield member


@pytest.fixture
def channel() -> str:
    return f"news-{secrets.token_hex(4)}"


async def test_a_plain_call_never_meets_the_asgi_application(
    caller: Caller, listener: Member, channel: str, ordinary_calls: list[str]
) -> None:
    await listener.subscribe(channel)

    caller.writer.write(caller.call(channel))

    assert (await caller.answer())[::2] == (200, b"{}")
    assert (await listener.next())["data"] == "hello"
    assert not ordinary_calls


async def test_a_plain_batch_takes_the_same_way(
    caller: Caller, listener: Member, channel: str, ordinary_calls: list[str]
) -> None:
    await listener.subscribe(channel)
    batch = [{"name": "e", "data": str(number), "channel": channel} for number in range(10)]

    body = json.dumps({"batch": batch}).encode()
    caller.writer.write(caller.call("", address="batch_events", body=body))

    assert (await caller.answer())[::2] == (200, b"{}")
    received = [(await listener.next())["data"] for _ in batch]
    assert received == [str(number) for number in range(10)]
    assert not ordinary_calls


@pytest.mark.parametrize(
    ("batch", "status"),
    [
        ([], 400),
        ([{"name": "e", "data": "", "channel": "c"}] * 11, 400),
        ([{"name": "e", "data": "", "channel": "c"}, {"name": "e", "data": ""}], 400),
        ([{"name": "e", "data": "", "channel": "no such name!"}], 400),
        ([{"name": "e", "data": "", "channel": "c", "info": "subscription_count"}], 200),
    ],
)
async def test_a_batch_that_is_not_plain_goes_the_ordinary_way(
    caller: Caller, ordinary_calls: list[str], batch: list[dict[str, str]], status: int
) -> None:
    body = json.dumps({"batch": batch}).encode()

    caller.writer.write(caller.call("", address="batch_events", body=body))

    assert (await caller.answer())[0] == status
    assert len(ordinary_calls) == 1


async def test_both_ways_write_the_same_answer(caller: Caller, channel: str) -> None:
    caller.writer.write(caller.call(channel))
    plain = await caller.answer()
    caller.writer.write(caller.call(channel, chunked=True))

    assert await caller.answer() == plain


def event(**changes: Any) -> bytes:
    return json.dumps({"name": "e", "channel": "c", "data": ""} | changes).encode()


@pytest.mark.parametrize(
    "body",
    [
        event(),
        event(unknown=1),
        event(name=""),
        event(name="e" * 200),
        event(name="e" * 201),
        event(name="pusher:e"),
        event(name=None),
        event(data={"a": 1}),
        event(data="x" * 10_240),
        event(data="x" * 10_241),
        event(data="ä" * 5_121),
        event(channel="c" * 201),
        event(channel=""),
        event(channel="#server-to-user-u"),
        event(channels=[]),
        event(channels=["c", "c"]),
        event(channels=["c"] * 101),
        event(channels=["private-encrypted-a", "c"]),
        event(channels="c"),
        event(socket_id="1.2"),
        event(socket_id="1.2:x"),
        event(info="subscription_count"),
        event(info="nothing"),
        b"",
        b"null",
        b"\xef\xbb\xbf" + event(),
        event() + b"x",
        event()[:-1] + b',"name":"f"}',
        event()[:-1] + b',"x":NaN}',
        event()[:-1] + b',"x":' + b"[" * 1_100 + b"]" * 1_100 + b"}",
        event(data="\ud83d"),
        b'{"name":"e","channel":"c","data":"\xff"}',
    ],
    ids=lambda body: repr(body[:60]),
)
async def test_both_ways_answer_and_deliver_the_same(
    caller: Caller, listener: Member, channel: str, body: bytes
) -> None:
    body = body.replace(b'"c"', json.dumps(channel).encode())
    await listener.subscribe(channel)
    seen = []
    # Without Connection it asks for nothing, but the call is not plain any more.
    for head in ("", "Upgrade: none\r\n"):
        caller.writer.write(caller.call("", body=body, head=head))
        answer = await caller.answer()
        caller.writer.write(caller.call(channel, "the end"))
        assert (await caller.answer())[0] == 200
        heard = []
        while (message := await listener.next())["data"] != "the end":
            heard.append(message)
        seen.append((answer, heard))

    assert seen[0] == seen[1]


async def test_calls_sent_at_once_are_answered_and_delivered_in_their_order(
    caller: Caller, listener: Member, channel: str
) -> None:
    await listener.subscribe(channel)

    # Every third goes the ordinary way, every fifth is refused.
    calls = [
        caller.call(channel, str(number), chunked=number % 3 == 0)
        if number % 5
        else caller.call(channel, body=b"no event")
        for number in range(60)
    ]
    caller.writer.write(b"".join(calls))

    statuses = [(await caller.answer())[0] for _ in calls]
    assert statuses == [200 if number % 5 else 400 for number in range(60)]
    received = [(await listener.next())["data"] for _ in range(48)]
    assert received == [str(number) for number in range(60) if number % 5]


async def test_a_call_may_come_byte_by_byte(
    caller: Caller, listener: Member, channel: str, ordinary_calls: list[str]
) -> None:
    await listener.subscribe(channel)

    for byte in caller.call(channel):
        caller.writer.write(bytes((byte,)))
        await asyncio.sleep(0)

    assert (await caller.answer())[0] == 200
    assert (await listener.next())["data"] == "hello"
    assert not ordinary_calls


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ({"head": "Idempotency-Key: k\r\n"}, 200),
        ({"head": "Expect: 100-continue\r\n"}, 200),
        ({"chunked": True}, 200),
        ({"body": b'{"name":"e","data":"","channel":"c","info":"subscription_count"}'}, 200),
        ({"body": b'{"name":"e","data":"","channel":"no such name!"}'}, 400),
        ({"body": b'{"name":"pusher:e","data":"","channel":"c"}'}, 400),
        ({"body": b'{"name":"e","data":"%b","channel":"c"}' % (b"x" * 20_000)}, 413),
        ({"body": b"\xff"}, 400),
        ({"body": b"x" * 500_000}, 413),
    ],
)
async def test_what_is_not_plain_goes_the_ordinary_way(
    caller: Caller, ordinary_calls: list[str], what: dict[str, Any], status: int
) -> None:
    caller.writer.write(caller.call("c", **what))

    if "Expect" in what.get("head", ""):
        assert await caller.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert (await caller.answer())[0] == status
    assert len(ordinary_calls) == 1


ELSEWHERE = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize("chunked", [False, True])
async def test_who_asks_for_a_protocol_that_we_do_not_speak_is_answered_in_this_one(
    caller: Caller, listener: Member, channel: str, chunked: bool
) -> None:
    await listener.subscribe(channel)

    asking = [caller.call(channel, str(n), head=ELSEWHERE, chunked=chunked) for n in range(3)]
    caller.writer.write(b"".join(asking) + caller.call(channel, "3"))

    assert [(await caller.answer())[0] for _ in range(4)] == [200] * 4
    assert [(await listener.next())["data"] for _ in range(4)] == ["0", "1", "2", "3"]


async def test_who_asks_for_another_protocol_and_for_the_end_gets_both_answers(
    caller: Caller, channel: str
) -> None:
    ending = ELSEWHERE.replace("Upgrade,", "close, Upgrade,")
    caller.writer.write(caller.call(channel, head=ending))

    assert (await caller.answer())[0] == 200
    assert await caller.ended()


async def test_the_body_of_a_call_is_never_taken_for_another_call(caller: Caller) -> None:
    smuggled = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"

    call = caller.call("", body=smuggled, head=ELSEWHERE)
    head, _, body = call.partition(b"\r\n\r\n")
    caller.writer.write(head + b"\r\n\r\n")
    await caller.writer.drain()
    caller.writer.write(body + caller.call("", body=b"no event"))

    assert [(await caller.answer())[0] for _ in range(2)] == [400, 400]


async def test_this_is_no_proxy(caller: Caller) -> None:
    caller.writer.write(b"CONNECT elsewhere:80 HTTP/1.1\r\nHost: elsewhere:80\r\n\r\n")

    status, _, body = await caller.answer()
    assert (status, json.loads(body)["detail"]) == (400, "This server is no proxy.")
    assert await caller.ended()


async def test_who_goes_on_asking_for_another_protocol_is_cut_off(caller: Caller) -> None:
    caller.writer.write(caller.call("c", head=ELSEWHERE) * 3_000)

    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            assert b"400 Bad Request" in await caller.reader.read()


async def test_a_trailer_is_no_header(caller: Caller, channel: str) -> None:
    call = caller.call(channel, chunked=True).removesuffix(b"\r\n")
    # As a header it would be refused: it is too long.
    caller.writer.write(call + b"Idempotency-Key: " + b"k" * 200 + b"\r\n\r\n")

    assert (await caller.answer())[::2] == (200, b"{}")


async def test_trailers_without_end_are_cut_off(caller: Caller, channel: str) -> None:
    caller.writer.write(caller.call(channel, chunked=True).removesuffix(b"\r\n"))

    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            while not caller.reader.at_eof():
                caller.writer.write(b"X-Trailer: 1\r\n" * 100)
                await caller.writer.drain()
                # The loop's turn in which an end is heard.
                await asyncio.sleep(0)


async def test_a_forged_call_is_refused_and_publishes_nothing(
    caller: Caller, listener: Member, channel: str
) -> None:
    await listener.subscribe(channel)

    forged = caller.call(channel, "forged").replace(b"auth_signature=", b"auth_signature=0")
    caller.writer.write(forged + caller.call(channel, "real"))

    assert (await caller.answer())[0] == 401
    assert (await caller.answer())[0] == 200
    assert (await listener.next())["data"] == "real"


async def test_a_connection_that_wants_to_end_does(caller: Caller, channel: str) -> None:
    caller.writer.write(caller.call(channel, head="Connection: close\r\n"))

    status, head, _ = await caller.answer()
    assert status == 200
    assert b"connection: close" in head
    assert await caller.ended()


async def test_a_caller_that_leaves_before_the_answer_has_still_published(
    gateway: RunningGateway, listener: Member, channel: str, caplog: pytest.LogCaptureFixture
) -> None:
    await listener.subscribe(channel)

    async with Caller(gateway) as hasty:
        hasty.writer.write(hasty.call(channel))
        hasty.writer.transport.abort()

    async with Caller(gateway) as caller:
        caller.writer.write(caller.call(channel, "next"))
        assert (await caller.answer())[0] == 200
    received = (await listener.next())["data"]
    assert received in {"hello", "next"}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_publication_that_redis_never_answers_is_refused_in_time_and_counted(
    settings: Settings, apps: Apps, own_redis: RedisServer
) -> None:
    changed = {"redis_url": own_redis.url, "redis_timeout_s": 0.3, "drain_s": 0}
    async with (
        running_gateway(settings.model_copy(update=changed), apps) as gateway,
        Caller(gateway) as caller,
    ):
        caller.writer.write(caller.call("c"))
        assert (await caller.answer())[0] == 200
        own_redis.process.pause()
        try:
            caller.writer.write(caller.call("c") * 3)
            refused = [await caller.answer() for _ in range(3)]
        finally:
            own_redis.process.resume()
        metrics = gateway.parts.telemetry.exposition().decode()

    assert [status for status, _, _ in refused] == [503] * 3
    assert all(b"retry-after: 1" in head for _, head, _ in refused)
    assert 'duet_api_calls_total{status="200"} 1.0' in metrics
    assert 'duet_api_calls_total{status="503"} 3.0' in metrics
    assert "duet_publications_sent_total 1.0" in metrics


async def test_the_bound_of_a_body_is_the_same_on_both_ways(settings: Settings, apps: Apps) -> None:
    changed = {"max_body_bytes": 1_024, "drain_s": 0}
    async with (
        running_gateway(settings.model_copy(update=changed), apps) as gateway,
        Caller(gateway) as caller,
    ):
        caller.writer.write(
            caller.call("c", body=b'{"name":"e","channel":"c","data":""}'.ljust(1_024))
        )
        assert (await caller.answer())[0] == 200
        caller.writer.write(caller.call("c", "x" * 1_024))
        assert (await caller.answer())[0] == 413


async def test_a_stopping_gateway_answers_what_is_under_way_and_closes(
    settings: Settings, apps: Apps, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = asyncio.Event()
    begin_drain = Node.begin_drain

    def noticed(self: Node) -> None:
        begin_drain(self)
        stopping.set()

    monkeypatch.setattr(Node, "begin_drain", noticed)
    changed = {"redis_url": own_redis.url, "redis_timeout_s": 30, "drain_s": 0}
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S):
        gateway = await stack.enter_async_context(
            running_gateway(settings.model_copy(update=changed), apps)
        )
        async with Caller(gateway) as caller:
            caller.writer.write(caller.call("c"))
            assert (await caller.answer())[0] == 200
            own_redis.process.pause()
            try:
                caller.writer.write(caller.call("c"))
                # Answered behind the other one on purpose: it has been read when this has.
                async with Caller(gateway) as other:
                    other.writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                    await other.answer()
                stopped = asyncio.create_task(stack.aclose())
                await stopping.wait()
            finally:
                own_redis.process.resume()

            status, head, _ = await caller.answer()
            assert await caller.ended()
            await stopped

    assert status == 200
    assert b"connection: close" in head


async def test_a_plain_call_in_the_drain_is_answered_and_its_caller_told_to_go(
    settings: Settings, apps: Apps
) -> None:
    changed = settings.model_copy(update={"drain_s": 60})
    async with running_gateway(changed, apps) as gateway, Caller(gateway) as caller:
        caller.writer.write(caller.call("c"))
        _, before, _ = await caller.answer()
        gateway.parts.node.begin_drain(0)
        caller.writer.write(caller.call("c"))
        status, during, _ = await caller.answer()

        assert await caller.ended()

    assert b"connection: close" not in before
    assert status == 200
    assert b"connection: close" in during


async def test_who_goes_on_asking_without_waiting_for_answers_is_cut_off(
    gateway: RunningGateway,
) -> None:
    async with Caller(gateway) as patient, Caller(gateway) as flood:
        patient.writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 60)
        for _ in range(60):
            assert (await patient.reader.readuntil(b"ok\n")).startswith(b"HTTP/1.1 200 ")

        flood.writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2_000)
        async with asyncio.timeout(PATIENCE_S):
            answers = await flood.reader.read()

    assert b"HTTP/1.1 400 " in answers
    assert answers.count(b"HTTP/1.1 ") < 100


async def test_who_upgrades_behind_an_answer_that_he_does_not_read_is_a_slow_reader(
    settings: Settings, apps: Apps
) -> None:
    async def much(_request: Request) -> Response:
        return Response(b"x" * 32 * 1024 * 1024)

    async with (
        running_gateway(settings, apps, routes=[Route("/much", much)]) as gateway,
        Caller(gateway) as caller,
    ):
        caller.writer.write(b"GET /much HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            await caller.reader.readuntil(b"\r\n\r\n")
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        caller.writer.write(UPGRADE)

        await until(
            lambda: "duet_slow_aborts_total 1.0" in gateway.parts.telemetry.exposition().decode()
        )
        assert not gateway.parts.node.connections()


async def test_a_call_learns_that_its_caller_has_left_though_others_wait_behind_it(
    settings: Settings, apps: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def patient(request: Request) -> Response:
        asked.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left.set()
        return Response()

    async with (
        running_gateway(settings, apps, routes=[Route("/patient", patient)]) as gateway,
        Caller(gateway) as caller,
        asyncio.timeout(PATIENCE_S),
    ):
        asking = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"
        caller.writer.write(asking % b"patient" + asking % b"healthz")
        await asked.wait()
        caller.writer.transport.abort()

        await left.wait()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    "hosts",
    [b"", b"Host: a\r\nHost: b\r\n", b"Host: x\r\nhost: x\r\n", b"Host: a b\r\n", b"Host: a/b\r\n"],
    ids=["none", "two", "the same twice", "with a space", "with a path"],
)
@pytest.mark.parametrize("what", ["publication", "call", "upgrade"])
async def test_a_call_names_one_host(caller: Caller, hosts: bytes, what: str) -> None:
    calls = {
        "publication": caller.call("c"),
        "call": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        "upgrade": UPGRADE,
    }
    caller.writer.write(calls[what].replace(b"Host: x\r\n", hosts))

    status, _, body = await caller.answer()
    assert (status, json.loads(body)["detail"]) == (
        400,
        "A call names one host, in one Host field.",
    )
    assert await caller.ended()


@pytest.mark.parametrize("host", [b"", b"localhost:6001", b"[::1]:6001", b"my_service.local."])
async def test_a_host_may_be_any(caller: Caller, ordinary_calls: list[str], host: bytes) -> None:
    caller.writer.write(caller.call("c").replace(b"Host: x", b"Host: " + host))

    assert (await caller.answer())[0] == 200
    assert not ordinary_calls


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://x/healthz", 200),
        (b"http://x", 404),
        (b"HTTP://[::1]:6001", 404),
        (b"http://x?protocol=7", 404),
    ],
)
async def test_a_call_may_name_its_whole_url_be_it_without_a_path(
    caller: Caller, target: bytes, status: int
) -> None:
    for _ in range(2):
        caller.writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target)

        assert (await caller.answer())[0] == status


async def test_who_speaks_http_1_0_needs_no_host_and_gets_no_interim_answer(caller: Caller) -> None:
    call = caller.call("c", version="1.0", head="Expect: 100-continue\r\n")
    caller.writer.write(call.replace(b"Host: x\r\n", b""))

    assert (await caller.answer())[::2] == (200, b"{}")
    assert await caller.ended()


@pytest.mark.parametrize(
    "fields",
    [
        b"Connection: Upgrade\r\nConnection: keep-alive\r\n",
        b"Connection: keep-alive\r\nConnection: Upgrade\r\n",
        b"CONNECTION: keep-alive , UPGRADE\r\n",
    ],
)
async def test_the_wish_to_upgrade_may_stand_in_any_connection_field(
    caller: Caller, fields: bytes
) -> None:
    caller.writer.write(UPGRADE.replace(b"Connection: Upgrade\r\n", fields))

    async with asyncio.timeout(PATIENCE_S):
        assert (await caller.reader.readline()).startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_refusal_arrives_though_the_body_that_was_too_long_still_comes(
    caller: Caller, version: str
) -> None:
    call = caller.call("c", body=b"x" * 3_000_000, version=version, head="Connection: close\r\n")
    caller.writer.write(call + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        await caller.writer.drain()

    assert (await caller.answer())[0] == 413
    assert await caller.ended()


async def test_a_fault_of_ours_while_a_call_is_read_is_logged_and_told_as_one(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("gateway.http_protocol.plain_publications", broken)
    caller.writer.write(caller.call("c"))

    status, _, body = await caller.answer()
    assert (status, json.loads(body)["code"]) == (500, "internal")
    assert await caller.ended()
    assert "call_not_read" in capsys.readouterr().out


async def test_the_head_of_whatever_can_be_got_may_be_asked_for_alone(caller: Caller) -> None:
    heads = []
    for method in ("GET", "HEAD"):
        target = caller.target(method, "/apps/1/channels/c")
        caller.writer.write(f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            heads.append(await caller.reader.readuntil(b"\r\n\r\n"))
        if method == "GET":
            await caller.reader.readexactly(len(b'{"occupied":false}'))
    caller.writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")

    assert heads[0] == heads[1]
    assert (await caller.answer())[::2] == (200, b"ok\n")
