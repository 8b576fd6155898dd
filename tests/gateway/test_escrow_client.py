"""What goes over the wire to the payment service, and how its answers are read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
import time
from datetime import UTC, datetime
from itertools import product
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from bson import ObjectId
from prometheus_client.parser import text_string_to_metric_families

from gateway.escrow_client import EscrowClient, _answer, signature
from gateway.telemetry import Telemetry
from persistence.clock import Clock
from persistence.documents import EscrowCall
from persistence.escrow_port import CallStatus, EscrowAnswer, Verdict, backoff_s
from statemachine.goal import Movement
from tests.payment_service import SECRET, Fault, PaymentService

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

GOAL = "65a000000000000000000001"
KEY = f"{GOAL}:hold"
AT = datetime(2026, 11, 22, 17, 25, 0, 123_000, UTC)
CROWD = 400
YES = json.dumps({"key": KEY}).encode()


@pytest.fixture
def service() -> Iterator[PaymentService]:
    with PaymentService() as service:
        yield service


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest_asyncio.fixture
async def client(service: PaymentService, telemetry: Telemetry) -> AsyncIterator[EscrowClient]:
    client = EscrowClient(f"{service.url}/", SECRET, 0.5, Clock(), telemetry)
    yield client
    await client.close()


def hold() -> EscrowCall:
    return EscrowCall.model_construct(
        id=KEY,
        call=Movement.HOLD,
        goal_id=ObjectId(GOAL),
        session_id=ObjectId("65a000000000000000000002"),
        viewer_id="ben",
        streamer_id="anna",
        amount=500,
        reason="invited",
        at=AT,
        status=CallStatus.PENDING,
        since=AT,
    )


async def test_a_call_carries_its_key_and_a_signature_that_the_service_accepts(
    client: EscrowClient, service: PaymentService
) -> None:
    answer = await client.ask(hold(), 5)

    assert answer == EscrowAnswer(Verdict.ACKNOWLEDGED)
    assert service.asked == [("hold", KEY)]
    assert service.faults_seen == []
    assert service.accounts[GOAL].held == 500


async def test_a_wrong_secret_is_not_a_refusal(service: PaymentService) -> None:
    client = EscrowClient(service.url, "another secret", 0.5, Clock(), Telemetry())

    answer = await client.ask(hold(), 5)
    await client.close()

    assert answer == EscrowAnswer(Verdict.UNKNOWN, "401: who are you?")


async def test_nobody_at_the_address_is_unknown() -> None:
    client = EscrowClient("http://127.0.0.1:1", SECRET, 0.5, Clock(), Telemetry())

    answer = await client.ask(hold(), 5)
    await client.close()

    assert answer.verdict is Verdict.UNKNOWN
    assert answer.why.startswith("ConnectError")


async def test_the_shorter_of_the_two_times_ends_a_call(
    client: EscrowClient, service: PaymentService
) -> None:
    service.always("hold", Fault.HANG)

    of_caller = await client.ask(hold(), 0.05)
    of_setting = await client.ask(hold(), 60)

    assert of_caller == EscrowAnswer(Verdict.UNKNOWN, "no answer within 0.05 s")
    assert of_setting == EscrowAnswer(Verdict.UNKNOWN, "no answer within 0.5 s")


async def test_a_crowd_that_waits_for_a_service_that_hangs_takes_no_time_of_others() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        client = EscrowClient(url, SECRET, 0.5, Clock(), Telemetry())
        began_s = time.process_time()

        answers = await asyncio.gather(*(client.ask(hold(), 5) for _ in range(CROWD)))

        # The calls by themselves are 0.2 s of CPU; each looking at all others they were 6.
        assert time.process_time() - began_s < 2.0
        await client.close()
    assert {answer.why for answer in answers} == {"no answer within 0.5 s"}


async def test_who_gives_money_back_does_not_wait_behind_holds(
    service: PaymentService,
) -> None:
    client = EscrowClient(service.url, SECRET, 60, Clock(), Telemetry())
    service.always("hold", Fault.HANG)
    release = hold().model_copy(update={"id": f"{GOAL}:close", "call": Movement.RELEASE})
    service.accounts[GOAL].held = release.amount
    async with asyncio.TaskGroup() as group:
        holds = [group.create_task(client.ask(hold(), 60)) for _ in range(100)]
        await service.until("as many hold as can", lambda: len(service.asked) >= 64)

        answer = await client.ask(release, 30)

        for each in holds:
            each.cancel()
    await client.close()
    assert answer.verdict is Verdict.ACKNOWLEDGED


async def test_no_cookie_is_kept() -> None:
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        told = b"HTTP/1.1 503 Later\r\nSet-Cookie: state=1; Path=/\r\nContent-Length: 0\r\n\r\n"
        writer.write(told)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    client = EscrowClient(url, SECRET, 5, Clock(), Telemetry())

    for _ in range(2):
        await client.ask(hold(), 5)

    await client.close()
    server.close()
    assert len(heads) == 2
    assert b"cookie" not in heads[1].lower()


async def test_answers_are_counted_by_call_and_verdict(
    client: EscrowClient, service: PaymentService, telemetry: Telemetry
) -> None:
    service.plan("hold", Fault.ERROR)

    await client.ask(hold(), 5)
    await client.ask(hold(), 5)

    counted = {
        sample.labels["verdict"]: sample.value
        for family in text_string_to_metric_families(telemetry.exposition().decode())
        for sample in family.samples
        if sample.name == "duet_escrow_call_duration_seconds_count"
    }
    assert counted == {"unknown": 1, "acknowledged": 1}


def test_the_signature_is_the_hmac_of_timestamp_and_body() -> None:
    wanted = hmac.new(b"secret", b'1700000000{"key":1}', hashlib.sha256).hexdigest()

    assert signature(b"secret", "1700000000", b'{"key":1}') == wanted


@pytest.mark.parametrize("status", [200, 201, 202, 299])
def test_a_success_with_the_key_is_acknowledged(status: int) -> None:
    assert _answer(status, YES, KEY).verdict is Verdict.ACKNOWLEDGED


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"<h1>It works!</h1>", b"[]", b"{}", b'{"key":null}', b'{"key":"other"}', b"\xff"),
        b'{"a":' * 10_000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_success_without_the_key_is_not(content: bytes) -> None:
    assert _answer(200, content, KEY).verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("status", [400, 402, 403, 409, 410, 422, 451])
def test_a_no_of_the_service_is_one(status: int) -> None:
    why = f"{status}: {YES.decode()}"

    assert _answer(status, YES, KEY) == EscrowAnswer(Verdict.REFUSED, why)


@pytest.mark.parametrize("status", [402, 422])
@pytest.mark.parametrize("content", [b"", b"not enough money", b'{"error":"no"}', b'{"key":null}'])
def test_a_no_that_only_a_service_says_needs_no_key(status: int, content: bytes) -> None:
    assert _answer(status, content, KEY).verdict is Verdict.REFUSED


@pytest.mark.parametrize(
    ("status", "content"),
    [
        *product((400, 403, 405, 409, 413, 421, 431), (b"", b"<h1>Blocked</h1>")),
        *product((400, 402, 403, 409, 422), (b'{"key":"other"}',)),
    ],
)
def test_a_no_without_the_key_may_be_anybodys(status: int, content: bytes) -> None:
    """A proxy's page, or the answer to another call, refuses nobody's payment."""
    answer = _answer(status, content, KEY)

    assert answer.verdict is Verdict.UNKNOWN
    assert answer.why.startswith(f"{status} without the key")


@pytest.mark.parametrize("status", [301, 302, 401, 404, 408, 425, 429, 500, 502, 503, 504, 599])
def test_what_tells_of_the_way_there_is_neither(status: int) -> None:
    assert _answer(status, YES, KEY).verdict is Verdict.UNKNOWN


def test_what_the_service_says_is_kept_as_one_short_line() -> None:
    why = _answer(500, b"a\r\n\x1b[31mb\x00" + b"c" * 1000, KEY).why

    assert why.startswith("500: a [31mb c")
    assert len(why) <= 300
    assert why.isprintable()


@pytest.mark.parametrize("attempts", [1, 2, 5, 8, 100, 10_000])
def test_the_backoff_doubles_up_to_a_minute_and_is_spread(attempts: int) -> None:
    whole_s = min(60.0, 0.5 * 2 ** min(attempts - 1, 50))

    waits = [backoff_s(attempts, 0.5) for _ in range(50)]

    assert all(whole_s / 2 <= wait <= whole_s for wait in waits)
    assert len(set(waits)) > 1
