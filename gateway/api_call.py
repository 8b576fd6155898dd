"""A signed call of the Pusher HTTP API and its answer, as the routes see them.

Answers are what Pusher's own libraries expect: JSON on success, one line of text otherwise.

Source: docs/pusher-compatibility.md 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.apps import App
    from gateway.parts import Parts


class Answer(msgspec.Struct, frozen=True):
    """A status and a body; text unless it is JSON."""

    status: int
    body: bytes
    is_json: bool = False


@dataclass(slots=True)
class ApiCall:
    """A call whose signature was found good.

    Attributes:
        app: The one that signed.
        arguments: What the path names: a channel, a user.
        query: Parameters in lower case.
        body: Raw, within its bound.
        idempotency_key: As sent, unchecked.
    """

    app: App
    parts: Parts
    arguments: tuple[str, ...]
    query: Mapping[str, str]
    body: bytes
    idempotency_key: str | None


NOTHING: Final = Answer(200, b"{}", is_json=True)
UNREACHABLE: Final = Answer(503, b"the broker can't be reached; try again shortly\n")

_encode = msgspec.json.Encoder().encode


def refused(status: int, why: str) -> Answer:
    """An answer that says in one line of text why not."""
    return Answer(status, f"{why}\n".encode())


def answered(value: object, status: int = 200) -> Answer:
    """An answer in JSON; an empty mapping is `{}`."""
    return Answer(status, _encode(value), is_json=True)
