"""A log that never waits for its reader."""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING, TextIO

import pytest
from structlog.testing import capture_logs

from gateway.log_stream import LogStream, unblocked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LINE = "x" * 999 + "\n"

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="a pipe is opened by its number")


@pytest.fixture(params=["pipe", pytest.param("socket", id="socket")])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, TextIO]]:
    """What is read from, and what is written to."""
    if request.param == "pipe":
        reading, writing = os.pipe()
    else:
        reading, writing = (one.detach() for one in socket.socketpair())
    with os.fdopen(writing, "w") as stream:
        yield reading, stream
    os.close(reading)


def drained(fd: int) -> str:
    os.set_blocking(fd, False)
    text = b""
    while True:
        try:
            text += os.read(fd, 1 << 20)
        except BlockingIOError:
            return text.decode()


def fill(stream: LogStream) -> int:
    """Writes until nothing is taken any more; tells how many lines that were."""
    count = 0
    while not stream._dropped:
        stream.write(LINE)
        count += 1
    return count


@only_linux
def test_what_finds_no_room_is_dropped_and_told_when_there_is_some(
    ends: tuple[int, TextIO],
) -> None:
    reading, standard_error = ends
    stream = unblocked(standard_error)
    assert isinstance(stream, LogStream)
    taken = fill(stream) - 1
    stream.write(LINE)

    text = drained(reading)
    with capture_logs() as told:
        stream.write("there is room\n")
    text += drained(reading)
    stream.close()

    assert told == [{"event": "log_lines_dropped", "lines": 2, "log_level": "warning"}]
    assert text == LINE * taken + "there is room\n"
    assert os.get_blocking(standard_error.fileno()), "others may write there, too"


@only_linux
def test_a_line_that_was_taken_in_part_is_ended_before_the_next() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as standard_error:
        stream = unblocked(standard_error)
        assert isinstance(stream, LogStream)
        long = "y" * 200_000 + "\n"
        stream.write(long)
        stream.write("dropped\n")

        text = drained(reading)
        stream.flush()
        text += drained(reading)
        while len(text) < len(long):
            stream.flush()
            text += drained(reading)
        stream.write("next\n")
        text += drained(reading)
        stream.close()

    assert text == long + "next\n"
    os.close(reading)


def test_a_file_is_written_to_as_ever(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        assert unblocked(file) is file
