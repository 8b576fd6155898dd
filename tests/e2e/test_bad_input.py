"""What no client should send, over bare sockets: a plain answer, nothing done, nobody harmed."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.gateway_process import APP_KEY, APP_SECRET
from tests.e2e.wire_socket import WireSocket

if TYPE_CHECKING:
    from tests.e2e.stage import Stage

UNKNOWN_ID = "0" * 24


@dataclass(frozen=True, slots=True)
class Scene:
    """A streamer who was invited, and the viewer who did it."""

    stage: Stage
    streamer: WireSocket
    viewer: WireSocket
    goal: dict[str, Any]

    async def assert_nothing_happened(self) -> None:
        """The invitation stands as it did, alone, and both sockets still answer."""
        assert [goal["version"] for goal in await self.stage.books.goals_of(self.session_id)] == [
            self.goal["version"]
        ]
        assert (await self.stage.books.goal(self.goal["id"]))["state"] == "invited"
        assert await self.stage.books.movements(self.goal["id"]) == {"hold": 1}
        for socket in (self.streamer, self.viewer):
            await socket.send("pusher:ping", {})
            await socket.expect("pusher:pong")

    @property
    def session_id(self) -> str:
        return self.stage.session_id


@pytest.fixture
async def scene(stage: Stage) -> Scene:
    await stage.open_session(stage.user("streamer"))
    streamer = await stage.socket("streamer", "streamer")
    viewer = await stage.socket("viewer", "viewer")
    invited = await viewer.command("client-goal.invite", **stage.terms())
    assert invited["ok"] is True, invited
    await stage.books.until_delivered()
    goal = await stage.books.goal(invited["goal"]["id"])
    return Scene(stage, streamer, viewer, {**invited["goal"], "version": goal["version"]})


def assert_refused(reply: dict[str, Any], code: str) -> None:
    assert reply["ok"] is False, reply
    assert reply["error"]["code"] == code, reply
    assert reply["error"]["retryable"] is False
    assert reply["error"]["message"]


@pytest.mark.parametrize(
    "text",
    [
        '{"event": "client-goal.agree"',
        "nonsense",
        "[]",
        "null",
        "{}",
        '{"event": 7, "data": {}}',
        '{"event": null}',
        '{"event": "pusher:subscribe", "data": 7}',
        '{"event": "pusher:subscribe", "data": {"channel": ["private-x"]}}',
        '{"event": "pusher:subscribe", "data": {"channel": "white space"}}',
        '{"event": "pusher:nonsense", "data": {}}',
        '{"event": "pusher_internal:member_added", "data": {}}',
        "[" * 20_000,
        '{"event": "client-goal.agree", "channel": 7, "data": {}}',
    ],
    ids=lambda text: text[:50],
)
async def test_a_message_that_is_none_gets_an_error_and_the_socket_stays_open(
    scene: Scene, text: str
) -> None:
    await scene.streamer.send_text(text)

    error = await scene.streamer.expect("pusher:error")
    assert error.data["message"]
    assert "code" in error.data
    await scene.assert_nothing_happened()


@pytest.mark.parametrize(
    ("event", "changes", "code"),
    [
        ("client-goal.marry", {}, "unknown_command"),
        ("client-exclusive.pause", {}, "unknown_command"),
        ("client-goal.", {}, "unknown_command"),
        ("client-goal.agree", {"goal_id": UNKNOWN_ID}, "unknown_goal"),
        ("client-goal.disagree", {"goal_id": UNKNOWN_ID}, "unknown_goal"),
        ("client-exclusive.start", {"goal_id": UNKNOWN_ID}, "unknown_goal"),
        ("client-exclusive.finish", {"goal_id": UNKNOWN_ID}, "unknown_goal"),
        ("client-goal.agree", {"goal_id": 7}, "malformed"),
        ("client-goal.agree", {"goal_id": None}, "malformed"),
        ("client-goal.agree", {"goal_id": {"$ne": None}}, "malformed"),
        ("client-goal.agree", {"goal_id": [UNKNOWN_ID]}, "malformed"),
        ("client-goal.agree", {"goal_id": "a.b"}, "unknown_goal"),
        ("client-goal.agree", {"goal_id": "$where"}, "unknown_goal"),
        ("client-goal.agree", {"goal_id": ""}, "unknown_goal"),
        ("client-goal.agree", {}, "malformed"),
    ],
    ids=str,
)
async def test_a_command_that_makes_no_sense_is_refused(
    scene: Scene, event: str, changes: dict[str, Any], code: str
) -> None:
    reply = await scene.streamer.command(event, **changes)

    assert_refused(reply, code)
    await scene.assert_nothing_happened()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"amount": 0}, "amount_out_of_range"),
        ({"amount": -1}, "amount_out_of_range"),
        ({"amount": -(2**63)}, "malformed"),
        ({"amount": 100_000_001}, "amount_out_of_range"),
        ({"amount": 2**53}, "amount_out_of_range"),
        ({"amount": 2**63 - 1}, "malformed"),
        ({"amount": 1.5}, "malformed"),
        ({"amount": 1e300}, "malformed"),
        ({"amount": "2500"}, "malformed"),
        ({"amount": True}, "malformed"),
        ({"amount": None}, "malformed"),
        ({"amount": [1]}, "malformed"),
        ({"prepaid_duration": 0}, "duration_out_of_range"),
        ({"prepaid_duration": -300}, "duration_out_of_range"),
        ({"prepaid_duration": 86_401}, "duration_out_of_range"),
        ({"prepaid_duration": "300"}, "malformed"),
        ({"prepaid_duration": 0.5}, "malformed"),
        ({"session_id": UNKNOWN_ID}, "unknown_session"),
        ({"session_id": "a.b"}, "unknown_session"),
        ({"session_id": "$ne"}, "unknown_session"),
        ({"session_id": {"$gt": ""}}, "malformed"),
        ({"session_id": 7}, "malformed"),
    ],
    ids=str,
)
async def test_an_invitation_on_impossible_terms_is_refused(
    scene: Scene, changes: dict[str, Any], code: str
) -> None:
    other = await scene.stage.socket("other", "viewer")

    reply = await other.command("client-goal.invite", **scene.stage.terms(**changes))

    assert_refused(reply, code)
    await scene.assert_nothing_happened()


@pytest.mark.parametrize("amount", ["1e400", "9" * 40, "-" + "9" * 40, "NaN", "Infinity"])
async def test_numbers_that_no_integer_holds_are_refused(scene: Scene, amount: str) -> None:
    other = await scene.stage.socket("other", "viewer")
    terms = json.dumps({"request_id": "n", **scene.stage.terms(amount=0)})
    text = json.dumps({"event": "client-goal.invite", "channel": other.own_channel, "data": "DATA"})

    await other.send_text(
        text.replace('"DATA"', terms.replace('"amount": 0', f'"amount": {amount}'))
    )

    answer = await other.expect(where=lambda record: record.event in {"goal.reply", "pusher:error"})
    if answer.event == "goal.reply":
        assert answer.data["ok"] is False
        assert answer.data["error"]["code"] in {"malformed", "amount_out_of_range"}
    await scene.assert_nothing_happened()


@pytest.mark.parametrize(
    "request_id", [None, "", "x" * 65, 7, ["a"], {"$ne": 1}], ids=["none", *"abcde"]
)
async def test_a_command_without_a_usable_request_id_is_refused(
    scene: Scene, request_id: Any
) -> None:
    data = {"goal_id": scene.goal["id"]}
    if request_id is not None:
        data["request_id"] = request_id

    await scene.streamer.send("client-goal.agree", data, scene.streamer.own_channel)

    reply = await scene.streamer.expect("goal.reply")
    assert reply.data["ok"] is False
    assert reply.data["error"]["code"] in {"bad_request_id", "malformed"}
    await scene.assert_nothing_happened()


@pytest.mark.parametrize("data", [None, 7, "text", [], "null", '{"goal_id": '], ids=str)
async def test_a_command_whose_data_is_no_object_is_refused(scene: Scene, data: Any) -> None:
    await scene.streamer.send("client-goal.agree", data, scene.streamer.own_channel)

    answer = await scene.streamer.expect(
        where=lambda record: record.event in {"goal.reply", "pusher:error"}
    )
    if answer.event == "goal.reply":
        assert answer.data["ok"] is False
    await scene.assert_nothing_happened()


async def test_another_streamers_goal_can_not_be_answered(scene: Scene) -> None:
    other = await scene.stage.socket("other-streamer", "streamer")

    for event in ("client-goal.agree", "client-goal.disagree", "client-exclusive.start"):
        reply = await other.command(event, goal_id=scene.goal["id"])
        assert reply["ok"] is False
        assert reply["error"]["code"] == "not_your_goal"
        assert "goal" not in reply, "a stranger's goal is nobody else's business"
    await scene.assert_nothing_happened()


async def test_a_viewer_can_not_agree_to_his_own_invitation(scene: Scene) -> None:
    for event in ("client-goal.agree", "client-goal.disagree", "client-exclusive.start"):
        reply = await scene.viewer.command(event, goal_id=scene.goal["id"])
        assert reply["ok"] is False
        assert reply["error"]["code"] in {"wrong_role", "not_your_goal"}
    await scene.assert_nothing_happened()


async def test_a_viewers_token_does_not_make_the_streamer_one(scene: Scene) -> None:
    """The streamer's own id with the role of a viewer: the token's role decides."""
    as_viewer = await scene.stage.socket("streamer", "viewer")

    reply = await as_viewer.command("client-goal.agree", goal_id=scene.goal["id"])

    assert reply["ok"] is False
    assert reply["error"]["code"] in {"wrong_role", "not_your_goal"}
    await scene.assert_nothing_happened()


async def test_a_streamer_can_not_invite_or_withdraw(scene: Scene) -> None:
    invited = await scene.streamer.command("client-goal.invite", **scene.stage.terms())
    withdrawn = await scene.streamer.command("client-goal.withdraw", goal_id=scene.goal["id"])

    for reply in (invited, withdrawn):
        assert reply["ok"] is False
        assert reply["error"]["code"] in {"wrong_role", "own_session", "not_your_goal"}
    await scene.assert_nothing_happened()


async def test_a_second_invitation_to_the_same_stream_is_refused(scene: Scene) -> None:
    reply = await scene.viewer.command("client-goal.invite", **scene.stage.terms())

    assert_refused(reply, "already_invited")
    await scene.assert_nothing_happened()


async def test_an_answered_goal_is_refused_with_the_state_it_is_in(scene: Scene) -> None:
    goal_id = scene.goal["id"]
    agreed = await scene.streamer.command("client-goal.agree", goal_id=goal_id)
    assert agreed["ok"] is True, agreed

    for event, socket in (
        ("client-goal.agree", scene.streamer),
        ("client-goal.disagree", scene.streamer),
        ("client-goal.withdraw", scene.viewer),
    ):
        reply = await socket.command(event, goal_id=goal_id)
        assert_refused(reply, "goal_already_agreed")
        assert reply["goal"]["state"] == "agreed"
    assert await scene.stage.books.movements(goal_id) == {"hold": 1}


async def test_a_show_can_not_start_before_it_is_agreed_nor_finish_before_it_starts(
    scene: Scene,
) -> None:
    started = await scene.streamer.command("client-exclusive.start", goal_id=scene.goal["id"])
    finished = await scene.viewer.command("client-exclusive.finish", goal_id=scene.goal["id"])

    assert_refused(started, "goal_not_agreed")
    assert_refused(finished, "goal_not_live")
    await scene.assert_nothing_happened()


async def test_commands_on_another_channel_are_not_executed(scene: Scene) -> None:
    stream = f"private-stream@{scene.streamer.user_id}"
    await scene.streamer.subscribe(stream)
    data = {"request_id": "r", "goal_id": scene.goal["id"]}

    for channel in (stream, scene.viewer.own_channel, "private-user@nobody", None):
        await scene.streamer.send("client-goal.agree", data, channel)
        await scene.streamer.expect("pusher:error")

    await scene.assert_nothing_happened()
    assert ("client-goal.agree", scene.viewer.own_channel) not in scene.viewer.pushes()


async def test_an_unsubscribed_channel_takes_no_commands(scene: Scene) -> None:
    async with WireSocket(scene.stage.gateway, scene.streamer.user_id, "streamer") as socket:
        data = {"request_id": "r", "goal_id": scene.goal["id"]}
        await socket.send("client-goal.agree", data, socket.own_channel)
        await socket.expect("pusher:error")

    await scene.assert_nothing_happened()


@pytest.mark.parametrize("user_id", ["a.b", "$where", "a$b", "", "ö", "x" * 65, "a b", "a/b"])
async def test_a_user_whose_id_is_none_gets_no_socket_and_no_call(
    stage: Stage, user_id: str
) -> None:
    response = await stage.gateway.call(
        "POST", "/sessions", user_id=user_id, role="streamer", body={}
    )
    assert response.status_code == 401, response.text

    socket = WireSocket(stage.gateway, user_id, "streamer")

    assert await socket.refused_with() in {401, 4009}


async def test_a_signed_channel_of_an_impossible_user_proves_no_identity(stage: Stage) -> None:
    """A backend may sign any channel; the dot must never become a path in MongoDB."""
    socket = await stage.socket("viewer", "viewer")
    channel = "private-user@a.b"
    text = f"{socket.socket_id}:{channel}"
    signature = hmac.new(APP_SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()
    await socket.send("pusher:subscribe", {"channel": channel, "auth": f"{APP_KEY}:{signature}"})
    await socket.expect("pusher_internal:subscription_succeeded", channel)

    await socket.send(
        "client-goal.invite", {"request_id": "r", **stage.terms(session_id=UNKNOWN_ID)}, channel
    )

    await socket.expect("pusher:error")


async def test_a_message_over_the_limit_closes_that_socket_alone(scene: Scene) -> None:
    other = await scene.stage.socket("other", "viewer")

    await other.send("client-typing", "x" * 70_000, other.own_channel)

    assert await other.wait_closed() == 1009
    await scene.assert_nothing_happened()


async def test_a_flood_of_commands_is_answered_one_by_one_and_some_are_put_off(
    scene: Scene,
) -> None:
    other = await scene.stage.socket("other", "viewer")
    request_ids = [f"flood-{number}" for number in range(300)]

    for request_id in request_ids:
        data = {"request_id": request_id, "goal_id": UNKNOWN_ID}
        await other.send("client-goal.withdraw", data, other.own_channel)
    replies = [await other.reply(request_id) for request_id in request_ids]

    put_off = {"overloaded", "rate_limited"}
    codes = {reply["error"]["code"] for reply in replies}
    assert codes <= {"unknown_goal", *put_off}
    assert codes & put_off
    assert all(
        reply["error"]["retryable"] is (reply["error"]["code"] in put_off) for reply in replies
    )
    await scene.assert_nothing_happened()


async def test_binary_frames_are_refused(scene: Scene) -> None:
    await scene.streamer.send_bytes(b"\x00\x01")

    await scene.streamer.expect("pusher:error")
    await scene.assert_nothing_happened()


async def test_an_expired_goal_can_not_be_agreed_even_before_the_timer_has_come(
    scene: Scene,
) -> None:
    """The database says that `exp` is past; the timer's own due time is left in the future."""
    await scene.stage.books.move_exp(scene.goal["id"], seconds=-120)

    reply = await scene.streamer.command("client-goal.agree", goal_id=scene.goal["id"])

    assert_refused(reply, "goal_expired")
    assert await scene.stage.books.movements(scene.goal["id"]) == {"hold": 1}


async def test_an_unknown_app_is_told_to_stay_away(stage: Stage) -> None:
    socket = WireSocket(stage.gateway, stage.user("viewer"), "viewer", path="/app/no-such-key")

    assert await socket.refused_with() == 4001


async def test_an_unknown_path_takes_no_socket(stage: Stage) -> None:
    socket = WireSocket(stage.gateway, stage.user("viewer"), "viewer", path="/apps/e2e-key")

    assert await socket.refused_with() in {404, 4005}
