"""The protocol without a socket: text in, effects out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.apps import App
from gateway.auth import Identity, sign_channel, sign_user
from gateway.limits import Limits
from gateway.messages import Execute, Member, Relay, Send, SignedIn, Subscribe, Unsubscribe
from gateway.protocol import INBOX_MAX, WATCHLIST_MAX, PusherProtocol
from gateway.rates import Rate
from statemachine.goal import Role
from tests.gateway.harness import settings_for_tests

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.messages import Effect

APP = App(id="1", key="key", secret="secret")


def protocol(app: App = APP, **settings: Any) -> PusherProtocol:
    return PusherProtocol(app, "1.2", Limits.of(settings_for_tests(**settings)), {})


def send(machine: PusherProtocol, event: str, now: float = 0.0, **parts: Any) -> Sequence[Effect]:
    return machine.receive(json.dumps({"event": event, **parts}).encode(), now)


def subscribe(machine: PusherProtocol, channel: str, **data: Any) -> Sequence[Effect]:
    return send(machine, "pusher:subscribe", data={"channel": channel, **data})


def sent(effects: Sequence[Effect]) -> dict[str, Any]:
    """The one event that the effects send."""
    [effect] = [one for one in effects if not isinstance(one, SignedIn)]
    assert isinstance(effect, Send)
    body = effect.frames
    decoded: dict[str, Any] = json.loads(body[4 if body[1] == 126 else 2 :])
    return decoded


def sign_in(machine: PusherProtocol, user: dict[str, Any]) -> Sequence[Effect]:
    user_data = json.dumps(user)
    auth = sign_user(machine.app, machine.socket_id, user_data)
    return send(machine, "pusher:signin", data={"auth": auth, "user_data": user_data})


@pytest.mark.pusher("1.2", "data of subscribe may be an object or a JSON string")
def test_data_of_subscribe_may_be_an_object_or_a_json_string() -> None:
    machine = protocol()
    as_object = subscribe(machine, "a")
    machine.opened()
    as_string = send(machine, "pusher:subscribe", data=json.dumps({"channel": "a"}))

    assert as_object == as_string == (Subscribe("a"),)


@pytest.mark.pusher("1.5", "the documentation's vectors of channels and sign-in")
def test_pushers_own_vectors_are_accepted() -> None:
    app = App(id="3", key="278d425bdf160c739803", secret="7ad3773142a6692b25b8")
    machine = PusherProtocol(app, "1234.1234", Limits.of(settings_for_tests()), {})
    private = "58df8b0c36d6982b82c3ecf6b4662e34fe8c25bba48f5369f135bf843651c3a4"
    presence = "afaed3695da2ffd16931f457e338e6c9f2921fa133ce7dac49f529792be6304c"

    one = subscribe(machine, "private-foobar", auth=f"{app.key}:{private}")
    machine.opened()
    two = subscribe(
        machine,
        "presence-foobar",
        auth=f"{app.key}:{presence}",
        channel_data='{"user_id":10,"user_info":{"name":"Mr. Pusher"}}',
    )

    assert one == (Subscribe("private-foobar"),)
    member = Member("10", b'{"name":"Mr. Pusher"}')
    assert two == (Subscribe("presence-foobar", member=member),)


@pytest.mark.pusher("1.5", "the whole of key:digest counts, for this socket and channel")
def test_a_signature_of_another_socket_or_with_another_key_is_refused() -> None:
    machine = protocol()
    for auth in (
        sign_channel(APP, "1.3", "private-a"),
        sign_channel(APP, "1.2", "private-b"),
        sign_channel(APP, "1.2", "private-a").replace("key:", "other:"),
        sign_channel(APP, "1.2", "private-a").partition(":")[2],
        "é:ü",
    ):
        event = sent(subscribe(machine, "private-a", auth=auth))
        assert event["event"] == "pusher:subscription_error"
    assert machine.opening is None


@pytest.mark.pusher("1.6", "encrypted and cache channels are authorized like their base")
def test_cache_and_encrypted_channels_have_the_kind_of_their_base() -> None:
    machine = protocol()
    assert subscribe(machine, "cache-a") == (Subscribe("cache-a"),)
    machine.opened()
    for name in ("private-cache-a", "private-encrypted-a", "private-encrypted-cache-a"):
        assert sent(subscribe(machine, name))["event"] == "pusher:subscription_error"
        auth = sign_channel(APP, "1.2", name)
        assert subscribe(machine, name, auth=auth) == (Subscribe(name),)
        machine.opened()


@pytest.mark.pusher("1.6", "a prefix counts at the beginning of a name only")
def test_a_prefix_counts_at_the_beginning_only() -> None:
    assert subscribe(protocol(), "foo-private-x") == (Subscribe("foo-private-x"),)


def test_channel_data_without_signature_shows_nobody_but_the_signed_in_user() -> None:
    machine = protocol()
    machine.identity = Identity("v", Role.VIEWER)

    [effect] = subscribe(machine, "presence-stream@s", channel_data='{"user_id":"boss"}')

    assert effect == Subscribe("presence-stream@s", Member("v", b"{}"), live_streamer="s")


@pytest.mark.pusher(
    "1.6", "user_id and user_info of a member have bounds; a numeric id becomes a string"
)
def test_presence_needs_a_member_that_fits() -> None:
    machine = protocol(presence_user_info_max_bytes=20)
    for channel_data in (
        None,
        "not json",
        "[]",
        '{"user_id":""}',
        '{"user_id":true}',
        '{"user_id":1.5}',
        json.dumps({"user_id": "x" * 129}),
        json.dumps({"user_id": "x", "user_info": {"name": "x" * 20}}),
    ):
        auth = sign_channel(APP, "1.2", "presence-a", channel_data)
        effects = subscribe(machine, "presence-a", auth=auth, channel_data=channel_data)
        assert sent(effects)["event"] == "pusher:subscription_error", channel_data


def test_messages_wait_for_the_subscription_before_them_but_pings_and_events_do_not() -> None:
    machine = protocol()
    machine.subscriptions["private-b"] = None
    subscribe(machine, "private-a", auth=sign_channel(APP, "1.2", "private-a"))

    assert send(machine, "client-x", channel="private-a", data=1) == ()
    assert send(machine, "pusher:unsubscribe", data={"channel": "private-a"}) == ()
    assert sent(send(machine, "pusher:ping"))["event"] == "pusher:pong"
    [relayed] = send(machine, "client-x", channel="private-b", data=1)
    assert isinstance(relayed, Relay)

    machine.subscriptions["private-a"] = None
    assert machine.resume(0) is None
    machine.opened()
    [waited] = machine.resume(0) or ()
    assert isinstance(waited, Relay)
    assert machine.resume(0) == (Unsubscribe("private-a"),)
    assert machine.resume(0) is None


def test_a_full_inbox_asks_to_stop_reading_and_an_empty_one_does_not() -> None:
    machine = protocol()
    subscribe(machine, "a")
    for _ in range(INBOX_MAX):
        assert not machine.congested
        send(machine, "pusher:unsubscribe", data={"channel": "b"})

    assert machine.congested
    machine.opened()
    while machine.resume(0) is not None:
        pass
    assert not machine.congested


@pytest.mark.pusher("1.8", "a socket signs in as one user only")
def test_signing_in_twice_as_one_user_works_and_as_another_does_not() -> None:
    machine = protocol()
    assert sent(sign_in(machine, {"id": 7}))["event"] == "pusher:signin_success"
    assert sent(sign_in(machine, {"id": "7"}))["event"] == "pusher:signin_success"
    assert sent(sign_in(machine, {"id": "8"}))["event"] == "pusher:error"
    assert machine.identity is not None
    assert machine.identity.user_id == "7"


def test_signing_in_keeps_the_role_that_a_token_proved() -> None:
    machine = protocol()
    machine.identity = Identity("v", Role.VIEWER, "platform")
    sign_in(machine, {"id": "v", "user_info": {"n": 1}})

    identity = machine.identity
    assert (identity.role, identity.client_id, identity.user_info) == (
        Role.VIEWER,
        "platform",
        b'{"n": 1}',
    )


@pytest.mark.pusher("1.8", "a wrong signature or no id signs nobody in")
def test_a_wrong_signature_or_no_id_signs_nobody_in() -> None:
    machine = protocol()
    data = {"auth": "key:00", "user_data": '{"id":"7"}'}
    assert sent(send(machine, "pusher:signin", data=data))["event"] == "pusher:error"
    for user in ({}, {"id": ""}, {"id": None}, {"id": "x" * 129}):
        assert sent(sign_in(machine, user))["event"] == "pusher:error"
    assert machine.identity is None


@pytest.mark.pusher("1.8", "a watchlist over 100 users is cut (4302) and signs in all the same")
@pytest.mark.pusher("1.8", "the watchlist and its user ids come with pusher:signin")
def test_signing_in_says_who_is_watched_with_numeric_ids_as_text() -> None:
    effects = sign_in(protocol(), {"id": 7, "watchlist": ["a", 8]})

    assert effects[-1] == SignedIn("7", ("a", "8"))


def test_a_watchlist_that_is_null_watches_nobody() -> None:
    effects = sign_in(protocol(), {"id": "v", "watchlist": None})

    assert effects[-1] == SignedIn("v", ())


def test_a_signature_over_ones_own_channel_signs_in_and_watches_as_before() -> None:
    machine = protocol()
    name = "private-user@v"
    effects = subscribe(machine, name, auth=sign_channel(APP, "1.2", name))
    machine.opened()
    again = subscribe(machine, "private-user@w", auth=sign_channel(APP, "1.2", "private-user@w"))

    assert effects == (SignedIn("v"), Subscribe(name, snapshot_of="v"))
    assert again == (Subscribe("private-user@w"),)


def test_hidden_channels_can_be_neither_joined_nor_left() -> None:
    machine = protocol()
    machine.subscriptions["#watch-u"] = None

    assert sent(subscribe(machine, "#watch-v"))["event"] == "pusher:error"
    assert send(machine, "pusher:unsubscribe", data={"channel": "#watch-u"}) == ()


def test_a_watchlist_over_its_limit_is_cut_and_signs_in_all_the_same() -> None:
    machine = protocol()
    success, notice, _ = sign_in(machine, {"id": "7", "watchlist": list(range(101))})

    assert sent([success])["event"] == "pusher:signin_success"
    assert sent([notice])["data"]["code"] == 4302
    assert machine.identity is not None
    assert len(machine.identity.watchlist) == WATCHLIST_MAX


@pytest.mark.pusher("1.2", "a client event's data keeps the sender's type")
def test_a_relayed_event_keeps_the_senders_bytes_and_an_absent_data_is_null() -> None:
    machine = protocol()
    machine.subscriptions["private-a"] = None
    raw = b'{"event":"client-x","channel":"private-a","data":{"a" :  1e3}}'

    [effect] = machine.receive(raw, 0)
    assert isinstance(effect, Relay)
    assert effect.body == b'{"event":"client-x","channel":"private-a","data":{"a" :  1e3}}'
    [effect] = send(machine, "client-x", channel="private-a")
    assert isinstance(effect, Relay)
    assert json.loads(effect.body)["data"] is None


def test_commands_count_against_their_own_rate_not_the_client_events() -> None:
    machine = protocol(client_event_rate_per_s=1, command_rate_per_s=3)
    machine.identity = Identity("v", Role.VIEWER)
    machine.subscriptions["private-user@v"] = None
    data = {"request_id": "r", "goal_id": "0" * 24}

    effects = [
        send(machine, "client-goal.withdraw", channel="private-user@v", data=data)[0]
        for _ in range(4)
    ]

    assert [isinstance(effect, Execute) for effect in effects] == [True, True, True, False]
    assert json.loads(sent(effects[3:])["data"])["error"]["code"] == "rate_limited"


def test_a_user_whose_id_the_goals_could_not_keep_gets_no_command_through() -> None:
    machine = protocol()
    sign_in(machine, {"id": "a.b"})
    machine.subscriptions["private-user@a.b"] = None
    data = {"request_id": "r", "goal_id": "0" * 24}

    reply = sent(send(machine, "client-goal.withdraw", channel="private-user@a.b", data=data))

    assert json.loads(reply["data"])["error"]["code"] == "bad_user_id"


def test_a_command_that_is_nested_too_deeply_inside_a_string_is_malformed() -> None:
    machine = protocol()
    machine.identity = Identity("v", Role.VIEWER)
    machine.subscriptions["private-user@v"] = None
    data = '{"request_id":"r","goal_id":"x","unknown":' + "[" * 100_000 + "]" * 100_000 + "}"

    reply = sent(send(machine, "client-goal.withdraw", channel="private-user@v", data=data))

    assert json.loads(reply["data"])["error"]["code"] == "malformed"


def test_a_rate_allows_a_burst_and_then_its_number_a_second() -> None:
    rate = Rate(10, 0.0)
    assert sum(rate.allow(10, 0.0) for _ in range(50)) == 10
    assert sum(rate.allow(10, 0.5) for _ in range(50)) == 5
    assert sum(rate.allow(10, 100.0) for _ in range(50)) == 10


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_text_whatever_makes_the_protocol_fail(text: bytes) -> None:
    for effect in protocol().receive(text, 0.0):
        assert isinstance(effect, Send)


@given(
    st.fixed_dictionaries(
        {
            "event": st.sampled_from(
                ["pusher:subscribe", "pusher:signin", "client-x", "pusher:ping"]
            )
        },
        optional={
            "channel": st.none() | st.integers() | st.text(max_size=20),
            "data": st.recursive(
                st.none() | st.booleans() | st.integers() | st.text(max_size=10),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(["channel", "auth", "channel_data", "user_data", "x"]),
                        inner,
                    )
                ),
                max_leaves=8,
            ),
        },
    )
)
def test_no_shape_whatever_makes_the_protocol_fail(message: dict[str, Any]) -> None:
    machine = protocol()
    machine.subscriptions["private-a"] = None

    for effect in machine.receive(json.dumps(message).encode(), 0.0):
        assert isinstance(effect, Send | Subscribe | Relay)
