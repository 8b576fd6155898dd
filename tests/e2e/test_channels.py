"""What Pusher's users expect of channels: members, client events, refusals, rate limits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.stage import Stage, StageBuilder

# Gateways of their own take seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(120)


@pytest.mark.pusher("clients", "pusher-js in Node: members of a presence channel come and go")
async def test_members_see_each_other_come_and_go(stage: Stage) -> None:
    anna = await stage.party("anna", "viewer", by="backend")
    bert = await stage.party("bert", "viewer", by="backend")
    room = f"presence-{stage.user('room')}"

    alone = await anna.subscribe(room)
    both = await bert.subscribe(room)
    added = await anna.expect("pusher:member_added", room)
    await bert.unsubscribe(room)
    removed = await anna.expect("pusher:member_removed", room)

    assert alone.data == {
        "me": anna.user_id,
        "count": 1,
        "members": {anna.user_id: {"name": anna.user_id}},
    }
    assert both.data["me"] == bert.user_id
    assert both.data["count"] == 2
    assert set(both.data["members"]) == {anna.user_id, bert.user_id}
    assert added.data == {"id": bert.user_id, "info": {"name": bert.user_id}}
    assert removed.data["id"] == bert.user_id
    # Who joins is not told of himself.
    assert not bert.all_of("pusher:member_added")


@pytest.mark.pusher(
    "1.3", "member_added and member_removed on a user's first and last socket, not to the joiner"
)
async def test_a_user_with_two_sockets_comes_once_and_goes_with_the_last(stage: Stage) -> None:
    anna = await stage.party("anna", "viewer", by="backend")
    first = await stage.party("bert", "viewer", by="backend")
    second = await stage.party("bert", "viewer", by="backend")
    room = f"presence-{stage.user('room')}"
    await anna.subscribe(room)
    await first.subscribe(room)
    seen = await second.subscribe(room)
    assert seen.data["count"] == 2

    await first.disconnect()
    third = await stage.party("carl", "viewer", by="backend")
    of_third = await third.subscribe(room)
    await anna.expect(
        "pusher:member_added", room, where=lambda record: record.data["id"] == third.user_id
    )
    assert of_third.data["count"] == 3
    await second.disconnect()
    await anna.expect("pusher:member_removed", room)

    told = [
        (record.event, record.data["id"])
        for record in anna.received
        if record.kind == "event"
        and record.event in {"pusher:member_added", "pusher:member_removed"}
    ]
    assert told == [
        ("pusher:member_added", first.user_id),
        ("pusher:member_added", third.user_id),
        ("pusher:member_removed", first.user_id),
    ]


@pytest.mark.pusher("clients", "pusher-js in Node: client events")
async def test_a_client_event_reaches_the_others_and_not_its_sender(stage: Stage) -> None:
    anna = await stage.party("anna", "viewer", by="backend")
    bert = await stage.party("bert", "viewer", by="backend")
    room = f"private-{stage.user('room')}"
    await anna.subscribe(room)
    await bert.subscribe(room)
    data = {"text": "Grüße 🎭", "n": [1, None]}

    await anna.trigger(room, "client-typing", data)
    received = await bert.expect("client-typing", room)
    await bert.trigger(room, "client-typing", "back")
    back = await anna.expect("client-typing", room)

    assert received.data == data
    assert back.data == "back"
    assert anna.all_of("client-typing") == ["back"]
    assert bert.all_of("client-typing") == [data]


@pytest.mark.pusher("1.7", "on presence a client event carries its sender's user_id")
async def test_a_client_event_on_presence_names_its_sender(stage: Stage) -> None:
    anna = await stage.party("anna", "viewer", by="backend")
    bert = await stage.party("bert", "viewer", by="backend")
    room = f"presence-{stage.user('room')}"
    await anna.subscribe(room)
    await bert.subscribe(room)

    await anna.trigger(room, "client-typing", {})

    received = await bert.expect("client-typing", room, kind="frame")
    assert received.fields["user_id"] == anna.user_id


async def test_client_events_need_a_channel_that_is_private_and_subscribed(stage: Stage) -> None:
    anna = await stage.party("anna", "viewer", by="backend")
    listener = await stage.socket("listener", "viewer")
    public = stage.user("room")
    await anna.subscribe(public)
    await listener.subscribe(public)

    await anna.trigger(public, "client-typing", {})
    await anna.expect("pusher:error", kind="frame")
    await listener.send("client-typing", {}, f"private-{public}")
    await listener.expect("pusher:error")

    await stage.gateway.publish([public], "last", {})
    await listener.expect("last", public)
    assert listener.all_of("client-typing") == []


@pytest.mark.pusher("1.7", "client events over the rate get 4301 and the socket stays open")
async def test_client_events_over_the_rate_are_refused_and_the_socket_stays(stage: Stage) -> None:
    anna = await stage.party("anna", "viewer", by="backend")
    bert = await stage.party("bert", "viewer", by="backend")
    room = f"private-{stage.user('room')}"
    await anna.subscribe(room)
    await bert.subscribe(room)

    for number in range(40):
        await anna.trigger(room, "client-n", number)
    error = await anna.expect("pusher:error", kind="frame")

    assert error.data["code"] == 4301
    await stage.gateway.publish([room], "last", {})
    await anna.expect("last", room)
    await bert.expect("last", room)
    assert len(bert.all_of("client-n")) < 40


@pytest.mark.pusher("1.3", "a channel's events keep their order")
async def test_events_keep_their_order_through_the_whole_path(stage: Stage) -> None:
    listener = await stage.party("listener", "viewer")
    channel = stage.user("news")
    await listener.subscribe(channel)

    for number in range(50):
        await stage.gateway.publish([channel], "n", number)
    await stage.gateway.publish([channel], "last", None)
    await listener.expect("last", channel)

    assert listener.all_of("n") == list(range(50))


@pytest.mark.parametrize("by", ["endpoint", "signin"])
async def test_nobody_hears_what_is_not_theirs(stage: Stage, by: str) -> None:
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    stranger = await stage.party("stranger", "viewer", by=by)

    for channel in (
        streamer.own_channel,
        viewer.own_channel,
        streamer.stream_channel,
        streamer.preview_channel(viewer),
        f"private-{stage.user('room')}",
        f"presence-{stage.user('room')}",
    ):
        refused = await stranger.refused(channel)
        assert refused.data["type"] == "AuthError"
    await stranger.subscribe(streamer.audience_channel)


async def test_the_audience_channel_opens_when_the_stream_does(stage: Stage) -> None:
    streamer = await stage.party("streamer", "streamer")
    viewer = await stage.party("viewer", "viewer")
    signed_in = await stage.party("signed-in", "viewer", by="signin")

    refusals = [
        await viewer.refused(streamer.audience_channel),
        await signed_in.refused(streamer.audience_channel),
    ]
    await stage.open_session(streamer.user_id)
    opened = await viewer.subscribe(streamer.audience_channel)
    # Where the gateway and not an endpoint has refused, pusher-js asks again when it reconnects.
    await signed_in.disconnect()
    await signed_in.reconnect()
    reopened = await signed_in.expect("pusher:subscription_succeeded", streamer.audience_channel)

    assert [refusal.data["type"] for refusal in refusals] == ["AuthError", "AuthError"]
    assert opened.data["me"] == viewer.user_id
    assert set(reopened.data["members"]) == {viewer.user_id, signed_in.user_id}


@pytest.mark.pusher(
    "1.5", "a wrong signature is a subscription_error that never tells the right one"
)
async def test_a_forged_signature_opens_nothing(stage: Stage) -> None:
    socket = await stage.socket("viewer", "viewer")
    channel = f"private-{stage.user('room')}"

    await socket.send(
        "pusher:subscribe", {"channel": channel, "auth": f"{stage.gateway.app_key}:{'0' * 64}"}
    )
    refused = await socket.expect("pusher:subscription_error", channel)

    assert refused.data["status"] == 401
    assert "0" * 64 not in str(refused.data)


@pytest.mark.pusher("clients", "pusher-js in Node comes back by itself when a gateway stops")
async def test_a_gateway_that_stops_sends_its_clients_elsewhere_and_they_come_back(
    stage_with: StageBuilder,
) -> None:
    stage = await stage_with()
    streamer = await stage.streamer()
    viewer = await stage.viewer("viewer", streamer)
    goal = await stage.invited(viewer)

    await asyncio.to_thread(stage.gateway.stop)
    await streamer.expect(
        kind="state", where=lambda record: record.fields["previous"] == "connected"
    )
    await stage.gateway.restart()

    await streamer.connected(timeout_s=30)
    snapshot = await streamer.expect("goal.snapshot", streamer.own_channel)
    assert [open_goal["id"] for open_goal in snapshot.data["goals"]] == [goal["id"]]
