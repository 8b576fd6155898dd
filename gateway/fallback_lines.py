r"""The lines of pusher-js's HTTP transports, made from ready WebSocket frames. Pure.

A line is a letter and JSON: `o{}` opened, `a["…",…]` messages, `h` heartbeat, `c[code,"reason"]`
closed; each ends with `\n`.

Source: docs/pusher-compatibility.md 1.10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

OPEN: Final = b"o{}\n"
HEARTBEAT: Final = b"h\n"

_encode = msgspec.json.Encoder().encode


def bodies_of(frames: bytes) -> Iterator[bytes]:
    """The bodies of joined, unmasked text frames as `gateway.frames.frame` makes them."""
    at, end = 0, len(frames)
    while at < end:
        length = frames[at + 1]
        at += 2
        if length == 126:
            length = int.from_bytes(frames[at : at + 2])
            at += 2
        elif length == 127:
            length = int.from_bytes(frames[at : at + 8])
            at += 8
        yield frames[at : at + length]
        at += length


def messages_line(frames: bytes) -> bytes:
    """The line that carries the messages of joined frames."""
    return b"a%b\n" % _encode([body.decode() for body in bodies_of(frames)])


def close_line(code: int, reason: str) -> bytes:
    """The line that ends a connection."""
    return b"c%b\n" % _encode([code, reason])


def length_in_browser(line: bytes) -> int:
    """How much longer `responseText` grows by it: UTF-16 code units."""
    if line.isascii():
        return len(line)
    return len(line.decode().encode("utf-16-le")) // 2


class SharedLines:
    """Makes each line once for all connections that are given the same frames one after another.

    Fan-out writes one bytes object to every connection of a channel.
    """

    __slots__ = ("_frames", "_line")

    def __init__(self) -> None:
        self._frames = b""
        self._line = b""

    def of(self, frames: bytes) -> bytes:
        """The line of `frames`."""
        if frames is not self._frames:
            self._frames, self._line = frames, messages_line(frames)
        return self._line
