from __future__ import annotations

import pytest

from gateway.channels import USER_EVENTS, USER_ID_MAX, ChannelKind, channel_kind, is_channel_name

LONGEST = 32


@pytest.mark.parametrize("name", ["a", "private-A_-=@,.;9", "x" * LONGEST])
def test_a_channel_has_the_letters_that_pusher_allows(name: str) -> None:
    assert is_channel_name(name, LONGEST)


@pytest.mark.parametrize(
    "name", ["", "a b", "a|b", "a/b", "é", "#a", "#watch-ann", "a\n", "x" * 33]
)
def test_no_other_letters_and_not_too_many(name: str) -> None:
    assert not is_channel_name(name, LONGEST)


@pytest.mark.parametrize(
    "user_id", ["ann", "auth0|5f7c", "ann+news@example.com", "Zoë B.", "#", "u" * USER_ID_MAX]
)
def test_whatever_id_a_user_signs_in_with_names_that_users_channel(user_id: str) -> None:
    name = USER_EVENTS + user_id

    assert is_channel_name(name, LONGEST)
    assert channel_kind(name) is ChannelKind.USER_EVENTS


@pytest.mark.parametrize("user_id", ["", "u" * (USER_ID_MAX + 1)])
def test_an_id_that_nobody_can_sign_in_with_names_no_channel(user_id: str) -> None:
    assert not is_channel_name(USER_EVENTS + user_id, 1_024)
