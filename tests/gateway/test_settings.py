from __future__ import annotations

import math
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from gateway.settings import (
    Settings,
    SettingsError,
    UnknownVariable,
    load_settings,
    unknown_variables,
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any setting."""
    for field in Settings.model_fields:
        monkeypatch.delenv(f"DUET_{field.upper()}", raising=False)
    return monkeypatch


def test_without_an_environment_every_setting_has_its_default(
    environment: pytest.MonkeyPatch,
) -> None:
    settings = load_settings()

    assert (settings.host, settings.port) == ("127.0.0.1", 6001)
    assert settings.refund_delay_s == 65
    assert settings.show_grace_s == 60


def test_a_variable_sets_its_field(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DUET_PORT", "7001")
    environment.setenv("DUET_INVITATION_TTL_S", "0.5")

    settings = load_settings()

    assert settings.port == 7001
    assert settings.invitation_ttl_s == 0.5


def test_an_empty_variable_counts_as_unset(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DUET_TLS_CERT", "")

    assert load_settings().tls_cert is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DUET_PORT", "70000"),
        ("DUET_PORT", "six thousand"),
        ("DUET_INVITATION_TTL_S", "0"),
        ("DUET_INVITATION_TTL_S", "nan"),
        ("DUET_LOG_FORMAT", "xml"),
        ("DUET_PATH_PREFIX", "duet/"),
        ("DUET_REDIS_PREFIX", "a b"),
        ("DUET_MAX_EVENT_BYTES", "-1"),
    ],
)
def test_a_value_out_of_range_is_named_in_one_line(
    environment: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    environment.setenv(variable, value)

    with pytest.raises(SettingsError) as caught:
        load_settings()

    (line,) = caught.value.lines
    assert line.startswith(f"{variable}: ")
    assert "\n" not in line


def wrong_values(name: str) -> list[str]:
    """Values that the setting can't have: of another type, or outside its range."""
    field = Settings.model_fields[name]
    wrong: list[str] = []
    types = [field.annotation, *get_args(field.annotation)]
    if int in types or float in types:
        wrong += ["abc", "nan", "inf", "1e400", "-1", "1 2", "0x10", "tcp://10.0.0.1:6001"]
    if bool in types or get_origin(field.annotation) is Literal:
        wrong += ["perhaps", "-1"]
    for constraint in [*field.metadata, *(one for each in types for one in metadata_of(each))]:
        for bound, beyond in (("gt", 0), ("ge", -0.001), ("le", 1)):
            if (limit := getattr(constraint, bound, None)) is not None:
                step = math.floor(beyond) if int in types else beyond
                wrong.append(str(limit + step))
        if (most := getattr(constraint, "max_length", None)) is not None:
            wrong.append("x" * (most + 1))
        if getattr(constraint, "pattern", None) is not None:
            wrong += [" ", "a b", "a\n", "\N{GRINNING FACE}", "$(reboot)"]
    return wrong


def metadata_of(annotation: Any) -> list[Any]:
    """The constraints of an annotation such as `Text | None`."""
    return [one for each in getattr(annotation, "__metadata__", ()) for one in each.metadata]


# What is in files, that these files are there, is for `gateway.preflight` to say.
FILES = ("tls_cert", "tls_key", "apps_file")


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name not in FILES])
def test_no_setting_takes_a_wrong_value_and_each_is_named_in_one_line(
    environment: pytest.MonkeyPatch, name: str
) -> None:
    variable = f"DUET_{name.upper()}"
    assert wrong_values(name)

    for wrong in wrong_values(name):
        environment.setenv(variable, wrong)
        with pytest.raises(SettingsError) as caught:
            load_settings()

        (line,) = caught.value.lines
        assert line.startswith(f"{variable}: ")
        assert "\n" not in line
        assert len(line) < 200


def test_every_wrong_variable_has_a_line(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DUET_PORT", "-1")
    environment.setenv("DUET_WORKERS", "0")

    with pytest.raises(SettingsError) as caught:
        load_settings()

    assert [line.partition(":")[0] for line in caught.value.lines] == ["DUET_PORT", "DUET_WORKERS"]


def test_a_secret_never_shows_in_a_representation_or_an_error() -> None:
    settings = Settings(
        jwt_secret="hush-hush",
        pass_secret="hush-hush",
        mongodb_url="mongodb://u:hush-hush@h",
        redis_url="redis://:hush-hush@h",
    )

    assert "hush-hush" not in repr(settings)
    with pytest.raises(ValidationError) as caught:
        Settings(jwt_secret="hush-hush" * 1000)
    assert "hush-hush" not in str(caught.value)


def test_settings_never_change() -> None:
    settings = Settings()

    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_a_public_key_may_have_its_line_breaks_written_out() -> None:
    settings = Settings(jwt_public_key=r"-----BEGIN-----\nabc\n-----END-----")

    assert settings.jwt_public_key == "-----BEGIN-----\nabc\n-----END-----\n"


def test_a_misspelt_variable_is_named_with_the_likely_name() -> None:
    found = unknown_variables({"DUET_MONGO_URL": "x", "DUET_PORT": "1", "PATH": "/bin"})

    line = "DUET_MONGO_URL is set, but no setting has that name; did you mean DUET_MONGODB_URL?"
    assert found == [UnknownVariable(line, misspelt=True)]


@pytest.mark.parametrize("name", ["DUET_IMAGE_TAG", "DUET_VERSION", "DUET_FUTURE_SETTING_S"])
def test_what_belongs_to_somebody_else_or_to_a_newer_version_is_no_misspelling(name: str) -> None:
    found = unknown_variables({name: "1"})

    line = f"{name} is set, but no setting has that name"
    assert found == [UnknownVariable(line, misspelt=False)]


def test_what_kubernetes_tells_of_services_is_no_misspelling() -> None:
    told = {
        "DUET_SERVICE_HOST": "10.0.0.1",
        "DUET_SERVICE_PORT": "6001",
        "DUET_SERVICE_PORT_HTTP": "6001",
        "DUET_PORT_6001_TCP": "tcp://10.0.0.1:6001",
        "DUET_PORT_6001_TCP_ADDR": "10.0.0.1",
        "DUET_REDIS_SERVICE_HOST": "10.0.0.2",
        "DUET_REDIS_PORT": "tcp://10.0.0.2:6379",
        "DUET_REDIS_PORT_6379_TCP_PROTO": "tcp",
    }

    assert unknown_variables(told) == []
    assert len(unknown_variables({"DUET_REDIS_PORT": "6379"})) == 1


def test_what_only_the_tests_read_is_no_misspelling() -> None:
    assert unknown_variables({"DUET_REQUIRE_REAL_PARTS": "1"}) == []


def test_a_node_is_named_after_its_host_and_port_unless_told() -> None:
    assert Settings(port=6001).named().node_name.endswith(":6001")
    assert Settings(node_name="eu-1").named().node_name == "eu-1"


def test_passes_are_signed_with_the_tokens_secret_unless_they_have_their_own() -> None:
    assert Settings(jwt_secret="tokens").pass_key == "tokens"
    assert Settings(jwt_secret="tokens", pass_secret="passes").pass_key == "passes"
