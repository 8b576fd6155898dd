"""The frames that a client sends nearly always, cut out of what was read: no object per frame.

Whole text messages, pings and pongs, masked, shorter than 64 KiB. Every other frame, and every
broken one, is `UNUSUAL`: from there on websockets' parser reads the connection, which knows what
the RFC asks for. Pure.

Source: RFC 6455 section 5.2.
"""

from __future__ import annotations

from typing import Final

try:
    from websockets.speedups import apply_mask
except ImportError:
    from websockets.utils import apply_mask

# FIN and the opcode.
TEXT: Final = 0x81
PING: Final = 0x89
PONG: Final = 0x8A

_MASKED: Final = 0x80
# Control frames have at most 125 bytes: longer ones are broken (RFC 6455 section 5.5).
_SHORT_MAX: Final = _MASKED | 125
_TWO_BYTE_LENGTH: Final = _MASKED | 126

# In place of a frame's first byte.
INCOMPLETE: Final = 0
UNUSUAL: Final = -1

_INCOMPLETE: Final = (INCOMPLETE, b"", 0)
_UNUSUAL: Final = (UNUSUAL, b"", 0)


def next_frame(  # noqa: PLR0911  one return for each way in which it can't be told
    data: bytes, at: int, most_bytes: int
) -> tuple[int, bytes, int]:
    """The frame that begins at `at`: its kind, its payload and where the next one begins.

    Args:
        data: What was read.
        at: An index in it, not behind its end.
        most_bytes: How long a payload may be; a longer one is `UNUSUAL`.
    """
    if len(data) < at + 2:
        return _INCOMPLETE
    kind, second = data[at], data[at + 1]
    if kind != TEXT and kind != PING and kind != PONG:  # noqa: PLR1714  three times as fast
        return _UNUSUAL
    if _MASKED <= second <= _SHORT_MAX:
        length, mask_at = second & 0x7F, at + 2
    elif second == _TWO_BYTE_LENGTH and kind == TEXT:
        if len(data) < at + 4:
            return _INCOMPLETE
        length, mask_at = int.from_bytes(data[at + 2 : at + 4]), at + 4
    else:
        return _UNUSUAL
    if length > most_bytes:
        return _UNUSUAL
    start = mask_at + 4
    end = start + length
    if len(data) < end:
        return _INCOMPLETE
    return kind, apply_mask(data[start:end], data[mask_at:start]), end


def pong(payload: bytes) -> bytes:
    """The frame that answers a ping."""
    return bytes((PONG, len(payload))) + payload
