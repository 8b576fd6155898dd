"""What the sockets of a generator process received, and how it is told."""

from __future__ import annotations

import os
import sys
import time

from gateway.bench.orders import STAMP_DIGITS, Answer, Count, RoundOver, Told, encode_line


def tell(answer: Answer) -> None:
    """Writes an answer, however long, to standard output."""
    line = memoryview(encode_line(answer))
    while line:
        line = line[os.write(sys.stdout.fileno(), line) :]


class Tally:
    """What the sockets received: bytes, rounds and, when asked for, each event's time.

    Attributes:
        counts: descriptor -> bytes since `begin`; closed sockets stay.
        total_bytes: Of all sockets.
        target_bytes: With which the next round is over.
        is_timed: Whether `time` wants to see each read.
    """

    __slots__ = (
        "_event_bytes",
        "_latencies_us",
        "_offset",
        "_round_bytes",
        "_rounds",
        "_stamp",
        "counts",
        "is_timed",
        "target_bytes",
        "total_bytes",
    )

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.total_bytes = 0
        self.target_bytes = sys.maxsize
        self.is_timed = False
        self._round_bytes = 0
        self._rounds = 0
        self._event_bytes = 0
        self._stamp = b""
        self._offset = -1
        self._latencies_us: list[int] = []

    def begin(self, order: Count) -> None:
        """Counts from zero."""
        self.counts = dict.fromkeys(self.counts, 0)
        self.total_bytes = 0
        self._rounds = 0
        self._round_bytes = order.round_bytes * len(self.counts)
        self.target_bytes = self._round_bytes or sys.maxsize
        self.is_timed = order.event_bytes > 0
        self._event_bytes = order.event_bytes
        self._stamp = order.stamp
        self._offset = -1
        self._latencies_us = []

    def end_round(self) -> None:
        """Reports the rounds whose last byte has come."""
        at_s = time.monotonic()
        while self.total_bytes >= self.target_bytes:
            self._rounds += 1
            self.target_bytes += self._round_bytes
            tell(RoundOver(self._rounds, at_s))

    def time(self, before: int, data: bytearray, count: int) -> None:
        """Notes how long ago each event was sent whose stamp was read.

        Args:
            before: How many bytes the socket had received before.
            data: What was read now, and behind it what was read earlier.
            count: How many bytes were read now.
        """
        now_us = int(time.monotonic() * 1e6)
        if self._offset < 0:
            found = data.find(self._stamp, 0, count)
            if found < 0:
                return
            # Events are equally long, so it lies at the same place in each.
            self._offset = (before + found + len(self._stamp)) % self._event_bytes
        start = self._offset - before % self._event_bytes
        while start + STAMP_DIGITS <= count:
            if start >= 0:  # else a read cut this event in front of its stamp
                self._latencies_us.append(now_us - int(data[start : start + STAMP_DIGITS]))
            start += self._event_bytes

    def result(self, expected_bytes: int) -> Told:
        """What came, compared socket by socket with what had to come."""
        received = sum(min(count, expected_bytes) for count in self.counts.values())
        return Told(
            cpu_s=time.process_time(),
            received_bytes=received,
            surplus_bytes=sum(self.counts.values()) - received,
            latencies_us=self._latencies_us,
        )
