"""CPU and memory of other processes, as the operating system counts them."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gateway.bench.errors import BenchError

# The CPU clock of all threads of a process, `clock_getcpuclockid(3)` as Linux computes it. It has
# nanoseconds; /proc has hundredths of a second, more than a Redis uses while an event is delivered.
_WHOLE_PROCESS_CLOCK: Final = 2
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
# Beside the sockets: pipes, logs, connections to the stores, libraries.
_OTHER_FILES: Final = 512


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its children have used so far.

    Attributes:
        cpu_s: User and system time of all threads since they were started.
        resident_bytes: Memory that is present now.
    """

    cpu_s: float
    resident_bytes: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.cpu_s + other.cpu_s, self.resident_bytes + other.resident_bytes)


def usage_of(pid: int) -> Usage:
    """The usage of a process and of its living children.

    Raises:
        BenchError: There is no such process any more.
    """
    try:
        return _from_proc(pid) if sys.platform.startswith("linux") else _from_ps(pid)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BenchError(f"process {pid} of the gateway has ended, see its log") from error


def _from_proc(pid: int) -> Usage:
    root = Path("/proc", str(pid))
    pages = int((root / "statm").read_text().split()[1])
    usage = Usage(time.clock_gettime(~pid << 3 | _WHOLE_PROCESS_CLOCK), pages * _PAGE_BYTES)
    for task in (root / "task").iterdir():
        # A thread or a child that has ended meanwhile uses nothing more.
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                usage += _from_proc(int(child))
    return usage


def _from_ps(pid: int) -> Usage:
    listing = subprocess.run(
        ["/bin/ps", "-o", "cputime=,rss=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=True,
        timeout=5,
    )
    clock, resident_kib = listing.stdout.split()
    cpu_s = 0.0
    for part in clock.split(":"):  # hours, minutes, seconds with hundredths
        cpu_s = cpu_s * 60 + float(part)
    return Usage(cpu_s, int(resident_kib) * 1024)


def allow_files(sockets: int) -> None:
    """Raises this process's limit of open files, which its children inherit.

    Raises:
        BenchError: The system's own limit is lower.
    """
    wanted = sockets + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise BenchError(
            f"{sockets:,} sockets need {wanted:,} open files, {hard:,} are allowed: "
            f"ulimit -Hn {wanted}, or fewer sockets"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
