"""The session-token view: a signed pass with which the media server lets somebody in. Pure.

In a pass instants are epoch seconds (docs/protocol.md): `nbf` and `exp` are JWT claims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jwt
import msgspec

from gateway.errors import CommandError, ErrorCode
from statemachine.goal import RejectionCode

if TYPE_CHECKING:
    from datetime import datetime

    from persistence.documents import Session


def pass_of(
    session: Session, user_id: str, now: datetime, room_pass_s: float
) -> dict[str, Any] | CommandError:
    """The claims with which `user_id` may see `session`, or why he may not.

    The streamer may always. Whoever has an entry in `session.viewers` may from its `nbf` to its
    `exp`. Everyone else may while the stream is exclusive to nobody, for `room_pass_s` at a time.
    """
    if not session.active:
        return CommandError.of(RejectionCode.SESSION_ENDED)
    streamer_id = session.user.id
    entry = session.viewers.get(user_id)
    if entry is not None and user_id != streamer_id:
        if now >= entry.exp:
            return CommandError.of(ErrorCode.FORBIDDEN, "Your private show is over.")
        nbf_s, duration_s = entry.nbf.timestamp(), entry.duration
    elif session.status.exclusive_to and user_id != streamer_id:
        return CommandError.of(ErrorCode.FORBIDDEN, "This stream is in a private show.")
    else:
        nbf_s, duration_s = now.timestamp(), room_pass_s
    return {
        "sub": user_id,
        "session_id": str(session.id),
        "streamer_id": streamer_id,
        "exclusive": entry is not None,
        "nbf": int(nbf_s),
        "duration": _plain(duration_s),
        "exp": int(nbf_s + duration_s),
    }


class _Span(msgspec.Struct, frozen=True):
    """What is read here of a view."""

    nbf: int
    duration: float


def has_time_left(view: bytes, now: datetime) -> bool:
    """Whether a cached view is still to be handed out: half of its pass's time is before it.

    Views live in the cache for as long as somebody's is stored there, so one may outlive its pass.
    """
    span = msgspec.json.decode(view, type=_Span)
    return now.timestamp() < span.nbf + span.duration / 2


def signed(claims: dict[str, Any], secret: str) -> dict[str, Any]:
    """The view: the pass as a JWT, and what it says in the open."""
    return {
        "token": jwt.encode(claims, secret, algorithm="HS256"),
        "session_id": claims["session_id"],
        "nbf": claims["nbf"],
        "duration": claims["duration"],
        "exp": claims["exp"],
    }


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number
