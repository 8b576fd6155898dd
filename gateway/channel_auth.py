"""Channel and user authorization for the bearer of a JWT, as Pusher's clients ask for it.

A browser app without a backend of its own names these two addresses in `channelAuthorization`
and `userAuthentication`. Only the four families of channels are signed here, by the same table as
on the socket: a token says nothing about the channels of the platform's own, whose backend signs
them with the app's secret (docs/decisions.md).

Source: docs/protocol.md, docs/pusher-compatibility.md 1.5.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from gateway.auth import Identity, Verdict, own_channel_access, sign_channel, sign_user
from gateway.bearer import FORM_TYPE, JSON_TYPE, RefusedError, body_of, decode, media_type, owned
from gateway.errors import ErrorCode
from gateway.parts import parts_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.parts import Parts

_SOCKET_ID: Final = re.compile(r"\d{1,20}\.\d{1,20}", re.ASCII)


class Asked(msgspec.Struct, frozen=True):
    """What a client sends; user authorization names no channel."""

    socket_id: str
    channel_name: str = ""


def routes(prefix: str) -> list[Route]:
    """The two addresses."""
    return [
        Route(f"{prefix}/pusher/auth", channel, methods=["POST"]),
        Route(f"{prefix}/pusher/user-auth", user, methods=["POST"]),
    ]


@owned
async def channel(request: Request, identity: Identity) -> Response:
    """Signs a subscription: `{auth}`, on presence channels `{auth, channel_data}`."""
    parts = parts_of(request.scope)
    asked = await _asked(request)
    await _check(asked.channel_name, identity, parts)
    app = parts.apps.first
    if not asked.channel_name.startswith("presence-"):
        return _json({"auth": sign_channel(app, asked.socket_id, asked.channel_name)})
    data = _presence_data(identity)
    auth = sign_channel(app, asked.socket_id, asked.channel_name, data)
    return _json({"auth": auth, "channel_data": data})


@owned
async def user(request: Request, identity: Identity) -> Response:
    """Signs a `pusher:signin`: `{auth, user_data}`."""
    asked = await _asked(request)
    data = msgspec.json.encode({"id": identity.user_id}).decode()
    app = parts_of(request.scope).apps.first
    return _json({"auth": sign_user(app, asked.socket_id, data), "user_data": data})


async def _check(name: str, identity: Identity, parts: Parts) -> None:
    access = own_channel_access(name, identity)
    match access.verdict:
        case Verdict.ALLOWED:
            return
        case Verdict.NEEDS_LIVE_STREAM:
            streamer_id = access.streamer_id or ""
            if not await parts.commands.stream_is_live(streamer_id):
                raise RefusedError(ErrorCode.FORBIDDEN, "This stream is not live.")
        case Verdict.DENIED:
            raise RefusedError(ErrorCode.FORBIDDEN, "This channel is someone else's.")
        case Verdict.NOT_OURS:
            raise RefusedError(
                ErrorCode.FORBIDDEN, "Channels of the platform are signed by its own backend."
            )


def _presence_data(identity: Identity) -> str:
    data: dict[str, object] = {"user_id": identity.user_id}
    if identity.user_info is not None:
        data["user_info"] = msgspec.Raw(identity.user_info)
    return msgspec.json.encode(data).decode()


async def _asked(request: Request) -> Asked:
    """The fields, from a form as pusher-js sends it or from JSON.

    Raises:
        RefusedError: They are missing or not what they must be.
    """
    body, kind = await body_of(request), media_type(request)
    if kind not in {FORM_TYPE, JSON_TYPE, ""}:
        raise RefusedError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, "The body must be a form or JSON.")
    asked = decode(body, Asked) if body.lstrip()[:1] == b"{" else _form(body)
    if not _SOCKET_ID.fullmatch(asked.socket_id):
        raise RefusedError(ErrorCode.MALFORMED, "socket_id must be two numbers around a dot.")
    return asked


def _form(body: bytes) -> Asked:
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=16)
    except ValueError:
        raise RefusedError(ErrorCode.MALFORMED, "The body is not a form.") from None
    return Asked(*(fields.get(name, [""])[0] for name in ("socket_id", "channel_name")))


def _json(value: object) -> Response:
    return Response(
        msgspec.json.encode(value), headers={"Cache-Control": "no-store"}, media_type=JSON_TYPE
    )
