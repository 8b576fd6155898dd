"""A forked `duet` is what the command would be: a test of the tests' own tools."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from persistence.embedded_process import ServerGuard, ServerProcess, free_port
from tests.e2e.forking_guard import DUET, ForkingServerGuard, forking_guard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.e2e.gateway_process import Gateway


def wait_until(holds: Callable[[], bool], process: ServerProcess) -> None:
    """Looks again and again: a process that is not this one's child tells nobody."""
    give_up_at_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < give_up_at_s, process.log_text()
        time.sleep(0.02)


def ended(guard: ServerGuard, argv: Sequence[str]) -> tuple[int, str]:
    """How a process ends, and what it said until then."""
    process = ServerProcess(guard, "ends-by-itself", stop_grace_s=10)
    process.start(argv)
    wait_until(lambda: process.exit_code() is not None, process)
    code = process.exit_code()
    assert code is not None
    return code, process.log_text()


def test_it_ends_and_speaks_as_the_command(server_guard: ServerGuard) -> None:
    argv = ["/usr/bin/env", "DUET_PORT=none", "DUET_LOG_LEVEL=loud", DUET, "serve"]

    code, log = ended(forking_guard(), argv)

    assert code == 1
    assert "DUET_PORT" in log
    assert (code, log) == ended(server_guard, argv)


def test_what_one_was_given_the_next_one_does_not_have() -> None:
    guard = forking_guard()
    told = ["/usr/bin/env", "DUET_PORT=none", DUET, "serve"]
    untold = ["/usr/bin/env", "DUET_LOG_LEVEL=loud", DUET, "serve"]

    assert "DUET_PORT" in ended(guard, told)[1]
    assert "DUET_PORT" not in ended(guard, untold)[1]


def test_a_signal_ends_it_as_it_ends_the_command(
    shared_gateway: Gateway, server_guard: ServerGuard
) -> None:
    codes = []
    for guard in (forking_guard(), server_guard):
        process = ServerProcess(guard, "is-told-to-end", stop_grace_s=10)
        settings = shared_gateway.environment() | {
            "DUET_PORT": str(free_port()),
            "DUET_NODE_NAME": "told",
        }
        variables = [f"{name}={value}" for name, value in settings.items()]
        process.start(["/usr/bin/env", *variables, DUET, "serve"])
        wait_until(lambda: "gateway_started" in process.log_text(), process)  # noqa: B023 - now
        process.stop()
        codes.append(process.exit_code())

    assert codes[0] == codes[1]


def test_it_ends_with_its_guard() -> None:
    guard = ForkingServerGuard()
    process = ServerProcess(guard, "is-left", stop_grace_s=10)
    process.start(["/usr/bin/env", DUET, "demo"])

    os.kill(guard.pid, signal.SIGKILL)

    wait_until(lambda: not Path(f"/proc/{process.pid}").exists(), process)
    guard.close()
