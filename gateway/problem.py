"""Bodies in, problem documents out: what every HTTP face of the gateway does the same way.

Source: RFC 9457, docs/protocol.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response

from gateway.errors import Code, CommandError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

PROBLEM_TYPE = "application/problem+json"


class BodyTooLargeError(Exception):
    """The body passed its bound while it was being read; the rest was not read."""


class DisconnectedError(Exception):
    """The caller went away before its body was complete."""


class Problem(msgspec.Struct, frozen=True):
    """The problem document of RFC 9457, with members of our own.

    Attributes:
        goal: The goal as it is, when a command lost to the state that another one left.
    """

    title: str
    status: int
    detail: str
    code: Code
    retryable: bool
    type: str = "about:blank"
    goal: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def problem(
    error: CommandError, goal_json: bytes | None = None, headers: dict[str, str] | None = None
) -> Response:
    """The HTTP answer that says why not."""
    status = error.http_status
    document = Problem(
        _TITLES[status],
        status,
        error.message,
        error.code,
        error.retryable,
        goal=msgspec.UNSET if goal_json is None else msgspec.Raw(goal_json),
    )
    extra = {"Cache-Control": "no-store", **(headers or {})}
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if status in {429, 503}:
        extra["Retry-After"] = "1"
    return Response(msgspec.json.encode(document), status, extra, PROBLEM_TYPE)


def refusal(code: Code, message: str | None = None) -> Response:
    """The problem document of a code of the table."""
    return problem(CommandError.of(code, message))


def header(scope: Scope, name: bytes) -> str | None:
    """The first header called `name` (lower case), none when absent."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body, never holding more than `max_bytes` of it.

    Raises:
        BodyTooLargeError: Announced or found to be longer.
        DisconnectedError: The caller went away.
    """
    announced = header(scope, b"content-length")
    if announced is not None and announced.isdigit() and int(announced[:18]) > max_bytes:
        raise BodyTooLargeError
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise DisconnectedError
        chunk: bytes = message.get("body", b"")
        # Nearly every body comes in one piece, which is then handed on uncopied.
        body = body + chunk if body else chunk
        if len(body) > max_bytes:
            raise BodyTooLargeError
        if not message.get("more_body"):
            return body
