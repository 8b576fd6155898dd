from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from gateway.apps import App, Apps, read_apps
from gateway.auth import sign_channel
from gateway.reload import AppsReload
from tests.gateway.fallback_client import FallbackClient
from tests.gateway.harness import running_gateway, settings_for_tests

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gateway.harness import Gateway

ONE: dict[str, Any] = {"id": "1", "key": "app-key", "secret": "first-secret"}
TWO: dict[str, Any] = {"id": "2", "key": "two-key", "secret": "second-secret"}


def write(path: Path, *apps: dict[str, Any]) -> None:
    """An apps' file with these apps."""
    blocks = (
        "[[apps]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in app.items())
        for app in apps
    )
    path.write_text("\n".join(blocks))


def replace(path: Path, text: str | None) -> None:
    """The file holds this now, or is gone."""
    path.unlink()
    if text is not None:
        path.write_text(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "apps.toml"
    write(path, ONE, TWO)
    return path


def reload_of(gateway: Gateway, path: Path) -> AppsReload:
    settings = settings_for_tests(apps_file=path)
    return AppsReload(settings, gateway.node.apps, gateway.node, lambda: None)


async def test_a_new_app_is_served_and_the_sockets_of_the_others_stay(path: Path) -> None:
    async with running_gateway(apps=read_apps(path)) as gateway:
        client = await gateway.connect()
        await client.subscribed("news")
        write(path, ONE, TWO, {"id": "3", "key": "three-key", "secret": "s"})

        assert await reload_of(gateway, path).reload()

        await gateway.connect("/app/three-key?protocol=7")
        await gateway.push("news")
        assert (await client.event())["event"] == "e"


async def test_both_secrets_are_valid_while_one_is_rotated_and_then_the_new_one_alone(
    path: Path,
) -> None:
    old = App(**ONE)
    new = App(**ONE | {"secret": "new-secret"})
    async with running_gateway(apps=read_apps(path)) as gateway:
        client = await gateway.connect()
        reload = reload_of(gateway, path)

        write(path, ONE | {"secret": "new-secret", "previous_secret": "first-secret"}, TWO)
        assert await reload.reload()
        await client.subscribed("private-a", sign_channel(old, client.socket_id, "private-a"))
        await client.subscribed("private-b", sign_channel(new, client.socket_id, "private-b"))

        write(path, ONE | {"secret": "new-secret"}, TWO)
        assert await reload.reload()
        client.subscribe("private-c", sign_channel(old, client.socket_id, "private-c"))
        assert (await client.event())["event"] == "pusher:subscription_error"
        await client.subscribed("private-c", sign_channel(new, client.socket_id, "private-c"))


@pytest.mark.pusher("1.9", "4003: the app was disabled while the socket was open")
@pytest.mark.parametrize(
    ("two", "code"),
    [
        (TWO | {"enabled": False}, 4003),
        (None, 4001),
        (TWO | {"key": "another-key"}, 4001),
    ],
    ids=["disabled", "removed", "another key"],
)
async def test_sockets_of_an_app_that_is_no_longer_served_are_closed_and_no_others(
    path: Path, two: dict[str, Any] | None, code: int
) -> None:
    async with running_gateway(apps=read_apps(path)) as gateway:
        stays = await gateway.connect()
        goes = await gateway.connect("/app/two-key?protocol=7")
        async with FallbackClient(gateway.port, streams=True, key="two-key") as goes_too:
            await goes_too.connect()
            write(path, ONE, *([] if two is None else [two]))

            assert await reload_of(gateway, path).reload()

            error, closed = await goes.refused()
            assert (error["code"], closed.code) == (code, code)
            assert (await goes_too.closed())[1][0] == code
            await stays.ping()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[apps]]\nid = 1\n", "apps.toml:2:"),
        ("nonsense", "not TOML"),
        ("", "no [[apps]] entry"),
        (
            '[[apps]]\nid = "1"\nkey = "app-key"\nsecret = "app-secret"\n',
            "the demo's secret",
        ),
        (
            '[[apps]]\nid = "2"\nkey = "two-key"\nsecret = "s"\n',
            "only a restart moves the invitations from app '1' to '2'",
        ),
        (None, "No such file"),
    ],
)
async def test_a_file_that_can_not_be_used_changes_nothing_and_is_one_line_of_the_log(
    path: Path, text: str | None, why: str
) -> None:
    async with running_gateway(apps=read_apps(path)) as gateway:
        client = await gateway.connect("/app/two-key?protocol=7")
        replace(path, text)

        with capture_logs() as lines:
            assert not await reload_of(gateway, path).reload()

        told = [line for line in lines if line["event"] == "apps_kept"]
        assert len(told) == 1
        assert told[0]["why"].startswith("DUET_APPS_FILE: ")
        assert why in told[0]["why"]
        assert "\n" not in told[0]["why"]
        await client.ping()
        await gateway.connect()


async def test_who_proves_a_token_during_the_change_gets_the_app_as_it_is_then(path: Path) -> None:
    async with running_gateway(apps=read_apps(path)) as gateway:
        gateway.tokens.held = asyncio.Event()
        client = await gateway.open("/app/app-key?protocol=7&token=viewer:ana")
        write(path, ONE | {"enabled": False}, TWO)
        assert await reload_of(gateway, path).reload()

        gateway.tokens.held.set()

        assert (await client.refused())[1].code == 4003


async def test_who_holds_the_apps_sees_the_new_ones() -> None:
    held = Apps([App(**ONE), App(**TWO)])

    held.become(Apps([App(**ONE | {"secret": "new"})]))

    assert [app.id for app in held] == ["1"]
    assert held.first.secret == "new"
    assert held.by_key("two-key") is None
    assert held.by_id("2") is None
