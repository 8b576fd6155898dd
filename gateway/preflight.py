"""What is looked at before the gateway runs: the refusals of `duet serve`, the lines of `doctor`.

Every finding names the setting and the remedy in one line.
"""

from __future__ import annotations

import hmac
import math
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import httpx

from gateway.apps import DEMO_APP, Apps, AppsError, read_apps
from gateway.certificate import pair_fault, validity_fault
from gateway.extensions import ExtensionError, registering_function
from gateway.open_files import KEPT_FREE, files_allowed, files_for_sockets
from gateway.redis_report import examine_redis
from gateway.settings import DEMO_JWT_SECRET, JWT_SECRET_MIN_BYTES, SettingsError
from gateway.token_keys import JWKS_TIMEOUT_S, KeysNotFetched, fetched_keys, key_sources, public_key
from persistence.clock import Clock
from persistence.diagnosis import examine_mongodb

if TYPE_CHECKING:
    from gateway.settings import Settings
    from persistence.diagnosis import MongodbReport

_TIMEOUT_S: Final = 5.0
_MIN_MONGODB: Final = (6,)
_ADVISED_MONGODB: Final = (7,)
_MIN_REDIS: Final = (6, 2)
# Each socket is a file; below this a thousand viewers are turned away.
_ADVISED_FILES: Final = 65_536
_MIN_FILES: Final = 1_024
_MAX_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class Finding:
    """One line about one thing.

    Attributes:
        fatal: Whether `duet serve` refuses to start because of it.
        good: Whether all is well; a finding that is neither good nor fatal is advice.
    """

    what: str
    text: str
    good: bool = False
    fatal: bool = False


def _good(what: str, text: str) -> Finding:
    return Finding(what, text, good=True)


def _advice(what: str, text: str) -> Finding:
    return Finding(what, text)


def _bad(what: str, text: str) -> Finding:
    return Finding(what, text, fatal=True)


def apps_of(settings: Settings) -> Apps:
    """The apps of `DUET_APPS_FILE`.

    Raises:
        SettingsError: The variable is not set, or the file can't be used.
    """
    if settings.apps_file is None:
        raise SettingsError(["DUET_APPS_FILE: must name the TOML file with the apps"])
    try:
        return read_apps(settings.apps_file)
    except AppsError as error:
        raise SettingsError([f"DUET_APPS_FILE: {error}"]) from None


def servable_apps(settings: Settings) -> Apps:
    """The apps of `DUET_APPS_FILE`, if `duet serve` may serve them.

    Raises:
        SettingsError: As `apps_of`, or an app has a secret that everyone knows.
    """
    apps = apps_of(settings)
    for app in apps:
        if any(_same(secret, DEMO_APP.secret) for secret in app.secrets):
            text = f"app {app.id!r} has the demo's secret, which everyone knows; choose another"
            raise SettingsError([f"DUET_APPS_FILE: {text}"])
    return apps


def check_settings(settings: Settings) -> list[Finding]:
    """What can be said without asking anybody else."""
    findings = [
        *_keys(settings),
        *_pass(settings),
        *_tls(settings),
        *_apps(settings),
        *_escrow(settings),
        *_receivers(settings),
    ]
    if settings.node_lease_s <= settings.redis_timeout_s:
        findings.append(_bad("DUET_NODE_LEASE_S", "must be longer than DUET_REDIS_TIMEOUT_S"))
    return findings


async def check_key_set(settings: Settings) -> list[Finding]:
    """Whether the keys of tokens can be fetched; a gateway starts without, and tries again."""
    name, url = "DUET_JWT_JWKS_URL", settings.jwt_jwks_url
    if url is None or any(finding.fatal for finding in _keys(settings)):
        return []
    async with httpx.AsyncClient(timeout=JWKS_TIMEOUT_S) as client:
        try:
            keys = await fetched_keys(client, url)
        except KeysNotFetched as error:
            return [_advice(name, f"no token is accepted until it answers: {error}")]
    return [_good(name, f"{len(keys)} key{'s' * (len(keys) > 1)} fetched")]


async def check_servers(settings: Settings) -> list[Finding]:
    """What MongoDB and Redis say of themselves."""
    return [await _mongodb(settings), *await _redis(settings)]


def check_files(settings: Settings) -> Finding:
    """Whether each process may open as many sockets as it will be asked for."""
    allowed, wanted = files_allowed(), _connections_wanted(settings)
    # Not all of them are for sockets, and each worker has as many.
    room = files_for_sockets(allowed) * settings.workers
    if wanted is not None and room < wanted:
        text = f"{allowed} allowed, each socket takes one, and the apps may have {wanted} sockets"
    elif allowed >= _ADVISED_FILES:
        return _good("open files", "unlimited" if math.isinf(allowed) else f"{allowed}")
    else:
        text = f"{allowed} allowed, each socket takes one"
    advised = max(_ADVISED_FILES, (wanted or 0) // settings.workers + KEPT_FREE)
    text = f"{text}; raise it: LimitNOFILE={advised} (systemd), ulimit -n {advised}"
    return _bad("open files", text) if allowed < _MIN_FILES else _advice("open files", text)


def _connections_wanted(settings: Settings) -> int | None:
    """How many sockets all apps together may have, None when one of them has no bound."""
    try:
        bounds = [app.max_connections for app in apps_of(settings)]
    except SettingsError:
        return None
    return sum(bounds) if all(bounds) else None


async def refusals(settings: Settings) -> list[str]:
    """Why `duet serve` must not start, one line each; empty when it may."""
    findings = [*check_settings(settings), *await check_servers(settings)]
    return [f"{finding.what}: {finding.text}" for finding in findings if finding.fatal]


def _same(secret: str | None, other: str) -> bool:
    return secret is not None and hmac.compare_digest(secret.encode(), other.encode())


def _keys(settings: Settings) -> list[Finding]:
    sources = key_sources(settings)
    names = "DUET_JWT_SECRET, DUET_JWT_PUBLIC_KEY or DUET_JWT_JWKS_URL"
    if len(sources) != 1:
        given = "none is" if not sources else f"{' and '.join(sources)} are"
        return [_bad("JWT key", f"exactly one of {names} must be set; {given}")]
    source = sources[0]
    if settings.jwt_secret and not settings.jwt_public_key:
        fault = _secret_fault(settings.jwt_secret)
        return [_bad(source, fault) if fault else _good(source, "HS256")]
    if settings.jwt_public_key:
        try:
            return [_good(source, public_key(settings.jwt_public_key).algorithm)]
        except SettingsError as error:
            return [_bad(source, line.partition(": ")[2]) for line in error.lines]
    url = settings.jwt_jwks_url or ""
    if re.match(r"https://|http://(localhost|127\.0\.0\.1|\[::1\])[:/]", url):
        return [_good(source, url)]
    return [_bad(source, "must be an https:// address: who can change the keys is everyone")]


def _secret_fault(secret: str) -> str | None:
    if _same(secret, DEMO_JWT_SECRET):
        return "is the demo's, which everyone knows; make one: openssl rand -base64 48"
    if len(secret.encode()) < JWT_SECRET_MIN_BYTES:
        return f"needs at least {JWT_SECRET_MIN_BYTES} bytes; make one: openssl rand -base64 48"
    return None


def _pass(settings: Settings) -> list[Finding]:
    """Media passes are signed with a shared secret, whatever tokens are signed with."""
    if settings.pass_secret is None:
        if settings.jwt_secret is None and key_sources(settings):
            return [_bad("DUET_PASS_SECRET", "must be set when DUET_JWT_SECRET is not")]
        return []
    fault = _secret_fault(settings.pass_secret)
    return [_bad("DUET_PASS_SECRET", fault)] if fault else []


def _escrow(settings: Settings) -> list[Finding]:
    """The payment service is told whom to pay: nobody else may listen or speak in our name."""
    if settings.escrow_url is None:
        if settings.escrow_secret is not None:
            return [_bad("DUET_ESCROW_URL", "must be set together with DUET_ESCROW_SECRET")]
        return []
    finding = _escrow_url(settings.escrow_url)
    if finding.fatal:
        return [finding]
    if settings.escrow_secret is None:
        return [_bad("DUET_ESCROW_SECRET", "must be set together with DUET_ESCROW_URL")]
    fault = _secret_fault(settings.escrow_secret)
    return [_bad("DUET_ESCROW_SECRET", fault) if fault else finding]


def _escrow_url(text: str) -> Finding:
    name = "DUET_ESCROW_URL"
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        return _bad(name, f"is no address: {error}")
    is_ours = url.scheme == "http" and url.host in {"localhost", "127.0.0.1", "::1"}
    if not url.host or not (url.scheme == "https" or is_ours):
        return _bad(name, "must be an https:// address, or one of this machine")
    if (url.port or 0) > _MAX_PORT:
        return _bad(name, f"has a port over {_MAX_PORT}")
    if "?" in text or "#" in text:
        return _bad(name, "must have no ? and no #: /escrow.hold and the like are put behind it")
    # A password in it is nobody's to read.
    return _good(name, str(url.copy_with(userinfo=b"")))


def _receivers(settings: Settings) -> list[Finding]:
    if settings.receivers is None:
        return []
    try:
        registering_function(settings.receivers)
    except ExtensionError as error:
        return [_bad("DUET_RECEIVERS", str(error))]
    return [_good("DUET_RECEIVERS", settings.receivers)]


def _tls(settings: Settings) -> list[Finding]:
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None and key is None:
        return []
    if cert is None:
        return [_bad("DUET_TLS_CERT", "must be set together with DUET_TLS_KEY")]
    if key is None:
        return [_bad("DUET_TLS_KEY", "must be set together with DUET_TLS_CERT")]
    if (fault := pair_fault(cert, key)) is not None:
        return [_bad("DUET_TLS_CERT, DUET_TLS_KEY", f"can't be used: {fault}")]
    if (fault := validity_fault(cert, Clock().now())) is not None:
        return [_advice("DUET_TLS_CERT", fault)]
    return [_good("DUET_TLS_CERT", str(cert))]


def _apps(settings: Settings) -> list[Finding]:
    try:
        apps = servable_apps(settings)
    except SettingsError as error:
        return [_bad("DUET_APPS_FILE", line.partition(": ")[2]) for line in error.lines]
    return [_good("DUET_APPS_FILE", f"{len(apps)} app{'s' * (len(apps) > 1)}")]


async def _mongodb(settings: Settings) -> Finding:
    name = "DUET_MONGODB_URL"
    if settings.mongodb_url is None:
        return _bad(name, "must be the address of a MongoDB replica set")
    with warnings.catch_warnings(record=True) as ignored:
        warnings.simplefilter("always")
        report = await examine_mongodb(settings.mongodb_url, settings.mongodb_database, _TIMEOUT_S)
    # The driver goes on without an option that it does not know, or whose value it can't read;
    # `tls` may be one.
    passed_over = [str(one.message) for one in ignored if issubclass(one.category, UserWarning)]
    if passed_over:
        return _bad(name, passed_over[0].partition(". ")[0])
    return _judged(name, settings.mongodb_database, report)


def _judged(name: str, database: str, report: MongodbReport) -> Finding:
    fault = _unusable(database, report)
    if fault is not None:
        return _bad(name, fault)
    text = f"MongoDB {report.version}, replica set"
    if _numbers(report.version) < _MIN_MONGODB:
        return _bad(name, f"{text}; 6 is the oldest that works")
    if _numbers(report.version) < _ADVISED_MONGODB:
        return _advice(name, f"{text}; 7 or newer is advised")
    return _good(name, text)


def _unusable(database: str, report: MongodbReport) -> str | None:
    """Why a MongoDB of whatever version is of no use, None when it is."""
    if report.fault is not None:
        return f"MongoDB can't be reached: {report.fault}"
    if not report.transactions:
        return "is no replica set, which transactions need: mongod --replSet …, rs.initiate()"
    if report.stranger:
        return "MongoDB lets nobody in without a user: mongodb://user:password@…"
    if report.lacking:
        text = f"its user may not {', '.join(report.lacking)} in the database {database}"
        return f"{text}; grant it the role readWrite there"
    return None


async def _redis(settings: Settings) -> list[Finding]:
    name = "DUET_REDIS_URL"
    if settings.redis_url is None:
        return [_bad(name, "must be the address of a Redis or Valkey")]
    report = await examine_redis(settings.redis_url, settings.redis_prefix, _TIMEOUT_S)
    if report.fault is not None:
        return [_bad(name, f"Redis can't be reached: {report.fault}")]
    if report.refused is not None:
        advice = "docs/operations.md has the rights that its user needs"
        return [_bad(name, f"Redis refuses what Duet does: {report.refused}; {advice}")]
    text = f"{report.name} {report.version}{', cluster' if report.cluster else ''}"
    # Valkey counts on from Redis 7.2, so its every version is new enough.
    if report.name == "Redis" and _numbers(report.version) < _MIN_REDIS:
        return [_bad(name, f"{text}; 6.2 is the oldest that works")]
    findings = [_good(name, text)]
    if report.persistent is False:
        findings.append(_advice("Redis persistence", "off; presence starts empty after a restart"))
    if report.evicts:
        text = "may evict presence under memory pressure: set maxmemory-policy noeviction"
        findings.append(_advice("Redis memory", text))
    return findings


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
