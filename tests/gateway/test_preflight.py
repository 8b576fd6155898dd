from __future__ import annotations

import contextlib
import resource
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gateway.preflight import (
    apps_of,
    check_files,
    check_key_set,
    check_servers,
    check_settings,
    refusals,
)
from gateway.redis_report import examine_redis
from gateway.settings import DEMO_JWT_SECRET, Settings, SettingsError
from persistence.clock import Clock
from persistence.diagnosis import examine_mongodb
from persistence.errors import StoreUnavailable, in_short
from persistence.store import Store, StoreOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = secrets.token_hex(32)
APP = '[[apps]]\nid = "1"\nkey = "k"\nsecret = "a-secret-of-our-own"\n'


@pytest.fixture
def apps_file(tmp_path: Path) -> Path:
    path = tmp_path / "apps.toml"
    path.write_text(APP)
    return path


@pytest.fixture
def good(apps_file: Path) -> dict[str, Any]:
    return {"apps_file": apps_file, "jwt_secret": SECRET}


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Accepts connections and never answers."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield listener.getsockname()[1]


def faults(settings: Settings) -> list[str]:
    return [f"{each.what}: {each.text}" for each in check_settings(settings) if each.fatal]


def test_settings_that_are_complete_and_safe_have_no_fault(good: dict[str, Any]) -> None:
    assert faults(Settings(**good)) == []


@pytest.mark.parametrize(
    ("changes", "name", "why"),
    [
        ({"apps_file": None}, "DUET_APPS_FILE", "must name the TOML file"),
        ({"apps_file": Path("/nowhere/apps.toml")}, "DUET_APPS_FILE", "No such file"),
        ({"jwt_secret": None}, "JWT key", "exactly one of"),
        ({"jwt_jwks_url": "https://login.example/keys"}, "JWT key", "exactly one of"),
        ({"jwt_secret": DEMO_JWT_SECRET}, "DUET_JWT_SECRET", "is the demo's"),
        ({"jwt_secret": "x" * 31}, "DUET_JWT_SECRET", "needs at least 32 bytes"),
        ({"pass_secret": DEMO_JWT_SECRET}, "DUET_PASS_SECRET", "is the demo's"),
        ({"pass_secret": "short"}, "DUET_PASS_SECRET", "needs at least 32 bytes"),
        (
            {"jwt_secret": None, "jwt_jwks_url": "https://login.example/keys"},
            "DUET_PASS_SECRET",
            "must be set when DUET_JWT_SECRET is not",
        ),
        (
            {
                "jwt_secret": None,
                "jwt_jwks_url": "http://login.example/keys",
                "pass_secret": SECRET,
            },
            "DUET_JWT_JWKS_URL",
            "must be an https:// address",
        ),
        (
            {"jwt_secret": None, "jwt_public_key": "no key", "pass_secret": SECRET},
            "DUET_JWT_PUBLIC_KEY",
            "is not a PEM public key",
        ),
        ({"tls_cert": Path("c.pem")}, "DUET_TLS_KEY", "must be set together with DUET_TLS_CERT"),
        ({"tls_key": Path("k.pem")}, "DUET_TLS_CERT", "must be set together with DUET_TLS_KEY"),
        (
            {"tls_cert": Path("/nowhere/c"), "tls_key": Path("/nowhere/k")},
            "DUET_TLS_CERT, DUET_TLS_KEY",
            "can't be used: /nowhere/c: No such file",
        ),
        ({"node_lease_s": 1, "redis_timeout_s": 1}, "DUET_NODE_LEASE_S", "must be longer"),
    ],
)
def test_what_is_missing_or_unsafe_is_named_in_one_line(
    good: dict[str, Any], changes: dict[str, Any], name: str, why: str
) -> None:
    (line,) = faults(Settings(**(good | changes)))

    assert line.startswith(f"{name}: ")
    assert why in line
    assert "\n" not in line


@pytest.mark.parametrize("field", ["secret", "previous_secret"])
def test_the_demos_app_secret_is_refused(good: dict[str, Any], apps_file: Path, field: str) -> None:
    text = APP.replace("a-secret-of-our-own", "app-secret")
    if field == "previous_secret":
        text = APP + 'previous_secret = "app-secret"\n'
    apps_file.write_text(text)

    assert faults(Settings(**good)) == [
        "DUET_APPS_FILE: app '1' has the demo's secret, which everyone knows; choose another"
    ]


def test_no_secret_shows_in_a_finding(good: dict[str, Any]) -> None:
    settings = Settings(**(good | {"jwt_secret": "hush" * 7, "pass_secret": "hush" * 7}))

    found = faults(settings)

    assert len(found) == 2
    assert "hush" not in "".join(found)


def test_a_keys_server_on_this_machine_needs_no_tls(good: dict[str, Any]) -> None:
    local = {"jwt_secret": None, "pass_secret": SECRET}

    for host in ("localhost:8080", "127.0.0.1", "[::1]"):
        assert faults(Settings(**(good | local), jwt_jwks_url=f"http://{host}/keys")) == []


async def test_keys_that_can_not_be_fetched_are_advice_since_they_may_come_back(
    good: dict[str, Any], silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.token_keys.JWKS_TIMEOUT_S", 0.1)
    url = f"http://127.0.0.1:{silent_port}/keys"
    settings = Settings(**good | {"jwt_secret": None, "pass_secret": SECRET}, jwt_jwks_url=url)

    [finding] = await check_key_set(settings)

    assert (finding.good, finding.fatal) == (False, False)
    assert finding.text == "no token is accepted until it answers: TimeoutError"
    assert await check_key_set(Settings(**good)) == []


def test_apps_that_can_not_be_read_are_told_with_the_variables_name(apps_file: Path) -> None:
    apps_file.write_text(APP + "colour = 1\n")

    with pytest.raises(SettingsError) as caught:
        apps_of(Settings(apps_file=apps_file))

    assert caught.value.lines[0].startswith(f"DUET_APPS_FILE: {apps_file}:5: ")


async def test_servers_that_answer_are_told_with_their_versions(
    good: dict[str, Any], mongodb_url: str, redis_url: str
) -> None:
    findings = await check_servers(Settings(**good, mongodb_url=mongodb_url, redis_url=redis_url))

    assert not any(finding.fatal for finding in findings)
    assert findings[0].text.startswith("MongoDB ")
    assert "replica set" in findings[0].text
    assert findings[1].text.startswith(("Redis ", "Valkey "))


async def test_servers_that_can_not_be_reached_are_refused_one_line_each(
    good: dict[str, Any], silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.preflight._TIMEOUT_S", 0.1)
    settings = Settings(
        **good,
        mongodb_url=f"mongodb://ada:hush@127.0.0.1:{silent_port}",
        redis_url=f"redis://:hush@127.0.0.1:{silent_port}",
    )

    lines = await refusals(settings)

    assert [line.partition(" can't be reached")[0] for line in lines] == [
        "DUET_MONGODB_URL: MongoDB",
        "DUET_REDIS_URL: Redis",
    ]
    assert not any("\n" in line or "hush" in line for line in lines)


async def test_no_part_of_a_password_that_is_not_escaped_is_told() -> None:
    report = await examine_redis("redis://:hush#word@127.0.0.1:6379", "duet", 0.1)

    assert report.fault is not None
    assert "hush" not in report.fault
    assert "%2F" in report.fault


def test_the_drivers_asides_are_left_out() -> None:
    error = OSError(
        "db-1:27017: refused (configured timeouts: socketTimeoutMS: 5000.0ms), Timeout: 5s"
    )

    assert in_short(error) == "db-1:27017: refused"
    assert in_short(OSError("Authentication failed., full error: {'ok': 0.0}")) == (
        "Authentication failed."
    )


@pytest.mark.parametrize(
    "url",
    [
        *("", "http://x", "mongodb://", "mongodb://a b", "mongodb://h:x"),
        "mongodb://h/?tls=true&tlsCAFile=/no/such.pem",
        f"mongodb://h/?tls=true&tlsCAFile={__file__}",
    ],
)
async def test_what_is_no_address_of_a_mongodb_is_a_finding_not_a_fault(url: str) -> None:
    report = await examine_mongodb(url, "duet", 0.1)
    with pytest.raises(StoreUnavailable):
        await Store.open(url, "duet", Clock(), StoreOptions(deadline_s=0.01))

    assert report.fault
    assert "\n" not in report.fault


@pytest.mark.parametrize(
    ("option", "why"),
    [("tsl=true", "Unknown option: tsl"), ("tls=maybe", "The value of tls must be")],
)
async def test_an_option_that_the_driver_would_pass_over_is_refused(
    mongodb_url: str, option: str, why: str
) -> None:
    url = f"{mongodb_url}{'&' if '?' in mongodb_url else '/?'}{option}"

    finding, _ = await check_servers(Settings(mongodb_url=url))

    assert finding.fatal
    assert finding.text.startswith(why)


def test_receivers_are_looked_for_and_not_called_yet(good: dict[str, Any]) -> None:
    assert faults(Settings(**good, receivers="builtins:exit")) == []
    [fault] = faults(Settings(**good, receivers="builtins:nothing"))
    assert fault.startswith("DUET_RECEIVERS: builtins:nothing can't be imported: ")


async def test_servers_that_are_not_named_are_asked_for(good: dict[str, Any]) -> None:
    lines = await refusals(Settings(**good))

    assert [line.partition(":")[0] for line in lines] == ["DUET_MONGODB_URL", "DUET_REDIS_URL"]


@pytest.mark.parametrize(
    ("limit", "good", "fatal"),
    [
        (256, False, True),
        (4_096, False, False),
        (65_536, True, False),
        (resource.RLIM_INFINITY, True, False),
    ],
)
def test_the_limit_of_open_files_is_judged(
    monkeypatch: pytest.MonkeyPatch, limit: int, good: bool, fatal: bool
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (limit, limit))

    finding = check_files(Settings())

    assert (finding.good, finding.fatal) == (good, fatal)
    assert ("ulimit -n" in finding.text) is not good


@pytest.mark.parametrize(
    ("bounds", "workers", "good"),
    [
        ((70_000, 30_000), 1, False),
        ((70_000, 30_000), 2, True),
        # No bound at all says nothing about how many will come.
        ((100_000, 0), 1, True),
    ],
)
def test_the_limit_of_open_files_is_judged_by_what_the_apps_may_have(
    monkeypatch: pytest.MonkeyPatch,
    apps_file: Path,
    bounds: tuple[int, ...],
    workers: int,
    good: bool,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (80_000, 80_000))
    apps_file.write_text(
        "\n".join(
            f'[[apps]]\nid="{number}"\nkey="k{number}"\nsecret="s"\nmax_connections={most}'
            for number, most in enumerate(bounds)
        )
    )

    finding = check_files(Settings(apps_file=apps_file, workers=workers))

    assert (finding.good, finding.fatal) == (good, False)
    if not good:
        assert "may have 100000 sockets" in finding.text
        assert "LimitNOFILE=100128" in finding.text
