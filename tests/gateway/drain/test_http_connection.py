"""How a connection on the HTTP side ends: every whole call is answered, in order, and why is said.

Source: RFC 9112 sections 9.3.2, 9.5 and 9.6.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import pytest
from starlette.responses import Response
from starlette.routing import Route

from gateway.server import running_gateway
from tests.gateway.caller import Caller
from tests.gateway.member import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from gateway.apps import Apps
    from gateway.settings import Settings

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
GARBAGE = b"\x16\x03\x01 this is no HTTP\r\n\r\n"


@contextlib.asynccontextmanager
async def calling(settings: Settings, apps: Apps, *routes: Route) -> AsyncIterator[Caller]:
    async with running_gateway(settings, apps, routes=routes) as gateway, Caller(gateway) as caller:
        yield caller


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"drain_s": 0})


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    """Calls have to come soon."""
    return settings.model_copy(update={"handshake_timeout_s": 0.2})


async def answers(caller: Caller) -> list[tuple[int, bytes]]:
    """Status and body of each answer, until the connection's end."""
    found: list[tuple[int, bytes]] = []
    while True:
        try:
            status, _, body = await caller.answer()
        except asyncio.IncompleteReadError as rest:
            return [*found, (0, rest.partial)] if rest.partial else found
        found.append((status, body))


def code(answer: tuple[int, bytes]) -> tuple[int, str]:
    status, body = answer
    return status, json.loads(body)["code"]


# What can't be read


async def test_a_publication_is_answered_before_the_garbage_behind_it(
    settings: Settings, apps: Apps
) -> None:
    async with calling(settings, apps) as caller:
        caller.writer.write(caller.call("c") + GARBAGE)

        first, second = await answers(caller)

    assert first == (200, b"{}")
    assert code(second) == (400, "malformed")


async def test_every_call_is_answered_before_the_garbage_behind_them(
    settings: Settings, apps: Apps
) -> None:
    async with calling(settings, apps) as caller:
        calls = [GET, caller.call("c"), GET, caller.call("c", chunked=True)]
        caller.writer.write(b"".join(calls) + GARBAGE)

        *before, last = await answers(caller)

    assert [status for status, _ in before] == [200] * 4
    assert code(last) == (400, "malformed")


async def test_garbage_amid_a_body_takes_no_answer_but_its_calls(
    settings: Settings, apps: Apps
) -> None:
    async with calling(settings, apps) as caller:
        broken = caller.call("c", chunked=True).replace(b"0\r\n\r\n", b"no size\r\n")
        caller.writer.write(GET + caller.call("c") + broken)

        first, second, third = await answers(caller)

    assert [first, second] == [(200, b"ok\n"), (200, b"{}")]
    assert code(third) == (400, "malformed")


async def test_a_body_that_breaks_while_it_is_read_is_answered_once(
    settings: Settings, apps: Apps, caplog: pytest.LogCaptureFixture
) -> None:
    reading = asyncio.Event()

    async def read(request: Request) -> Response:
        reading.set()
        return Response(await request.body())

    async with calling(settings, apps, Route("/read", read, methods=["POST"])) as caller:
        caller.writer.write(
            b"POST /read HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
        )
        async with asyncio.timeout(PATIENCE_S):
            await reading.wait()
        caller.writer.write(b"no size\r\n")

        [only] = await answers(caller)

    assert code(only) == (400, "malformed")


@pytest.mark.parametrize(
    ("head", "refused"),
    [
        (b"GET /healthz?q=" + b"x" * 2_000_000, (414, "url_too_long")),
        (
            b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X-Much: x\r\n" * 200_000,
            (431, "head_too_long"),
        ),
    ],
    ids=["address", "fields"],
)
async def test_a_head_without_end_is_refused_in_words_that_arrive(
    settings: Settings, apps: Apps, head: bytes, refused: tuple[int, str]
) -> None:
    async with calling(settings, apps) as caller:
        caller.writer.write(GET + head)

        first, second = await answers(caller)

    assert first == (200, b"ok\n")
    assert code(second) == refused


# What does not come


@pytest.mark.parametrize(
    "half",
    [
        b"GET /healthz HTTP/1.1\r\n",
        b"POST /apps/1/events HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
        b"POST /apps/1/events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
    ],
    ids=["half a head", "half a plain publication", "half a body"],
)
@pytest.mark.parametrize("before", [b"", GET], ids=["first", "second"])
async def test_a_call_that_does_not_come_in_time_is_told_so(
    impatient: Settings, apps: Apps, half: bytes, before: bytes
) -> None:
    async with calling(impatient, apps) as caller:
        caller.writer.write(before + half)

        *earlier, last = await answers(caller)

    assert earlier == ([(200, b"ok\n")] if before else [])
    assert code(last) == (408, "incomplete")


async def test_a_call_that_was_refused_before_its_body_came_gets_no_second_answer(
    impatient: Settings, apps: Apps
) -> None:
    async with calling(impatient, apps) as caller:
        caller.writer.write(caller.call("c", body=b"x" * 500_000)[:1_000])

        [only] = await answers(caller)

    assert only[0] == 413


# Who closes his sending side


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "ordinary"])
async def test_who_half_closes_behind_a_publication_is_answered(
    settings: Settings, apps: Apps, chunked: bool
) -> None:
    async with calling(settings, apps) as caller:
        caller.writer.write(caller.call("c", chunked=chunked))
        caller.writer.write_eof()

        assert await answers(caller) == [(200, b"{}")]


async def test_who_half_closes_behind_many_calls_has_all_of_them_answered(
    settings: Settings, apps: Apps
) -> None:
    async with calling(settings, apps) as caller:
        caller.writer.write((GET + caller.call("c") + caller.call("c", chunked=True)) * 10)
        caller.writer.write_eof()

        assert [status for status, _ in await answers(caller)] == [200] * 30


async def test_who_half_closes_amid_a_call_is_told_that_it_is_not_whole(
    settings: Settings, apps: Apps
) -> None:
    async with calling(settings, apps) as caller:
        caller.writer.write(caller.call("c") + caller.call("c")[:-1])
        caller.writer.write_eof()

        first, second = await answers(caller)

    assert first == (200, b"{}")
    assert code(second) == (400, "malformed")


async def test_who_half_closes_an_idle_connection_has_it_closed(
    settings: Settings, apps: Apps
) -> None:
    async with calling(settings, apps) as caller:
        caller.writer.write(GET)
        await caller.answer()
        caller.writer.write_eof()

        assert await answers(caller) == []


async def test_a_call_that_waits_for_its_callers_leaving_hears_of_it_and_may_still_answer(
    settings: Settings, apps: Apps
) -> None:
    asked = asyncio.Event()

    async def patient(request: Request) -> Response:
        await request.body()
        asked.set()
        # Twice: it stays so.
        heard = [(await request.receive())["type"] for _ in range(2)]
        return Response(" ".join(heard))

    async with calling(settings, apps, Route("/patient", patient)) as caller:
        caller.writer.write(b"GET /patient HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(PATIENCE_S):
            await asked.wait()
        caller.writer.write_eof()

        assert await answers(caller) == [(200, b"http.disconnect http.disconnect")]
