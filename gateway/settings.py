"""Every setting is an environment variable `DUET_…` with a unit, a default and a range.

A name that ends in `_s`, `_ms`, `_bytes`, `_minor` or `_per_s` carries its unit; other numbers
count things. `docs/settings.md` is made from this file (`python -m gateway.settings_table`),
and a test compares the two.
"""

import difflib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "DUET_"

# What `duet demo` runs with and `duet serve` refuses. It is public, so it protects nothing.
DEMO_JWT_SECRET = "duet-development-secret-not-for-production"  # noqa: S105

# An HMAC key shorter than its digest weakens the signature (RFC 7518 section 3.2).
JWT_SECRET_MIN_BYTES = 32

# Read by the tests alone: no settings of the gateway, but no typing errors either.
_NOT_SETTINGS = frozenset(
    {
        "DUET_REQUIRE_REAL_PARTS",
        "DUET_TEST_MONGODB_URL",
        "DUET_FAULT_CRASH_AT",
        "DUET_FAULT_ARMED_BY",
        "DUET_FAULT_FREEZES",
    }
)

# What Kubernetes tells a pod of a service whose name begins with `duet`.
# How alike two names are when one is taken for the other misspelt, of 1: a letter or a word part
# is missing, and not just their beginning the same.
_NEARLY = 0.85
_SERVICE_LINK = re.compile(
    r"DUET_(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
    r"=.*|DUET_.+_PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)

Text = Annotated[str, Field(max_length=2048)]


class SettingsError(Exception):
    """Names the variables that can't be used and why, one line each.

    Attributes:
        lines: One sentence per variable, without a line break.
    """

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class Settings(BaseSettings):
    """What one gateway process is told from outside, checked once and never changed."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        # Secrets and addresses with passwords would otherwise end up in logs.
        hide_input_in_errors=True,
    )

    # Listening
    host: Annotated[Text, Field(description="Address that the gateway listens on.")] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65_535, description="Port that it listens on; 0 takes a free one.")
    ] = 6001
    workers: Annotated[
        int, Field(ge=1, le=64, description="Processes of `duet serve` on this machine.")
    ] = 1
    tls_cert: Annotated[
        Path | None, Field(description="PEM file with the certificate chain; needs `DUET_TLS_KEY`.")
    ] = None
    tls_key: Annotated[
        Path | None, Field(description="PEM file with the certificate's private key.")
    ] = None
    path_prefix: Annotated[
        str,
        Field(
            pattern=r"^(/[A-Za-z0-9._~-]+)*$",
            description="Prefix of every path, e.g. `/duet` when a proxy passes it on.",
        ),
    ] = ""
    node_name: Annotated[
        str,
        Field(
            max_length=128,
            pattern=r"^[A-Za-z0-9_.:-]*$",
            description="This process's name in leases and logs; empty: `hostname:port`.",
        ),
    ] = ""

    # Stores
    mongodb_url: Annotated[
        Text | None,
        Field(repr=False, description="MongoDB replica set, `mongodb://…` or `mongodb+srv://…`."),
    ] = None
    mongodb_database: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_-]{1,63}$", description="Name of the database in it."),
    ] = "duet"
    mongodb_pool_size: Annotated[
        int, Field(ge=1, le=1_000, description="Connections to MongoDB per process.")
    ] = 64
    redis_url: Annotated[
        Text | None,
        Field(repr=False, description="Redis or Valkey, `redis://…`, `rediss://…` or `unix://…`."),
    ] = None
    redis_prefix: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9_.-]{1,64}$",
            description="First part of every name in Redis; one per installation.",
        ),
    ] = "duet"
    redis_timeout_s: Annotated[
        float, Field(gt=0, le=60, description="How long one command to Redis may take.")
    ] = 1.0
    apps_file: Annotated[
        Path | None, Field(description="TOML file with the apps; the first carries invitations.")
    ] = None

    # Identity
    jwt_secret: Annotated[
        Text | None,
        Field(repr=False, description="Shared key of HS256 tokens, at least 32 bytes."),
    ] = None
    jwt_public_key: Annotated[
        str | None,
        Field(
            max_length=16_384,
            description="PEM public key of RS256, ES256 or EdDSA tokens (`\\n` may stand for a "
            "line break).",
        ),
    ] = None
    jwt_jwks_url: Annotated[
        Text | None, Field(description="Address of a JSON Web Key Set with the public keys.")
    ] = None
    jwt_issuer: Annotated[
        Text | None, Field(description="Required `iss` of a token; unset: not checked.")
    ] = None
    jwt_audience: Annotated[
        Text | None, Field(description="Required `aud` of a token; unset: a token has none.")
    ] = None
    pass_secret: Annotated[
        Text | None,
        Field(
            repr=False,
            description="Key that signs media passes, at least 32 bytes; unset: `DUET_JWT_SECRET`.",
        ),
    ] = None
    auth_timestamp_tolerance_s: Annotated[
        float,
        Field(gt=0, le=86_400, description="How old a signed call of the Pusher HTTP API may be."),
    ] = 600

    # Invitations
    invitation_ttl_s: Annotated[
        float, Field(gt=0, le=86_400, description="How long an invitation stays open.")
    ] = 60
    refund_delay_s: Annotated[
        float, Field(ge=0, le=86_400, description="From a goal's `exp` to its refund check.")
    ] = 65
    show_grace_s: Annotated[
        float, Field(ge=0, le=86_400, description="Added to the prepaid duration of a show.")
    ] = 60
    room_pass_s: Annotated[
        float, Field(gt=0, le=86_400, description="Validity of a media pass outside private shows.")
    ] = 3_600
    receivers: Annotated[
        Text | None,
        Field(description="`module:function` that registers the platform's own receivers."),
    ] = None
    amount_max_minor: Annotated[
        int,
        Field(ge=1, le=10**15, description="Highest amount of an invitation, in minor units."),
    ] = 100_000_000
    prepaid_duration_max_s: Annotated[
        int, Field(ge=1, le=31_536_000, description="Longest duration that can be paid ahead.")
    ] = 86_400

    # Payment service
    escrow_url: Annotated[
        Text | None,
        Field(
            description="Base address of the platform's payment service; unset: the ledger alone."
        ),
    ] = None
    escrow_secret: Annotated[
        Text | None,
        Field(repr=False, description="Key that signs calls to it, at least 32 bytes."),
    ] = None
    escrow_timeout_s: Annotated[
        float, Field(gt=0, le=60, description="How long one call to it may take.")
    ] = 1.0
    escrow_give_up_s: Annotated[
        float,
        Field(gt=0, le=2_592_000, description="Age at which an unanswered call is a dead letter."),
    ] = 86_400

    # Sockets
    activity_timeout_s: Annotated[
        float, Field(gt=0, le=3_600, description="Silence after which either side pings.")
    ] = 120
    pong_timeout_s: Annotated[
        float, Field(gt=0, le=600, description="Wait for the answer to a ping before closing 4201.")
    ] = 30
    handshake_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=600,
            description="Within which a new connection's opening handshake, and every HTTP call "
            "with its body, must have come; a peer that takes nothing of its answer for as long "
            "is cut off.",
        ),
    ] = 10
    strict_protocol: Annotated[
        bool,
        Field(
            description="As strict as Pusher: a missing `protocol` is refused (4008), a refused "
            "subscription answered with `pusher:error` instead of `pusher:subscription_error`."
        ),
    ] = False
    client_event_rate_per_s: Annotated[
        int, Field(ge=1, le=10_000, description="Client events of one connection.")
    ] = 10
    command_rate_per_s: Annotated[
        int, Field(ge=1, le=100_000, description="Goal commands of one connection.")
    ] = 100
    commands_in_flight: Annotated[
        int, Field(ge=1, le=10_000, description="Unanswered commands of one connection.")
    ] = 32
    command_timeout_s: Annotated[
        float, Field(gt=0, le=60, description="Whole time of one command, MongoDB included.")
    ] = 2.0
    send_buffer_bytes: Annotated[
        int,
        Field(
            ge=16_384,
            le=1_073_741_824,
            description="Unsent data of one socket over which it is aborted as slow.",
        ),
    ] = 1_048_576
    fanout_slice: Annotated[
        int, Field(ge=1, le=65_536, description="Sockets written to between two loop turns.")
    ] = 256
    join_wait_ms: Annotated[
        float,
        Field(
            ge=0, le=1_000, description="How long a busy channel's publications wait for others."
        ),
    ] = 2

    # Limits of the wire
    max_message_bytes: Annotated[
        int, Field(ge=1_024, le=16_777_216, description="One message from a socket.")
    ] = 65_536
    max_event_bytes: Annotated[
        int, Field(ge=256, le=16_777_216, description="The `data` of one event.")
    ] = 10_240
    max_body_bytes: Annotated[
        int, Field(ge=1_024, le=67_108_864, description="Body of one HTTP call.")
    ] = 262_144
    channel_name_max: Annotated[
        int, Field(ge=32, le=1_024, description="Characters of a channel's name.")
    ] = 200
    event_name_max: Annotated[
        int, Field(ge=32, le=1_024, description="Characters of an event's name.")
    ] = 200
    presence_max_members: Annotated[
        int, Field(ge=1, le=100_000, description="Members of one presence channel.")
    ] = 10_000
    presence_user_info_max_bytes: Annotated[
        int, Field(ge=2, le=1_048_576, description="The `user_info` of one presence member.")
    ] = 2_048
    cache_ttl_s: Annotated[
        float,
        Field(gt=0, le=86_400, description="How long the last event of a cache channel is kept."),
    ] = 1_800

    # Webhooks
    webhook_timeout_s: Annotated[
        float, Field(gt=0, le=60, description="How long one call of a webhook may take.")
    ] = 5.0
    webhook_delay_s: Annotated[
        float,
        Field(
            ge=0,
            le=60,
            description="Wait of `channel_vacated` and `member_removed` for a return.",
        ),
    ] = 3.0
    webhook_give_up_s: Annotated[
        float,
        Field(gt=0, le=86_400, description="Age at which an event that can't be told is given up."),
    ] = 300

    # Workers and leases
    lease_s: Annotated[
        float,
        Field(
            gt=0,
            le=3_600,
            description="Within which another process has done what a dead one left undone.",
        ),
    ] = 5.0
    node_lease_s: Annotated[
        float,
        Field(gt=0, le=3_600, description="Silence after which a node's members have left."),
    ] = 10
    poll_interval_s: Annotated[
        float,
        Field(
            ge=0.01,
            le=60,
            description="Between two looks for what other processes have left; for deadlines it is "
            "a second at most.",
        ),
    ] = 1.0
    drain_s: Annotated[
        float, Field(ge=0, le=3_600, description="Over which a stopping node closes its sockets.")
    ] = 10

    # Logs
    log_format: Annotated[
        Literal["json", "console"], Field(description="Log lines for machines or for people.")
    ] = "json"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Field(description="Least severe log line that is written."),
    ] = "info"

    @field_validator("jwt_public_key")
    @classmethod
    def _unfold(cls, value: str | None) -> str | None:
        r"""Environment files can't hold line breaks, so `\n` stands for one."""
        return None if value is None else value.replace("\\n", "\n").strip() + "\n"

    @property
    def pass_key(self) -> str | None:
        """The key of media passes: their own or, failing that, the HS256 tokens'."""
        return self.pass_secret or self.jwt_secret

    def named(self) -> Self:
        """The same settings with a node name: `hostname:port`, unless they have one.

        Where the port is still to be found, the process stands for it.
        """
        if self.node_name:
            return self
        name = f"{socket.gethostname()}:{self.port}"
        if self.port == 0:
            name = f"{name}:{os.getpid()}"
        return self.model_copy(update={"node_name": name[:128]})


def load_settings() -> Settings:
    """The settings of this process's environment.

    Raises:
        SettingsError: A variable's value is not usable; each line names its variable.
    """
    try:
        return Settings()
    except ValidationError as error:
        lines = [
            f"{variable_name('.'.join(str(part) for part in fault['loc']))}: {_plain(fault['msg'])}"
            for fault in error.errors(include_input=False, include_url=False)
        ]
        raise SettingsError(lines) from None


def variable_name(field: str) -> str:
    """The environment variable of a field of `Settings`."""
    return PREFIX + field.upper()


class UnknownVariable(NamedTuple):
    """A `DUET_…` variable that nothing reads.

    Attributes:
        line: what is wrong with it.
        misspelt: whether it is nearly the name of a setting. Another may belong to a newer
            version, or to somebody else.
    """

    line: str
    misspelt: bool


def unknown_variables(environment: Mapping[str, str]) -> list[UnknownVariable]:
    """Each `DUET_…` variable that nothing reads."""
    known = {variable_name(field) for field in Settings.model_fields}
    found = []
    for name, text in sorted(environment.items()):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known | _NOT_SETTINGS:
            continue
        if _SERVICE_LINK.fullmatch(f"{name}={text}"):
            continue
        close = difflib.get_close_matches(upper, known, n=1, cutoff=_NEARLY)
        hint = f"; did you mean {close[0]}?" if close else ""
        line = f"{name} is set, but no setting has that name{hint}"
        found.append(UnknownVariable(line, misspelt=bool(close)))
    return found


def _plain(message: str) -> str:
    """Pydantic's message as the rest of a sentence, on one line."""
    return " ".join(message.split()).removeprefix("Input ").removeprefix("Value error, ")
