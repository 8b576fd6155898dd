"""A client library from npm in a Node process of its own, driven by JSON lines."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from pathlib import Path
from typing import Any, Self

from tests.conftest import require
from tests.e2e.inbox import PATIENCE_S, Inbox

HERE = Path(__file__).parent
CLIENTS_INSTALLED = (HERE / "node_modules" / "pusher-js").is_dir()
NODE = shutil.which("node")

# One frame can carry a snapshot of many goals.
_LINE_LIMIT_BYTES = 4_194_304


class OrderFailedError(AssertionError):
    """The client library refused an order; `status` is the HTTP status where there was one."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class NodeProcess(Inbox):
    """One Node process; ends when its standard input is closed, so it never outlives the test."""

    script = ""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        require(NODE, "there is no node on PATH")
        require(CLIENTS_INSTALLED, "the clients from npm are not installed (make npm)")
        assert NODE is not None
        self._process = await asyncio.create_subprocess_exec(
            NODE,
            str(HERE / self.script),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT_BYTES,
        )
        self._reader = asyncio.create_task(self._read())
        await self.expect(kind="ready")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._reader is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reader

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            fields = json.loads(line)
            self.put(fields.pop("kind"), fields)
        self.close("its process ended")

    async def order(self, name: str, **arguments: Any) -> Any:
        """Sends one order and waits until the library has taken it."""
        assert self._process is not None
        assert self._process.stdin is not None
        number = next(self._numbers)
        line = json.dumps({"do": name, "n": number, **arguments}) + "\n"
        self._process.stdin.write(line.encode())
        await self._process.stdin.drain()
        answer = await self.expect(kind="answer", where=lambda record: record.fields["n"] == number)
        if not answer.fields["ok"]:
            raise OrderFailedError(answer.fields["message"], answer.fields["status"])
        return answer.fields["result"]
