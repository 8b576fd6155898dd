"""The Pusher HTTP API: backends publish with the app's signature.

`POST /apps/{id}/events` is the way in of nearly every publication, so it goes past Starlette's
routing and middleware, decodes once and encodes each channel's body once for the whole cluster.
Answers are what Pusher's own libraries expect: `{}` on success, one line of text otherwise.

Source: PROTOCOL 2.1, 2.2.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.channels import is_channel_name
from gateway.frames import encode_event
from gateway.broker import BrokerUnavailable, Publication
from gateway.parts import parts_of
from gateway.problem import BodyTooLargeError, DisconnectedError, read_body
from gateway.signing import SignedQuery, signed_paths

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from gateway.apps import App
    from gateway.parts import Parts
    from gateway.settings import Settings

MAX_CHANNELS: Final = 100

_SOCKET_ID: Final = re.compile(r"\d{1,20}\.\d{1,20}", re.ASCII)
_RESERVED: Final = ("pusher:", "pusher_internal:")


class Answer(msgspec.Struct, frozen=True):
    """A status and a body; text unless it is JSON."""

    status: int
    body: bytes
    is_json: bool = False


class Event(msgspec.Struct, frozen=True):
    """The body of `POST /apps/{id}/events`."""

    name: str
    data: str
    channels: list[str] | None = None
    channel: str | None = None
    socket_id: str | None = None
    info: str | None = None


_DECODER: Final = msgspec.json.Decoder(Event)
_ENCODER: Final = msgspec.json.Encoder()

_PUBLISHED: Final = Answer(200, b"{}", is_json=True)
_JSON: Final = (b"content-type", b"application/json")
_TEXT: Final = (b"content-type", b"text/plain; charset=utf-8")


def refused(status: int, why: str) -> Answer:
    """An answer that says in one line of text why not."""
    return Answer(status, f"{why}\n".encode())


class PusherApi:
    """The ASGI application below `/apps/`. Further routes of the API join at `_answer`."""

    def __init__(self, path_prefix: str) -> None:
        self._prefix = path_prefix
        self.root = f"{path_prefix}/apps/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one call, always with a content length."""
        parts = parts_of(scope)
        try:
            answer = await self._answer(scope, receive, parts)
        except BodyTooLargeError:
            answer = refused(413, f"the body is over {parts.settings.max_body_bytes} bytes")
        except DisconnectedError:
            return
        parts.telemetry.api_calls.labels(str(answer.status)).inc()
        await _send(answer, send)

    async def _answer(self, scope: Scope, receive: Receive, parts: Parts) -> Answer:
        app_id, _, route = scope["path"].removeprefix(self.root).partition("/")
        app = parts.apps.by_id(app_id)
        if app is None:
            return refused(404, "there is no app with this id")
        if route != "events":
            return refused(404, "there is nothing at this address")
        if scope["method"] != "POST":
            return refused(405, "events are published with POST")
        if not app.enabled:
            return refused(403, "this app is disabled")
        body = await read_body(scope, receive, parts.settings.max_body_bytes)
        return self._unsigned(scope, app, body, parts) or await _publish(app, body, parts)

    def _unsigned(self, scope: Scope, app: App, body: bytes, parts: Parts) -> Answer | None:
        """The refusal of a call that the app's secret didn't sign, else none."""
        fault = SignedQuery(scope["query_string"]).fault(
            app,
            scope["method"],
            signed_paths(scope.get("raw_path") or b"", scope["path"], self._prefix),
            body,
            parts.clock.now().timestamp(),
            parts.settings.auth_timestamp_tolerance_s,
        )
        return None if fault is None else refused(401, fault.message)


async def _publish(app: App, body: bytes, parts: Parts) -> Answer:
    """Hands an event to the broker, for all its channels at once; returns when it has accepted."""
    try:
        event = _DECODER.decode(body)
    except msgspec.DecodeError as error:
        return refused(400, f"the body is not an event: {error}")
    channels = event.channels or ([event.channel] if event.channel else [])
    fault = _event_fault(event, channels, parts.settings)
    if fault is not None:
        return fault
    data = _ENCODER.encode(event.data)
    publications = [
        Publication(app.id, channel, encode_event(event.name, channel, data), event.socket_id)
        for channel in dict.fromkeys(channels)
    ]
    try:
        await parts.node.publish(publications)
    except BrokerUnavailable:
        return refused(503, "the broker can't be reached; try again shortly")
    return _PUBLISHED


def _event_fault(event: Event, channels: list[str], settings: Settings) -> Answer | None:
    if not 0 < len(event.name) <= settings.event_name_max:
        return refused(400, f"name must have 1 to {settings.event_name_max} characters")
    if event.name.startswith(_RESERVED):
        return refused(400, f"names beginning with {' or '.join(_RESERVED)} are the server's own")
    if not 0 < len(channels) <= MAX_CHANNELS:
        return refused(400, f"an event goes to 1 to {MAX_CHANNELS} channels")
    for channel in channels:
        if not is_channel_name(channel, settings.channel_name_max):
            return refused(400, f"not the name of a channel: {channel[:64]!a}")
    if event.socket_id is not None and not _SOCKET_ID.fullmatch(event.socket_id):
        return refused(400, "socket_id must be two numbers with a dot between them")
    return _size_fault(event.data, settings.max_event_bytes)


def _size_fault(data: str, max_bytes: int) -> Answer | None:
    """Counts bytes only where the number of characters leaves a doubt."""
    if len(data) * 4 > max_bytes and len(data.encode()) > max_bytes:
        return refused(413, f"data is over {max_bytes} bytes")
    return None


async def _send(answer: Answer, send: Send) -> None:
    headers = [
        _JSON if answer.is_json else _TEXT,
        (b"content-length", str(len(answer.body)).encode()),
    ]
    if answer.status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
