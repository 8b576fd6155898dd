"""Counts what a piece of the gateway does: opcodes, calls, JSON, tasks, futures, timers, blocks.

None of it is time, so the same code gives the same numbers on a slow machine and a fast one.
Opcodes and calls are those of the gateway's own functions: what a library or the event loop does
inside is not ours, but each call of it is.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import gateway

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import FrameType

T = TypeVar("T")

_OURS = str(Path(gateway.__file__).parent)
_JSON_MODULES = ("msgspec", "json", "_json", "orjson")


@dataclass(frozen=True, slots=True)
class Costs:
    """What something has cost.

    Attributes:
        opcodes: Bytecode instructions of the gateway's functions.
        calls: Calls that these functions made, to Python and to C.
        json: Those of them that read or build JSON.
        tasks: Tasks that were started.
        futures: Futures that were made by the loop, those of tasks not among them.
        timers: Callbacks for a later time.
        turns: Callbacks for the loop's next turn.
        blocks: Memory blocks that are still allocated, garbage collected.
    """

    opcodes: float = 0
    calls: float = 0
    json: float = 0
    tasks: float = 0
    futures: float = 0
    timers: float = 0
    turns: float = 0
    blocks: float = 0

    def __sub__(self, other: Costs) -> Costs:
        return Costs(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def per(self, count: int) -> Costs:
        """The costs of one of `count`."""
        return Costs(*(getattr(self, f.name) / count for f in fields(self)))


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts what is asked of it, and whose clock moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.tasks = self.futures = self.timers = self.turns = 0
        super().__init__()

    def time(self) -> float:
        return self.now_s

    def create_task(self, coroutine: Any, **options: Any) -> asyncio.Task[Any]:  # type: ignore[override]
        self.tasks += 1
        return super().create_task(coroutine, **options)

    def create_future(self) -> asyncio.Future[Any]:
        self.futures += 1
        return super().create_future()

    def call_at(self, when: float, callback: Any, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        self.timers += 1
        return super().call_at(when, callback, *arguments, **options)

    def call_soon(self, callback: Any, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        self.turns += 1
        return super().call_soon(callback, *arguments, **options)

    def do(self, callback: Callable[..., object], *arguments: Any) -> None:
        """Calls back from within the loop, and settles what follows; the call is not counted."""
        super().call_soon(callback, *arguments)
        self.settle()

    def settle(self) -> None:
        """Turns until nothing is left to be done at this instant."""
        while self._ready:  # type: ignore[attr-defined]
            # As `run_until_complete` does it, without a task of its own to count.
            super().call_soon(self.stop)
            self.run_forever()

    def pass_s(self, seconds: float) -> None:
        """Lets time pass, and what is due then be done."""
        self.now_s += seconds
        self.do(lambda: None)

    def finished(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What a coroutine returns that waits for nothing outside."""
        return self.run_until_complete(coroutine)


class Meter:
    """Counts the costs of what happens inside its block."""

    def __init__(self, loop: CountingLoop, *, blocks: bool = False) -> None:
        self._loop = loop
        self._wants_blocks = blocks
        self._opcodes = self._calls = self._json = 0
        self.costs = Costs()

    def __enter__(self) -> Self:
        # A debugger or a coverage tool may be at work, too.
        self._outer = (sys.gettrace(), sys.getprofile())
        self._blocks = self._allocated()
        self._before = self._of_loop()
        if not self._wants_blocks:
            sys.setprofile(self._on_profile)
            sys.settrace(self._on_call)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.settrace(self._outer[0])
        sys.setprofile(self._outer[1])
        counted = Costs(opcodes=self._opcodes, calls=self._calls, json=self._json)
        loop = self._of_loop() - self._before
        blocks = self._allocated() - self._blocks
        self.costs = Costs(
            counted.opcodes, counted.calls, counted.json, *_loop_part(loop), blocks=blocks
        )

    def restart(self) -> None:
        """Counts from zero: Python 3.13 misses the first traced run of each function."""
        self._opcodes = self._calls = self._json = 0
        self._before = self._of_loop()

    def _allocated(self) -> int:
        if not self._wants_blocks:
            return 0
        gc.collect()
        return sys.getallocatedblocks()

    def _of_loop(self) -> Costs:
        loop = self._loop
        return Costs(tasks=loop.tasks, futures=loop.futures, timers=loop.timers, turns=loop.turns)

    def _on_call(self, frame: FrameType, _event: str, _argument: object) -> Any:
        if not is_ours(frame):
            return None
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        return self._on_opcode

    def _on_opcode(self, _frame: FrameType, event: str, _argument: object) -> Any:
        if event == "opcode":
            self._opcodes += 1
        return self._on_opcode

    def _on_profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            if is_ours(frame):
                self._calls += 1
                self._json += reads_or_builds_json(argument)
        elif event == "call":
            caller = frame.f_back
            if is_ours(frame) or (caller is not None and is_ours(caller)):
                self._calls += 1
                self._json += frame.f_globals.get("__name__", "").partition(".")[0] == "json"


def _loop_part(costs: Costs) -> tuple[float, float, float, float]:
    return costs.tasks, costs.futures, costs.timers, costs.turns


def is_ours(frame: FrameType) -> bool:
    """Whether a frame runs one of the gateway's functions."""
    return frame.f_code.co_filename.startswith(_OURS)


def reads_or_builds_json(function: Any) -> bool:
    """Whether a C function is one of a JSON library's."""
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    return module.partition(".")[0] in _JSON_MODULES


def opcodes_of(action: Callable[[], object]) -> int:
    """The instructions of a plain function and of what it calls, wherever they are written."""
    count = 0

    def on_event(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return on_event

    outer = sys.gettrace()
    sys.settrace(on_event)
    try:
        action()
    finally:
        sys.settrace(outer)
    return count
