from __future__ import annotations

import json

import pytest

from gateway.bench.crowd import share_of
from gateway.bench.orders import Count, Room, stamped
from gateway.bench.tally import Tally


def tally_of(sockets: int, order: Count) -> Tally:
    tally = Tally()
    tally.counts = dict.fromkeys(range(sockets), 0)
    tally.begin(order)
    return tally


def receive(tally: Tally, fd: int, count: int) -> None:
    tally.counts[fd] += count
    tally.total_bytes += count
    tally.end_round()


def test_a_round_is_over_with_its_last_byte(capfd: pytest.CaptureFixture[str]) -> None:
    tally = tally_of(2, Count(round_bytes=10))

    receive(tally, 0, 10)
    receive(tally, 1, 9)
    before = capfd.readouterr().out
    receive(tally, 1, 1)
    after = capfd.readouterr().out

    assert before == ""
    assert json.loads(after)["number"] == 1


def test_what_one_socket_got_twice_does_not_hide_what_another_lost() -> None:
    tally = tally_of(2, Count(round_bytes=100))
    tally.counts.update({0: 15, 1: 5})

    told = tally.result(expected_bytes=10)

    assert (told.received_bytes, told.surplus_bytes) == (15, 5)


@pytest.mark.parametrize("cut", [1000, 90, 45, 44])
def test_every_event_is_timed_however_reads_join_and_cut_them_outside_the_stamp(
    cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bench.tally.time.monotonic", lambda: 2.0)
    event = b"." * 20 + b"at:" + stamped(1.5).encode() + b"." * 7
    stream = event * 6
    tally = tally_of(1, Count(round_bytes=0, event_bytes=len(event), stamp=b"at:"))

    for start in range(0, len(stream), cut):
        part = stream[start : start + cut]
        # What an earlier read left in the buffer is no event of this one.
        tally.time(start, bytearray(part + stream), len(part))

    assert tally.result(0).latencies_us == [500_000] * 6


def test_an_event_whose_stamp_was_cut_is_not_timed_and_the_next_one_is() -> None:
    event = b"at:" + stamped(0).encode()
    stream = event * 3
    tally = tally_of(1, Count(round_bytes=0, event_bytes=len(event), stamp=b"at:"))

    for start, end in ((0, 2), (2, 25), (25, 54)):
        tally.time(start, bytearray(stream[start:end] + stream), end - start)

    assert len(tally.result(0).latencies_us) == 2


@pytest.mark.parametrize("members", [1, 2, 3])
def test_every_socket_of_every_room_is_dealt_to_one_process_and_none_has_two_more(
    members: int,
) -> None:
    rooms = [Room(f"room-{number}", b"", sockets=number % 4) for number in range(12)]

    shares = [share_of(rooms, index, members) for index in range(members)]

    joined = [sum(room.sockets for room in share) for share in shares]
    for room in rooms:
        found = [mine.sockets for share in shares for mine in share if mine.channel == room.channel]
        assert sum(found) == room.sockets
    assert max(joined) - min(joined) <= 1
