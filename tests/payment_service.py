"""A platform's payment service with books of its own, which misbehaves as a test tells it.

It listens on a real socket in a thread, so that nodes in this process and gateways in others can
call it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from pymongo.database import Database
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

SECRET = "what-duet-and-the-payment-service-share"
PATIENCE_S = 60.0
SLOW_S = 0.05
CALLS = ("hold", "capture", "release")


class Fault(StrEnum):
    """How one call goes wrong. `AFTER`: the work is done, only the answer is not what it was."""

    SLOW = "slow"
    ERROR = "error"
    BUSY = "busy"
    GARBAGE = "garbage"
    HANG = "hang"
    ERROR_AFTER = "error_after"
    GARBAGE_AFTER = "garbage_after"
    BLOCKED_AFTER = "blocked_after"
    DROP_AFTER = "drop_after"
    HANG_AFTER = "hang_after"
    REFUSE = "refuse"


# Faults that leave the caller in the dark for one call.
UNCLEAR = [fault for fault in Fault if fault not in {Fault.SLOW, Fault.REFUSE}]


class _Dropped(Response):
    """Promises more than it sends; the server then closes the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"999")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"ke', "more_body": True})


@dataclass
class Account:
    """What the service has done for one goal, in minor units."""

    held: int = 0
    captured: int = 0
    released: int = 0

    @property
    def open(self) -> int:
        return self.held - self.captured - self.released


@dataclass
class PaymentService:
    """The service and its books.

    Attributes:
        asked: every call that came in with a good signature, with its key, in order.
        done: every call that moved money, once for each time that it did.
        faults_seen: what no caller of this service may do.
        most_open: the most holds of one viewer that were open at one time.
    """

    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    done: list[tuple[str, str]] = field(default_factory=list)
    faults_seen: list[str] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=lambda: defaultdict(Account))
    most_open: int = 0

    def __post_init__(self) -> None:
        self._plans: dict[str, deque[Fault]] = {call: deque() for call in CALLS}
        self._always: dict[str, Fault] = {}
        self._gates: dict[str, asyncio.Event] = {}
        self._answers: dict[str, int] = {}
        self._viewer_of: dict[str, str] = {}
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._chance: Random | None = None
        self._rate = 0.0

    # What a test tells it

    def plan(self, call: str, *faults: Fault) -> None:
        """The next calls of this kind go wrong like this, one after the other."""
        with self._changed:
            self._plans[call].extend(faults)

    def always(self, call: str, fault: Fault | None) -> None:
        """Every call of this kind goes wrong like this, or none does."""
        with self._changed:
            self._always.pop(call, None)
            if fault is not None:
                self._always[call] = fault

    def go_wild(self, chance: Random | None, rate: float = 0.4) -> None:
        """Calls of every kind go wrong at random, at this rate; `None` heals it."""
        with self._changed:
            self._chance, self._rate = chance, rate

    def close_gate(self, call: str) -> None:
        """Calls of this kind do their work and wait with the answer."""
        self._gates[call] = asyncio.Event()

    def open_gate(self, call: str) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._gates.pop(call).set)

    async def until(self, what: str, holds: Callable[[], bool]) -> None:
        """Waits until something is so; looks again after each call."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(holds, PATIENCE_S)

        assert await asyncio.to_thread(wait), f"not in {PATIENCE_S} s: {what}"

    def look_again(self) -> None:
        """Has those who wait look again, for something of their own."""
        with self._changed:
            self._changed.notify_all()

    def times(self, call: str) -> int:
        """How often money was moved by this call."""
        return sum(1 for name, _ in self.done if name == call)

    # What it does

    async def answer(self, request: Request) -> Response:
        call = request.path_params["call"]
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response()
        told = json.loads(body)
        if not self._is_signed(request, body) or told["call"] != call:
            self.faults_seen.append(f"a call that is not signed: {body!r}")
            return PlainTextResponse("who are you?", 401)
        key = told["key"]
        if request.headers["idempotency-key"] != key:
            self.faults_seen.append(f"two keys in one call: {key}")
        fault = self._next_fault(call, key)
        response = await self._before(request, fault, key)
        if response is None:
            status = self._do(call, key, told)
            response = await self._after(request, fault, key, status)
        if gate := self._gates.get(call):
            await gate.wait()
        return response

    def _is_signed(self, request: Request, body: bytes) -> bool:
        stamp = request.headers["x-duet-timestamp"]
        wanted = hmac.new(SECRET.encode(), stamp.encode() + body, hashlib.sha256).hexdigest()
        return hmac.compare_digest(wanted, request.headers["x-duet-signature"])

    def _next_fault(self, call: str, key: str) -> Fault | None:
        with self._changed:
            self.asked.append((call, key))
            self._changed.notify_all()
            if self._plans[call]:
                return self._plans[call].popleft()
            if self._chance is not None and self._chance.random() < self._rate:
                return self._chance.choice(UNCLEAR)
            return self._always.get(call)

    async def _before(self, request: Request, fault: Fault | None, key: str) -> Response | None:
        match fault:
            case Fault.SLOW:
                await asyncio.sleep(SLOW_S)
            case Fault.ERROR:
                return PlainTextResponse("out of order", 500)
            case Fault.BUSY:
                return PlainTextResponse("later", 429)
            case Fault.GARBAGE:
                return PlainTextResponse("<h1>It works!</h1>")
            case Fault.HANG:
                return await _hang(request)
            case Fault.REFUSE:
                if key.endswith(":hold"):
                    # The first answer to a hold stands.
                    self._answers[key] = 402
                return JSONResponse({"key": key, "error": "not enough money"}, 402)
            case _:
                pass
        return None

    def _do(self, call: str, key: str, told: dict[str, Any]) -> int:
        """Moves the money, once for each key."""
        with self._changed:
            if key in self._answers:
                return self._answers[key]
            account = self.accounts[told["goal_id"]]
            amount = told["amount"]
            if call == "hold":
                account.held += amount
                self._viewer_of[told["goal_id"]] = told["viewer_id"]
                opened = [
                    goal_id
                    for goal_id, other in self.accounts.items()
                    if other.open and self._viewer_of[goal_id] == told["viewer_id"]
                ]
                self.most_open = max(self.most_open, len(opened))
            elif account.open != amount:
                self.faults_seen.append(f"{call} of {amount} with {account} ({key})")
                return 409
            elif call == "capture":
                account.captured += amount
            else:
                account.released += amount
            self.done.append((call, key))
            self._answers[key] = 200
            self._changed.notify_all()
            return 200

    async def _after(
        self, request: Request, fault: Fault | None, key: str, status: int
    ) -> Response:
        match fault:
            case Fault.ERROR_AFTER:
                return PlainTextResponse("out of order", 503)
            case Fault.GARBAGE_AFTER:
                return Response(b"\xff\xfe{", 200)
            case Fault.BLOCKED_AFTER:
                # A proxy's own no.
                return PlainTextResponse("<h1>403 Forbidden</h1>", 403)
            case Fault.DROP_AFTER:
                return _Dropped()
            case Fault.HANG_AFTER:
                return await _hang(request)
            case _:
                return JSONResponse({"key": key}, status)

    # Its life

    def __enter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/payments"
        app = Starlette(
            routes=[Route("/payments/escrow.{call:str}", self.answer, methods=["POST"])]
        )
        self._server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        )

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve([listener])

        self._listener = listener
        self._thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for call in list(self._gates):
            self.open_gate(call)
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    # Against Duet's books

    def disagreements(self, database: Database[dict[str, Any]]) -> list[str]:
        """Where the service's books differ from the ledger, or either is out of balance."""
        ledger: dict[str, Account] = defaultdict(Account)
        fields = {"hold": "held", "capture": "captured", "release": "released"}
        for row in database["escrow"].find():
            account = ledger[str(row["goal_id"])]
            name = fields[row["movement"]]
            setattr(account, name, getattr(account, name) + row["amount"])
        found = list(self.faults_seen)
        for goal_id in {*ledger, *self.accounts}:
            ours, theirs = ledger.get(goal_id), self.accounts[goal_id]
            if ours is None and (theirs.open or theirs.captured):
                found.append(f"{goal_id}: {theirs}, and no invitation")
            elif ours is not None and ours != theirs:
                found.append(f"{goal_id}: the ledger says {ours}, the service {theirs}")
        if len(set(self.done)) != len(self.done):
            found.append(f"something was done twice: {self.done}")
        return found


async def _hang(request: Request) -> Response:
    """Never answers; ends when the caller has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return Response()
