"""The Pusher HTTP API: who calls what, whether the app's secret signed it, and how often.

`POST /apps/{id}/events` is the way in of nearly every publication, so it goes past Starlette's
routing and middleware, decodes once and encodes each channel's body once for the whole cluster.

Who has not proved to be an app learns nothing of any: an unknown key, an unknown app and a wrong
signature are one answer. An app that asks for another one's address is told that there is nothing.

Source: docs/pusher-compatibility.md 2.1, 2.2.
"""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import unquote

from gateway.api_call import Answer, ApiCall, refused
from gateway.api_channels import channel_info, channel_list, channel_stats, channel_users
from gateway.api_events import plain_batch, plain_event, publish, publish_batch, publish_to_channel
from gateway.api_users import terminate_connections
from gateway.parts import parts_of
from gateway.problem import BodyTooLargeError, DisconnectedError, read_body
from gateway.signing import SignedQuery, signed_paths

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from gateway.apps import App
    from gateway.broker import Publication
    from gateway.parts import Parts
    from gateway.signing import SignatureFault

    Handler = Callable[[ApiCall], Awaitable[Answer]]


class _Route(NamedTuple):
    """What answers one address: its method and its handler."""

    method: str
    handler: Handler


# The address below `/apps/{id}/`; its second segment is a name.
_ROUTES: Final[dict[str, _Route]] = {
    "events": _Route("POST", publish),
    "batch_events": _Route("POST", publish_batch),
    "channels": _Route("GET", channel_list),
    "channels/*": _Route("GET", channel_info),
    "channels/*/users": _Route("GET", channel_users),
    # Deprecated by Pusher, still called by old backends.
    "channels/*/stats": _Route("GET", channel_stats),
    "channels/*/events": _Route("POST", publish_to_channel),
    "users/*/terminate_connections": _Route("POST", terminate_connections),
}

_JSON: Final = (b"content-type", b"application/json")
_TEXT: Final = (b"content-type", b"text/plain; charset=utf-8")
_NO_NAMES: Final[tuple[str, ...]] = ()
KEY_HEADERS: Final = (b"idempotency-key", b"x-idempotency-key")

# What an answer says beside its body.
_Headers = list[tuple[bytes, bytes]]


class PusherApi:
    """The ASGI application below `/apps/`, and below `/users/` for one library.

    Attributes:
        roots: What the paths of its calls begin with.
    """

    def __init__(self, path_prefix: str) -> None:
        self._prefix = path_prefix
        self._apps = f"{path_prefix}/apps/"
        # pusher-http-python terminates a user's connections without saying of which app.
        self._users = f"{path_prefix}/users/"
        self.roots = (self._apps, self._users)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call, always with a content length."""
        parts = parts_of(scope)
        headers: _Headers = []
        try:
            answer = await self._answer(scope, receive, parts, headers)
        except BodyTooLargeError:
            answer = refused(413, f"the body is over {parts.settings.max_body_bytes} bytes")
        except DisconnectedError:
            return
        parts.telemetry.api_called(answer.status)
        await _send(answer, headers, send)

    async def _answer(
        self, scope: Scope, receive: Receive, parts: Parts, headers: _Headers
    ) -> Answer:
        path: str = scope["path"]
        app_id: str | None = None
        if path.startswith(self._apps):
            app_id, _, address = path.removeprefix(self._apps).partition("/")
        else:
            address = path.removeprefix(f"{self._prefix}/")
        route, arguments = _ROUTES.get(address), _NO_NAMES
        if route is None:
            route, arguments = self._named_route(scope, address, is_below_app=app_id is not None)
        if route is None:
            return refused(404, "there is nothing at this address")
        # Who may GET may have the HEAD of it: RFC 9110 section 9.1.
        if scope["method"] != route.method and (scope["method"], route.method) != ("HEAD", "GET"):
            headers.append((b"allow", route.method.encode()))
            return refused(405, f"this address takes {route.method}")
        body = await read_body(scope, receive, parts.settings.max_body_bytes)
        query = SignedQuery(scope["query_string"])
        app = parts.apps.by_key(query.auth_key or "")
        fault = self._unsigned(scope, query, app, body, parts)
        if fault is not None or app is None:
            return refused(401, fault.message if fault else "auth_key is missing")
        refusal = self._not_allowed(app, app_id, parts, headers)
        if refusal is not None:
            return refusal
        key = _idempotency_key(scope)
        return await route.handler(ApiCall(app, parts, arguments, query.parameters, body, key))

    def _unsigned(
        self, scope: Scope, query: SignedQuery, app: App | None, body: bytes, parts: Parts
    ) -> SignatureFault | None:
        return query.fault(
            app,
            scope["method"],
            signed_paths(
                (scope.get("raw_path") or b"").decode("latin-1"), scope["path"], self._prefix
            ),
            body,
            parts.clock.now().timestamp(),
            parts.settings.auth_timestamp_tolerance_s,
        )

    def _not_allowed(
        self, app: App, app_id: str | None, parts: Parts, headers: _Headers
    ) -> Answer | None:
        """Why an app that has proved to be itself gets no answer, else none."""
        if app_id is not None and app_id != app.id:
            # The same whether there is an app of that id.
            return refused(404, "the app that signed this call has another id")
        if not app.enabled:
            return refused(403, "this app is disabled")
        if app.api_rate_per_s and not _is_within_rate(app, parts, headers):
            return refused(429, f"this app may make {app.api_rate_per_s} calls a second")
        return None

    def _named_route(
        self, scope: Scope, address: str, *, is_below_app: bool
    ) -> tuple[_Route | None, tuple[str, ...]]:
        """The route of an address that names something, and the name.

        The raw path is split, so that a name may hold an escaped slash.
        """
        raw = (scope.get("raw_path") or b"").decode("latin-1")
        if raw.startswith(self._prefix):
            raw = raw.removeprefix(f"{self._prefix}/")
            segments = raw.split("/")[2 if is_below_app else 0 :]
        else:
            segments = address.split("/")
        if len(segments) < 2 or not segments[1]:
            return None, ()
        kind, name, *rest = segments
        if not is_below_app and rest != ["terminate_connections"]:
            return None, ()
        return _ROUTES.get("/".join([kind, "*", *rest])), (unquote(name),)


def _is_within_rate(app: App, parts: Parts, headers: _Headers) -> bool:
    """Counts a call of an app that has a limit, and tells the caller where it stands."""
    allowed, left = parts.rates.allow(app, parts.node.now())
    headers += [
        (b"x-ratelimit-limit", str(app.api_rate_per_s).encode()),
        (b"x-ratelimit-remaining", str(left).encode()),
    ]
    return allowed


def _idempotency_key(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name in KEY_HEADERS:
            return bytes(value).decode("latin-1")
    return None


def _headers_of(answer: Answer) -> _Headers:
    headers = [
        _JSON if answer.is_json else _TEXT,
        (b"content-length", str(len(answer.body)).encode()),
    ]
    if answer.status in {429, 503}:
        headers.append((b"retry-after", b"1"))
    return headers


async def _send(answer: Answer, extra: _Headers, send: Send) -> None:
    headers = _headers_of(answer) + extra
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


_PLAIN: Final = {"events": plain_event, "batch_events": plain_batch}


@cache
def written(answer: Answer, *, keep_alive: bool) -> bytes:
    """The bytes of an answer; for the few that are always the same."""
    status = HTTPStatus(answer.status)
    headers = _headers_of(answer)
    if not keep_alive:
        headers.append((b"connection", b"close"))
    lines = [b"HTTP/1.1 %d %b" % (status, status.phrase.encode())]
    lines += [b"%b: %b" % pair for pair in headers]
    return b"\r\n".join([*lines, b"", answer.body])


def plain_publications(
    parts: Parts, path: str, query: bytes, body: bytes
) -> list[Publication] | None:
    """What a call of `POST /apps/{id}/events` or `…/batch_events` publishes, if it is plain.

    None, when it asks for more or something is wrong with it, leaves it to `PusherApi`.
    """
    settings = parts.settings
    signed = SignedQuery(query)
    app = parts.apps.by_key(signed.auth_key or "")
    if app is None or not app.enabled or app.api_rate_per_s:
        return None
    of_app = f"{settings.path_prefix}/apps/{app.id}/"
    read = _PLAIN.get(path.removeprefix(of_app))
    if read is None or not path.startswith(of_app):
        return None
    fault = signed.fault(
        app,
        "POST",
        signed_paths(path, path, settings.path_prefix),
        body,
        parts.clock.now().timestamp(),
        settings.auth_timestamp_tolerance_s,
    )
    return None if fault is not None else read(app.id, body, settings)
