"""The six goal commands as clients send them, and the reply they get: decode and encode, pure.

On a socket a command is a client event on one's own `private-user@{id}`; over HTTP it is a call.
Both become the same struct here.

Source: docs/protocol.md (commands).
"""

from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol

import msgspec

from gateway import frames
from gateway.errors import CommandError, ErrorCode

if TYPE_CHECKING:
    from gateway.auth import Identity

REQUEST_ID_MAX: Final = 64

# 64-bit JSON numbers beyond this are no amount and no time of anybody.
_Number = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
_Id = Annotated[str, msgspec.Meta(max_length=128)]


class Invite(msgspec.Struct, frozen=True, kw_only=True):
    """A viewer offers `amount` minor units for `prepaid_duration` seconds."""

    request_id: str | None = None
    session_id: _Id
    prepaid_duration: _Number
    amount: _Number


class _OnGoal(msgspec.Struct, frozen=True, kw_only=True):
    """A command on a goal that exists."""

    request_id: str | None = None
    goal_id: _Id


class Agree(_OnGoal, frozen=True, kw_only=True):
    """The streamer accepts."""


class Disagree(_OnGoal, frozen=True, kw_only=True):
    """The streamer refuses."""


class Withdraw(_OnGoal, frozen=True, kw_only=True):
    """The viewer takes his invitation back."""


class Start(_OnGoal, frozen=True, kw_only=True):
    """The streamer starts the agreed show."""


class Finish(_OnGoal, frozen=True, kw_only=True):
    """Either ends the live show."""


GoalCommand = Invite | Agree | Disagree | Withdraw | Start | Finish

_KIND_OF: Final[dict[str, type[Any]]] = {
    "client-goal.invite": Invite,
    "client-goal.agree": Agree,
    "client-goal.disagree": Disagree,
    "client-goal.withdraw": Withdraw,
    "client-exclusive.start": Start,
    "client-exclusive.finish": Finish,
}
_DECODER_OF: Final = {event: msgspec.json.Decoder(kind).decode for event, kind in _KIND_OF.items()}


class Reply(msgspec.Struct, frozen=True):
    """What a command is answered: the goal after it, or why it was refused.

    Attributes:
        goal_json: the goal; with an error, the goal as it is when the caller may see it.
    """

    request_id: str | None
    goal_json: bytes | None
    error: CommandError | None = None

    def data_json(self) -> bytes:
        """The data of `goal.reply` as JSON bytes."""
        data: dict[str, Any] = {"request_id": self.request_id, "ok": self.error is None}
        if self.error is not None:
            data["error"] = self.error
        if self.goal_json is not None:
            data["goal"] = msgspec.Raw(self.goal_json)
        return msgspec.json.encode(data)


def decode_command(event: str, data: bytes) -> GoalCommand | CommandError:
    """Reads the data of a command's client event; it may be an object or a string that holds one.

    Args:
        event: the client event; one that is no command is `unknown_command`.
        data: JSON bytes.
    """
    decode = _DECODER_OF.get(event)
    if decode is None:
        return CommandError.of(ErrorCode.UNKNOWN_COMMAND, f"There is no command {event[:200]}.")
    try:
        if data[:1] == b'"':
            data = msgspec.json.decode(data, type=str).encode()
        command: GoalCommand = decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        return CommandError.of(ErrorCode.MALFORMED, f"The data of {event} is malformed: {error}.")
    if not command.request_id or len(command.request_id) > REQUEST_ID_MAX:
        return CommandError.of(ErrorCode.BAD_REQUEST_ID)
    return command


class _RequestId(msgspec.Struct):
    request_id: str | None = None


def request_id_of(data: bytes) -> str | None:
    """The request_id in the data of a command that was refused unread, if there is one."""
    try:
        return msgspec.json.decode(data, type=_RequestId).request_id
    except (msgspec.DecodeError, RecursionError):
        return None


def reply_frame(channel: str, reply: Reply) -> bytes:
    """The frame that answers a command on the socket that sent it."""
    data = frames.json_string(reply.data_json())
    return frames.frame(frames.encode_event("goal.reply", channel, data))


class CommandPort(Protocol):
    """How sockets reach the goal commands."""

    async def execute(self, command: GoalCommand, identity: "Identity") -> Reply:
        """Runs a command; refusals are replies."""

    async def snapshot(self, user_id: str) -> bytes:
        """The JSON object of `goal.snapshot`; raises `StoreUnavailable`."""

    async def stream_is_live(self, streamer_id: str) -> bool:
        """Whether the streamer has an open session; raises `StoreUnavailable`."""
