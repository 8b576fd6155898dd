"""The one table of errors, which answer a command, and the one of disconnects, which end a socket.

An error's code is for programs, its sentence for people; both are the same on a socket
(`goal.reply`) and over HTTP (RFC 9457). A disconnect's code tells the client whether to come
back: 4000-4099 no, 4100-4199 after a second, 4200-4299 at once.

Source: docs/protocol.md, docs/pusher-compatibility.md 1.9.
"""

from enum import IntEnum, StrEnum
from typing import Final, NamedTuple, TypeAlias

import msgspec

from statemachine.goal import RejectionCode


class ErrorCode(StrEnum):
    """Why the edge refuses; the state machine's own reasons are `RejectionCode`."""

    MALFORMED = "malformed"
    UNKNOWN_COMMAND = "unknown_command"
    UNKNOWN_GOAL = "unknown_goal"
    UNKNOWN_SESSION = "unknown_session"
    ALREADY_INVITED = "already_invited"
    PAYMENT_REFUSED = "payment_refused"
    BAD_USER_ID = "bad_user_id"
    BAD_REQUEST_ID = "bad_request_id"
    REQUEST_ID_REUSED = "request_id_reused"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    TIMED_OUT = "timed_out"
    RATE_LIMITED = "rate_limited"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    INCOMPLETE = "incomplete"
    BODY_TOO_LARGE = "body_too_large"
    URL_TOO_LONG = "url_too_long"
    HEAD_TOO_LONG = "head_too_long"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INTERNAL = "internal"


# Every `code` that an answer of Duet can carry.
Code: TypeAlias = RejectionCode | ErrorCode


class ErrorSpec(NamedTuple):
    """What stands behind a code.

    Attributes:
        http_status: The status of the HTTP answer.
        retryable: Whether the same command may succeed when sent again unchanged.
        sentence: For a person, when the place that refuses has nothing more exact to say.
    """

    http_status: int
    retryable: bool
    sentence: str


def _no(http_status: int, sentence: str) -> ErrorSpec:
    return ErrorSpec(http_status, False, sentence)


def _again(http_status: int, sentence: str) -> ErrorSpec:
    return ErrorSpec(http_status, True, sentence)


_R, _E = RejectionCode, ErrorCode

ERRORS: Final[dict[Code, ErrorSpec]] = {
    _R.NOT_YOUR_GOAL: _no(403, "This goal belongs to someone else."),
    _R.WRONG_ROLE: _no(403, "Your role can't do this."),
    _R.OWN_SESSION: _no(403, "You can't invite yourself."),
    _R.SESSION_ENDED: _no(409, "The stream has ended."),
    _R.SESSION_BUSY: _no(409, "The streamer has already agreed to a private show."),
    _R.AMOUNT_OUT_OF_RANGE: _no(422, "This amount is not allowed."),
    _R.DURATION_OUT_OF_RANGE: _no(422, "This duration is not allowed."),
    _R.GOAL_EXPIRED: _no(409, "This invitation has expired."),
    _R.GOAL_NOT_AGREED: _no(409, "This goal has not been agreed."),
    _R.GOAL_NOT_LIVE: _no(409, "This goal is not live."),
    _R.GOAL_NOT_DECLINED: _no(409, "This goal has not been declined."),
    _R.GOAL_ALREADY_INVITED: _no(409, "This goal already stands as an invitation."),
    _R.GOAL_ALREADY_AGREED: _no(409, "This goal has already been agreed."),
    _R.GOAL_ALREADY_LIVE: _no(409, "This goal is already live."),
    _R.GOAL_ALREADY_DECLINED: _no(409, "This goal has already been declined."),
    _R.GOAL_ALREADY_ENDED: _no(409, "This goal has already ended."),
    _R.TOO_EARLY: _no(409, "It is too early for this."),
    _E.MALFORMED: _no(400, "This is not what the command expects."),
    _E.UNKNOWN_COMMAND: _no(400, "There is no such command."),
    _E.UNKNOWN_GOAL: _no(404, "There is no such goal."),
    _E.UNKNOWN_SESSION: _no(404, "There is no such session."),
    _E.ALREADY_INVITED: _no(409, "Your invitation to this stream is still open."),
    _E.PAYMENT_REFUSED: _no(402, "The payment was refused."),
    _E.BAD_USER_ID: _no(
        400, "A user id has 1 to 64 of the characters A-Z, a-z, 0-9 and _ = @ , ; -."
    ),
    _E.BAD_REQUEST_ID: _no(400, "A request_id has 1 to 64 characters."),
    _E.REQUEST_ID_REUSED: _no(409, "This request_id was already used for another command."),
    _E.OVERLOADED: _again(503, "Too many commands are in progress; try again shortly."),
    _E.UNAVAILABLE: _again(503, "A part that Duet needs can't be reached; try again shortly."),
    _E.TIMED_OUT: _again(504, "No answer in time; send the same request_id again to learn more."),
    _E.RATE_LIMITED: _again(429, "Too many commands; slow down."),
    _E.UNAUTHENTICATED: _no(401, "A valid bearer token is required."),
    _E.FORBIDDEN: _no(403, "This is not yours to use."),
    _E.NOT_FOUND: _no(404, "There is nothing at this address."),
    _E.METHOD_NOT_ALLOWED: _no(405, "This address doesn't answer to this method."),
    _E.INCOMPLETE: _again(408, "The call did not come whole in time."),
    _E.BODY_TOO_LARGE: _no(413, "The body is too large."),
    _E.URL_TOO_LONG: _no(414, "The address is too long."),
    _E.HEAD_TOO_LONG: _no(431, "The header fields are too long."),
    _E.UNSUPPORTED_MEDIA_TYPE: _no(415, "The body must be JSON."),
    _E.INTERNAL: _again(500, "Something went wrong on our side."),
}

_BY_VALUE: Final = {code.value: code for code in ERRORS}

# A code that either list learns and this table lacks stops the process when it starts.
_UNCOVERED = {code.value for code in (*RejectionCode, *ErrorCode)} - _BY_VALUE.keys()
if _UNCOVERED:
    raise ValueError(f"gateway.errors has no entry for {', '.join(sorted(_UNCOVERED))}")


def code_of(value: str) -> Code:
    """The code that is written `value`; raises `KeyError` when there is none."""
    return _BY_VALUE[value]


class CommandError(msgspec.Struct, frozen=True):
    """Why a command was refused: the `error` of a `goal.reply`, the core of an HTTP problem."""

    code: Code
    message: str
    retryable: bool

    @classmethod
    def of(cls, code: Code, message: str | None = None) -> "CommandError":
        """The error of `code`, in the table's sentence unless there is a more exact one."""
        spec = ERRORS[code]
        return cls(code, message or spec.sentence, spec.retryable)

    @property
    def http_status(self) -> int:
        """The HTTP status that this error is answered with."""
        return ERRORS[self.code].http_status


class CloseCode(IntEnum):
    """Close codes of the Pusher protocol, by what a client does when it reads one."""

    # Stop.
    TLS_ONLY = 4000
    UNKNOWN_APP = 4001
    APP_DISABLED = 4003
    OVER_CONNECTION_QUOTA = 4004
    PATH_NOT_FOUND = 4005
    BAD_PROTOCOL_VERSION = 4006
    UNSUPPORTED_PROTOCOL = 4007
    NO_PROTOCOL = 4008
    UNAUTHORIZED = 4009
    # Come back after a second.
    OVER_CAPACITY = 4100
    # Come back at once.
    RECONNECT = 4200
    NO_PONG = 4201
    INACTIVE = 4202


class Disconnect(NamedTuple):
    """How a socket is ended: the close frame's code and its reason (at most 123 bytes)."""

    code: int
    reason: str


DISCONNECTS: Final[dict[CloseCode, Disconnect]] = {
    code: Disconnect(code, reason)
    for code, reason in (
        (CloseCode.TLS_ONLY, "This app only accepts connections over TLS"),
        (CloseCode.UNKNOWN_APP, "There is no app with this key"),
        (CloseCode.APP_DISABLED, "This app is disabled"),
        (CloseCode.OVER_CONNECTION_QUOTA, "This app has as many connections as it may have"),
        (CloseCode.PATH_NOT_FOUND, "There is nothing at this path"),
        (CloseCode.BAD_PROTOCOL_VERSION, "The protocol version is not a number"),
        (CloseCode.UNSUPPORTED_PROTOCOL, "Only the protocol versions 5, 6 and 7 are supported"),
        (CloseCode.NO_PROTOCOL, "The protocol version is missing"),
        (CloseCode.UNAUTHORIZED, "The connection is not authorized"),
        (CloseCode.OVER_CAPACITY, "The node is over capacity, connect again shortly"),
        (CloseCode.RECONNECT, "The node is being restarted, connect again"),
        (CloseCode.NO_PONG, "No pong arrived in time"),
        (CloseCode.INACTIVE, "The connection was inactive for too long"),
    )
}


class Notice(IntEnum):
    """Codes that a `pusher:error` frame carries and no close frame ever: pusher-js would stop."""

    CLIENT_EVENT_RATE = 4301
    WATCHLIST_LIMIT = 4302
