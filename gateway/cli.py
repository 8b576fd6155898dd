"""The `duet` command. What goes wrong is told in one line on standard error, never a traceback."""

import asyncio
import io
import os
import sys
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import jwt
import typer

from gateway.auth import USER_ID_PATTERN
from gateway.bench.cli import app as bench
from gateway.cli_escrow import app as escrow
from gateway.cli_migrate import migrate
from gateway.preflight import (
    Finding,
    apps_of,
    check_files,
    check_key_set,
    check_servers,
    check_settings,
    refusals,
)
from gateway.settings import (
    DEMO_JWT_SECRET,
    Settings,
    SettingsError,
    load_settings,
    unknown_variables,
)
from gateway.telemetry import configure_logging
from gateway.token_keys import secret_key
from gateway.wiring import StartError
from persistence.clock import Clock

app = typer.Typer(
    name="duet",
    help="Duet: a realtime gateway for paid 1-on-1 invitations, over the Pusher protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class TokenRole(StrEnum):
    """The roles that a token can give."""

    STREAMER = "streamer"
    VIEWER = "viewer"


def main() -> None:
    """Runs the command line; the process's exit code says whether it went well."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # In a locale without them, a question mark stands for `…` and the like.
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # `duet doctor | head`: nobody is left to read the rest.
        _let_go_of_output()
        raise SystemExit(1) from None
    except SettingsError as error:
        fail(*error.lines)
    except OSError as error:
        _let_go_of_output()
        fail(str(error))
    except StartError as error:
        fail(str(error))
    except Exception as error:
        # The last place that can turn a fault of ours into one line; debug shows all of it.
        if os.environ.get("DUET_LOG_LEVEL", "").lower() == "debug":
            raise
        name = type(error).__name__
        fail(f"internal error: {name}: {error} (DUET_LOG_LEVEL=debug shows where)")


def _let_go_of_output() -> None:
    """What could not be written is not tried again when Python ends, which would complain."""
    if sys.stdout is None:
        # It was given none.
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(*lines: str) -> NoReturn:
    """Ends the process with code 1 after one line for each thing that is wrong."""
    for line in lines:
        typer.echo(f"duet: {' '.join(line.split())}", err=True)
    raise SystemExit(1)


def _misspelt_variables() -> list[str]:
    """A line for each variable that is nearly a setting; warns of others that nothing reads."""
    unknown = unknown_variables(os.environ)
    for variable in unknown:
        if not variable.misspelt:
            _warn(variable.line)
    return [variable.line for variable in unknown if variable.misspelt]


def _warn(line: str) -> None:
    typer.echo(f"duet: warning: {line}", err=True)


@app.command()
def serve(
    workers: Annotated[
        int | None, typer.Option(min=1, max=64, help="Processes; overrides DUET_WORKERS.")
    ] = None,
) -> None:
    """Runs the gateway with the DUET_… settings of the environment (see docs/settings.md)."""
    if workers is not None:
        # In the environment, because each worker process reads its settings there.
        os.environ["DUET_WORKERS"] = str(workers)
    misspelt = _misspelt_variables()
    try:
        settings = load_settings()
    except SettingsError as error:
        fail(*error.lines, *misspelt)
    why_not = [*misspelt, *asyncio.run(refusals(settings))]
    if why_not:
        fail(*why_not)
    for finding in check_settings(settings):
        if not finding.good:
            _warn(f"{finding.what}: {finding.text}")
    configure_logging(settings)
    # The whole gateway, which the other commands start faster without.
    from gateway.server import serve as run_server

    run_server(settings, apps_of(settings))


@app.command()
def demo(
    host: Annotated[str | None, typer.Option(help="Address; overrides DUET_HOST.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port; overrides DUET_PORT.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Keeps the data of the embedded servers between runs.")
    ] = None,
    exit_after_play: Annotated[
        bool, typer.Option("--exit-after-play", help="Ends once the invitation has been played.")
    ] = False,
) -> None:
    """Starts everything on this machine, plays one invitation and serves the demo page."""
    for line in _misspelt_variables():
        _warn(line)
    # As above, and the embedded servers.
    from gateway.demo import run

    run(host=host, port=port, data_dir=data_dir, exit_after_play=exit_after_play)


@app.command()
def token(
    user: Annotated[str, typer.Option(help="The user's id, the token's sub.")],
    role: Annotated[TokenRole, typer.Option(help="What the user is.")],
    client_id: Annotated[str | None, typer.Option(help="The app that acts for the user.")] = None,
    ttl_s: Annotated[
        float, typer.Option(min=1, max=31_536_000, help="How long the token is valid, in seconds.")
    ] = 86_400,
) -> None:
    """Prints a development JWT, signed with DUET_JWT_SECRET or, unset, the demo's secret."""
    settings = load_settings()
    if settings.jwt_public_key or settings.jwt_jwks_url:
        fail("tokens are signed by whoever has the private key; DUET_JWT_SECRET is not in use")
    if not USER_ID_PATTERN.fullmatch(user):
        fail("--user: 1 to 64 of the characters A-Z, a-z, 0-9 and _ = @ , ; -")
    if settings.jwt_secret:
        # No gateway would accept what a shorter one signs.
        secret_key(settings.jwt_secret)
    typer.echo(development_token(settings, user, role.value, client_id, ttl_s))


def development_token(
    settings: Settings, user_id: str, role: str, client_id: str | None, ttl_s: float
) -> str:
    """A JWT as the platform's own login would issue it."""
    now = Clock().now()
    claims: dict[str, object] = {
        "sub": user_id,
        "role": role,
        "iat": int(now.timestamp()),
        "exp": int((now + timedelta(seconds=ttl_s)).timestamp()),
    }
    optional = {
        "client_id": client_id,
        "iss": settings.jwt_issuer,
        "aud": settings.jwt_audience,
    }
    claims.update({name: value for name, value in optional.items() if value is not None})
    return jwt.encode(claims, settings.jwt_secret or DEMO_JWT_SECRET, algorithm="HS256")


@app.command()
def doctor() -> None:
    """Looks at settings, MongoDB, Redis and file limits; exit code 1 when something is wrong."""
    settings = load_settings()
    findings = [
        *(
            Finding("environment", unknown.line, fatal=unknown.misspelt)
            for unknown in unknown_variables(os.environ)
        ),
        *check_settings(settings),
        *asyncio.run(check_key_set(settings)),
        *asyncio.run(check_servers(settings)),
        check_files(settings),
    ]
    for finding in findings:
        mark = "ok  " if finding.good else "BAD " if finding.fatal else "note"
        typer.echo(f"{mark}  {finding.what}: {finding.text}")
    if any(finding.fatal for finding in findings):
        raise typer.Exit(1)


app.add_typer(bench, name="bench")
app.add_typer(escrow, name="escrow")
app.command()(migrate)
