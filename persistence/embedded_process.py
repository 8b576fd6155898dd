"""Server processes that end with this process: the parent's side of `embedded_guard`."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOPBACK: Final = "127.0.0.1"
START_DEADLINE_S: Final = 30.0
POLL_INTERVAL_S: Final = 0.01
_LOG_READ_BYTES: Final = 65_536
_LOG_TAIL_LINES: Final = 12
_LAST_WORDS_LENGTH: Final = 300
_GUARD_PROGRAM: Final = Path(__file__).with_name("embedded_guard.py")
_ANSWER_DEADLINE_S: Final = 10.0


class EmbeddedError(Exception):
    """An embedded server can't run: what is wrong and the remedy, in one line.

    Attributes:
        log_tail: The last lines that the server wrote, for those who want to know more.
    """

    def __init__(self, problem: str, remedy: str, log_tail: Sequence[str] = ()) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.problem = problem
        self.remedy = remedy
        self.log_tail = tuple(log_tail)


class PortLostError(EmbeddedError):
    """Somebody else took the port between the moment it was found free and its use."""


class ServerGuard:
    """A guard process, and a private directory that vanishes with it.

    Every server started through it ends, and the directory is removed, when `close` is called or
    this process ends, `kill -9` included. Ctrl-C doesn't reach the servers. Safe to use from
    several threads.
    """

    def __init__(self, keep_fds: Sequence[int] = ()) -> None:
        """Starts the guard.

        Args:
            keep_fds: File descriptors that stay open as long as the guard or a server runs.

        Raises:
            EmbeddedError: There is no room for the directory.
        """
        try:
            # mkdtemp makes it 0700: nobody else can reach a socket in it.
            self.directory = Path(tempfile.mkdtemp(prefix="duet-")).absolute()
        except OSError as error:
            raise EmbeddedError(
                f"no temporary directory ({error.strerror})", "free some space or set TMPDIR"
            ) from error
        self._lock = threading.Lock()
        self._process = self._spawn(keep_fds)

    def _spawn(self, keep_fds: Sequence[int]) -> subprocess.Popen[bytes]:
        # Both pipes are close-on-exec, so no other child of this process can hold the end open
        # whose closing tells the guard that this process is gone.
        arguments = [str(os.getpid()), str(self.directory), *map(str, keep_fds)]
        return subprocess.Popen(
            [sys.executable, "-I", "-S", _GUARD_PROGRAM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            pass_fds=keep_fds,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The guard's own process."""
        return self._process.pid

    def ask(
        self, command: dict[str, Any], deadline_s: float = _ANSWER_DEADLINE_S
    ) -> dict[str, Any]:
        """Sends a command to the guard and returns its answer.

        Raises:
            EmbeddedError: The guard is gone or doesn't answer in time.
        """
        with self._lock:
            stdin, stdout = self._process.stdin, self._process.stdout
            if stdin is None or stdout is None or stdin.closed:
                raise EmbeddedError("the embedded servers are closed", "start them again")
            try:
                stdin.write(json.dumps(command).encode() + b"\n")
                answer = _read_line(stdout.fileno(), deadline_s)
            except OSError as error:
                raise EmbeddedError(
                    f"the guard of the embedded servers is gone ({error})", "start them again"
                ) from error
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def close(self, deadline_s: float = START_DEADLINE_S) -> None:
        """Ends the servers, waits for it and leaves no file in the temporary directory."""
        with self._lock:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)  # what a killed guard could not do

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_line(fd: int, deadline_s: float) -> bytes:
    line = b""
    give_up_at = time.monotonic() + deadline_s
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], max(0.0, give_up_at - time.monotonic()))
        if not ready:
            raise TimeoutError(errno.ETIMEDOUT, "no answer")
        received = os.read(fd, 65536)
        if not received:
            raise BrokenPipeError(errno.EPIPE, "it ended")
        line += received
    return line


class ServerProcess:
    """One server under a guard: it can be paused, killed and started again.

    Attributes:
        pid: The server's own process, not the guard's. It changes with every start.
        log: Where the server's output goes.
    """

    def __init__(
        self,
        guard: ServerGuard,
        name: str,
        *,
        stop_grace_s: float,
    ) -> None:
        self.guard = guard
        self.name = name
        self.log = guard.directory / f"{name}.log"
        self.pid = 0
        self._program = ""
        self._stop_grace_s = stop_grace_s

    def start(self, argv: Sequence[str]) -> None:
        """Starts the program with its arguments; says nothing about whether it answers yet.

        Raises:
            EmbeddedError: The program can't be run here.
        """
        self._program = Path(argv[0]).name
        self.log.unlink(missing_ok=True)  # an old failure must not explain a new one
        answer = self.guard.ask(
            {
                "do": "start",
                "name": self.name,
                "argv": list(argv),
                "log": str(self.log),
                "grace_s": self._stop_grace_s,
            }
        )
        if "error" in answer:
            raise EmbeddedError(
                f"{argv[0]} can't be run ({answer['error']})",
                "it may be made for another system; install the server with the package manager",
            )
        self.pid = answer["pid"]

    def exit_code(self) -> int | None:
        """Tells how the process ended; None while it runs."""
        code: int | None = self.guard.ask({"do": "poll", "name": self.name})["code"]
        return code

    def stop(self, grace_s: float | None = None) -> None:
        """Ends the process in order, by force after `grace_s`, and waits for it."""
        grace_s = self._stop_grace_s if grace_s is None else grace_s
        command = {"do": "stop", "name": self.name, "grace_s": grace_s}
        self.guard.ask(command, deadline_s=grace_s + _ANSWER_DEADLINE_S)

    def kill(self) -> None:
        """Ends the process as a crash does (SIGKILL) and waits for it."""
        self.stop(grace_s=0)

    def pause(self) -> None:
        """Freezes the process (SIGSTOP): its sockets stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def log_text(self) -> str:
        """What the server wrote last."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - _LOG_READ_BYTES))
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def fail_if_ended(self) -> None:
        """Raises the error that explains why the process is not running, if it isn't."""
        code = self.exit_code()
        if code is not None:
            raise explain_exit(self._program, code, self.log_text())

    def too_late(self) -> EmbeddedError:
        """The error for a server that runs and still isn't ready at its deadline."""
        tail = self.log_text().splitlines()[-_LOG_TAIL_LINES:]
        last_words = tail[-1] if tail else "it wrote nothing"
        problem = f"{self._program} isn't ready in time"
        return EmbeddedError(problem, _last_words(tail) or last_words, tail)


_MISSING_LIBRARY: Final = re.compile(r"loading shared libraries: (\S+?):")
_OLD_LIBRARY: Final = re.compile(r"version `(\w+_[\d.]+)' not found")
# mongod's own line about it may be cut off, for its log is on the same disk.
_DISK_FULL: Final = ("No space left on device", f'"error":{errno.ENOSPC},')
_DEBIAN_PACKAGES: Final = {"libcurl.so.4": "libcurl4", "libcrypto.so.3": "libssl3"}


def explain_exit(program: str, code: int, log_text: str) -> EmbeddedError:
    """Names the reason why a server ended, as far as its last words tell it."""
    lines = log_text.splitlines()
    tail = lines[-_LOG_TAIL_LINES:]
    if found := _MISSING_LIBRARY.search(log_text):
        package = _DEBIAN_PACKAGES.get(found[1], f"the package that has {found[1]}")
        return EmbeddedError(
            f"{program} needs the library {found[1]}", f"install it (Debian: {package})", tail
        )
    if found := _OLD_LIBRARY.search(log_text):
        return EmbeddedError(
            f"{program} needs a newer system ({found[1]})",
            f"install {program} with the package manager, so that it is on PATH",
            tail,
        )
    if any(words in log_text for words in _DISK_FULL):
        return EmbeddedError(f"{program} has no disk space left", "free some, or set TMPDIR", tail)
    if "Address already in use" in log_text:
        return PortLostError(f"{program} can't listen, its port is taken", "try again", tail)
    last_words = _last_words(lines) or "it didn't say why"
    return EmbeddedError(f"{program} ended with code {code}", last_words, tail)


def _last_words(lines: Sequence[str]) -> str:
    """The last line that tells of an error; mongod logs JSON, and much after its errors."""
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            return line[:_LAST_WORDS_LENGTH]
        if isinstance(entry, dict) and entry.get("s") in {"E", "F"}:
            error = entry.get("attr", {}).get("error", "")
            return f"{entry.get('msg', '')} {error}".strip()[:_LAST_WORDS_LENGTH]
    return ""


def require_space(program: str, directory: Path, needed_bytes: int) -> None:
    """Raises an error that names the shortage if a file system has less room than a server needs.

    Servers that meet a full disk end with a stack trace, or without a word when their log is there.
    """
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise EmbeddedError(
            f"{program} needs {needed_bytes >> 20} MiB in {directory}, {free_bytes >> 20} are free",
            "free some, set TMPDIR or choose another --data-dir",
        )


def free_port() -> int:
    """A loopback port that nobody listens on right now; somebody may take it before its use."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
