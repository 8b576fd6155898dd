from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from gateway.auth import verify_channel_signature, verify_signin_signature

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from gateway.apps import Apps

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOCKET = "123.456"


async def test_ones_own_channel_is_signed_from_a_form_as_pusher_js_sends_it(
    http: httpx.AsyncClient,
    bearer: Callable[..., dict[str, str]],
    user: Callable[[str], str],
    apps: Apps,
) -> None:
    channel = f"private-user@{user('bob')}"

    answer = await http.post(
        "/pusher/auth",
        data={"socket_id": SOCKET, "channel_name": channel},
        headers=bearer(user("bob"), "viewer"),
    )

    assert answer.status_code == 200
    assert answer.json().keys() == {"auth"}
    auth = answer.json()["auth"]
    assert verify_channel_signature(apps.first, SOCKET, channel, auth, None)


async def test_a_presence_channel_is_signed_with_the_member_data(
    http: httpx.AsyncClient,
    bearer: Callable[..., dict[str, str]],
    user: Callable[[str], str],
    apps: Apps,
) -> None:
    channel = f"presence-stream-viewer@{user('ada')}.preview.{user('bob')}"

    answer = await http.post(
        "/pusher/auth",
        json={"socket_id": SOCKET, "channel_name": channel},
        headers=bearer(user("bob"), "viewer"),
    )

    data = answer.json()["channel_data"]
    assert json.loads(data) == {"user_id": user("bob")}
    assert verify_channel_signature(apps.first, SOCKET, channel, answer.json()["auth"], data)


async def test_a_streams_room_is_open_while_the_stream_is_live(
    http: httpx.AsyncClient, bearer: Callable[..., dict[str, str]], user: Callable[[str], str]
) -> None:
    streamer, viewer = bearer(user("ada"), "streamer"), bearer(user("bob"), "viewer")
    asked = {"socket_id": SOCKET, "channel_name": f"presence-stream@{user('ada')}"}

    before = await http.post("/pusher/auth", data=asked, headers=viewer)
    session = await http.post("/sessions", headers=streamer)
    during = await http.post("/pusher/auth", data=asked, headers=viewer)
    await http.delete(f"/sessions/{session.json()['id']}", headers=streamer)
    after = await http.post("/pusher/auth", data=asked, headers=viewer)

    assert [before.status_code, during.status_code, after.status_code] == [403, 200, 403]


@pytest.mark.parametrize(
    "channel",
    ["private-user@someone", "private-stream@someone", "private-room", "presence-room", "public"],
)
async def test_other_channels_are_not_signed_here(
    http: httpx.AsyncClient, bearer: Callable[..., dict[str, str]], channel: str
) -> None:
    answer = await http.post(
        "/pusher/auth",
        data={"socket_id": SOCKET, "channel_name": channel},
        headers=bearer("bob", "viewer"),
    )

    assert answer.status_code == 403
    assert answer.json()["code"] == "forbidden"


@pytest.mark.parametrize("socket_id", ["", "1", "1.2.3", "a.b", "1.2:private-x", "1.2\n"])
async def test_a_socket_id_is_two_numbers_around_a_dot(
    http: httpx.AsyncClient, bearer: Callable[..., dict[str, str]], socket_id: str
) -> None:
    answer = await http.post(
        "/pusher/auth",
        data={"socket_id": socket_id, "channel_name": "private-user@bob"},
        headers=bearer("bob", "viewer"),
    )

    assert answer.status_code == 400
    assert answer.json()["code"] == "malformed"


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/x-www-form-urlencoded", 400),
        (b"\xff", "application/x-www-form-urlencoded", 400),
        (b"&".join([b"a=1"] * 100), "application/x-www-form-urlencoded", 400),
        (b'{"socket_id": 1}', "application/json", 400),
        (b"{", "application/json", 400),
        (b"<xml/>", "text/xml", 415),
    ],
)
async def test_a_body_that_can_not_be_read_is_refused(
    http: httpx.AsyncClient,
    bearer: Callable[..., dict[str, str]],
    body: bytes,
    kind: str,
    status: int,
) -> None:
    headers = bearer("bob", "viewer") | {"Content-Type": kind}

    answer = await http.post("/pusher/auth", content=body, headers=headers)

    assert answer.status_code == status


async def test_a_signin_is_signed_for_the_tokens_user(
    http: httpx.AsyncClient, bearer: Callable[..., dict[str, str]], apps: Apps
) -> None:
    answer = await http.post(
        "/pusher/user-auth", data={"socket_id": SOCKET}, headers=bearer("bob", "viewer")
    )

    data = answer.json()["user_data"]
    assert json.loads(data) == {"id": "bob"}
    assert verify_signin_signature(apps.first, SOCKET, data, answer.json()["auth"])
