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
    from collections.abc import Sequence

    from tests.e2e.gateway_process import Gateway


def ended(guard: ServerGuard, argv: Sequence[str]) -> tuple[int, str]:
    """How a process ends, and what it said until then."""
    process = ServerProcess(guard, "ends-by-itself", stop_grace_s=10)
    process.start(argv)
    give_up_at_s = time.monotonic() + 30
    while (code := process.exit_code()) is None:
        assert time.monotonic() < give_up_at_s, process.log_text()
        time.sleep(0.02)
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
        give_up_at_s = time.monotonic() + 30
        while "gateway_started" not in process.log_text():
            assert time.monotonic() < give_up_at_s, process.log_text()
            time.sleep(0.02)
        process.stop()
        codes.append(process.exit_code())

    assert codes[0] == codes[1]


def test_it_ends_with_its_guard() -> None:
    guard = ForkingServerGuard()
    process = ServerProcess(guard, "is-left", stop_grace_s=10)
    process.start(["/usr/bin/env", DUET, "demo"])

    os.kill(guard.pid, signal.SIGKILL)

    give_up_at_s = time.monotonic() + 10
    while Path(f"/proc/{process.pid}").exists():
        assert time.monotonic() < give_up_at_s
        time.sleep(0.02)
    guard.close()
