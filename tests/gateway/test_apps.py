from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from gateway.apps import DEMO_APP, WEBHOOK_EVENTS, App, Apps, AppsError, parse_apps, read_apps

PAGE = Path(__file__).parent.parent.parent / "docs" / "apps.md"
ONE = '[[apps]]\nid = "1"\nkey = "app-key"\nsecret = "s3cret"\n'


def test_an_app_is_found_by_its_key_and_by_its_id() -> None:
    apps = parse_apps(ONE)

    assert apps.by_key("app-key") is apps.by_id("1")
    assert apps.by_key("1") is None
    assert apps.by_id("app-key") is None


def test_the_first_app_in_the_file_carries_the_invitations() -> None:
    apps = parse_apps(ONE + '[[apps]]\nid = "0"\nkey = "another"\nsecret = "s"\n')

    assert apps.first.id == "1"
    assert [app.id for app in apps] == ["1", "0"]


def test_every_key_of_the_design_is_read() -> None:
    text = """
    [[apps]]
    id = "1"
    key = "app-key"
    secret = "new"
    previous_secret = "old"
    client_events = false
    subscription_count = true
    max_connections = 10
    enabled = false
    authorized_only = true
    authorization_timeout_s = 5
    origins = ["example.com", "*.example.org", "localhost:3000"]
    [[apps.webhooks]]
    url = "https://example.com/hook"
    events = ["channel_occupied", "member_removed"]
    """

    app = parse_apps(text).first

    assert app.secrets == ("new", "old")
    assert (app.client_events, app.subscription_count, app.enabled) == (False, True, False)
    assert (app.max_connections, app.authorization_timeout_s) == (10, 5.0)
    assert app.authorized_only
    assert app.origins == ("example.com", "*.example.org", "localhost:3000")
    assert app.webhooks[0].events == ("channel_occupied", "member_removed")


def test_the_documented_file_names_every_key_with_its_default() -> None:
    text = PAGE.read_text().partition("```toml\n")[2].partition("```")[0]
    documented = tomllib.loads(text)["apps"][0]
    app = parse_apps(text).first

    assert documented.keys() == set(App.__struct_fields__)
    assert {event for hook in app.webhooks for event in hook.events} == WEBHOOK_EVENTS
    plain = App(id=app.id, key=app.key, secret=app.secret)
    examples = {"previous_secret", "origins", "webhooks"}
    for field in documented.keys() - examples:
        assert getattr(app, field) == getattr(plain, field), field


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "apps.toml: there is no [[apps]] entry"),
        ("apps = 1", "apps.toml:1: apps: expected `array`, got `int`"),
        ("[[apps]\n", "apps.toml: not TOML: "),
        (ONE + "colour = 1\n", "apps.toml:5: apps[0]: object contains unknown field `colour`"),
        ('[[apps]]\nid = "1"\nkey = "k"\n', "apps.toml:1: apps[0]: object missing required field"),
        (ONE.replace('"1"', "1"), "apps.toml:2: apps[0].id: expected `str`, got `int`"),
        (ONE.replace('"1"', '"a/b"'), "apps.toml:2: apps[0].id: expected `str` matching"),
        (ONE.replace("s3cret", ""), "apps.toml:4: apps[0].secret: expected `str` of length >= 1"),
        (ONE + ONE, "apps.toml: two apps have the id '1'"),
        (ONE + ONE.replace('"1"', '"2"'), "apps.toml: two apps have the key 'app-key'"),
        (ONE + "max_connections = -1\n", "apps.toml:5: apps[0].max_connections: expected `int` >="),
        (
            ONE + 'origins = ["https://a"]\n',
            "apps.toml:5: apps[0].origins[0]: expected `str` match",
        ),
        (
            ONE + '[[apps.webhooks]]\nurl = "ftp://x"\nevents = []\n',
            "apps.toml:6: apps[0].webhooks[0].url: expected `str` matching",
        ),
        (
            ONE + '[[apps.webhooks]]\nurl = "https://x"\nevents = ["vacated"]\n',
            "apps.toml:5: apps[0].webhooks[0]: no webhook event is called 'vacated'",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(AppsError) as caught:
        parse_apps(text)

    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


def test_the_line_is_that_of_the_app_which_is_wrong() -> None:
    second = '\n# the second\n[[apps]]\nid = "2"\nkey = "k2"\nsecret = 5\n'

    with pytest.raises(AppsError, match=r"^apps\.toml:10: apps\[1\]\.secret: "):
        parse_apps(ONE + second)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AppsError, match=r"missing\.toml: No such file"):
        read_apps(tmp_path / "missing.toml")


def test_a_file_is_read_as_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "apps.toml"
    path.write_bytes(ONE.replace("s3cret", "geheimnis-ä").encode())

    assert read_apps(path).first.secret == "geheimnis-ä"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(AppsError, match="not a text file in UTF-8"):
        read_apps(path)


def test_a_secret_never_shows_in_a_representation() -> None:
    app = App(id="1", key="k", secret="hush", previous_secret="old-hush")

    assert "hush" not in repr(app)


def test_the_demo_has_one_app_with_public_values() -> None:
    apps = Apps([DEMO_APP])

    assert (apps.first.id, apps.first.key, apps.first.secret) == ("1", "app-key", "app-secret")
