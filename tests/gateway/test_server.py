from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
from typing import TYPE_CHECKING

import httpx
import pytest
from websockets.asyncio.client import connect

from gateway.app import GatewayApp
from gateway.broker import Publication
from gateway.frames import push_body
from gateway.server import calm_collector, listen, running_gateway, server_config
from gateway.wiring import StartError
from tests.gateway.fallback_client import FallbackClient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.apps import Apps
    from gateway.settings import Settings


@pytest.fixture
def taken_port() -> Iterator[int]:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listened a moment ago."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return listener.getsockname()[1]


def test_a_taken_port_is_told_in_one_line(taken_port: int) -> None:
    with pytest.raises(StartError) as caught:
        listen("127.0.0.1", taken_port)

    assert str(caught.value).startswith(f"port {taken_port} on 127.0.0.1 is taken")


def test_an_address_of_another_machine_is_told_in_one_line() -> None:
    with pytest.raises(StartError, match="DUET_HOST is no address of this machine"):
        listen("192.0.2.1", 0)


def test_a_certificate_that_is_none_is_told_in_one_line(
    settings: Settings, apps: Apps, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("tls") / "cert.pem"
    file.write_text("no certificate")

    with pytest.raises(StartError, match=r"^DUET_TLS_CERT, DUET_TLS_KEY: "):
        server_config(
            settings.model_copy(update={"tls_cert": file, "tls_key": file}),
            GatewayApp(settings, apps),
        )


async def test_a_gateway_knows_the_port_that_it_was_given(settings: Settings, apps: Apps) -> None:
    async with running_gateway(settings, apps) as gateway:
        assert gateway.port != 0
        assert str(gateway.port) in gateway.parts.settings.node_name
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{gateway.url}/healthz")).status_code == 200

    with contextlib.closing(listen("127.0.0.1", gateway.port)):
        # It has let go of its port.
        pass


async def test_a_stopping_gateway_sends_its_sockets_elsewhere_and_ends(
    settings: Settings, apps: Apps
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(running_gateway(settings, apps))
        client = await connect(f"{gateway.ws_url}/app/{apps.first.key}?protocol=7")
        assert json.loads(await client.recv())["event"] == "pusher:connection_established"

        closed = asyncio.ensure_future(client.wait_closed())
        async with asyncio.timeout(10):
            await stack.aclose()
            await closed

    assert client.close_code == 4200


@pytest.mark.pusher("1.10", "a stopping node sends its sessions elsewhere (4200)")
async def test_a_stopping_gateway_sends_its_connections_over_http_elsewhere_and_ends(
    settings: Settings, apps: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(running_gateway(settings, apps))
        async with (
            FallbackClient(gateway.port, streams=True) as reader,
            FallbackClient(gateway.port, streams=True) as stalled,
        ):
            await reader.connect()
            await stalled.connect()
            await stalled.subscribed("news")
            big = Publication("1", "news", push_body("e", "news", "x" * 10_000))
            for _ in range(60):
                await gateway.parts.node.publish([big])

            stopping = asyncio.create_task(stack.aclose())

            assert (await reader.closed())[1][0] == 4200
            async with asyncio.timeout(10):
                await stopping
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_call_in_flight_is_answered_before_the_end(settings: Settings, apps: Apps) -> None:
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(10):
        gateway = await stack.enter_async_context(running_gateway(settings, apps))
        idle, idle_writer = await asyncio.open_connection(gateway.host, gateway.port)
        idle_writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        await idle.readuntil(b"ok\n")
        busy, busy_writer = await asyncio.open_connection(gateway.host, gateway.port)
        busy_writer.write(
            f"POST /apps/{apps.first.id}/events HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert await busy.readline() == b"HTTP/1.1 100 Continue\r\n"

        stopping = asyncio.ensure_future(stack.aclose())
        assert await idle.read() == b""
        busy_writer.write(b"{}")
        answer = await busy.read()
        await stopping

    assert b"HTTP/1.1 401 " in answer
    assert b"connection: close" in answer.lower()
    for writer in (idle_writer, busy_writer):
        writer.close()


async def test_without_an_answer_from_mongodb_it_does_not_start_and_says_so(
    settings: Settings, apps: Apps, taken_port: int
) -> None:
    # Accepted and never answered.
    lost = settings.model_copy(
        update={"mongodb_url": f"mongodb://127.0.0.1:{taken_port}", "command_timeout_s": 0.05}
    )

    with pytest.raises(StartError) as caught:
        async with running_gateway(lost, apps):
            pytest.fail("it runs without a database")

    assert str(caught.value).startswith("DUET_MONGODB_URL: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"mongodb_url": None}, "DUET_MONGODB_URL"),
        ({"redis_url": None}, "DUET_REDIS_URL"),
        ({"redis_url": "http://127.0.0.1"}, "DUET_REDIS_URL"),
        ({"jwt_secret": None}, "DUET_JWT_SECRET"),
    ],
)
async def test_what_is_missing_is_named(
    settings: Settings, apps: Apps, changes: dict[str, str | None], name: str
) -> None:
    with pytest.raises(StartError, match=name):
        async with running_gateway(settings.model_copy(update=changes), apps):
            pytest.fail("it runs without")


async def test_without_redis_it_runs_and_commits_but_is_not_ready(
    settings: Settings, apps: Apps, free_port: int
) -> None:
    alone = settings.model_copy(
        update={"redis_url": f"redis://127.0.0.1:{free_port}", "redis_timeout_s": 0.1}
    )

    async with (
        running_gateway(alone, apps) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=10) as client,
    ):
        ready = await client.get("/readyz")
        alive = await client.get("/healthz")

    assert ready.status_code == 503
    assert ready.json()["redis"] == "unreachable"
    assert ready.json()["mongodb"] == "ok"
    assert alive.status_code == 200


@pytest.fixture
def pythons_collector() -> Iterator[None]:
    """Python's own collector again, whatever the test has made of it."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.usefixtures("pythons_collector")
def test_the_collector_leaves_alone_what_was_there_when_the_work_began() -> None:
    kept: list[object] = [[]]

    calm_collector()

    assert not any(found is kept for found in gc.get_objects())
    assert gc.get_threshold()[0] == 10_000
