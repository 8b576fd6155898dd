"""Who may connect: the upgrade request's path, query and headers against apps and settings. Pure.

Source: docs/pusher-compatibility.md 1.1 (versions), 1.9 (codes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from gateway.errors import CloseCode

if TYPE_CHECKING:
    from gateway.apps import App, Apps

# Pusher's own client libraries still speak 5 (Java), 6 (Python) and 7 (all others).
SUPPORTED: Final = frozenset({5, 6, 7})
_QUERY_FIELDS_MAX: Final = 64
_BEARER: Final = "bearer "


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that may become a connection of `app`, if `token` (a JWT) holds.

    Attributes:
        token: None for an app that does not carry the invitations: its users are its own.
    """

    app: App
    token: str | None


def admit(  # noqa: PLR0911  one return for each close code
    target: str,
    origin: str | None,
    authorization: str | None,
    apps: Apps,
    *,
    path_prefix: str,
    strict: bool,
    secure: bool,
) -> Admission | CloseCode:
    """Judges an upgrade request.

    Args:
        target: The request target: path and query.
        origin: The `Origin` header.
        authorization: The `Authorization` header.
        apps: All apps.
        path_prefix: What stands before `/app/` in the path.
        strict: Whether a missing `protocol` is refused instead of taken as 7.
        secure: Whether the client speaks TLS, see `is_secure`.
    """
    path, _, query = target.partition("?")
    prefix = f"{path_prefix}/app/"
    if not path.startswith(prefix):
        return CloseCode.PATH_NOT_FOUND
    fields = _fields(query)
    if fields is None:
        return CloseCode.PATH_NOT_FOUND
    app = apps.by_key(unquote(path.removeprefix(prefix)))
    if app is None:
        return CloseCode.UNKNOWN_APP
    refused = _version_refused(fields.get("protocol", ""), strict)
    if refused is not None:
        return refused
    if not app.enabled:
        return CloseCode.APP_DISABLED
    if app.tls_only and not secure:
        return CloseCode.TLS_ONLY
    if app.origins and origin is not None and not origin_allowed(origin, app.origins):
        return CloseCode.UNAUTHORIZED
    if app is not apps.first:
        return Admission(app, None)
    return Admission(app, fields.get("token") or _bearer(authorization))


def _fields(query: str) -> dict[str, str] | None:
    """The parameters of a query, the last one of each name; None when they are too many."""
    if query.count("&") >= _QUERY_FIELDS_MAX:
        return None
    if "%" in query or "+" in query:
        return dict(parse_qsl(query, keep_blank_values=True))
    # Nothing is escaped in what the client libraries send: cutting it up is all there is to do.
    return {name: value for name, _, value in (one.partition("=") for one in query.split("&"))}


def is_secure(encrypted: bool, forwarded_proto: str | None) -> bool:
    """Whether a client speaks TLS, to this process or to the proxy in front of it.

    Args:
        encrypted: This process's own socket is.
        forwarded_proto: The `X-Forwarded-Proto` header. A client that forges it deceives itself.
    """
    first = (forwarded_proto or "").partition(",")[0].strip().lower()
    return encrypted or first in {"https", "wss"}


def _version_refused(version: str, strict: bool) -> CloseCode | None:
    if not version:
        return CloseCode.NO_PROTOCOL if strict else None
    if not (version.isascii() and version.isdigit()):
        return CloseCode.BAD_PROTOCOL_VERSION
    # No version has more digits; int() of thousands of them would take long.
    if len(version) > 4 or int(version) not in SUPPORTED:
        return CloseCode.UNSUPPORTED_PROTOCOL
    return None


def _bearer(authorization: str | None) -> str | None:
    if authorization is None or not authorization.lower().startswith(_BEARER):
        return None
    return authorization[len(_BEARER) :].strip() or None


def origin_allowed(origin: str, allowed: tuple[str, ...]) -> bool:
    """Whether an `Origin` header's host is one of `allowed`.

    Args:
        origin: `https://host[:port]`, or `null`.
        allowed: `host`, `host:port`, or either with `*.` for its subdomains.
    """
    try:
        parts = urlsplit(origin.lower())
        host, port = parts.hostname, parts.port
    except ValueError:
        return False
    if host is None:
        return False
    names = {host, f"{host}:{port}"}
    for pattern in allowed:
        wanted = pattern.lower()
        if wanted in names:
            return True
        if wanted.startswith("*.") and any(name.endswith(wanted[1:]) for name in names):
            return True
    return False
