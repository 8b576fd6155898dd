"""Connections to Redis that never block anyone: one parser each, supervised for ever.

`RedisLink` is one connection: an `asyncio.Protocol` around hiredis' parser. `Supervisor` keeps one
link standing, with growing, jittered pauses between attempts. `RedisCommands` runs commands over
one link: those of one loop turn leave in one write, answers come back in order, and nobody waits
longer than the timeout. There is no pool to run dry and no task per command.

Source: docs/decisions.md (measured), docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import hiredis
import structlog
from redis.asyncio.connection import SSLConnection, parse_url

from gateway.backoff import Backoff
from gateway.outage import Outage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


log = structlog.get_logger(__name__)

# What hiredis makes of an answer: bytes, int, None, list, or a ReplyError as a value.
Answer: TypeAlias = Any
Argument: TypeAlias = bytes | str | int

_RETRY_LEAST_S: Final = 0.05
_RETRY_MOST_S: Final = 2.0

# How a server begins its answer that could not save its data, and so refuses writes. It refuses a
# PING too, and carries publications all the same.
_CANT_SAVE: Final = "MISCONF "


def packed(*arguments: Argument) -> bytes:
    """One command as Redis reads it."""
    # The stub asks for a tuple of exactly one argument.
    command: bytes = hiredis.pack_command(arguments)  # type: ignore[arg-type]
    return command


# What some hosted servers don't answer: then there is nothing to go by.
_ROLE: Final = packed("ROLE")


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a Redis is and how to get in.

    Attributes:
        path: Of a unix socket; then host and port mean nothing.
        greeting: The packed commands that open a connection (AUTH, SELECT).
    """

    host: str
    port: int
    path: str | None
    tls: ssl.SSLContext | None
    greeting: tuple[bytes, ...]

    @classmethod
    def of(cls, url: str) -> RedisAddress:
        """The address that a `redis://`, `rediss://` or `unix://` URL means, as redis-py reads it.

        Raises:
            ValueError: It is no such URL.
        """
        # Untyped there: host, port, username, password, db, path, ssl_* options.
        parts: dict[str, Any] = dict(parse_url(url))
        greeting = []
        if parts.get("password") is not None:
            user = [parts["username"]] if parts.get("username") else []
            greeting.append(packed("AUTH", *user, parts["password"]))
        if parts.get("db"):
            greeting.append(packed("SELECT", parts["db"]))
        tls = _tls_context(parts) if parts.get("connection_class") is SSLConnection else None
        return cls(
            host=parts.get("host", "localhost"),
            port=parts.get("port", 6379),
            path=parts.get("path"),
            tls=tls,
            greeting=tuple(greeting),
        )


def _tls_context(parts: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(
        cafile=parts.get("ssl_ca_certs"), capath=parts.get("ssl_ca_path")
    )
    if parts.get("ssl_cert_reqs") == "none":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif str(parts.get("ssl_check_hostname", True)).lower() in {"false", "0", "no"}:
        context.check_hostname = False
    if parts.get("ssl_certfile"):
        context.load_cert_chain(parts["ssl_certfile"], parts.get("ssl_keyfile"))
    return context


class LinkRefused(Exception):
    """Redis won't have us, or is none that we want: wrong password, loading, a replica."""


class RedisLink(asyncio.Protocol):
    """One connection; hands every answer to `on_answer`, in order.

    Attributes:
        lost: Done when the connection has ended, whatever ended it.
    """

    __slots__ = ("_buffer", "_loop", "_on_answer", "_reader", "_transport", "lost")

    def __init__(self, on_answer: Callable[[Answer], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._on_answer = on_answer
        self._buffer: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def open(
        cls, address: RedisAddress, on_answer: Callable[[Answer], None], timeout_s: float
    ) -> RedisLink:
        """Connects and logs in.

        Raises:
            OSError, TimeoutError: It can't be reached.
            LinkRefused: It can, but won't have us.
        """
        loop = asyncio.get_running_loop()
        link = cls(on_answer)
        try:
            async with asyncio.timeout(timeout_s):
                if address.path is not None:
                    await loop.create_unix_connection(lambda: link, address.path)
                else:
                    await loop.create_connection(
                        lambda: link, address.host, address.port, ssl=address.tls
                    )
                await link._greet(address.greeting)
        except BaseException:
            link.abort()
            raise
        return link

    async def _greet(self, greeting: Sequence[bytes]) -> None:
        on_answer = self._on_answer
        # PING tells a server that still loads its data, which refuses it, from one that serves.
        # A replica would take publications, and carry them to nobody but its own listeners.
        for command in (*greeting, packed("PING"), _ROLE):
            answered: asyncio.Future[Answer] = self._loop.create_future()
            self._on_answer = answered.set_result
            self.send(command)
            await asyncio.wait([answered, self.lost], return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise ConnectionError("Redis closed the connection")
            answer = answered.result()
            refused = isinstance(answer, hiredis.ReplyError) and command is not _ROLE
            if refused and not str(answer).startswith(_CANT_SAVE):
                raise LinkRefused(str(answer))
            if isinstance(answer, list) and answer[:1] == [b"slave"]:
                raise LinkRefused("it is a replica, which takes no writes")
        self._on_answer = on_answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells whoever keeps the link."""
        del exc
        if not self.lost.done():
            self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Hands on every complete answer."""
        reader = self._reader
        reader.feed(data)
        try:
            # False is what hiredis returns when no answer is complete; RESP2 has no booleans.
            while (answer := reader.gets()) is not False:
                self._on_answer(answer)
        except hiredis.ProtocolError as error:
            log.error("redis_speaks_nonsense", error=str(error))  # noqa: TRY400
            self.abort()

    def send(self, command: bytes) -> None:
        """Queues packed commands; those of one loop turn leave in one write."""
        if not self._buffer:
            self._loop.call_soon(self._flush)
        self._buffer.append(command)

    def _flush(self) -> None:
        data = b"".join(self._buffer)
        self._buffer.clear()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def abort(self) -> None:
        """Ends the connection at once; `lost` follows."""
        if self._transport is not None:
            self._transport.abort()
        elif not self.lost.done():
            self.lost.set_result(None)


class Supervisor:
    """Keeps one link standing until it is stopped.

    Attributes:
        link: The link that stands, None while there is none.
    """

    __slots__ = (
        "_address",
        "_on_answer",
        "_on_down",
        "_on_up",
        "_outage",
        "_purpose",
        "_timeout_s",
        "first_try",
        "link",
    )

    def __init__(
        self,
        address: RedisAddress,
        purpose: str,
        timeout_s: float,
        on_answer: Callable[[Answer], None],
        on_up: Callable[[RedisLink], None],
        on_down: Callable[[], None],
    ) -> None:
        self._address = address
        self._purpose = purpose
        self._timeout_s = timeout_s
        self._on_answer = on_answer
        self._on_up = on_up
        self._on_down = on_down
        self._outage = Outage(
            log.bind(purpose=purpose), "redis_unreachable", "redis_reachable_again"
        )
        self.link: RedisLink | None = None
        # Set after the first attempt, well or not.
        self.first_try = asyncio.Event()

    async def run(self) -> None:
        """Connects, waits for the end, connects again; ends only by being cancelled."""
        backoff = Backoff(_RETRY_LEAST_S, _RETRY_MOST_S)
        now = asyncio.get_running_loop().time
        try:
            while True:
                if await self._connect():
                    stands_since = now()
                    await self._until_lost()
                    # A link that is refused what it is for ends as soon as it stands.
                    if now() - stands_since >= _RETRY_MOST_S:
                        backoff.begin_again()
                self.first_try.set()
                await backoff.pause()
        finally:
            if self.link is not None:
                self.link.abort()
                self._forget()

    async def _connect(self) -> bool:
        now = asyncio.get_running_loop().time
        try:
            link = await RedisLink.open(self._address, self._on_answer, self._timeout_s)
        except (OSError, TimeoutError, LinkRefused) as error:
            self._outage.failed(now(), error if str(error) else TimeoutError("timeout"))
            return False
        self._outage.worked(now())
        self.link = link
        log.info("redis_connected", purpose=self._purpose)
        self._on_up(link)
        self.first_try.set()
        return True

    async def _until_lost(self) -> None:
        assert self.link is not None  # noqa: S101  set by _connect
        await self.link.lost
        log.warning("redis_lost", purpose=self._purpose)
        self._forget()

    def _forget(self) -> None:
        self.link = None
        self._on_down()

    def abort(self) -> None:
        """Ends the link that stands; a new one is made."""
        if self.link is not None:
            self.link.abort()
