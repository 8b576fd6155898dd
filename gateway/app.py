"""The ASGI application: what answers which path, and what is started before and stopped after.

The Pusher HTTP API is dispatched first and past the middleware, since nearly every publication
comes that way. WebSockets don't come here at all: uvicorn hands them to `gateway.socket`.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Final

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from gateway import channel_auth, probes, rest
from gateway.errors import CommandError, ErrorCode
from gateway.fallback import Fallback
from gateway.problem import problem
from gateway.pusher_api import PusherApi
from gateway.reload import AppsReload
from gateway.wiring import StartError, open_parts
from gateway.worker_metrics import WorkerMetrics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

    from gateway.apps import App, Apps
    from gateway.parts import Parts
    from gateway.settings import Settings
    from persistence.clock import Clock

__all__ = ["GatewayApp", "StartError"]

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_CODES: Final = {404: ErrorCode.NOT_FOUND, 405: ErrorCode.METHOD_NOT_ALLOWED}


class GatewayApp:
    """The gateway as uvicorn runs it.

    Attributes:
        fault: Why it could not be started, once that is known.
    """

    def __init__(
        self,
        settings: Settings,
        apps: Apps,
        clock: Clock | None = None,
        routes: Sequence[BaseRoute] = (),
        *,
        reloads: bool = False,
        worker: tuple[Path, int] | None = None,
    ) -> None:
        """Built, not yet started.

        Args:
            settings: As `open_parts`.
            apps: As `open_parts`.
            clock: As `open_parts`.
            routes: Further HTTP routes, such as the demo page's.
            reloads: Whether SIGHUP makes it read the apps' file again.
            worker: Of several workers, where they tell each other their metrics, and which
                this one is.
        """
        self._settings = settings
        self._routes = routes
        self._reloads = reloads
        self._worker = worker
        self._apps = apps
        self._clock = clock
        self._parts: Parts | None = None
        self.fault: StartError | None = None
        self._api = PusherApi(settings.path_prefix)
        self._fallback = Fallback(settings.path_prefix)
        self._web = self._browser_facing()

    @property
    def parts(self) -> Parts:
        """What the running application consists of.

        Raises:
            StartError: It does not run.
        """
        if self._parts is None:
            raise self.fault or StartError("the gateway is not running")
        return self._parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP call, or lives through the process's life."""
        if scope["type"] == "http":
            await self._answering(scope["path"])(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(scope, receive, send)

    def _answering(self, path: str) -> ASGIApp:
        if path.startswith(self._api.roots):
            return self._api
        return self._fallback if path.startswith(self._fallback.root) else self._web

    def _browser_facing(self) -> CORSMiddleware:
        return _browser_facing(self._settings.path_prefix, self._apps.first, self._routes)

    def apps_reload(self) -> AppsReload:
        """What brings the apps of the running gateway up to date with their file."""

        def done() -> None:
            # Which origins may call is the first app's to say.
            self._web = self._browser_facing()

        return AppsReload(self._settings, self._apps, self.parts.node, done)

    def begin_drain(self) -> float:
        """Begins to send the connections elsewhere; returns how long that may take, in seconds."""
        if self._parts is None:
            return 0.0
        self._parts.node.begin_drain()
        return self._settings.drain_s

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        async with contextlib.AsyncExitStack() as stack:
            try:
                parts = await open_parts(stack, self._settings, self._apps, self._clock)
            except StartError as error:
                self.fault = error
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            self._fallback.join(parts.node)
            self._parts = parts
            if self._reloads:
                self.apps_reload().on_hangup()
            scope["state"].update(parts=parts, node=parts.node)
            if self._worker is not None:
                metrics = WorkerMetrics(*self._worker, parts.telemetry)
                scope["state"]["metrics"] = await stack.enter_async_context(metrics)
            await send({"type": "lifespan.startup.complete"})
            log.info("gateway_started", node=parts.settings.node_name)
            await receive()
        self._parts = None
        log.info("gateway_stopped", node=parts.settings.node_name)
        await send({"type": "lifespan.shutdown.complete"})


def _browser_facing(prefix: str, first: App, routes: Sequence[BaseRoute]) -> CORSMiddleware:
    """The routes that browsers call from pages of other origins, with bearer tokens, no cookies."""
    web = Starlette(
        routes=[
            *probes.routes(prefix),
            *rest.routes(prefix),
            *channel_auth.routes(prefix),
            *routes,
        ],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )
    web.router.redirect_slashes = False
    return CORSMiddleware(
        web,
        allow_origins=() if first.origins else ("*",),
        allow_origin_regex=origins_pattern(first.origins) if first.origins else None,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("Retry-After",),
    )


def origins_pattern(origins: Sequence[str]) -> str:
    """A pattern for `Origin` headers of the hosts that an app allows; `*.` covers subdomains.

    A host without a port is allowed on every port.
    """
    hosts = []
    for origin in origins:
        host, _, port = origin.removeprefix("*.").partition(":")
        subdomains = r"([A-Za-z0-9-]+\.)+" if origin.startswith("*.") else ""
        hosts.append(subdomains + re.escape(host) + (f":{port}" if port else r"(:\d+)?"))
    return rf"https?://({'|'.join(hosts)})"


async def _http_error(_request: Request, error: Exception) -> Response:
    """No route, or not by this method: a problem document like every other refusal."""
    if not isinstance(error, HTTPException):
        raise error
    code = _CODES.get(error.status_code, ErrorCode.MALFORMED)
    return problem(CommandError.of(code), headers=dict(error.headers or {}))


async def _internal_error(_request: Request, _error: Exception) -> Response:
    """A fault of ours; the server logs it with its traceback."""
    return problem(CommandError.of(ErrorCode.INTERNAL))
