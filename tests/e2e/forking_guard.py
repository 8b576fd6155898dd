"""A guard whose `duet` processes start in a fraction of a second, for tests that need many of them.

To import all that a gateway is made of takes a second of CPU. This guard does it once and forks; a
fork then runs the same `main` with the same arguments and environment as the command would, and has
the same open files and signals. Whatever else it is to start it starts as ever.

As a program it is what `persistence.embedded_guard` is, which says how it is spoken to.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from persistence import embedded_guard
from persistence.embedded_process import ServerGuard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ROOT: Final = Path(__file__).parents[2]
_ENV: Final = "/usr/bin/env"
# The command as it was installed beside the interpreter of the tests.
DUET: Final = str(Path(sys.executable).with_name("duet"))
# What a gateway is made of, and what it imports only when it starts.
GATEWAY_MODULES: Final = (
    "gateway.cli",
    "certifi",
    "httpcore",
    "tomllib",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvloop",
)
# How long its imports may take on a machine that is busy.
_READY_WITHIN_S: Final = 60.0
_LOOK_S: Final = 0.005


@cache
def forking_guard() -> ServerGuard:
    """The one of this test process, with which its gateways end."""
    guard = ForkingServerGuard()
    atexit.register(guard.close)
    # Whatever it says, it has imported by then.
    guard.ask({"do": "poll", "name": "nobody"}, _READY_WITHIN_S)
    return guard


class ForkingServerGuard(ServerGuard):
    """The test's side of this program."""

    def _spawn(self, keep_fds: Sequence[int]) -> subprocess.Popen[bytes]:
        assert not keep_fds
        arguments = [str(os.getpid()), str(self.directory)]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.forking_guard", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=_ROOT,
            start_new_session=True,
        )


# --- the program --------------------------------------------------------------------------------


class Fork:
    """A process that was forked; as much of `subprocess.Popen` as the guard asks for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        give_up_at_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > give_up_at_s:
                raise subprocess.TimeoutExpired(DUET, timeout)
            time.sleep(_LOOK_S)
        return code


class ForkingGuard(embedded_guard.Guard):
    """Forks for `duet`."""

    def _start(self, command: dict[str, Any]) -> dict[str, Any]:
        program, *rest = command["argv"]
        if program != _ENV or DUET not in rest:
            return super()._start(command)
        name = command["name"]
        first = rest.index(DUET)
        # What it has buffered a fork would write as well.
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            _become_duet(rest[:first], rest[first:], command["log"], self._before_exec)
        self._servers[name] = Fork(pid)  # type: ignore[assignment]
        self._grace_s[name] = command["grace_s"]
        return {"pid": pid, "code": None}


def _become_duet(
    variables: Sequence[str], argv: list[str], log: str, prepare: Callable[[], None] | None
) -> NoReturn:
    """Is from here on what the command would be."""
    if prepare is not None:
        prepare()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    for variable in variables:
        name, _, value = variable.partition("=")
        os.environ[name] = value
    sys.argv = argv
    code = 1
    try:
        importlib.import_module("gateway.cli").main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter at the end of a program
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Imports, then guards."""
    # The file on which the parent listens is not for what imports may write.
    for name in GATEWAY_MODULES:
        importlib.import_module(name)
    embedded_guard.Guard = ForkingGuard  # type: ignore[misc]
    embedded_guard.main(int(sys.argv[1]), sys.argv[2], [])


if __name__ == "__main__":
    main()
