"""A backend of an app that signs its calls of the Pusher HTTP API by hand."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from gateway.auth import hmac_hex

if TYPE_CHECKING:
    import httpx

    from gateway.apps import App
    from gateway.server import RunningGateway


class Backend:
    """A backend of one app, which signs what it asks."""

    def __init__(self, http: httpx.AsyncClient, gateway: RunningGateway, app: App) -> None:
        self._http = http
        self._gateway = gateway
        self.app = app

    async def ask(
        self,
        method: str,
        address: str,
        body: bytes = b"",
        *,
        headers: dict[str, str] | None = None,
        secret: str | None = None,
        sent_to: str | None = None,
        **query: str,
    ) -> httpx.Response:
        """Asks for an address below the app's, or for a whole path.

        Args:
            sent_to: Where the call goes, when that is not the path that is signed.
        """
        path = address if address.startswith("/") else f"/apps/{self.app.id}/{address}"
        now = int(self._gateway.parts.clock.now().timestamp())
        given = {
            "auth_key": self.app.key,
            "auth_timestamp": str(now),
            "auth_version": "1.0",
            **query,
        }
        if body:
            given["body_md5"] = hashlib.md5(body).hexdigest()
        text = "&".join(f"{key}={given[key]}" for key in sorted(given))
        signed = hmac_hex(secret or self.app.secret, f"{method}\n{path}\n{text}".encode())
        return await self._http.request(
            method,
            f"{sent_to or path}?{urlencode(given | {'auth_signature': signed})}",
            content=body,
            headers=headers,
        )

    async def get(self, address: str, **query: Any) -> httpx.Response:
        return await self.ask("GET", address, **query)

    async def post(
        self, address: str, document: object, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        return await self.ask("POST", address, json.dumps(document).encode(), headers=headers)
