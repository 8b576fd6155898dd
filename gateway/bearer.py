"""Calls with a bearer token: whose they are, and their bodies as typed values.

Whatever is wrong with a call is answered by `owned`, so an endpoint reads like what
it does when all is well.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar

import msgspec

from gateway.auth import AuthError
from gateway.broker import BrokerUnavailable
from gateway.errors import Code, CommandError, ErrorCode
from gateway.parts import parts_of
from gateway.problem import BodyTooLargeError, DisconnectedError, header, problem, read_body
from persistence.errors import StoreOverloaded, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from gateway.auth import Identity

    Endpoint = Callable[[Request], Awaitable[Response]]
    OwnedEndpoint = Callable[[Request, Identity], Awaitable[Response]]

T = TypeVar("T")

JSON_TYPE = "application/json"
FORM_TYPE = "application/x-www-form-urlencoded"


class RefusedError(Exception):
    """Ends a call with a problem document.

    Attributes:
        error: What the document says.
    """

    def __init__(self, code: Code, message: str | None = None) -> None:
        self.error = CommandError.of(code, message)
        super().__init__(self.error.message)


def owned(endpoint: OwnedEndpoint) -> Endpoint:
    """Runs `endpoint` with the identity of the caller's token; refusals become problems."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            identity = await caller(request)
            return await endpoint(request, identity)
        except RefusedError as refused:
            return problem(refused.error)
        except (StoreUnavailable, BrokerUnavailable):
            return problem(CommandError.of(ErrorCode.UNAVAILABLE))
        except StoreOverloaded:
            return problem(CommandError.of(ErrorCode.OVERLOADED))

    return answer


async def caller(request: Request) -> Identity:
    """Who calls.

    Raises:
        RefusedError: No bearer token, or one that proves nothing.
    """
    parts = parts_of(request.scope)
    scheme, _, token = (header(request.scope, b"authorization") or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise RefusedError(ErrorCode.UNAUTHENTICATED)
    try:
        identity = await parts.authorizer.identity_of(token.strip(), parts.clock.now())
    except AuthError as error:
        raise RefusedError(error.code, error.message) from None
    return identity.acting_through(parts.apps.first)


async def body_of(request: Request) -> bytes:
    """The body, within the bound of the settings.

    Raises:
        RefusedError: It is longer, or never came.
    """
    limit = parts_of(request.scope).settings.max_body_bytes
    try:
        return await read_body(request.scope, request.receive, limit)
    except BodyTooLargeError:
        raise RefusedError(ErrorCode.BODY_TOO_LARGE, f"The body is over {limit} bytes.") from None
    except DisconnectedError:
        raise RefusedError(ErrorCode.MALFORMED, "The body is not complete.") from None


async def json_body(request: Request) -> bytes:
    """A body that says it is JSON, or says nothing; an empty one counts as `{}`.

    Raises:
        RefusedError: It says it is something else, or as `body_of`.
    """
    body = await body_of(request)
    if body and media_type(request) not in {"", JSON_TYPE}:
        raise RefusedError(ErrorCode.UNSUPPORTED_MEDIA_TYPE)
    return body or b"{}"


def media_type(request: Request) -> str:
    """The body's content type in lower case, without parameters."""
    return (header(request.scope, b"content-type") or "").partition(";")[0].strip().lower()


def decode(body: bytes, shape: type[T]) -> T:
    """The JSON `body` as a `shape`.

    Raises:
        RefusedError: `malformed`, naming the field.
    """
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(ErrorCode.MALFORMED, f"{error}.") from None
