"""`duet demo` as a process: what it plays, prints and serves, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from persistence.embedded_mongod import mongod_path
from persistence.embedded_redis import redis_server_path
from tests.conftest import require

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DUET = Path(sys.executable).parent / "duet"
READY_S = 40.0
END_S = 20.0

PLAYED = {
    ("mira", "goal.snapshot", "private-user@mira"),
    ("theo", "goal.snapshot", "private-user@theo"),
    ("theo", "goal.reply", "private-user@theo"),
    ("mira", "goal.reply", "private-user@mira"),
    ("mira", "goal.added", "private-stream@mira"),
    ("mira", "goal.added", "private-user@mira"),
    ("theo", "escrow.held", "private-user@theo"),
    ("mira", "goal.ended", "private-stream@mira"),
    ("mira", "goal.ended", "presence-stream@mira"),
    ("mira", "goal.ended", "private-user@mira"),
    ("theo", "goal.ended", "presence-stream@mira"),
    ("theo", "stream.authorized", "presence-stream-viewer@mira.preview.theo"),
    ("mira", "exclusive.started", "private-stream@mira"),
    ("mira", "exclusive.started", "presence-stream@mira"),
    ("theo", "exclusive.started", "presence-stream@mira"),
    ("theo", "escrow.captured", "private-user@theo"),
    ("mira", "exclusive.ended", "private-stream@mira"),
    ("mira", "exclusive.ended", "presence-stream@mira"),
    ("theo", "exclusive.ended", "presence-stream@mira"),
}


@pytest.fixture
def stores(
    mongodb_url: str, mongodb_database_name: str, redis_url: str, redis_prefix: str
) -> dict[str, str]:
    """The environment of a demo that uses servers which run already."""
    return {
        "DUET_MONGODB_URL": mongodb_url,
        "DUET_MONGODB_DATABASE": mongodb_database_name,
        "DUET_REDIS_URL": redis_url,
        "DUET_REDIS_PREFIX": redis_prefix,
    }


@contextlib.asynccontextmanager
async def started(*options: str, **variables: str) -> AsyncIterator[Process]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DUET_")}
    process = await create_subprocess_exec(
        DUET, "demo", *options, stdout=PIPE, stderr=PIPE, env={**inherited, **variables}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ended(process: Process) -> tuple[int, str, str]:
    """Waits for the end: exit code, standard output, standard error."""
    async with asyncio.timeout(END_S + READY_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def address(process: Process) -> str:
    """Waits until the demo says that it is ready, and where."""
    assert process.stdout is not None
    async with asyncio.timeout(READY_S):
        async for line in process.stdout:
            if found := re.match(r"Duet demo is ready: (http://\S+/)", line.decode()):
                return found[1]
    raise AssertionError((await ended(process))[2])


def faults(err: str) -> str:
    """Standard error without the log's warnings, which a paused machine may cause."""
    return "".join(line for line in err.splitlines(keepends=True) if "[warning" not in line)


async def test_it_plays_an_invitation_and_prints_what_each_socket_received(
    stores: dict[str, str],
) -> None:
    async with started("--port", "0", "--exit-after-play", **stores) as process:
        code, out, err = await ended(process)

    lines = re.findall(r"^ *(\d+\.\d) ms +(\w+) +([\w.]+) +(\S+)$", out, re.MULTILINE)
    assert (code, faults(err)) == (0, "")
    assert {(who, event, channel) for _, who, event, channel in lines} == PLAYED
    assert all(float(ms) > 0 for ms, *_ in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_serves_the_page_until_a_signal_ends_it(
    stores: dict[str, str], number: signal.Signals
) -> None:
    async with started("--port", "0", **stores) as process, httpx.AsyncClient() as http:
        url = await address(process)
        page = await http.get(url)
        script = await http.get(f"{url}main.js")
        config = (await http.get(f"{url}demo/config")).json()
        nothing = await http.get(f"{url}no-such-page")
        process.send_signal(number)
        code, out, err = await ended(process)

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert nothing.status_code == 404
    assert [user["id"] for user in config["users"]] == ["nova", "alice", "bruno"]
    # The played invitation had users of its own: the page begins with nothing done.
    assert config["session_id"] is None
    assert (code, faults(err)) == (0, "")
    assert out.endswith("Duet demo has ended.\n")


async def test_it_brings_its_own_servers_and_keeps_their_data_where_it_is_told(
    tmp_path: Path,
) -> None:
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    require(redis_server_path(), "there is no redis-server, neither on PATH nor in a wheel")
    options = ("--port", "0", "--data-dir", str(tmp_path / "data"), "--exit-after-play")

    async with started(*options) as first:
        before = await ended(first)
    async with started(*options) as second:
        after = await ended(second)

    assert (before[0], faults(before[2])) == (0, "")
    assert (after[0], faults(after[2])) == (0, "")
    assert any((tmp_path / "data").iterdir())


async def test_a_taken_port_is_one_clear_line_before_anything_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with started("--port", str(port)) as process:
            code, out, err = await ended(process)

    assert code != 0
    assert out == ""
    assert err == (
        f"duet: port {port} on 127.0.0.1 is taken by another program; choose another with --port\n"
    )


async def test_a_foreign_address_is_one_clear_line() -> None:
    # 192.0.2.0/24 is for documentation and no machine's own (RFC 5737).
    async with started("--host", "192.0.2.1", "--port", "0") as process:
        code, out, err = await ended(process)

    assert code != 0
    assert out == ""
    assert re.fullmatch(r"duet: port 0 on 192\.0\.2\.1 can't be used: .+\n", err)


async def test_a_data_directory_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with started("--port", "0", "--data-dir", str(tmp_path / "file")) as process:
        code, _, err = await ended(process)

    assert code != 0
    assert err.startswith(f"duet: {tmp_path / 'file'} can't be used")
    assert err.count("\n") == 1


async def test_a_server_that_does_not_answer_is_one_clear_line(stores: dict[str, str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        silent = f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"
        async with started("--port", "0", **{**stores, "DUET_REDIS_URL": silent}) as process:
            code, _, err = await ended(process)

    assert code != 0
    assert err.startswith("duet: ")
    assert err.count("\n") == 1
