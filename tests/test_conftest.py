"""A missing real part is a skip for a person and a failure on CI; cancelled connects are closed."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest
import uvloop

from tests.conftest import require

if TYPE_CHECKING:
    from collections.abc import Callable


def test_a_missing_part_skips_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUET_REQUIRE_REAL_PARTS", raising=False)

    with pytest.raises(pytest.skip.Exception, match="there is no Chromium"):
        require(part_present=False, reason="there is no Chromium")


def test_a_missing_part_fails_where_all_parts_must_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DUET_REQUIRE_REAL_PARTS", "1")

    with pytest.raises(pytest.fail.Exception, match="there is no Chromium"):
        require(part_present=False, reason="there is no Chromium")


def test_a_part_that_is_there_lets_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUET_REQUIRE_REAL_PARTS", "1")

    require(part_present=True, reason="there is no Chromium")


async def cancel_a_connect() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        address = deaf.getsockname()
        # Nobody accepts, so the second of them stays on its way.
        with socket.create_connection(address), socket.socket() as late:
            late.setblocking(False)
            connecting = loop.create_task(loop.sock_connect(late, address))
            await asyncio.sleep(0)
            assert not connecting.done()

            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting

            assert late.fileno() == -1


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connect_that_is_cancelled_closes_its_socket(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(cancel_a_connect())
