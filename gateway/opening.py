"""Opening a connection: whether it may be, whose token it carries, what its app is by then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.admission import Admission, admit, is_secure
from gateway.auth import AuthError
from gateway.errors import CloseCode, ErrorCode

if TYPE_CHECKING:
    from gateway.apps import App, Apps
    from gateway.auth import Identity
    from gateway.handshake import Opening
    from gateway.node import Node


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection is closed instead of opened."""

    code: CloseCode
    message: str | None = None


def admitted(node: Node, opening: Opening, *, encrypted: bool) -> Admission | CloseCode:
    """Judges a request to connect, by its apps' rules and by what the node does.

    Args:
        node: Where it came.
        opening: What it says.
        encrypted: The socket it came by is; see `is_secure`.
    """
    settings = node.settings
    admission = admit(
        opening.target,
        opening.origin,
        opening.authorization,
        node.apps,
        path_prefix=settings.path_prefix,
        strict=settings.strict_protocol,
        secure=is_secure(encrypted, opening.forwarded_proto),
    )
    if node.draining and isinstance(admission, Admission):
        return CloseCode.OVER_CAPACITY
    return admission


async def prove(node: Node, token: str) -> Identity | Refusal:
    """The user that a token proves, or how the connection is closed."""
    try:
        identity = await node.auth.identity_of(token, node.clock.now())
    except AuthError as error:
        # Keys that can't be fetched now say nothing against the token: come back later.
        temporary = error.code is not ErrorCode.UNAUTHENTICATED
        code = CloseCode.OVER_CAPACITY if temporary else CloseCode.UNAUTHORIZED
        return Refusal(code, error.message)
    return identity.acting_through(node.apps.first)


def app_now(apps: Apps, app: App) -> App | CloseCode:
    """What has become of an app that was found earlier, or how its sockets are closed."""
    now = apps.by_key(app.key)
    if now is None or now.id != app.id:
        return CloseCode.UNKNOWN_APP
    return now if now.enabled else CloseCode.APP_DISABLED
