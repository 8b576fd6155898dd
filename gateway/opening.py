"""Opening a connection: whose token it carries, and what its app is by then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.auth import AuthError
from gateway.errors import CloseCode, ErrorCode

if TYPE_CHECKING:
    from gateway.apps import App, Apps
    from gateway.auth import Identity
    from gateway.node import Node


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection is closed instead of opened."""

    code: CloseCode
    message: str | None = None


async def prove(node: Node, token: str) -> Identity | Refusal:
    """The user that a token proves, or how the connection is closed."""
    try:
        return await node.auth.identity_of(token, node.clock.now())
    except AuthError as error:
        # Keys that can't be fetched now say nothing against the token: come back later.
        temporary = error.code is not ErrorCode.UNAUTHENTICATED
        code = CloseCode.OVER_CAPACITY if temporary else CloseCode.UNAUTHORIZED
        return Refusal(code, error.message)


def app_now(apps: Apps, app: App) -> App | CloseCode:
    """What has become of an app that was found earlier, or how its sockets are closed."""
    now = apps.by_key(app.key)
    if now is None or now.id != app.id:
        return CloseCode.UNKNOWN_APP
    return now if now.enabled else CloseCode.APP_DISABLED
