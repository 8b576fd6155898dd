"""What a benchmark tells its audience processes, and what they answer: JSON lines through a pipe.

Commands go to a process's standard input, answers come from its standard output. Instants are
monotonic seconds: one clock for all processes of a machine.
"""

from __future__ import annotations

import msgspec

# In a subscription of a private channel: where the 64 digits of the signature go.
SIGNATURE_PLACE = b"$" * 64


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """A text that a message of the server contains, and the frame that a client answers it with."""

    awaited: bytes
    answer: bytes


class Manners(msgspec.Struct, frozen=True):
    """How a server greets its clients, confirms a subscription and is kept awake.

    Attributes:
        greetings: Before the subscription, in that order.
        welcome: A text in the message after which a client subscribes.
        confirmed: A text in the message that confirms a subscription.
        refused: Texts in messages that refuse one for good: asking again would not help.
        failed: Texts in messages after which a client has to come anew.
        ping: The frame with which a silent client asks whether the server is there; empty: none.
        pong: A text in its answer.
        asked: A text in the server's own question; empty: it has none.
        reply: The frame that answers it.
    """

    welcome: bytes
    confirmed: bytes
    greetings: tuple[Greeting, ...] = ()
    refused: tuple[bytes, ...] = ()
    failed: tuple[bytes, ...] = ()
    ping: bytes = b""
    pong: bytes = b""
    asked: bytes = b""
    reply: bytes = b""


class Room(msgspec.Struct, frozen=True, array_like=True):
    """A channel and how many sockets are to be on it.

    Attributes:
        subscribe_frame: Holds `SIGNATURE_PLACE` when the channel needs a signature.
    """

    channel: str
    subscribe_frame: bytes
    sockets: int


class Join(msgspec.Struct, frozen=True, tag=True):
    """Open sockets, `in_flight` at a time, and subscribe each; brings `Joined`s, then `Within`.

    Attributes:
        deadline_s: How long one attempt may take.
        retry_s: How long a socket waits before its next attempt; None: a failure ends the process.
        secret: What private channels are signed with.
    """

    host: str
    port: int
    path: str
    rooms: tuple[Room, ...]
    manners: Manners
    in_flight: int
    deadline_s: float
    retry_s: float | None = None
    secret: str = ""


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Close every socket at once, with a reset; answered by `Left`."""


class Count(msgspec.Struct, frozen=True, tag=True):
    """Count from zero, in rounds of `round_bytes` per socket; answered by `Counting`.

    Attributes:
        event_bytes: Length of one event, when each is to be timed.
        stamp: The text before each event's `STAMP_DIGITS` digits: when it was sent, in monotonic
            microseconds.
    """

    round_bytes: int
    event_bytes: int = 0
    stamp: bytes = b""


class Tell(msgspec.Struct, frozen=True, tag=True):
    """Tell what came since `Count`, of `expected_bytes` per socket; answered by `Told`."""

    expected_bytes: int


class Keep(msgspec.Struct, frozen=True, tag=True):
    """Ping as clients do, each socket every `every_s`, and answer pings; answered by `Counting`."""

    every_s: float


class Kept(msgspec.Struct, frozen=True, tag=True):
    """Stop pinging and tell what came; answered by `Awake`."""


class Joined(msgspec.Struct, frozen=True, tag=True):
    """So many sockets are subscribed by now; 0, unasked, once the process is there."""

    sockets: int


class Within(msgspec.Struct, frozen=True, tag=True):
    """Every socket is subscribed.

    Attributes:
        at_s: When the last one was.
        latencies_us: Of each socket, from its last attempt's begin to its subscription.
        failures: Attempts that were refused, cut or too late, and were made again.
        cpu_s: CPU time of this process while it joined.
    """

    at_s: float
    latencies_us: list[int]
    failures: int
    cpu_s: float


class Left(msgspec.Struct, frozen=True, tag=True):
    """All sockets are closed since that time."""

    at_s: float


class Counting(msgspec.Struct, frozen=True, tag=True):
    """Counting has begun; `cpu_s` is this process's CPU time so far."""

    cpu_s: float


class RoundOver(msgspec.Struct, frozen=True, tag=True):
    """The last byte of the round, numbered from 1, arrived at that monotonic time."""

    number: int
    at_s: float


class Told(msgspec.Struct, frozen=True, tag=True):
    """What all sockets together received of what was expected.

    Attributes:
        received_bytes: Counted up to what was expected, socket by socket, so that what one socket
            got twice doesn't hide what another lost.
        surplus_bytes: What came beyond that.
        latencies_us: Of each event that was timed.
    """

    cpu_s: float
    received_bytes: int
    surplus_bytes: int
    latencies_us: list[int] = []


class Awake(msgspec.Struct, frozen=True, tag=True):
    """What the sockets did while nothing was published.

    Attributes:
        lost: Sockets that were closed by the server.
    """

    cpu_s: float
    pings: int
    pongs: int
    lost: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Why this process can't go on."""

    message: str


Command = Join | Leave | Count | Tell | Keep | Kept
Answer = Joined | Within | Left | Counting | RoundOver | Told | Awake | Failed

STAMP_DIGITS = 15

_encode = msgspec.json.Encoder().encode
decode_command = msgspec.json.Decoder(Command).decode
decode_answer = msgspec.json.Decoder(Answer).decode


def encode_line(message: Command | Answer) -> bytes:
    """One command or answer as it goes through the pipe."""
    return _encode(message) + b"\n"


def stamped(at_s: float) -> str:
    """An instant as an event carries it."""
    return f"{int(at_s * 1e6):0{STAMP_DIGITS}d}"
