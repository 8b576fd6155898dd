"""The service in `docs/escrow.md` does what the page says, asked by Duet's own client."""

from __future__ import annotations

import re
import socket
import sqlite3
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import uvicorn

from gateway.escrow_client import EscrowClient
from gateway.telemetry import Telemetry
from persistence.clock import Clock
from persistence.escrow_port import EscrowAnswer, Verdict
from statemachine.goal import Movement
from tests.gateway.test_escrow_client import KEY, hold

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

SECRET = "what-the-example-and-duet-share-for-a-test"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "escrow.md"


@pytest.fixture
def books(tmp_path: Path) -> Path:
    return tmp_path / "books.db"


@pytest.fixture
def url(books: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example, as it stands on the page, on a socket."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setenv("DUET_ESCROW_SECRET", SECRET)
    monkeypatch.setenv("BOOKS", str(books))
    listener = socket.create_server(("127.0.0.1", 0))
    server: list[uvicorn.Server] = []
    running = threading.Event()
    fault: list[BaseException] = []

    def serve() -> None:
        # In one thread from the first line, as SQLite wants it.
        module: dict[str, Any] = {"__name__": "service"}
        try:
            exec(compile(source, str(PAGE), "exec"), module)
            config = uvicorn.Config(module["app"], log_config=None, lifespan="off")
            server.append(uvicorn.Server(config))
        except Exception as error:
            fault.append(error)
            raise
        finally:
            running.set()
        server[0].run([listener])
        module["books"].close()

    thread = threading.Thread(target=serve)
    thread.start()
    running.wait()
    assert not fault
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server[0].should_exit = True
    thread.join()
    listener.close()


@pytest_asyncio.fixture
async def client(url: str) -> AsyncIterator[EscrowClient]:
    client = EscrowClient(url, SECRET, 5.0, Clock(), Telemetry())
    yield client
    await client.close()


def answers(books: Path) -> list[tuple[str, int]]:
    connection = sqlite3.connect(books)
    rows = connection.execute("SELECT key, status FROM answers").fetchall()
    connection.close()
    return rows


async def test_it_holds_and_closes_each_once(client: EscrowClient, books: Path) -> None:
    close = hold().model_copy(update={"id": KEY.replace("hold", "close"), "call": Movement.RELEASE})

    verdicts = [(await client.ask(call, 5)).verdict for call in (hold(), hold(), close, close)]

    assert verdicts == [Verdict.ACKNOWLEDGED] * 4
    assert answers(books) == [(KEY, 200), (close.id, 200)]


async def test_its_refusal_of_a_hold_stands(client: EscrowClient, books: Path) -> None:
    dear = hold().model_copy(update={"amount": 10_001})

    first = await client.ask(dear, 5)
    again = await client.ask(dear, 5)

    assert first == again
    assert first.verdict is Verdict.REFUSED
    assert answers(books) == [(KEY, 402)]


async def test_it_answers_nobody_who_does_not_know_the_secret(url: str, books: Path) -> None:
    stranger = EscrowClient(url, "guessed", 5.0, Clock(), Telemetry())

    answer = await stranger.ask(hold(), 5)
    await stranger.close()

    assert answer == EscrowAnswer(Verdict.UNKNOWN, "401: {}")
    assert answers(books) == []


async def test_it_answers_no_call_that_is_too_old(url: str, books: Path) -> None:
    clock = Clock()
    clock.shift(-3600)
    late = EscrowClient(url, SECRET, 5.0, clock, Telemetry())

    answer = await late.ask(hold(), 5)
    await late.close()

    assert answer == EscrowAnswer(Verdict.UNKNOWN, "401: {}")
    assert answers(books) == []
