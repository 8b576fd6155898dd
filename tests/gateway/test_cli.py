"""The command as a process of its own: what it prints, where, and its exit code."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import jwt
import pytest

from gateway.settings import DEMO_JWT_SECRET

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DUET = [sys.executable, "-c", "from gateway.cli import main; main()"]
SECRET = secrets.token_hex(32)
PATIENCE_S = 45


@pytest.fixture(scope="module")
def apps_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "apps.toml"
    path.write_text('[[apps]]\nid = "1"\nkey = "k"\nsecret = "a-secret-of-our-own"\n')
    return path


def environment(**variables: object) -> dict[str, str]:
    """This process's environment with these settings and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DUET_")}
    return kept | {name: str(value) for name, value in variables.items()}


@pytest.fixture
def good(
    mongodb_url: str, mongodb_database_name: str, redis_url: str, redis_prefix: str, apps_file: Path
) -> dict[str, str]:
    return environment(
        DUET_PORT=free_port(),
        DUET_MONGODB_URL=mongodb_url,
        DUET_MONGODB_DATABASE=mongodb_database_name,
        DUET_REDIS_URL=redis_url,
        DUET_REDIS_PREFIX=redis_prefix,
        DUET_APPS_FILE=apps_file,
        DUET_JWT_SECRET=SECRET,
        DUET_DRAIN_S=0.1,
    )


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port


def duet(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DUET, *arguments],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def assert_refused(run: subprocess.CompletedProcess[str], *beginnings: str) -> None:
    """Exit code 1, and on standard error one line for each thing that is wrong."""
    lines = run.stderr.splitlines()
    assert run.returncode == 1, run.stderr
    assert len(lines) == len(beginnings), run.stderr
    for line, beginning in zip(lines, beginnings, strict=True):
        assert line.startswith(f"duet: {beginning}")


class TestToken:
    def test_a_development_token_is_signed_with_the_demos_secret(self) -> None:
        run = duet(
            "token",
            "--user",
            "ada",
            "--role",
            "streamer",
            "--client-id",
            "ios",
            "--ttl-s",
            "60",
            env=environment(),
        )

        claims = jwt.decode(run.stdout.strip(), DEMO_JWT_SECRET, ["HS256"])
        assert (run.returncode, run.stderr) == (0, "")
        assert (claims["sub"], claims["role"], claims["client_id"]) == ("ada", "streamer", "ios")
        assert claims["exp"] - claims["iat"] == 60

    def test_or_with_the_settings_secret_issuer_and_audience(self) -> None:
        env = environment(DUET_JWT_SECRET=SECRET, DUET_JWT_ISSUER="i", DUET_JWT_AUDIENCE="a")

        run = duet("token", "--user", "bob", "--role", "viewer", env=env)

        claims = jwt.decode(run.stdout.strip(), SECRET, ["HS256"], issuer="i", audience="a")
        assert claims["sub"] == "bob"

    def test_a_user_id_that_no_channel_could_carry_is_refused(self) -> None:
        run = duet("token", "--user", "a.b", "--role", "viewer", env=environment())

        assert_refused(run, "--user: 1 to 64 of the characters")

    def test_tokens_of_a_public_key_are_made_elsewhere(self) -> None:
        env = environment(DUET_JWT_JWKS_URL="https://login.example/keys")

        run = duet("token", "--user", "ada", "--role", "viewer", env=env)

        assert_refused(run, "tokens are signed by whoever has the private key")

    def test_a_secret_that_no_gateway_accepts_is_refused(self) -> None:
        run = duet("token", "--user", "a", "--role", "viewer", env=environment(DUET_JWT_SECRET="x"))

        assert_refused(run, "DUET_JWT_SECRET: needs at least 32 bytes")

    def test_an_output_without_room_is_told_once(self) -> None:
        with Path("/dev/full").open("w") as full:
            run = subprocess.run(
                [*DUET, "token", "--user", "a", "--role", "viewer"],
                env=environment(),
                cwd=ROOT,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )

        assert_refused(run, "[Errno 28]")


class TestServeRefuses:
    def test_without_settings_and_names_each_that_is_missing(self) -> None:
        run = duet("serve", env=environment())

        assert_refused(
            run, "JWT key: ", "DUET_APPS_FILE: ", "DUET_MONGODB_URL: ", "DUET_REDIS_URL: "
        )

    def test_a_value_out_of_range(self, good: dict[str, str]) -> None:
        run = duet("serve", env=good | {"DUET_PORT": "70000", "DUET_WORKERS": "0"})

        assert_refused(run, "DUET_PORT: ", "DUET_WORKERS: ")

    def test_the_demos_secrets(self, good: dict[str, str], tmp_path: Path) -> None:
        apps = tmp_path / "apps.toml"
        apps.write_text('[[apps]]\nid = "1"\nkey = "app-key"\nsecret = "app-secret"\n')
        unsafe = {"DUET_JWT_SECRET": DEMO_JWT_SECRET, "DUET_APPS_FILE": str(apps)}

        run = duet("serve", env=good | unsafe)

        assert_refused(
            run, "DUET_JWT_SECRET: is the demo's", "DUET_APPS_FILE: app '1' has the demo's"
        )

    def test_servers_that_can_not_be_reached(self, good: dict[str, str]) -> None:
        lost = {
            "DUET_MONGODB_URL": f"mongodb://127.0.0.1:{free_port()}",
            "DUET_REDIS_URL": f"redis://127.0.0.1:{free_port()}",
        }

        run = duet("serve", env=good | lost)

        assert_refused(run, "DUET_MONGODB_URL: MongoDB can't", "DUET_REDIS_URL: Redis can't")

    def test_a_port_that_is_taken(self, good: dict[str, str]) -> None:
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = listener.getsockname()[1]

            run = duet("serve", env=good | {"DUET_PORT": str(port)})

        assert_refused(run, f"port {port} on 127.0.0.1 is taken")

    def test_a_misspelt_variable_beside_whatever_else_is_wrong(self, good: dict[str, str]) -> None:
        run = duet("serve", env=good | {"DUET_MONGO_URL": "x"})
        and_more = duet("serve", env=good | {"DUET_MONGO_URL": "x", "DUET_PORT": "-1"})

        unknown = (
            "DUET_MONGO_URL is set, but no setting has that name; did you mean DUET_MONGODB_URL?"
        )
        assert_refused(run, unknown)
        assert_refused(and_more, "DUET_PORT: ", unknown)

    def test_not_what_a_newer_version_may_know(self, good: dict[str, str]) -> None:
        run = duet("serve", env=good | {"DUET_FUTURE_SETTING_S": "1", "DUET_PORT": "-1"})

        warning, *refusals = run.stderr.splitlines()
        assert warning == (
            "duet: warning: DUET_FUTURE_SETTING_S is set, but no setting has that name"
        )
        assert len(refusals) == 1

    @pytest.mark.parametrize(
        ("name", "wrong", "beginning"),
        [
            ("RECEIVERS", "no.such:function", "DUET_RECEIVERS: no.such:function can't be imported"),
            ("HOST", "[::1]", "port 0 on [::1] can't be used; DUET_HOST is no address"),
            ("APPS_FILE", "/", "DUET_APPS_FILE: /: Is a directory"),
        ],
    )
    def test_what_can_not_be_used_in_one_line(
        self, good: dict[str, str], name: str, wrong: str, beginning: str
    ) -> None:
        run = duet("serve", env=good | {"DUET_PORT": "0", f"DUET_{name}": wrong})

        assert_refused(run, beginning)


@contextlib.contextmanager
def serving(env: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`duet serve` once it answers; killed if the test leaves it running."""
    process = subprocess.Popen([*DUET, "serve", *arguments], env=env, cwd=ROOT)
    try:
        wait_until_ready(process, env["DUET_PORT"])
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended by itself"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz", verify=False).status_code == 200:
                return
        # Another process: there is no event here to wait for.
        time.sleep(0.05)
    pytest.fail("it is not ready")


class TestServe:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_it_serves_until_a_signal_and_ends_in_order(
        self, good: dict[str, str], number: signal.Signals
    ) -> None:
        with serving(good) as process:
            answer = httpx.get(f"http://127.0.0.1:{good['DUET_PORT']}/goals/x", verify=False)
            process.send_signal(number)

            code = process.wait(timeout=PATIENCE_S)

        assert answer.status_code == 401
        # uvicorn raises the signal again once everything has been stopped.
        assert code in {0, 130, -number}

    def test_several_processes_share_the_port(self, good: dict[str, str]) -> None:
        with serving(good, "--workers", "2") as process:
            base = f"http://127.0.0.1:{good['DUET_PORT']}"
            statuses = {httpx.get(f"{base}/healthz", verify=False).status_code for _ in range(20)}
            process.send_signal(signal.SIGTERM)

            code = process.wait(timeout=PATIENCE_S)

        assert statuses == {200}
        assert code == 0


class TestDoctor:
    def test_when_all_is_well_it_says_so_line_by_line(self, good: dict[str, str]) -> None:
        run = duet("doctor", env=good)

        marks = {
            line.split(": ")[0].split()[-1]: line.split()[0] for line in run.stdout.splitlines()
        }
        assert run.returncode == 0, run.stdout
        assert marks["DUET_JWT_SECRET"] == "ok"
        assert marks["DUET_APPS_FILE"] == "ok"
        assert marks["DUET_MONGODB_URL"] in {"ok", "note"}
        assert marks["DUET_REDIS_URL"] in {"ok", "note"}
        assert run.stderr == ""

    def test_what_is_wrong_is_marked_and_its_exit_code_is_1(self) -> None:
        run = duet("doctor", env=environment(DUET_MONGO_URL="x"))

        assert run.returncode == 1
        assert "BAD   DUET_MONGODB_URL: must be the address" in run.stdout
        assert "BAD   environment: DUET_MONGO_URL is set" in run.stdout
        assert "Traceback" not in run.stdout + run.stderr


def test_help_names_every_command() -> None:
    """Even where the terminal has nothing but ASCII."""
    run = duet("--help", env=environment(PYTHONIOENCODING="ascii"))

    assert run.returncode == 0, run.stderr
    for command in ("demo", "serve", "token", "doctor", "bench"):
        assert command in run.stdout


def test_a_command_that_does_not_exist_ends_with_a_code() -> None:
    run = duet("dance", env=environment())

    assert run.returncode == 2
    assert "Traceback" not in run.stderr
