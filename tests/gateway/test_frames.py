from __future__ import annotations

import json

import pytest
from websockets.frames import Frame, Opcode

from gateway import frames


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_a_frame_is_what_websockets_itself_would_write(length: int) -> None:
    body = b"x" * length

    assert frames.frame(body) == Frame(Opcode.TEXT, body).serialize(mask=False)


def test_a_push_carries_its_data_as_a_json_string() -> None:
    body = json.loads(frames.push_body("goal.ended", "private-stream@s", {"goal_id": "é\n"}))

    assert body["event"] == "goal.ended"
    assert body["channel"] == "private-stream@s"
    assert json.loads(body["data"]) == {"goal_id": "é\n"}


@pytest.mark.pusher("1.2", "published data goes out exactly as published")
def test_published_data_goes_out_exactly_as_published() -> None:
    data = '{"a" : 1,\n"b":"\\u00e9"}'

    assert json.loads(frames.published_body("e", "c", data))["data"] == data


@pytest.mark.parametrize(
    "data", [b'{"a": 1.0}', b'"text"', b"[1, 2]", b"null", b"12", b'"{\\"a\\":1}"']
)
def test_a_client_events_data_keeps_its_type_and_its_bytes(data: bytes) -> None:
    body = frames.client_event_body("client-e", "private-c", data, None)

    assert b'"data":' + data + b"}" in body
    assert "user_id" not in json.loads(body)


@pytest.mark.pusher("1.7", "on presence a client event carries its sender's user_id")
def test_a_client_event_on_presence_names_its_sender() -> None:
    body = json.loads(frames.client_event_body("client-e", "presence-c", b"{}", "7"))

    assert body == {"event": "client-e", "channel": "presence-c", "data": {}, "user_id": "7"}


@pytest.mark.pusher("1.2", "data of pusher:error is an object with a code or null")
def test_an_errors_data_is_an_object_with_a_code_or_null() -> None:
    assert json.loads(frames.error_body("no")) == {
        "event": "pusher:error",
        "data": {"code": None, "message": "no"},
    }
    assert json.loads(frames.error_body("no", 4301))["data"]["code"] == 4301


@pytest.mark.pusher("1.3", "activity_timeout is whole seconds and never falsy")
@pytest.mark.parametrize(("seconds", "sent"), [(120, 120), (0.2, 1), (29.6, 30)])
def test_activity_timeout_is_whole_seconds_and_never_falsy(seconds: float, sent: int) -> None:
    body = json.loads(frames.established_body("1.2", seconds))

    assert json.loads(body["data"]) == {"socket_id": "1.2", "activity_timeout": sent}


@pytest.mark.pusher("1.3", "presence data: ids, hash and count")
def test_presence_data_lists_ids_and_their_user_info() -> None:
    data = json.loads(frames.presence_data({"1": b'{"name":"A"}', "2": b"{}"}))

    assert data == {
        "presence": {"ids": ["1", "2"], "hash": {"1": {"name": "A"}, "2": {}}, "count": 2}
    }


@pytest.mark.pusher("1.2", "data of subscription_succeeded is always there and a JSON string")
def test_subscription_succeeded_always_has_data_and_it_is_a_string() -> None:
    assert json.loads(frames.succeeded_body("c"))["data"] == "{}"


@pytest.mark.pusher("1.2", "data of member events is a JSON string")
def test_member_events_are_double_encoded() -> None:
    added = json.loads(frames.member_added_body("presence-c", "7", b'{"a":1}'))
    removed = json.loads(frames.member_removed_body("presence-c", "7"))

    assert json.loads(added["data"]) == {"user_id": "7", "user_info": {"a": 1}}
    assert json.loads(removed["data"]) == {"user_id": "7"}
