"""Who is on the other side, and which channels that gives.

An identity comes from a JWT, from `pusher:signin` or from a Pusher signature over one's own
`private-user@{id}`. Four families of channels follow from the identity alone; every other channel
needs a signature by the app's backend. Pure: `now` is a parameter, keys are handed in.

Source: docs/protocol.md, docs/pusher-compatibility.md 1.5.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol

import jwt

from gateway.errors import ErrorCode
from statemachine.goal import Role

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from gateway.apps import App

# The characters of a channel's name without ".", which separates ids in preview channels and is a
# path separator in MongoDB; "$" is in no channel's name anyway.
USER_ID_PATTERN: Final = re.compile(r"[A-Za-z0-9_=@,;-]{1,64}", re.ASCII)

# Another machine's clock made `nbf`; a token that starts a moment from now is not an attack.
NBF_LEEWAY_S: Final = 5.0

_MAX_TOKEN_CHARACTERS: Final = 8_192
_ROLES: Final = {Role.STREAMER.value: Role.STREAMER, Role.VIEWER.value: Role.VIEWER}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a connection or an HTTP call speaks for.

    Attributes:
        role: None when proved by a Pusher signature, which tells no role; then the relation to
            the goal decides.
        client_id: The app that acts (the requirements' `request.client.id`, the `triggerer`):
            the JWT's `client_id`, else the key of the app that carries the invitations.
        user_info: JSON of what presence shows of the user, when known.
        user_data: The exact `user_data` of `pusher:signin`, when that was the proof.
        watchlist: Users whose coming and going is reported, from `user_data`.
    """

    user_id: str
    role: Role | None = None
    client_id: str | None = None
    user_info: bytes | None = None
    user_data: str | None = None
    watchlist: tuple[str, ...] = ()

    def acting_through(self, app: App) -> Identity:
        """This identity, acting by the app unless it says by which."""
        return self if self.client_id is not None else replace(self, client_id=app.key)


class AuthError(Exception):
    """A token or signature proves nothing.

    Attributes:
        code: `unauthenticated`, or `unavailable` when the keys could not be fetched.
        message: For a person; never says what a right signature would have been.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.UNAUTHENTICATED) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class UnknownKeyError(AuthError):
    """No key of the set has the token's `kid`: fetching the set again may help."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A key and the one algorithm it is used with, whatever a token's header asks for."""

    algorithm: str
    key: Any


class TokenKeys(Protocol):
    """The keys that tokens may be signed with, and what their claims must say."""

    @property
    def issuer(self) -> str | None:
        """The required `iss`; none: not checked."""

    @property
    def audience(self) -> str | None:
        """The required `aud`; none: a token with an audience is meant for someone else."""

    def find(self, key_id: str | None) -> VerificationKey:
        """The key for a token's `kid`; raises `UnknownKeyError` when there is none."""


class Authorizer(Protocol):
    """Checks tokens with keys that may have to be fetched; bound to the settings."""

    async def identity_of(self, token: str, now: datetime) -> Identity:
        """The identity that `token` proves at `now`; raises `AuthError`."""


def identity_of_token(token: str, keys: TokenKeys, now: datetime) -> Identity:
    """The identity that a JWT proves at `now`.

    The algorithm is the key's own: a header can't choose another, nor `none`.

    Raises:
        AuthError: The token is not one, not ours, too old or without the claims it must have.
    """
    if len(token) > _MAX_TOKEN_CHARACTERS or not token.isascii():
        raise AuthError("The token is malformed.")
    try:
        key_id = jwt.get_unverified_header(token).get("kid")
        key = keys.find(key_id)
        claims = jwt.decode(
            token,
            key.key,
            algorithms=[key.algorithm],
            issuer=keys.issuer,
            audience=keys.audience,
            options={
                # `now` decides, not the library's own clock.
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
                "require": ["exp", "sub"],
            },
        )
    except jwt.InvalidTokenError as error:
        raise AuthError(_why(error)) from None
    _check_time(claims, now)
    return _identity_of_claims(claims)


def _why(error: jwt.InvalidTokenError) -> str:
    """One sentence on a refused token, without what its signature should have been."""
    match error:
        case jwt.MissingRequiredClaimError():
            return f"The token lacks the claim {error.claim}."
        case jwt.InvalidAudienceError():
            return "The token is meant for another audience."
        case jwt.InvalidIssuerError():
            return "The token was issued by someone else."
        case jwt.InvalidAlgorithmError():
            return "The token is signed with an algorithm that its key is not for."
        case jwt.InvalidSignatureError():
            return "The token's signature is wrong."
        case _:
            return "The token is malformed."


def _check_time(claims: Mapping[str, Any], now: datetime) -> None:
    """Refuses a token before `nbf` and from `exp` on."""
    at = now.timestamp()
    expires, starts = claims["exp"], claims.get("nbf", 0)
    for value in (expires, starts):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise AuthError("The token's exp and nbf must be numbers.")
    # Written so that a NaN, for which every comparison is false, is refused.
    if not at < expires:
        raise AuthError("The token has expired.")
    if not starts <= at + NBF_LEEWAY_S:
        raise AuthError("The token is not valid yet.")


def _identity_of_claims(claims: Mapping[str, Any]) -> Identity:
    user_id, role, client_id = claims["sub"], claims.get("role"), claims.get("client_id")
    if not isinstance(user_id, str) or not USER_ID_PATTERN.fullmatch(user_id):
        raise AuthError("The token's sub is not a user id.")
    if not isinstance(role, str) or role not in _ROLES:
        raise AuthError("The token's role must be streamer or viewer.")
    if client_id is not None and not (isinstance(client_id, str) and 0 < len(client_id) <= 128):
        raise AuthError("The token's client_id must be text of 1 to 128 characters.")
    return Identity(user_id, _ROLES[role], client_id)


# Pusher signatures


def sign_channel(app: App, socket_id: str, channel: str, channel_data: str | None = None) -> str:
    """The `auth` that lets `socket_id` subscribe to `channel`: `key:hex`."""
    return _signed(app, app.secret, _channel_text(socket_id, channel, channel_data))


def sign_user(app: App, socket_id: str, user_data: str) -> str:
    """The `auth` of a `pusher:signin` with exactly `user_data`."""
    return _signed(app, app.secret, f"{socket_id}::user::{user_data}")


def verify_channel_signature(
    app: App, socket_id: str, channel: str, auth: str, channel_data: str | None
) -> bool:
    """Whether one of the app's secrets signed this subscription, compared in constant time."""
    return _verified(app, _channel_text(socket_id, channel, channel_data), auth)


def verify_signin_signature(app: App, socket_id: str, user_data: str, auth: str) -> bool:
    """Whether one of the app's secrets signed this `user_data`, compared in constant time."""
    return _verified(app, f"{socket_id}::user::{user_data}", auth)


def _channel_text(socket_id: str, channel: str, channel_data: str | None) -> str:
    text = f"{socket_id}:{channel}"
    return text if channel_data is None else f"{text}:{channel_data}"


def hmac_hex(secret: str, text: bytes) -> str:
    """HMAC-SHA256 in lower-case hex, the form of every Pusher signature."""
    return hmac.digest(secret.encode(), text, hashlib.sha256).hex()


def _signed(app: App, secret: str, text: str) -> str:
    # A JSON escape can smuggle a lone surrogate in; it must be refused, not crash the socket.
    return f"{app.key}:{hmac_hex(secret, text.encode(errors='surrogatepass'))}"


def _verified(app: App, text: str, auth: str) -> bool:
    given = auth.encode(errors="surrogatepass")
    # No early way out: how long it takes doesn't depend on which secret matched.
    matches = [hmac.compare_digest(_signed(app, s, text).encode(), given) for s in app.secrets]
    return any(matches)


# Channels that follow from the identity


class Verdict(StrEnum):
    """What an identity alone gives on a channel."""

    ALLOWED = "allowed"
    NEEDS_LIVE_STREAM = "needs_live_stream"
    DENIED = "denied"
    NOT_OURS = "not_ours"


@dataclass(frozen=True, slots=True)
class Access:
    """A verdict, with the streamer whose stream must be live when it depends on that."""

    verdict: Verdict
    streamer_id: str | None = None


ALLOWED: Final = Access(Verdict.ALLOWED)
DENIED: Final = Access(Verdict.DENIED)
NOT_OURS: Final = Access(Verdict.NOT_OURS)

_USER: Final = "private-user@"
_STREAM: Final = "private-stream@"
_PREVIEW: Final = "presence-stream-viewer@"
_LIVE: Final = "presence-stream@"


def own_channel_access(channel: str, identity: Identity | None) -> Access:
    """What `identity` may do on `channel` without a signature, by the table of docs/protocol.md.

    `DENIED` is the verdict on the four families only: a signature may still open the channel, as
    with Pusher. `NOT_OURS` is every other channel.
    """
    family = next((p for p in (_USER, _STREAM, _PREVIEW, _LIVE) if channel.startswith(p)), None)
    if family is None:
        return NOT_OURS
    if identity is None:
        return DENIED
    owner = channel.removeprefix(family)
    if family == _PREVIEW:
        return _preview_access(owner, identity)
    if family == _LIVE and USER_ID_PATTERN.fullmatch(owner):
        return Access(Verdict.NEEDS_LIVE_STREAM, owner)
    viewers_own_stream = family == _STREAM and identity.role is Role.VIEWER
    return ALLOWED if owner == identity.user_id and not viewers_own_stream else DENIED


def _preview_access(name: str, identity: Identity) -> Access:
    """`{streamer}.preview.{viewer}` is for these two, each in a role that fits."""
    streamer, separator, viewer = name.partition(".preview.")
    if not separator or not all(USER_ID_PATTERN.fullmatch(user) for user in (streamer, viewer)):
        return DENIED
    if identity.user_id == streamer and identity.role in (Role.STREAMER, None):
        return ALLOWED
    if identity.user_id == viewer and identity.role in (Role.VIEWER, None):
        return ALLOWED
    return DENIED


def user_channel(user_id: str) -> str:
    """The channel that belongs to one user, on which commands are sent."""
    return _USER + user_id
