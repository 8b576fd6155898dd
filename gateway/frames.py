"""The wire: JSON bodies in the Pusher protocol's two encodings, and RFC 6455 text frames.

A body is the complete JSON of one event; a frame is a body behind its WebSocket header. Both are
bytes, made once and then shared by every socket that they are written to. Pure.

Source: docs/pusher-compatibility.md 1.2 (which `data` is a JSON string), RFC 6455 section 5.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from gateway.errors import DISCONNECTS

if TYPE_CHECKING:
    from collections.abc import Sequence

_encode = msgspec.json.Encoder().encode

# FIN set, opcode 1 (text), not masked: a server's frames never are (RFC 6455 section 5.1).
_TEXT: Final = 0x81
_CLOSE: Final = 0x88


def frame(body: bytes) -> bytes:
    """The unmasked text frame that carries `body`; concatenated frames are again valid bytes."""
    length = len(body)
    if length < 126:
        return bytes((_TEXT, length)) + body
    if length < 0x10000:
        return b"\x81\x7e" + length.to_bytes(2) + body
    return b"\x81\x7f" + length.to_bytes(8) + body


def close_frame(payload: bytes) -> bytes:
    """The close frame that carries `payload`: nothing, or a code and up to 123 bytes of reason."""
    return bytes((_CLOSE, len(payload))) + payload


def close_payload(code: int, reason: str) -> bytes:
    """What a close frame carries; a longer reason is cut, but no character of it."""
    return code.to_bytes(2) + reason.encode()[:120].decode(errors="ignore").encode()


def json_bytes(value: object) -> bytes:
    """Compact JSON of `value`; `msgspec.Raw` inside is spliced in as it is."""
    return _encode(value)


def json_string(text: str | bytes) -> bytes:
    """The JSON string that holds `text`, quotes included."""
    return _encode(text if isinstance(text, str) else text.decode())


def encode_event(event: str, channel: str | None, data: bytes) -> bytes:
    """The body of an event whose `data` is already JSON: object, string, number, anything."""
    if channel is None:
        return b'{"event":%b,"data":%b}' % (_encode(event), data)
    return b'{"event":%b,"channel":%b,"data":%b}' % (_encode(event), _encode(channel), data)


def push_body(event: str, channel: str, data: object) -> bytes:
    """The body of a push: `data` is encoded twice, once per cluster.

    Args:
        event: The event's name.
        channel: The channel's name.
        data: What the client reads after parsing `data`; anything that msgspec can encode.
    """
    return encode_event(event, channel, json_string(_encode(data)))


def published_body(event: str, channel: str, data: str) -> bytes:
    """The body of an event from the HTTP API: the string `data` goes out exactly as published."""
    return encode_event(event, channel, _encode(data))


def client_event_body(event: str, channel: str, data: bytes, user_id: str | None) -> bytes:
    """The body of a relayed client event.

    Args:
        event: Begins with `client-`.
        channel: Private or presence.
        data: The sender's bytes, so that an object stays an object and a string a string.
        user_id: The sender's, on presence channels.
    """
    if user_id is None:
        return encode_event(event, channel, data)
    head = (_encode(event), _encode(channel), data, _encode(user_id))
    return b'{"event":%b,"channel":%b,"data":%b,"user_id":%b}' % head


def error_body(message: str, code: int | None = None) -> bytes:
    """The body of `pusher:error`; its data is an object, and `code` null unless 4000 to 4399."""
    data: dict[str, Any] = {"code": code, "message": message}
    return encode_event("pusher:error", None, _encode(data))


def farewell(code: int, message: str | None = None) -> tuple[str, bytes]:
    """Why a connection ends, and the `pusher:error` frame that says so before its close.

    Args:
        code: Of `CloseCode`, or of RFC 6455.
        message: For a person; the table's sentence when there is none.
    """
    known = DISCONNECTS.get(code)  # type: ignore[call-overload]
    reason = message or (known.reason if known else "")
    return reason, frame(error_body(reason, int(code) if code >= 4000 else None))


def subscription_error_body(channel: str, kind: str, message: str, status: int) -> bytes:
    """The body of `pusher:subscription_error`, which pusher-js hands to the channel's bindings."""
    data = {"type": kind, "error": message, "status": status}
    return encode_event("pusher:subscription_error", channel, _encode(data))


def established_body(socket_id: str, activity_timeout_s: float) -> bytes:
    """The body of `pusher:connection_established`, the first frame of every connection.

    `activity_timeout` is whole seconds and at least 1: pusher-js gives up the handshake when it
    is falsy.
    """
    data = {"socket_id": socket_id, "activity_timeout": max(1, round(activity_timeout_s))}
    return encode_event("pusher:connection_established", None, json_string(_encode(data)))


def succeeded_body(channel: str, data: bytes = b"{}") -> bytes:
    """The body of `pusher_internal:subscription_succeeded`; `data` is an object's JSON."""
    return encode_event("pusher_internal:subscription_succeeded", channel, json_string(data))


def presence_data(members: dict[str, bytes]) -> bytes:
    """The `data` of a presence channel's `subscription_succeeded`: all members, joiner included.

    Args:
        members: user id -> JSON of its `user_info`.
    """
    infos = {user_id: msgspec.Raw(info) for user_id, info in members.items()}
    state = {"ids": list(members), "hash": infos, "count": len(members)}
    return _encode({"presence": state})


def member_added_body(channel: str, user_id: str, user_info: bytes) -> bytes:
    """The body of `pusher_internal:member_added`."""
    data = _encode({"user_id": user_id, "user_info": msgspec.Raw(user_info)})
    return encode_event("pusher_internal:member_added", channel, json_string(data))


def member_removed_body(channel: str, user_id: str) -> bytes:
    """The body of `pusher_internal:member_removed`."""
    data = _encode({"user_id": user_id})
    return encode_event("pusher_internal:member_removed", channel, json_string(data))


def subscription_count_body(channel: str, count: int) -> bytes:
    """The body of `pusher_internal:subscription_count`."""
    data = _encode({"subscription_count": count})
    return encode_event("pusher_internal:subscription_count", channel, json_string(data))


def cache_miss_body(channel: str) -> bytes:
    """The body of `pusher:cache_miss`, which has nothing to say.

    Its data is there, because Java's client asks for it, and is JSON, because asyncpusher reads no
    further when it can't parse it.
    """
    return encode_event("pusher:cache_miss", channel, json_string(b"{}"))


def watchlist_body(online: Sequence[str] | None, offline: Sequence[str] | None = None) -> bytes:
    """The body of `pusher_internal:watchlist_events`; None leaves an event out."""
    named = (("online", online), ("offline", offline))
    events = [{"name": name, "user_ids": users} for name, users in named if users is not None]
    data = json_string(_encode({"events": events}))
    return encode_event("pusher_internal:watchlist_events", None, data)


PING_FRAME: Final = frame(encode_event("pusher:ping", None, b"{}"))
PONG_FRAME: Final = frame(encode_event("pusher:pong", None, b"{}"))
