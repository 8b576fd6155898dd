"""The demo page's HTTP routes: its files, and `/demo/config` with its users and their tokens.

Only `duet demo` has them: the tokens are signed with a secret that everybody knows.
"""

from __future__ import annotations

import secrets
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import jwt
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route

from gateway.errors import ErrorCode
from gateway.parts import parts_of
from gateway.problem import refusal
from gateway.settings import DEMO_JWT_SECRET
from gateway.wiring import StartError
from persistence.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime

    from starlette.requests import Request
    from starlette.responses import Response

    from gateway.parts import Parts
    from gateway.settings import Settings

# In a clone the page lies beside the packages; installed, it lies inside this one.
_PAGE_DIRECTORIES: Final = (
    Path(__file__).parent.parent / "static" / "demo",
    Path(__file__).parent / "_demo",
)
# Not the machine's own table of types: some know no type for .js, and modules need the right one.
_MEDIA_TYPES: Final = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_TOKEN_TTL: Final = timedelta(days=1)


class DemoUser(NamedTuple):
    """Somebody whose part is played in the demo."""

    id: str
    name: str
    role: str

    def token(self, now: datetime) -> str:
        """A JWT as the platform's own login would issue it, valid for a day."""
        return jwt.encode(
            {
                "sub": self.id,
                "role": self.role,
                "client_id": "duet-demo",
                "iat": now,
                "exp": now + _TOKEN_TTL,
            },
            DEMO_JWT_SECRET,
            algorithm="HS256",
        )


STREAMER: Final = DemoUser("nova", "Nova", "streamer")
VIEWERS: Final = (DemoUser("alice", "Alice", "viewer"), DemoUser("bruno", "Bruno", "viewer"))


def page_routes(settings: Settings) -> list[Route]:
    """The page's files at `/`, one route for each, and its configuration.

    Raises:
        StartError: The files are not there.
    """
    directory = next((path for path in _PAGE_DIRECTORIES if path.is_dir()), None)
    if directory is None:
        raise StartError("the demo page's files are missing from this installation")
    files = sorted(path for path in directory.iterdir() if path.suffix in _MEDIA_TYPES)
    return [
        Route("/", _file(directory / "index.html"), methods=["GET"]),
        *(Route(f"/{path.name}", _file(path), methods=["GET"]) for path in files),
        Route("/demo/config", _config(settings, secrets.token_hex(8)), methods=["GET"]),
    ]


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def send(_request: Request) -> Response:
        return FileResponse(path, headers=_HEADERS, media_type=_MEDIA_TYPES[path.suffix])

    return send


def _config(settings: Settings, run: str) -> Callable[[Request], Awaitable[Response]]:
    """`run` names this run of the demo: what a tab kept of an earlier one is not for it."""

    async def send(request: Request) -> Response:
        parts = parts_of(request.scope)
        now = parts.clock.now()
        try:
            session_id = await _live_session_id(parts, STREAMER.id)
        except StoreUnavailable:
            return refusal(ErrorCode.UNAVAILABLE)
        body: dict[str, Any] = {
            "app_key": parts.apps.first.key,
            "ws_path": f"/app/{parts.apps.first.key}",
            "run": run,
            "session_id": session_id,
            "timing": {
                "invitation_ttl_s": settings.invitation_ttl_s,
                "refund_delay_s": settings.refund_delay_s,
                "show_grace_s": settings.show_grace_s,
            },
            "users": [
                {"id": user.id, "name": user.name, "role": user.role, "token": user.token(now)}
                for user in (STREAMER, *VIEWERS)
            ],
        }
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    return send


async def _live_session_id(parts: Parts, streamer_id: str) -> str | None:
    """The Session in which the streamer is live; on a platform, its own pages know it.

    Raises:
        StoreUnavailable: MongoDB did not answer in time.
    """
    async with parts.store.reading():
        row = await parts.store.sessions.find_one({"user.id": streamer_id, "active": True})
    return None if row is None else str(row["_id"])
