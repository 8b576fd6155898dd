"""The guard process, with small programs in the place of servers."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from persistence.embedded_process import EmbeddedError, ServerGuard, ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Says into a pipe that it is ready, then ends with 7 when it is asked to end.
OBEDIENT = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
pathlib.Path(sys.argv[1]).write_text('ready')
while True:
    signal.pause()
"""
STUBBORN = OBEDIENT.replace("lambda *_: sys.exit(7)", "signal.SIG_IGN")


@pytest.fixture
def guard() -> Iterator[ServerGuard]:
    with ServerGuard() as guard:
        yield guard


def start(guard: ServerGuard, source: str, ready: Path, *, stop_grace_s: float) -> ServerProcess:
    """Starts a Python program and waits until it says that it is ready."""
    os.mkfifo(ready)
    process = ServerProcess(guard, "server", stop_grace_s=stop_grace_s)
    process.start([sys.executable, "-I", "-S", "-c", source, str(ready)])
    assert ready.read_text() == "ready"
    return process


def test_a_server_that_is_asked_to_end_ends_in_its_own_way(
    guard: ServerGuard, tmp_path: Path
) -> None:
    process = start(guard, OBEDIENT, tmp_path / "ready", stop_grace_s=20)
    assert process.exit_code() is None

    process.stop()

    assert process.exit_code() == 7


def test_a_paused_server_hears_that_it_shall_end(guard: ServerGuard, tmp_path: Path) -> None:
    process = start(guard, OBEDIENT, tmp_path / "ready", stop_grace_s=20)
    process.pause()

    process.stop()

    assert process.exit_code() == 7


def test_a_server_that_does_not_listen_is_killed_after_its_grace(
    guard: ServerGuard, tmp_path: Path
) -> None:
    process = start(guard, STUBBORN, tmp_path / "ready", stop_grace_s=0.1)

    process.stop()

    assert process.exit_code() == -signal.SIGKILL


def test_a_server_without_grace_is_killed_at_once(guard: ServerGuard, tmp_path: Path) -> None:
    process = start(guard, STUBBORN, tmp_path / "ready", stop_grace_s=0)

    process.stop()

    assert process.exit_code() == -signal.SIGKILL


def test_closing_ends_a_server_that_does_not_listen(tmp_path: Path) -> None:
    with ServerGuard() as guard:
        process = start(guard, STUBBORN, tmp_path / "ready", stop_grace_s=0.1)

    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_two_servers_can_not_have_one_name(guard: ServerGuard, tmp_path: Path) -> None:
    process = start(guard, OBEDIENT, tmp_path / "ready", stop_grace_s=0)
    twin = ServerProcess(guard, process.name, stop_grace_s=0)

    with pytest.raises(EmbeddedError, match="server is running"):
        twin.start(["sleep", "60"])


def test_a_server_that_was_killed_can_be_started_again(guard: ServerGuard, tmp_path: Path) -> None:
    process = start(guard, OBEDIENT, tmp_path / "ready", stop_grace_s=0)
    first_pid = process.pid
    process.kill()

    again = start(guard, OBEDIENT, tmp_path / "ready again", stop_grace_s=20)

    assert again.pid != first_pid
    again.stop()
    assert again.exit_code() == 7


def test_an_inherited_lock_is_held_until_the_servers_have_ended(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock, (tmp_path / "lock").open("w") as other:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ServerGuard(keep_fds=[lock.fileno()]) as guard:
            start(guard, STUBBORN, tmp_path / "ready", stop_grace_s=0)
            lock.close()

            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_guard_that_is_gone_is_one_clear_line(guard: ServerGuard, tmp_path: Path) -> None:
    process = start(guard, OBEDIENT, tmp_path / "ready", stop_grace_s=0)
    os.kill(guard.pid, signal.SIGKILL)

    with pytest.raises(EmbeddedError, match="the guard of the embedded servers is gone"):
        process.exit_code()


def test_a_closed_guard_is_one_clear_line(tmp_path: Path) -> None:
    with ServerGuard() as guard:
        process = start(guard, OBEDIENT, tmp_path / "ready", stop_grace_s=0)

    with pytest.raises(EmbeddedError, match="the embedded servers are closed"):
        process.exit_code()
