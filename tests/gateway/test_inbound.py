"""The usual frames of a client: cut as the library cuts them, everything else left to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from gateway import inbound
from tests.gateway.harness import masked_frame

MOST_BYTES = 70_000
KINDS = {inbound.TEXT: Opcode.TEXT, inbound.PING: Opcode.PING, inbound.PONG: Opcode.PONG}

texts = st.tuples(st.just(1), st.binary(max_size=300))
controls = st.tuples(st.sampled_from([9, 10]), st.binary(max_size=125))


def cut(data: bytes) -> list[tuple[int, bytes]]:
    """The complete frames at the beginning of `data`."""
    at, found = 0, []
    while at < len(data):
        kind, payload, end = inbound.next_frame(data, at, MOST_BYTES)
        if kind in {inbound.INCOMPLETE, inbound.UNUSUAL}:
            break
        found.append((kind, payload))
        at = end
    return found


@given(st.lists(texts | controls, max_size=5), st.integers(min_value=0, max_value=20))
def test_frames_are_cut_as_the_library_cuts_them(
    frames: list[tuple[int, bytes]], missing: int
) -> None:
    data = b"".join(masked_frame(opcode, payload) for opcode, payload in frames)
    data = data[: max(0, len(data) - missing)]
    wire = ServerProtocol(state=State.OPEN)

    wire.receive_data(data)

    events = [event for event in wire.events_received() if isinstance(event, Frame)]
    expected = [(event.opcode, bytes(event.data)) for event in events]
    assert [(KINDS[kind], payload) for kind, payload in cut(data)] == expected


@pytest.mark.parametrize("length", [0, 125, 126, 65_535])
def test_a_text_may_have_any_length_of_two_bytes(length: int) -> None:
    assert cut(masked_frame(1, b"a" * length)) == [(inbound.TEXT, b"a" * length)]


@pytest.mark.parametrize(
    "data",
    [
        masked_frame(1, b"{", fin=False),
        masked_frame(0, b"}"),
        masked_frame(2, b"binary"),
        masked_frame(8, b"\x03\xe8"),
        masked_frame(3, b"reserved"),
        masked_frame(9, b"p" * 126),
        masked_frame(1, b"a" * 65_536),
        b"\xc1" + masked_frame(1, b"{}")[1:],
        b"\x81\x02{}",
    ],
    ids=[
        "fragment",
        "continuation",
        "binary",
        "close",
        "reserved opcode",
        "long ping",
        "long text",
        "reserved bit",
        "not masked",
    ],
)
def test_every_other_frame_is_unusual(data: bytes) -> None:
    assert inbound.next_frame(data, 0, MOST_BYTES)[0] == inbound.UNUSUAL


def test_a_text_over_the_limit_is_unusual_before_it_has_come() -> None:
    head = masked_frame(1, b"a" * 2_000)[:8]

    assert inbound.next_frame(head, 0, 2_000)[0] == inbound.INCOMPLETE
    assert inbound.next_frame(head, 0, 1_999)[0] == inbound.UNUSUAL


def test_a_ping_is_answered_by_its_payload() -> None:
    assert inbound.pong(b"abc") == b"\x8a\x03abc"
