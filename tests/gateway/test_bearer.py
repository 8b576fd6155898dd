from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from gateway.server import RunningGateway

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNKNOWN = "0123456789abcdef01234567"

CALLS = [
    ("POST", "/goals"),
    ("GET", f"/goals/{UNKNOWN}"),
    ("DELETE", f"/goals/{UNKNOWN}"),
    ("POST", f"/goals/{UNKNOWN}/withdraw"),
    ("POST", "/sessions"),
    ("GET", f"/sessions/{UNKNOWN}"),
    ("DELETE", f"/sessions/{UNKNOWN}"),
    ("GET", f"/sessions/{UNKNOWN}/token"),
    ("POST", f"/sessions/{UNKNOWN}/exclusive"),
    ("DELETE", f"/sessions/{UNKNOWN}/exclusive"),
    ("POST", "/pusher/auth"),
    ("POST", "/pusher/user-auth"),
]


@pytest.mark.parametrize(("method", "path"), CALLS)
async def test_every_call_needs_a_token(http: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await http.request(method, path)

    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["code"] == "unauthenticated"


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Basic YTpi", "Bearer a.b.c", "Bearer \xff", "x"]
)
async def test_what_is_no_bearer_token_proves_nothing(
    http: httpx.AsyncClient, authorization: str
) -> None:
    headers = {b"Authorization": authorization.encode("latin-1")}

    answer = await http.get(f"/goals/{UNKNOWN}", headers=headers)

    assert answer.status_code == 401


async def test_the_schemes_name_is_read_in_any_case(
    http: httpx.AsyncClient, bearer: Callable[..., dict[str, str]]
) -> None:
    value = bearer("ada", "streamer")["Authorization"].replace("Bearer", "bEARER")

    answer = await http.get(f"/goals/{UNKNOWN}", headers={"Authorization": value})

    assert answer.status_code == 404


async def test_a_token_expires_by_the_gateways_clock(
    http: httpx.AsyncClient, bearer: Callable[..., dict[str, str]], gateway: RunningGateway
) -> None:
    now = gateway.parts.clock.now()
    expired = bearer("ada", "streamer", exp=now - timedelta(seconds=1))

    answer = await http.get(f"/goals/{UNKNOWN}", headers=expired)

    assert answer.status_code == 401
    assert answer.json()["detail"] == "The token has expired."
