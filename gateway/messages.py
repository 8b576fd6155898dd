"""What a client may send, decoded once and checked at the edge; and what must follow from it.

Messages come in as JSON text and become structs here; effects are what the pure protocol asks
its shell to do. Pure.

Source: docs/pusher-compatibility.md 1.3.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from gateway.commands import GoalCommand

T = TypeVar("T")


class Message(msgspec.Struct, gc=False):
    """One text message of a client; `data` stays the bytes that were sent."""

    event: str
    channel: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


class SubscribeData(msgspec.Struct, gc=False):
    """The `data` of `pusher:subscribe`. pusher-js sends `auth: ""` for public channels."""

    channel: str
    auth: str | None = None
    channel_data: str | None = None


class UnsubscribeData(msgspec.Struct, gc=False):
    """The `data` of `pusher:unsubscribe`."""

    channel: str


class SigninData(msgspec.Struct, gc=False):
    """The `data` of `pusher:signin`."""

    auth: str
    user_data: str


class ChannelData(msgspec.Struct, gc=False):
    """The signed `channel_data` of a presence subscription; numeric ids become text."""

    user_id: str | int
    user_info: msgspec.Raw = msgspec.Raw(b"{}")


class UserData(msgspec.Struct, gc=False):
    """The signed `user_data` of a sign-in; no `user_info` is empty bytes."""

    id: str | int
    user_info: msgspec.Raw = msgspec.Raw(b"")
    # Backends that serialize whole objects write null for a list that nobody gave.
    watchlist: list[str | int] | None = None


class MalformedError(Exception):
    """A message that can't be read; says in one sentence why, for the developer of the client."""


_decode_message = msgspec.json.Decoder(Message).decode
_decode_text = msgspec.json.Decoder(str).decode


def decode_message(text: bytes) -> Message:
    """The message that `text` (valid UTF-8) holds.

    Raises:
        MalformedError: No JSON object with a text `event`.
    """
    try:
        return _decode_message(text)
    except msgspec.ValidationError as error:
        raise MalformedError(f"The message has a wrong shape: {error}") from None
    except msgspec.DecodeError as error:
        raise MalformedError(f"The message is not JSON: {error}") from None
    except RecursionError:
        raise MalformedError("The message is nested too deeply") from None


def decode_data(data: msgspec.Raw, kind: type[T]) -> T:
    """The `data` of a `pusher:` message, sent as an object or as a JSON string of one.

    Raises:
        MalformedError: It is missing or not of that kind.
    """
    try:
        return msgspec.json.decode(unwrapped(data), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedError(f"The data has a wrong shape: {error}") from None


def unwrapped(data: msgspec.Raw) -> bytes:
    """The JSON in `data`: what is in the string if it is one, else its bytes as sent.

    Raises:
        MalformedError: The string is not one.
    """
    raw = bytes(data)
    if raw[:1] != b'"':
        return raw
    try:
        return _decode_text(raw).encode()
    except msgspec.DecodeError as error:
        raise MalformedError(f"The data has a wrong shape: {error}") from None


# Effects: what the shell of a connection performs, in order.


class Member(msgspec.Struct, frozen=True, gc=False):
    """A user as a presence channel shows it.

    Attributes:
        user_info: JSON.
    """

    user_id: str
    user_info: bytes


class Send(msgspec.Struct, frozen=True, gc=False):
    """Write these ready frames to this connection."""

    frames: bytes


class Subscribe(msgspec.Struct, frozen=True, gc=False):
    """Subscribe this connection; authorized but for `live_streamer`.

    The shell answers with `PusherProtocol.opened` when it is done, well or not.

    Attributes:
        member: Who joins, on presence channels.
        live_streamer: The streamer who must be live for it, if that is the condition.
        snapshot_of: The user whose own channel this is: `goal.snapshot` follows.
    """

    channel: str
    member: Member | None = None
    live_streamer: str | None = None
    snapshot_of: str | None = None


class SignedIn(msgspec.Struct, frozen=True, gc=False):
    """The connection speaks for a user from now on.

    Attributes:
        watchlist: Whom the connection watches instead of whom it has watched; None: as before.
    """

    user_id: str
    watchlist: tuple[str, ...] | None = None


class Unsubscribe(msgspec.Struct, frozen=True, gc=False):
    """End a subscription of this connection; there is one."""

    channel: str


class Relay(msgspec.Struct, frozen=True, gc=False):
    """Publish a client event to everyone else on its channel."""

    channel: str
    body: bytes


class Execute(msgspec.Struct, frozen=True, gc=False):
    """Run a goal command and answer with `goal.reply` on `channel`."""

    command: GoalCommand
    channel: str


Effect: TypeAlias = Send | SignedIn | Subscribe | Unsubscribe | Relay | Execute
