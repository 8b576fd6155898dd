"""A caller of the HTTP side who sends bytes as they are, be it what no library would send."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Self
from urllib.parse import urlencode

from gateway.apps import App
from gateway.auth import hmac_hex
from tests.gateway.member import PATIENCE_S

if TYPE_CHECKING:
    from gateway.server import RunningGateway

APP = App(id="1", key="app-key", secret="app-s3cret")


class Caller:
    """One keep-alive connection that sends bytes as they are."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway = gateway

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(
            self._gateway.host, self._gateway.port
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def call(
        self,
        channel: str,
        data: str = "hello",
        *,
        head: str = "",
        body: bytes | None = None,
        chunked: bool = False,
        version: str = "1.1",
        address: str = "events",
    ) -> bytes:
        """A signed call of `POST /apps/1/{address}`."""
        event = {"name": "greeting", "channel": channel, "data": data}
        body = json.dumps(event).encode() if body is None else body
        target = self.target("POST", f"/apps/{APP.id}/{address}", body)
        if chunked:
            head += "Transfer-Encoding: chunked\r\n"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            head += f"Content-Length: {len(body)}\r\n"
        first = f"POST {target} HTTP/{version}\r\nHost: x\r\n{head}\r\n"
        return first.encode() + body

    def target(self, method: str, path: str, body: bytes = b"") -> str:
        """The path with the query that signs a call."""
        query = {
            "auth_key": APP.key,
            "auth_timestamp": str(int(self._gateway.parts.clock.now().timestamp())),
            "auth_version": "1.0",
            "body_md5": hashlib.md5(body).hexdigest(),
        }
        text = "&".join(f"{key}={query[key]}" for key in sorted(query))
        query["auth_signature"] = hmac_hex(APP.secret, f"{method}\n{path}\n{text}".encode())
        return f"{path}?{urlencode(query)}"

    async def answer(self) -> tuple[int, bytes, bytes]:
        """Status, head and body of the next answer."""
        async with asyncio.timeout(PATIENCE_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.partition(b":")[2])
                for line in head.split(b"\r\n")
                if line.startswith(b"content-length")
            )
            return int(head.split(b" ")[1]), head, await self.reader.readexactly(length)

    async def ended(self) -> bool:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read() == b""
