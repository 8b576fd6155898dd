from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.errors import ERRORS, Code, CommandError, ErrorCode
from gateway.problem import BodyTooLargeError, DisconnectedError, problem, read_body, refusal
from statemachine.goal import RejectionCode


class Caller:
    """Sends a body in pieces and counts how many were asked for."""

    def __init__(self, *pieces: bytes, disconnects: bool = False) -> None:
        self._messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": piece, "more_body": n + 1 < len(pieces) or disconnects}
            for n, piece in enumerate(pieces)
        ]
        if disconnects:
            self._messages.append({"type": "http.disconnect"})
        self.asked = 0

    async def receive(self) -> dict[str, Any]:
        self.asked += 1
        return self._messages[self.asked - 1]


def scope(length: str | None = None) -> dict[str, Any]:
    return {"headers": [] if length is None else [(b"content-length", length.encode())]}


async def read(caller: Caller, length: str | None = None) -> bytes:
    return await read_body(scope(length), caller.receive, 10)


@pytest.mark.parametrize("pieces", [(b"",), (b"0123456789",), (b"01234", b"", b"56789")])
async def test_a_body_comes_in_any_number_of_pieces(pieces: tuple[bytes, ...]) -> None:
    assert await read(Caller(*pieces)) == b"".join(pieces)


async def test_a_body_that_announces_too_much_is_not_read_at_all() -> None:
    caller = Caller(b"")

    with pytest.raises(BodyTooLargeError):
        await read(caller, length="11")

    assert caller.asked == 0


async def test_a_body_that_grows_too_long_is_not_read_on() -> None:
    caller = Caller(b"0123456789", b"0", b"1", b"2")

    with pytest.raises(BodyTooLargeError):
        await read(caller)

    assert caller.asked == 2


@pytest.mark.parametrize("length", ["", "-1", "ten", "1" * 500])
async def test_a_length_that_is_none_does_not_help(length: str) -> None:
    with pytest.raises(BodyTooLargeError):
        await read(Caller(b"0123456789", b"0"), length=length)


async def test_a_caller_who_leaves_has_sent_no_body() -> None:
    with pytest.raises(DisconnectedError):
        await read(Caller(b"01", disconnects=True))


@pytest.mark.parametrize("code", list(ERRORS))
def test_every_code_makes_a_problem_document(code: Code) -> None:
    answer = refusal(code)

    document = json.loads(bytes(answer.body))
    assert answer.status_code == document["status"] == ERRORS[code].http_status
    assert answer.headers["content-type"] == "application/problem+json"
    assert document.keys() == {"type", "title", "status", "detail", "code", "retryable"}
    assert document["code"] == code.value
    assert document["title"]


def test_a_problem_can_show_the_goal_as_it_is() -> None:
    error = CommandError.of(RejectionCode.GOAL_ALREADY_AGREED)

    document = json.loads(bytes(problem(error, b'{"state":"agreed"}').body))

    assert document["goal"] == {"state": "agreed"}


def test_who_may_try_again_is_told_when() -> None:
    assert refusal(ErrorCode.UNAVAILABLE).headers["retry-after"] == "1"
    assert refusal(ErrorCode.RATE_LIMITED).headers["retry-after"] == "1"
    assert "retry-after" not in refusal(ErrorCode.MALFORMED).headers
