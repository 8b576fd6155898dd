"""Who has connected before the listener closed is answered, whenever he asks."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import ssl
from typing import TYPE_CHECKING, Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gateway.app import GatewayApp
from gateway.drain import something_waits
from gateway.server import GatewayServer, listen, server_config
from tests.gateway.harness import PATIENCE_S, RawClient, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gateway.apps import Apps
    from gateway.settings import Settings

CALL = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
UPGRADE = (
    b"GET /app/app-key?protocol=7 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"Sec-WebSocket-Version: 13\r\n\r\n"
)


def nothing() -> None:
    """What happens at most stops."""


class PromptServer(GatewayServer):
    """Begins to stop in the very turn of the loop in which a test has it do its last deed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        self.told: asyncio.Future[Callable[[], None]]
        deed = await self.told
        deed()


class Stopping:
    """A gateway that is stopped; leaving the block waits for its end.

    Attributes:
        ended: Set once the application is told to end: from there on nobody can be served.
    """

    def __init__(self, settings: Settings, apps: Apps) -> None:
        self._listener = listen("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self._app = GatewayApp(settings.model_copy(update={"port": self.port}), apps)
        self._server = PromptServer(server_config(settings, self._app))
        self.ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server.told = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(self._server.serve([self._listener]))
        await self._server.settled.wait()
        assert self._server.fault is None
        end = self._server.lifespan.shutdown

        async def noted() -> None:
            self.ended.set()
            await end()

        self._server.lifespan.shutdown = noted
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._server.told.done():
            self.stop()
        async with asyncio.timeout(PATIENCE_S):
            await self._serving

    def stop(self, deed: Callable[[], None] = nothing) -> None:
        """Stops it right behind the `deed`, before the loop looks at any socket again."""
        self._server.told.set_result(deed)

    async def drain(self, deed: Callable[[], None] = nothing) -> None:
        """Stops it as `stop` does, and waits until nobody can connect any more."""
        self.stop(deed)
        await until(self._refuses)

    def _refuses(self) -> bool:
        try:
            self.connected().close()
        except ConnectionError:
            return True
        return False

    def kinds(self) -> list[str]:
        """What the server takes its connections for, in order."""
        return sorted(type(one).__name__ for one in self._server.server_state.connections)

    def connected(self) -> socket.socket:
        """A connection that the kernel has accepted, and the gateway only when the loop turns."""
        return socket.create_connection(("127.0.0.1", self.port))

    async def caller(self) -> RawClient:
        """A connection that has sent nothing."""
        return RawClient(*await asyncio.open_connection("127.0.0.1", self.port))


async def client_of(connected: socket.socket) -> RawClient:
    return RawClient(*await asyncio.open_connection(sock=connected))


async def last_answer(client: RawClient) -> str:
    """All that still comes: the answer to a call, and the end of the connection."""
    async with asyncio.timeout(PATIENCE_S):
        answer = (await client.reader.read()).decode()
    client.writer.close()
    return answer


async def sent_elsewhere(client: RawClient) -> bool:
    """Whether an upgrade is answered, and its socket closed so that the client comes again."""
    async with asyncio.timeout(PATIENCE_S):
        head = await client.reader.readuntil(b"\r\n\r\n")
    _, closed = await client.refused()
    client.writer.close()
    return head.startswith(b"HTTP/1.1 101 ") and closed.code == 4100


def is_last(answer: str) -> bool:
    """Whether a call was carried out, and its caller told that the connection ends."""
    return answer.startswith("HTTP/1.1 200 ") and "\r\nconnection: close\r\n" in answer


@pytest.fixture
def at_once(settings: Settings) -> Settings:
    """No socket is left to itself for a time."""
    return settings.model_copy(update={"drain_s": 0})


async def test_who_waits_in_the_listeners_queue_is_answered(at_once: Settings, apps: Apps) -> None:
    callers: list[socket.socket] = []
    upgrades: list[socket.socket] = []
    silent: list[socket.socket] = []

    async with Stopping(at_once, apps) as gateway:

        def come() -> None:
            for _ in range(20):
                for who, words in ((callers, CALL), (upgrades, UPGRADE), (silent, b"")):
                    who.append(gateway.connected())
                    who[-1].sendall(words)

        await gateway.drain(come)

        answers = [await last_answer(await client_of(one)) for one in callers]
        elsewhere = [await sent_elsewhere(await client_of(one)) for one in upgrades]
        late = [await client_of(one) for one in silent]
        for client in late:
            client.writer.write(CALL)
        late_answers = [await last_answer(client) for client in late]

    assert all(map(is_last, answers))
    assert all(elsewhere)
    assert all(map(is_last, late_answers))


async def test_the_application_serves_until_the_last_newcomer_has_been_answered(
    at_once: Settings, apps: Apps
) -> None:
    async with Stopping(at_once, apps) as gateway:
        slow = await gateway.caller()
        member = await gateway.caller()
        member.writer.write(UPGRADE)
        await until(lambda: gateway.kinds() == ["Arrival", "GatewayProtocol"])

        gateway.stop()
        async with asyncio.timeout(PATIENCE_S):
            await member.reader.readuntil(b"4200")
        member.writer.close()
        await until(lambda: gateway.kinds() == ["Arrival"])

        assert not gateway.ended.is_set()
        slow.writer.write(UPGRADE)
        assert await sent_elsewhere(slow)


async def half_an_upgrade(gateway: Stopping, client: RawClient) -> None:
    """Sends the beginning of a handshake, and waits until the gateway has read it."""
    client.writer.write(UPGRADE[:40])
    await until(lambda: gateway.kinds() == ["HttpProtocol"])


async def test_a_handshake_of_which_half_has_come_is_finished(
    at_once: Settings, apps: Apps
) -> None:
    async with Stopping(at_once, apps) as gateway:
        client = await gateway.caller()
        await half_an_upgrade(gateway, client)

        await gateway.drain()
        client.writer.write(UPGRADE[40:])

        assert await sent_elsewhere(client)


async def test_a_handshake_that_begins_in_the_drain_may_come_in_parts_too(
    at_once: Settings, apps: Apps
) -> None:
    async with Stopping(at_once, apps) as gateway:
        client = await gateway.caller()
        await until(lambda: gateway.kinds() == ["Arrival"])

        await gateway.drain()
        await half_an_upgrade(gateway, client)
        client.writer.write(UPGRADE[40:])

        assert await sent_elsewhere(client)


async def test_an_idle_connections_next_call_is_answered_and_the_last(
    settings: Settings, apps: Apps
) -> None:
    async with Stopping(settings.model_copy(update={"drain_s": 60}), apps) as gateway:
        client = await gateway.caller()
        client.writer.write(CALL)
        await client.reader.readuntil(b"ok\n")

        await gateway.drain()
        client.writer.write(CALL)

        assert is_last(await last_answer(client))


@pytest.fixture
def impatient(at_once: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Newcomers have to ask soon."""
    for module in ("arrival", "http_connection"):
        monkeypatch.setattr(f"gateway.{module}.FIRST_WORDS_S", 0.05)
    return at_once


@pytest.mark.parametrize(
    "beginning", [b"", CALL[:10], UPGRADE[:40]], ids=["nothing", "half a call", "half a handshake"]
)
@pytest.mark.parametrize("late", [False, True], ids=["accepted", "in the queue"])
async def test_who_never_asks_is_told_to_come_again(
    impatient: Settings, apps: Apps, beginning: bytes, late: bool
) -> None:
    async with Stopping(impatient, apps) as gateway:
        comers: list[socket.socket] = []

        def come() -> None:
            comers.append(gateway.connected())
            comers[0].sendall(beginning)

        if late:
            gateway.stop(come)
            await until(lambda: comers)
        else:
            come()
            await until(lambda: gateway.kinds() == ["HttpProtocol" if beginning else "Arrival"])
            gateway.stop()
        answer = await last_answer(await client_of(comers[0]))

    assert answer.startswith("HTTP/1.1 408 ")
    assert "\r\nConnection: close\r\n" in answer


@pytest.mark.parametrize(
    "call",
    [
        b"POST /apps/1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
        b"POST /apps/1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
        b"POST /pusher/app/k/1/s/xhr_send HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    ],
    ids=["a plain publication", "another one", "messages"],
)
async def test_a_call_whose_body_never_comes_is_told_that_the_gateway_stops(
    impatient: Settings, apps: Apps, caplog: pytest.LogCaptureFixture, call: bytes
) -> None:
    async with Stopping(impatient, apps) as gateway:
        client = await gateway.caller()
        client.writer.write(call)
        await until(lambda: gateway.kinds() == ["HttpProtocol"])
        gateway.stop()
        answer = await last_answer(client)

    assert answer.startswith("HTTP/1.1 503 ")
    assert "\r\nretry-after: 1\r\n" in answer
    assert "\r\nconnection: close\r\n" in answer
    assert '"code":"unavailable"' in answer
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("calls_before", [0, 1], ids=["a newcomer", "an idle connection"])
async def test_a_call_that_has_come_at_the_last_moment_is_answered(
    impatient: Settings, apps: Apps, monkeypatch: pytest.MonkeyPatch, calls_before: int
) -> None:
    looked: list[int] = []

    async with Stopping(impatient, apps) as gateway:
        with contextlib.closing(gateway.connected()) as connected:
            client = await client_of(connected.dup())
            await until(lambda: gateway.kinds() == ["Arrival"])
            for _ in range(calls_before):
                client.writer.write(CALL)
                await client.reader.readuntil(b"ok\n")

            def at_the_last_moment(fd: int) -> bool:
                if not looked:
                    # It is in the kernel, unread, when the connection would be closed.
                    connected.sendall(CALL)
                looked.append(fd)
                return something_waits(fd)

            for module in ("arrival", "http_connection"):
                monkeypatch.setattr(f"gateway.{module}.something_waits", at_the_last_moment)
            gateway.stop()

            assert is_last(await last_answer(client))


@pytest.fixture
def over_tls(at_once: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = self_signed(folder)
    return at_once.model_copy(update={"tls_cert": certificate, "tls_key": key})


def self_signed(folder: Path) -> tuple[Path, Path]:
    """The files of a certificate for `localhost` and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(hours=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


async def test_who_has_not_finished_his_tls_handshake_is_answered_too(
    over_tls: Settings, apps: Apps
) -> None:
    trusting = ssl.create_default_context()
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE

    async with Stopping(over_tls, apps) as gateway:
        connected: list[socket.socket] = []
        await gateway.drain(lambda: connected.append(gateway.connected()))

        assert not gateway.ended.is_set()
        async with asyncio.timeout(PATIENCE_S):
            client = RawClient(
                *await asyncio.open_connection(
                    sock=connected[0], ssl=trusting, server_hostname="localhost"
                )
            )
        client.writer.write(CALL)

        assert is_last(await last_answer(client))
