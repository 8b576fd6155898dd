"""Puts what a peer needs into a cache: packages of npm as the lock file names them, C compiled.

The cache is per user (`$XDG_CACHE_HOME/duet-bench`, else the platform's own place). Each content
has a directory of its own, named after what it is made from and moved there when it is whole: an
installation that was interrupted is made anew, and a newer lock file doesn't meet older packages.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SOURCES: Final = Path(__file__).parent
_INSTALL_DEADLINE_S: Final = 600.0
_COMPILE_DEADLINE_S: Final = 60.0
_NPM_CI: Final = (
    "ci",
    "--no-audit",
    "--no-fund",
    "--no-progress",
    "--loglevel=error",
    "--fetch-retries=5",
)


def cache_directory() -> Path:
    """Where this user's programs keep what can be had again."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "duet-bench"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "duet-bench"
    return Path.home() / ".cache" / "duet-bench"


def source(name: str) -> Path:
    """A file of this package."""
    return _SOURCES / name


def program(name: str, why: str) -> str:
    """The path of a program on PATH.

    Raises:
        BenchError: It is not there; `why` ends the sentence.
    """
    found = shutil.which(name)
    if found is None:
        raise BenchError(f"there is no {name} on PATH: {why}")
    return str(Path(found).absolute())


def npm_packages() -> Path:
    """The directory with the peers' `node_modules`, installed when they are not there yet.

    Raises:
        BenchError: There is no npm, or it failed.
    """
    files = [source("package.json"), source("package-lock.json")]

    def install(directory: Path) -> None:
        npm = program("npm", "install Node.js 20 or newer, the peers come from npm")
        for file in files:
            shutil.copy(file, directory)
        _run([npm, *_NPM_CI], directory, _INSTALL_DEADLINE_S)

    return _made("npm", files, install)


def compiled(name: str) -> Path:
    """The program that a C source of this package is compiled to.

    Raises:
        BenchError: This is not Linux, there is no compiler, or it failed.
    """
    if not sys.platform.startswith("linux"):
        raise BenchError("the C loop is written for Linux (epoll): choose another --against")

    def compile_it(directory: Path) -> None:
        compiler = program("cc", "install a C compiler, or choose another --against")
        output = str(directory / "server")
        _run([compiler, "-O2", "-o", output, str(source(name))], directory, _COMPILE_DEADLINE_S)

    return _made(Path(name).stem, [source(name)], compile_it) / "server"


def _made(name: str, inputs: Sequence[Path], make: Callable[[Path], None]) -> Path:
    """The cached directory that `make` has filled from these files, now or in an earlier run."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in inputs)).hexdigest()[:16]
    cache = cache_directory()
    finished = cache / f"{name}-{digest}"
    if finished.is_dir():
        return finished
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            if not finished.is_dir():
                with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}-") as temporary:
                    content = Path(temporary) / "content"
                    content.mkdir()
                    make(content)
                    content.rename(finished)
    except OSError as error:
        raise BenchError(f"{cache} can't be used as a cache: {error.strerror or error}") from error
    return finished


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock among processes: two installations at once would do the work twice."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(argv: Sequence[str], directory: Path, deadline_s: float) -> None:
    try:
        subprocess.run(
            argv,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=deadline_s,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{argv[0]} took more than {deadline_s:g} s") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr + error.stdout).decode(errors="replace").strip().splitlines()
        raise BenchError(
            f"{Path(argv[0]).name} failed: {lines[0] if lines else 'it did not say why'}"
        ) from error
