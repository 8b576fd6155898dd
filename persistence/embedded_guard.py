"""Runs servers for a parent process and ends them when the parent ends, however it ends.

A program of its own, run by its path with `python -I -S` so that it starts in some 30 ms and sees
nothing but the standard library. Its arguments are the parent's pid, the directory to remove at
the end, and the inherited file descriptors that every server inherits too. Commands come as JSON
lines on standard input, each answered by one line on standard output:

    {"do": "start", "name": …, "argv": […], "log": …, "grace_s": …}
    {"do": "poll", "name": …}
    {"do": "stop", "name": …, "grace_s": …}

    {"pid": …, "code": null while it runs, else its exit code} or {"error": …, "errno": …}

Standard input at its end means that the parent is gone, for the parent holds the only other end of
the pipe; the operating system closes it even after `kill -9`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

PR_SET_PDEATHSIG: Final = 1
# A child that the parent forked without an exec shares the parent's end of the pipe and hides the
# end of file: a look at the parent's pid this often is the answer to that.
ORPHAN_CHECK_S: Final = 1.0
PATIENCE_AFTER_KILL_S: Final = 10.0


def die_with_guard() -> Callable[[], None] | None:
    """Returns what a server does between fork and exec to end when this process is killed.

    Linux only. The servers of other systems outlive a killed guard, not a killed parent.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    guard_pid = os.getpid()

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard_pid:  # the guard died before the line above
            os._exit(1)

    return prepare


class Guard:
    """Holds the servers by name, and how long each may take to end in order."""

    def __init__(self, keep_fds: list[int]) -> None:
        self._keep_fds = keep_fds
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._grace_s: dict[str, float] = {}
        self._before_exec = die_with_guard()

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Performs one command."""
        name = command["name"]
        if command["do"] == "start":
            return self._start(command)
        if name not in self._servers:
            return {"error": f"no server {name}", "errno": errno.ESRCH}
        if command["do"] == "stop":
            self._stop([name], {name: command["grace_s"]})
        server = self._servers[name]
        return {"pid": server.pid, "code": server.poll()}

    def _start(self, command: dict[str, Any]) -> dict[str, Any]:
        name = command["name"]
        if name in self._servers and self._servers[name].poll() is None:
            return {"error": f"{name} is running", "errno": errno.EBUSY}
        try:
            with Path(command["log"]).open("ab") as log:
                server = subprocess.Popen(
                    command["argv"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    pass_fds=self._keep_fds,
                    preexec_fn=self._before_exec,  # noqa: PLW1509 - this process has one thread
                )
        except OSError as error:
            return {"error": os.strerror(error.errno or 0), "errno": error.errno}
        self._servers[name] = server
        self._grace_s[name] = command["grace_s"]
        return {"pid": server.pid, "code": None}

    def reap(self) -> None:
        """Takes the exit codes of servers that ended, so that none stays a zombie."""
        for server in self._servers.values():
            server.poll()

    def stop_all(self) -> None:
        """Ends every server."""
        self._stop(list(self._servers), self._grace_s)

    def _stop(self, names: list[str], grace_s: dict[str, float]) -> None:
        """Asks all at once, then waits for each; who is late, or has no grace, is killed."""
        running = [name for name in names if self._servers[name].poll() is None]
        for name in running:
            if grace_s[name]:
                self._servers[name].send_signal(signal.SIGTERM)
                self._servers[name].send_signal(signal.SIGCONT)  # a paused one can't hear
            else:
                self._servers[name].kill()
        for name in running:
            try:
                self._servers[name].wait(grace_s[name] or PATIENCE_AFTER_KILL_S)
            except subprocess.TimeoutExpired:
                self._servers[name].kill()
                self._servers[name].wait(PATIENCE_AFTER_KILL_S)


class ParentLink:
    """The parent's side as this process sees it: lines until the parent is gone."""

    def __init__(self, parent_pid: int) -> None:
        self._parent_pid = parent_pid
        self._buffer = b""
        self._ended = False
        self._wake_read, wake_write = os.pipe()
        for fd in (self._wake_read, wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._end)
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_IGN)

    def _end(self, *_: object) -> None:
        self._ended = True

    def next_lines(self) -> list[bytes] | None:
        """Waits for something to happen: returns complete lines, or None when it is time to go."""
        ready, _, _ = select.select([0, self._wake_read], [], [], ORPHAN_CHECK_S)
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        if self._ended or os.getppid() != self._parent_pid:
            return None
        if 0 not in ready:
            return []
        received = os.read(0, 65536)
        if not received:
            return None
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        return lines


def main(parent_pid: int, directory: str, keep_fds: list[int]) -> None:
    """Serves commands until the parent is gone, then leaves nothing behind."""
    guard = Guard(keep_fds)
    link = ParentLink(parent_pid)
    try:
        while (lines := link.next_lines()) is not None:
            guard.reap()
            for line in lines:
                os.write(1, json.dumps(guard.answer(json.loads(line))).encode() + b"\n")
    except BrokenPipeError:
        pass  # the parent ended between asking and listening
    finally:
        guard.stop_all()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], [int(fd) for fd in sys.argv[3:]])
