"""Our own reading of frames against the library's: the same bytes, the same end."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.protocol import State

from tests.guard.stage import Stage, Wire, connection_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PING = b'{"event":"pusher:ping","data":{}}'
SUBSCRIBE = b'{"event":"pusher:subscribe","data":{"channel":"news"}}'


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    stage.node.settings = stage.node.settings.model_copy(update={"max_message_bytes": 1_024})
    # Somebody stays on the channel, so that each subscription to it is as quick as the other.
    stays = Wire()
    stage.connect(stays)
    stage.receive(stays, usual_frame(1, SUBSCRIBE))
    assert b"subscription_succeeded" in stays.written[-1]
    yield stage
    stage.close()


@pytest.fixture
def faults(stage: Stage) -> list[object]:
    """What a callback has raised; a transport would drop its connection for it."""
    faults: list[object] = []
    stage.loop.set_exception_handler(lambda _loop, context: faults.append(context))
    return faults


def raw_frame(first: int, payload: bytes, *, masked: bool, length_form: int) -> bytes:
    """A frame as nobody should send it; its length may take more bytes than it needs."""
    size = len(payload)
    form = max(length_form, 126 if size > 125 else 0)
    head = bytes((first, (0x80 if masked else 0) | (form if form >= 126 else size)))
    head += size.to_bytes({126: 2, 127: 8}.get(form, 0)) if form >= 126 else b""
    mask = b"\x01\x80\x7f\x3c"
    if not masked:
        return head + payload
    return head + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))


def usual_frame(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    return raw_frame((0x80 if fin else 0) | opcode, payload, masked=True, length_form=0)


texts = st.sampled_from(
    [
        PING,
        SUBSCRIBE,
        b'{"event":"client-e","channel":"news","data":"\xc3\xa4"}',
        b"",
        b"\xff",
        b"\xc3",
        b"not json",
        b'{"event":"pusher:ping","data":"' + b"x" * 400 + b'"}',
        b"y" * 1_100,
    ]
)
payloads = texts | st.binary(max_size=130) | st.just(b"\x03\xe8bye") | st.just(b"\x03\xed")
usual = st.builds(usual_frame, st.just(1), texts) | st.builds(
    usual_frame, st.sampled_from([9, 10]), st.binary(max_size=125)
)
fragments = st.builds(
    lambda text, at, between: (
        usual_frame(1, text[:at], fin=False) + between + usual_frame(0, text[at:])
    ),
    texts,
    st.integers(0, 60),
    st.sampled_from([b"", usual_frame(9, b"between"), usual_frame(0, b"", fin=False)]),
)
odd = st.builds(
    raw_frame,
    st.integers(0, 255) | st.sampled_from([0x80, 0x81, 0x01, 0x82, 0x88, 0x89, 0x8A, 0xC1, 0x83]),
    payloads,
    masked=st.integers(0, 9).map(bool),
    length_form=st.sampled_from([0, 0, 126, 127]),
)
streams = st.lists(usual | usual | fragments | odd, max_size=6).map(b"".join)


def outcome(stage: Stage, pieces: Sequence[bytes], *, by_the_library: bool) -> tuple[bytes, bool]:
    """What a connection writes to a peer that sends this, and whether it has ended."""
    wire = Wire()
    stage.connect(wire)
    connection = connection_of(wire)
    if by_the_library:
        connection._wire = connection._new_wire(State.OPEN)
    wire.written.clear()
    for piece in pieces:
        if wire.protocol is not None:
            stage.receive(wire, piece)
    ended = wire.protocol is None or not connection.is_open
    stage.loop.do(wire.abort)
    stage.wires.remove(wire)
    return b"".join(wire.written), ended


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    at = [0, *sorted(min(place, len(stream)) for place in places), len(stream)]
    return [stream[start:end] for start, end in itertools.pairwise(at) if start < end]


@settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(streams, st.lists(st.integers(0, 600), max_size=6))
def test_bytes_cut_anywhere_end_as_the_library_ends_them(
    stage: Stage, faults: list[object], stream: bytes, places: list[int]
) -> None:
    pieces = cut(stream, places)

    ours = outcome(stage, pieces, by_the_library=False)

    assert ours == outcome(stage, pieces, by_the_library=True)
    assert ours == outcome(stage, [stream], by_the_library=False)
    assert not faults


BROKEN_TEXT = usual_frame(1, b"\xff")
CLOSE = usual_frame(8, (1000).to_bytes(2))
# After it the library's parser reads the connection.
UNUSUAL = usual_frame(1, PING[:9], fin=False) + usual_frame(0, PING[9:])


@pytest.mark.parametrize("follows", [CLOSE, usual_frame(3, b""), usual_frame(9, b"p") + CLOSE])
def test_what_is_read_behind_a_message_that_ends_the_connection_disturbs_nobody(
    stage: Stage, faults: list[object], follows: bytes
) -> None:
    stream = UNUSUAL + usual_frame(9, b"q") + BROKEN_TEXT + follows

    written, _ = outcome(stage, [stream], by_the_library=False)

    # The last words are our close frame, with nothing behind it.
    assert written.endswith(b"\x88\x1a" + (1007).to_bytes(2) + b"The message is not UTF-8")
    assert b"\x8a\x01q" in written
    assert b"\x8a\x01p" not in written
    assert not faults


class PausedWire(Wire):
    """A transport that knows whether it is to read."""

    reads = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


@pytest.mark.parametrize("ends", [False, True])
def test_nothing_more_is_read_before_a_long_read_is_taken(stage: Stage, ends: bool) -> None:
    wire = PausedWire()
    stage.connect(wire)
    connection = connection_of(wire)
    still_reads = []

    def flood() -> None:
        connection.data_received(usual_frame(1, PING) * 2_000)
        # As a subscription that has succeeded does, or whoever ends the connection.
        if ends:
            connection.disconnect(4009)
        else:
            connection.resume_reading()
        still_reads.append(wire.reads)

    stage.loop.do(flood)

    assert still_reads == [False]
    assert wire.reads
