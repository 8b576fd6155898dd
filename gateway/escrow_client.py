"""The platform's payment service over HTTP: signed calls, each with its posting's key.

`POST {DUET_ESCROW_URL}/escrow.hold`, `…/escrow.capture`, `…/escrow.release`. What a service must do
is in `docs/escrow.md`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Final

import httpx
import msgspec

from gateway.trust import trusted
from persistence.escrow_port import EscrowAnswer, Verdict
from statemachine.goal import Movement
from statemachine.instants import rfc3339

if TYPE_CHECKING:
    from gateway.telemetry import Telemetry
    from persistence.clock import Clock
    from persistence.documents import EscrowCall

# An answer is a few bytes; whoever sends more is not the payment service.
_MAX_ANSWER_BYTES: Final = 65_536
# Calls under way at once. httpx's own queue is none for a crowd: with a thousand calls that wait in
# it, each one that comes or goes takes tens of ms. Who closes waits for nobody who holds.
_HOLDS_AT_ONCE: Final = 64
_CLOSINGS_AT_ONCE: Final = 32
_WHY_CHARACTERS: Final = 300

# They tell of the way to the service, not of the payment: a secret being changed, a route that a
# proxy does not know yet, a service that is busy. Every other 4xx with the key is the service's no.
_NOT_REFUSED: Final = frozenset(
    {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
)

# Nothing on the way says these by itself: they need no key.
_REFUSED_BY_NO_OTHER: Final = frozenset(
    {HTTPStatus.PAYMENT_REQUIRED, HTTPStatus.UNPROCESSABLE_ENTITY}
)


class _Body(msgspec.Struct, frozen=True):
    """What the service is told. `call` is in it so that the signature covers it."""

    call: str
    key: str
    goal_id: str
    session_id: str
    viewer_id: str
    streamer_id: str
    amount: int
    reason: str
    at: str


class _Own(msgspec.Struct, frozen=True):
    """What the service answers; without the key a yes or a no could be anybody's."""

    key: str


_decode_own = msgspec.json.Decoder(_Own).decode


class EscrowClient:
    """One pooled client; implements `persistence.escrow_port.EscrowPort`."""

    def __init__(
        self, url: str, secret: str, timeout_s: float, clock: Clock, telemetry: Telemetry
    ) -> None:
        self._url = url.rstrip("/")
        self._secret = secret.encode()
        self._timeout_s = timeout_s
        self._clock = clock
        self._telemetry = telemetry
        self._places = {
            True: asyncio.Semaphore(_HOLDS_AT_ONCE),
            False: asyncio.Semaphore(_CLOSINGS_AT_ONCE),
        }
        connections = _HOLDS_AT_ONCE + _CLOSINGS_AT_ONCE
        self._client = httpx.AsyncClient(
            # For a phase of a call; the whole of it has the same deadline in `ask`.
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
            # A proxy that gives each answer another one would be told all of them, for ever.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            # A proxy of the environment is no place for calls about money.
            trust_env=False,
            verify=trusted(),
            headers={"User-Agent": "duet", "Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        """Closes every connection."""
        await self._client.aclose()

    async def ask(self, call: EscrowCall, within_s: float) -> EscrowAnswer:
        """Says `call` once, within the shorter of `within_s` and `DUET_ESCROW_TIMEOUT_S`."""
        began_at_s = self._clock.monotonic_s()
        timeout_s = min(within_s, self._timeout_s)
        try:
            async with asyncio.timeout(timeout_s), self._places[call.call is Movement.HOLD]:
                answer = await self._ask(call)
        except TimeoutError:
            answer = EscrowAnswer(Verdict.UNKNOWN, f"no answer within {timeout_s:.3g} s")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            answer = EscrowAnswer(Verdict.UNKNOWN, _line(f"{type(error).__name__}: {error}"))
        self._telemetry.escrow_answered(
            call.call.value, answer.verdict.value, self._clock.monotonic_s() - began_at_s
        )
        return answer

    async def _ask(self, call: EscrowCall) -> EscrowAnswer:
        body = _body(call)
        timestamp = str(int(self._clock.now().timestamp()))
        async with self._client.stream(
            "POST",
            f"{self._url}/escrow.{call.call.value}",
            content=body,
            headers={
                "Content-Type": "application/json",
                "Idempotency-Key": call.id,
                "X-Duet-Timestamp": timestamp,
                "X-Duet-Signature": signature(self._secret, timestamp, body),
            },
        ) as response:
            content = b""
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > _MAX_ANSWER_BYTES:
                    return EscrowAnswer(Verdict.UNKNOWN, "an answer without end")
        return _answer(response.status_code, content, call.id)


def signature(secret: bytes, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256 in hex over the timestamp and the body, one behind the other."""
    return hmac.new(secret, timestamp.encode() + body, hashlib.sha256).hexdigest()


def _body(call: EscrowCall) -> bytes:
    return msgspec.json.encode(
        _Body(
            call=call.call.value,
            key=call.id,
            goal_id=str(call.goal_id),
            session_id=str(call.session_id),
            viewer_id=call.viewer_id,
            streamer_id=call.streamer_id,
            amount=call.amount,
            reason=call.reason,
            at=rfc3339(call.at),
        )
    )


def _answer(status: int, content: bytes, key: str) -> EscrowAnswer:
    """Reads an answer: only the service's own yes is one, and only its own no."""
    is_yes = HTTPStatus(200) <= status < HTTPStatus(300)
    is_no = HTTPStatus(400) <= status < HTTPStatus(500) and status not in _NOT_REFUSED
    named = _named(content)
    is_own = named == key or (named is None and status in _REFUSED_BY_NO_OTHER)
    if (is_yes or is_no) and not is_own:
        return EscrowAnswer(Verdict.UNKNOWN, _line(f"{status} without the key: {_text(content)}"))
    if is_yes:
        return EscrowAnswer(Verdict.ACKNOWLEDGED)
    verdict = Verdict.REFUSED if is_no else Verdict.UNKNOWN
    return EscrowAnswer(verdict, _line(f"{status}: {_text(content)}"))


def _named(content: bytes) -> str | None:
    """The key that an answer repeats, if any."""
    try:
        return _decode_own(content).key
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _text(content: bytes) -> str:
    return content[:_WHY_CHARACTERS].decode(errors="replace")


def _line(text: str) -> str:
    """One printable line for a terminal and a log."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(plain.split())[:_WHY_CHARACTERS].rstrip(": ")
