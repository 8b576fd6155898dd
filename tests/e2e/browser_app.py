"""An app in Chromium: an unmodified pusher-js in a page of another origin than the gateway's."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from tests.e2e.inbox import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.browser import Page
    from tests.e2e.gateway_process import Gateway

HERE = Path(__file__).parent
DIST = HERE / "node_modules" / "pusher-js" / "dist"

WEB = "/web/pusher.min.js"
WORKER = "/worker/pusher.worker.min.js"
_PAGE = f"""<!doctype html><link rel="icon" href="data:,">
<script src="{WEB}"></script><script src="/client.js"></script>
"""


class _Files(BaseHTTPRequestHandler):
    """The page, its script, and the builds of pusher-js as npm has installed them."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer("text/html", _PAGE.encode())
        elif path == "/client.js":
            self._answer("text/javascript", (HERE / "browser_client.js").read_bytes())
        elif path in {WEB, WORKER}:
            self._answer("text/javascript", (DIST / path.removeprefix("/")).read_bytes())
        else:
            self.send_error(404)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
        """Says nothing."""


@contextmanager
def page_server() -> Iterator[str]:
    """Serves the page on loopback; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class BrowserApp:
    """The app of one user in one tab."""

    def __init__(self, page: Page, gateway: Gateway, user_id: str, role: str) -> None:
        self.page = page
        self.gateway = gateway
        self.user_id = user_id
        self.role = role
        self._since = 0

    @property
    def own_channel(self) -> str:
        return f"private-user@{self.user_id}"

    async def connect(self, address: str, **options: Any) -> dict[str, Any]:
        """Opens the page and connects; options as those of `begin`."""
        await self.begin(address, **options)
        return await self.expect(kind="state", state="connected")

    async def begin(
        self,
        address: str,
        *,
        transports: list[str],
        worker: bool = False,
        key: str | None = None,
        ws_port: int | None = None,
    ) -> None:
        """Opens the page and begins to connect."""
        await self.page.open(address)
        if worker:
            await self.page.evaluate(f"startWorker({json.dumps(WORKER)})")
        await self.order(
            "connect",
            key=key or self.gateway.app_key,
            gateway=self.gateway.url,
            token=self.gateway.token(self.user_id, self.role),
            options={
                "wsHost": "127.0.0.1",
                "wsPort": ws_port or self.gateway.port,
                "httpHost": "127.0.0.1",
                "httpPort": self.gateway.port,
                "enabledTransports": transports,
            },
        )

    async def order(self, name: str, **arguments: Any) -> Any:
        return await self.page.evaluate(f"order({json.dumps(name)}, {json.dumps(arguments)})")

    async def expect(self, *, timeout_s: float = PATIENCE_S, **fields: Any) -> dict[str, Any]:
        """Waits for the next record with these fields; those before it are passed over."""
        found = await self.page.evaluate(
            f"expected({self._since}, {json.dumps(fields)}, {timeout_s * 1000})"
        )
        self._since = found["at"] + 1
        entry: dict[str, Any] = found["entry"]
        return entry

    async def subscribe(self, channel: str) -> dict[str, Any]:
        await self.order("subscribe", channel=channel)
        return await self.expect(
            kind="event", event="pusher:subscription_succeeded", channel=channel
        )
