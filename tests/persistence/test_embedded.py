"""The embedded servers as the demo and the tests use them: real processes, real crashes."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient
from redis import Redis

from persistence.embedded import EmbeddedError, EmbeddedServers, start_embedded
from persistence.embedded_mongod import mongod_path
from persistence.embedded_redis import redis_server_path
from tests.conftest import require

if TYPE_CHECKING:
    from collections.abc import Iterator

END_DEADLINE_S = 20.0

# A parent that tells what it started, then does what its argument says.
PARENT = """
import json, os, subprocess, sys
from pathlib import Path
from persistence.embedded import start_embedded

how, data_directory = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
servers = start_embedded(Path(data_directory) if data_directory else None)
mongod, redis = servers.mongodb.members[0].process, servers.redis.process
if how == "with-children":
    # Both kinds of child outlive their parent: one forked without an exec, one that is given
    # every descriptor it may have. They read standard input until the test closes it.
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
    subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], close_fds=False)
print(json.dumps({
    "mongod": mongod.pid,
    "redis": redis.pid,
    "guard": mongod.guard.pid,
    "directory": str(mongod.guard.directory),
    "mongodb_url": servers.mongodb_url,
}), flush=True)
sys.stdin.read()
if how == "return":
    sys.exit(0)
"""


@pytest.fixture(autouse=True)
def _real_parts() -> None:
    require(mongod_path(), "there is no mongod, neither on PATH nor in a wheel")
    require(redis_server_path(), "there is no redis-server, neither on PATH nor in a wheel")


@contextmanager
def parent_process(
    how: str, data_directory: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Another process that runs embedded servers, and what it says about them."""
    arguments = [how, *([str(data_directory)] if data_directory else [])]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def wait_until_ended(pid: int) -> None:
    """Waits until a process that is no child of this one has ended; fails at the deadline."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], END_DEADLINE_S)[0], f"process {pid} still runs"
    finally:
        os.close(fd)


def ask_both(servers: EmbeddedServers) -> tuple[list[str], str | None]:
    """The notes that both servers hold."""
    with MongoClient[dict[str, Any]](servers.mongodb_url) as mongodb:
        notes = [document["text"] for document in mongodb["notes"]["note"].find()]
    with Redis.from_url(servers.redis_url, decode_responses=True) as redis:
        return notes, redis.get("note")


def tell_both(servers: EmbeddedServers, text: str) -> None:
    with (
        MongoClient[dict[str, Any]](servers.mongodb_url) as mongodb,
        mongodb.start_session() as session,
        session.start_transaction(),
    ):
        mongodb["notes"]["note"].insert_one({"text": text}, session=session)
    with Redis.from_url(servers.redis_url) as redis:
        redis.set("note", text)


def test_both_start_and_answer_and_leave_nothing_behind() -> None:
    with start_embedded() as servers:
        tell_both(servers, "hello")

        assert ask_both(servers) == (["hello"], "hello")
        assert servers.mongodb is not None
        assert servers.redis is not None
        processes = [servers.mongodb.members[0].process, servers.redis.process]
        directory = processes[0].guard.directory
        assert directory.stat().st_mode & 0o777 == 0o700

    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
    assert not directory.exists()


def test_urls_that_are_given_are_used_and_nothing_is_started(mongodb_url: str) -> None:
    with start_embedded(mongodb_url=mongodb_url, redis_url="redis://127.0.0.1:1") as servers:
        assert (servers.mongodb_url, servers.redis_url) == (mongodb_url, "redis://127.0.0.1:1")
        assert (servers.mongodb, servers.redis) == (None, None)


def test_only_the_missing_one_is_started(mongodb_url: str) -> None:
    with start_embedded(mongodb_url=mongodb_url) as servers:
        assert servers.mongodb is None
        assert servers.redis is not None
        with Redis.from_url(servers.redis_url) as redis:
            assert redis.ping()


@pytest.mark.parametrize("how", ["return", "killed", "with-children"])
def test_servers_and_files_are_gone_after_their_parent(how: str) -> None:
    with parent_process(how) as (parent, started):
        if how == "return":
            parent.communicate()
        else:
            parent.send_signal(signal.SIGKILL)

        for name in ("mongod", "redis", "guard"):
            wait_until_ended(started[name])
        assert not Path(started["directory"]).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_servers_end_when_their_guard_is_killed() -> None:
    with start_embedded() as servers:
        assert servers.mongodb is not None
        assert servers.redis is not None
        processes = [servers.mongodb.members[0].process, servers.redis.process]
        guard = processes[0].guard

        os.kill(guard.pid, signal.SIGKILL)

        for process in processes:
            wait_until_ended(process.pid)
    assert not guard.directory.exists()


def test_the_terminals_interrupt_does_not_reach_the_servers() -> None:
    with start_embedded() as servers:
        assert servers.mongodb is not None

        server = servers.mongodb.members[0].process

        assert os.getsid(server.pid) == server.guard.pid != os.getsid(0)


def test_a_data_directory_keeps_data_even_on_another_port(tmp_path: Path) -> None:
    with start_embedded(tmp_path / "data") as servers:
        tell_both(servers, "first run")
        first_url = servers.mongodb_url
        assert servers.mongodb is not None
        host, _, port = servers.mongodb.members[0].host.partition(":")

    with socket.socket() as squatter:
        squatter.bind((host, int(port)))
        servers = start_embedded(tmp_path / "data")
    with servers:
        assert servers.mongodb_url != first_url
        assert ask_both(servers) == (["first run"], "first run")
        tell_both(servers, "second run")

    with start_embedded(tmp_path / "data") as servers:
        assert ask_both(servers) == (["first run", "second run"], "second run")


def test_a_data_directory_is_free_again_after_a_kill(tmp_path: Path) -> None:
    with parent_process("killed", tmp_path) as (parent, started):
        with MongoClient[dict[str, Any]](started["mongodb_url"]) as mongodb:
            mongodb["notes"]["note"].insert_one({"text": "before the kill"})
        parent.send_signal(signal.SIGKILL)
        parent.wait()

        with start_embedded(tmp_path) as servers:
            assert ask_both(servers)[0] == ["before the kill"]


def test_a_second_user_of_a_data_directory_gets_one_clear_line(tmp_path: Path) -> None:
    with parent_process("killed", tmp_path) as (parent, _):
        with pytest.raises(EmbeddedError) as raised:
            start_embedded(tmp_path)

        assert str(raised.value) == (
            f"{tmp_path} is in use by process {parent.pid}: end that one or choose another"
            " --data-dir"
        )


def test_a_data_directory_that_is_a_file_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(EmbeddedError, match=r"file can't be used \(File exists\)"):
        start_embedded(file)


def test_a_failed_start_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis_server = redis_server_path()
    assert redis_server is not None
    programs, temporary = tmp_path / "programs", tmp_path / "temporary"
    programs.mkdir()
    temporary.mkdir()
    (programs / "redis-server").symlink_to(redis_server)
    mongod = programs / "mongod"
    mongod.write_text("#!/bin/sh\necho some reason\nexit 3\n")
    mongod.chmod(0o700)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    with pytest.raises(EmbeddedError, match="mongod ended with code 3: some reason"):
        start_embedded(tmp_path / "data")

    assert list(temporary.iterdir()) == []
    monkeypatch.undo()
    with start_embedded(tmp_path / "data"):
        """The lock is free again."""
