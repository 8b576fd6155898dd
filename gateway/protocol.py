"""The Pusher protocol of one connection: text in, effects out, in order.

Everything that the protocol decides by itself is decided here, without I/O: who may subscribe,
what is answered, what a client event may be, how often. The shell (`gateway.socket`) performs the
effects. Subscribing is the one effect that takes time; while it is under way the messages that
depend on it wait in a bounded inbox, so that a connection's messages act in the order they came.
Pings, client events and commands on other channels don't wait.

Source: docs/pusher-compatibility.md 1.2-1.8, docs/protocol.md.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Final, assert_never

import msgspec

from gateway import frames
from gateway.auth import (
    NOT_OURS,
    USER_ID_PATTERN,
    Identity,
    Verdict,
    own_channel_access,
    user_channel,
    verify_channel_signature,
    verify_signin_signature,
)
from gateway.channels import (
    USER_EVENTS,
    USER_ID_MAX,
    WATCHED,
    ChannelKind,
    channel_kind,
    is_channel_name,
)
from gateway.commands import Reply, decode_command, reply_frame, request_id_of
from gateway.errors import CommandError, ErrorCode, Notice
from gateway.messages import (
    ChannelData,
    Effect,
    Execute,
    MalformedError,
    Member,
    Message,
    Relay,
    Send,
    SignedIn,
    SigninData,
    Subscribe,
    SubscribeData,
    Unsubscribe,
    UnsubscribeData,
    UserData,
    decode_data,
    decode_message,
    unwrapped,
)
from gateway.rates import Rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.apps import App
    from gateway.hub import Subscriptions
    from gateway.limits import Limits

_COMMAND_PREFIXES: Final = ("client-goal.", "client-exclusive.")
_USER_CHANNEL: Final = user_channel("")
_NOTHING: Final[tuple[Effect, ...]] = ()
_PONG: Final[tuple[Effect, ...]] = (Send(frames.PONG_FRAME),)
_NO_INFO: Final = b"{}"

# docs/pusher-compatibility.md 1.8; it is not worth a setting.
WATCHLIST_MAX: Final = 100

# Messages that wait for a subscription; at this many the shell stops reading.
INBOX_MAX: Final = 64


class PusherProtocol:
    """State and rules of one connection.

    Attributes:
        identity: Who the connection speaks for, once that is proved.
        invitations: Whether its app carries them. In another app a `private-user@` channel is like
            any private one: who signs for that app must not speak for a streamer of this one.
        subscriptions: channel -> presence member or None; the hub writes it, this class reads it.
        opening: The channel that is being subscribed, while that takes time.
        commands_running: Commands that have not been answered; the shell counts down.
    """

    __slots__ = (
        "_client_events",
        "_commands",
        "_inbox",
        "_limits",
        "app",
        "commands_running",
        "identity",
        "invitations",
        "opening",
        "socket_id",
        "subscriptions",
    )

    def __init__(
        self,
        app: App,
        socket_id: str,
        limits: Limits,
        subscriptions: Subscriptions,
        *,
        invitations: bool = True,
    ) -> None:
        self.app = app
        self.invitations = invitations
        self.socket_id = socket_id
        self.identity: Identity | None = None
        self.subscriptions = subscriptions
        self.opening: str | None = None
        self.commands_running = 0
        self._limits = limits
        # Most connections never need these three.
        self._inbox: deque[Message] | None = None
        self._client_events: Rate | None = None
        self._commands: Rate | None = None

    @property
    def congested(self) -> bool:
        """Whether so many messages wait that the shell should stop reading."""
        return self._inbox is not None and len(self._inbox) >= INBOX_MAX

    @property
    def authorized(self) -> bool:
        """Whether the connection has signed in or joined a channel that is not public."""
        if self.identity is not None:
            return True
        return any(channel_kind(name) is not ChannelKind.PUBLIC for name in self.subscriptions)

    def receive(self, text: bytes, now: float) -> Sequence[Effect]:
        """What follows from one text message.

        Args:
            text: Valid UTF-8.
            now: Monotonic seconds.
        """
        try:
            message = decode_message(text)
            if self.opening is not None and not self._urgent(message):
                if self._inbox is None:
                    self._inbox = deque()
                self._inbox.append(message)
                return _NOTHING
            return self._handle(message, now)
        except MalformedError as error:
            return _error(str(error))

    def opened(self) -> None:
        """Tells that the `Subscribe` effect has been performed, whatever came of it."""
        self.opening = None

    def resume(self, now: float) -> Sequence[Effect] | None:
        """What follows from the next message that waited; None when none can be handled now."""
        if self.opening is not None or self._inbox is None:
            return None
        if not self._inbox:
            self._inbox = None
            return None
        try:
            return self._handle(self._inbox.popleft(), now)
        except MalformedError as error:
            return _error(str(error))

    def _urgent(self, message: Message) -> bool:
        """Whether a message may overtake the subscription under way."""
        if message.event in {"pusher:ping", "pusher:pong"}:
            return True
        channel = message.channel
        return (
            channel != self.opening
            and channel in self.subscriptions
            and message.event.startswith("client-")
        )

    def _handle(  # noqa: PLR0911  one return for each event
        self, message: Message, now: float
    ) -> Sequence[Effect]:
        event = message.event
        if event.startswith("client-"):
            return self._client_event(message, now)
        match event:
            case "pusher:ping":
                return _PONG
            case "pusher:pong":
                return _NOTHING
            case "pusher:subscribe":
                return self._subscribe(decode_data(message.data, SubscribeData))
            case "pusher:unsubscribe":
                name = decode_data(message.data, UnsubscribeData).channel
                known = name in self.subscriptions and not name.startswith(WATCHED)
                return (Unsubscribe(name),) if known else _NOTHING
            case "pusher:signin":
                return self._sign_in(decode_data(message.data, SigninData))
            case _:
                return _error(f"Unknown event {event[:80]!r}; client events begin with client-")

    # Subscribing

    def _subscribe(  # noqa: PLR0911  one return for each kind and refusal
        self, data: SubscribeData
    ) -> Sequence[Effect]:
        name = data.channel
        if not is_channel_name(name, self._limits.channel_name_max):
            return _error(
                f"Invalid channel name {name[:80]!r}: at most {self._limits.channel_name_max} of "
                "A-Z, a-z, 0-9 and _ - = @ , . ;"
            )
        if name in self.subscriptions:
            return _error(f"Existing subscription to channel {name}")
        kind = channel_kind(name)
        match kind:
            case ChannelKind.PUBLIC:
                return self._open(Subscribe(name))
            case ChannelKind.USER_EVENTS:
                if self.identity is None or name != USER_EVENTS + self.identity.user_id:
                    return self._refused(name, "This channel is its signed-in user's alone")
                return self._open(Subscribe(name))
            case ChannelKind.PRIVATE | ChannelKind.PRESENCE:
                if data.auth:
                    return self._subscribe_signed(data, kind)
                return self._subscribe_own(name, kind)
            case _:
                assert_never(kind)

    def _subscribe_signed(self, data: SubscribeData, kind: ChannelKind) -> Sequence[Effect]:
        """A subscription that the app's backend signed: any channel, as with Pusher."""
        name, auth, channel_data = data.channel, data.auth or "", data.channel_data or None
        if not verify_channel_signature(self.app, self.socket_id, name, auth, channel_data):
            # Never with the expected digest: it would be a signing oracle.
            return self._refused(name, "Invalid signature")
        if kind is ChannelKind.PRIVATE:
            bound = self._bind(name)
            return (*bound, *self._open(Subscribe(name, snapshot_of=self._own(name))))
        if channel_data is None:
            return self._join(name, self._self_as_member())
        try:
            shown = msgspec.json.decode(channel_data.encode(), type=ChannelData)
        except (msgspec.DecodeError, RecursionError) as error:
            return self._refused(name, f"The channel_data has a wrong shape: {error}")
        return self._join(name, Member(str(shown.user_id), bytes(shown.user_info)))

    def _subscribe_own(self, name: str, kind: ChannelKind) -> Sequence[Effect]:
        """A subscription without signature: what the identity alone allows."""
        access = own_channel_access(name, self.identity) if self.invitations else NOT_OURS
        match access.verdict:
            case Verdict.DENIED | Verdict.NOT_OURS:
                return self._refused(name, "Subscribing to this channel takes a signature")
            case Verdict.ALLOWED | Verdict.NEEDS_LIVE_STREAM:
                if kind is ChannelKind.PRESENCE:
                    return self._join(name, self._self_as_member(), access.streamer_id)
                return self._open(
                    Subscribe(name, live_streamer=access.streamer_id, snapshot_of=self._own(name))
                )
            case _:
                assert_never(access.verdict)

    def _join(
        self, name: str, member: Member | None, live_streamer: str | None = None
    ) -> Sequence[Effect]:
        if member is None:
            return self._refused(name, "Presence needs channel_data or a signed-in user")
        if not 0 < len(member.user_id) <= USER_ID_MAX:
            return self._refused(name, f"A user_id has 1 to {USER_ID_MAX} characters")
        if len(member.user_info) > self._limits.user_info_max_bytes:
            longest = self._limits.user_info_max_bytes
            return self._refused(
                name, f"user_info is longer than {longest} bytes", "LimitReached", 413
            )
        return self._open(Subscribe(name, member=member, live_streamer=live_streamer))

    def _open(self, effect: Subscribe) -> Sequence[Effect]:
        self.opening = effect.channel
        return (effect,)

    def _self_as_member(self) -> Member | None:
        identity = self.identity
        if identity is None:
            return None
        return Member(identity.user_id, identity.user_info or _NO_INFO)

    def _own(self, name: str) -> str | None:
        """The user whose own channel `name` is, if that is this connection's user."""
        identity = self.identity if self.invitations else None
        if identity is not None and name == user_channel(identity.user_id):
            return identity.user_id
        return None

    def _bind(self, name: str) -> Sequence[Effect]:
        """A verified signature over `private-user@{id}` proves the user, though not the role."""
        user_id = name.removeprefix(_USER_CHANNEL)
        if not self.invitations:
            return _NOTHING
        if self.identity is None and user_id != name and USER_ID_PATTERN.fullmatch(user_id):
            self.identity = Identity(user_id, client_id=self.app.key)
            return (SignedIn(user_id),)
        return _NOTHING

    def refusal(
        self, channel: str, message: str, kind: str = "AuthError", status: int = 401
    ) -> bytes:
        """The frame of a subscription that was refused; the connection stays open."""
        if self._limits.strict:
            return frames.frame(frames.error_body(f"{message} (channel {channel})"))
        return frames.frame(frames.subscription_error_body(channel, kind, message, status))

    def _refused(
        self, channel: str, message: str, kind: str = "AuthError", status: int = 401
    ) -> tuple[Effect, ...]:
        return (Send(self.refusal(channel, message, kind, status)),)

    # Signing in

    def _sign_in(self, data: SigninData) -> Sequence[Effect]:
        if not verify_signin_signature(self.app, self.socket_id, data.user_data, data.auth):
            return _error("Invalid signature of pusher:signin")
        user = decode_data(msgspec.Raw(data.user_data.encode()), UserData)
        user_id = str(user.id)
        if not 0 < len(user_id) <= USER_ID_MAX:
            return _error(f"The id in user_data has 1 to {USER_ID_MAX} characters")
        if len(user.user_info) > self._limits.user_info_max_bytes:
            return _error(f"user_info is longer than {self._limits.user_info_max_bytes} bytes")
        watchlist = user.watchlist or []
        known = self.identity
        if known is not None and known.user_id != user_id:
            return _error("The connection is already signed in as another user")
        if known is None:
            known = Identity(user_id, client_id=self.app.key)
        self.identity = replace(
            known,
            user_info=bytes(user.user_info) or None,
            user_data=data.user_data,
            watchlist=tuple(str(watched) for watched in watchlist[:WATCHLIST_MAX]),
        )
        answer = frames.json_string(frames.json_bytes({"user_data": data.user_data}))
        success = Send(frames.frame(frames.encode_event("pusher:signin_success", None, answer)))
        signed_in = SignedIn(user_id, self.identity.watchlist)
        if len(watchlist) <= WATCHLIST_MAX:
            return (success, signed_in)
        notice = f"Only the first {WATCHLIST_MAX} users of the watchlist are watched"
        return (success, *_error(notice, Notice.WATCHLIST_LIMIT), signed_in)

    # Client events

    def _client_event(self, message: Message, now: float) -> Sequence[Effect]:
        event, name = message.event, message.channel
        if self.invitations and event.startswith(_COMMAND_PREFIXES):
            return self._command(message, now)
        fault = self._client_event_fault(message)
        if name is None or fault is not None:
            return _error(fault or "A client event needs a channel")
        rate = self._client_events
        per_s = self._limits.client_events_per_s
        if rate is None:
            rate = self._client_events = Rate(per_s, now)
        if not rate.allow(per_s, now):
            return _error(f"At most {per_s} client events a second", Notice.CLIENT_EVENT_RATE)
        member = self.subscriptions[name]
        data = bytes(message.data) or b"null"
        user_id = None if member is None else member.user_id
        return (Relay(name, frames.client_event_body(event, name, data, user_id)),)

    def _client_event_fault(self, message: Message) -> str | None:
        """What forbids a client event, but for its rate; None if nothing does."""
        event, name, limits = message.event, message.channel, self._limits
        if not self.app.client_events:
            return "Client events are not enabled for this app"
        if name is None or name not in self.subscriptions:
            return f"Client event {event[:80]!r} on a channel that is not subscribed"
        if channel_kind(name) not in {ChannelKind.PRIVATE, ChannelKind.PRESENCE}:
            return "Client events need a private or presence channel"
        if len(event) > limits.event_name_max:
            return f"An event's name has at most {limits.event_name_max} characters"
        if len(message.data) > limits.max_event_bytes:
            return f"An event's data has at most {limits.max_event_bytes} bytes"
        return None

    def _command(self, message: Message, now: float) -> Sequence[Effect]:
        """A goal command: executed only on the connection's own user channel."""
        name = message.channel
        if name is None or name not in self.subscriptions or self._own(name) is None:
            return _error("Commands are sent on one's own, subscribed private-user@ channel")
        data = unwrapped(message.data)
        rate = self._commands
        per_s = self._limits.commands_per_s
        if rate is None:
            rate = self._commands = Rate(per_s, now)
        if not rate.allow(per_s, now):
            return _command_refused(name, data, CommandError.of(ErrorCode.RATE_LIMITED))
        if self.commands_running >= self._limits.commands_in_flight:
            return _command_refused(name, data, CommandError.of(ErrorCode.OVERLOADED))
        if not USER_ID_PATTERN.fullmatch(name.removeprefix(_USER_CHANNEL)):
            return _command_refused(name, data, CommandError.of(ErrorCode.BAD_USER_ID))
        command = decode_command(message.event, data)
        if isinstance(command, CommandError):
            return _command_refused(name, data, command)
        self.commands_running += 1
        return (Execute(command, name),)


def _command_refused(channel: str, data: bytes, error: CommandError) -> Sequence[Effect]:
    """A `goal.reply` for a command that was not executed, with its request_id if it has one."""
    return (Send(reply_frame(channel, Reply(request_id_of(data), None, error))),)


def _error(message: str, code: int | None = None) -> tuple[Effect, ...]:
    return (Send(frames.frame(frames.error_body(message, code))),)
