"""The keys that JWTs are verified with: a shared secret, a public key, or a fetched key set.

A key's type decides its algorithm, so a token's header can choose none (no `none`, no HS256 with
a public key as the secret).

Source: docs/settings.md, RFC 7517, RFC 8725.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import httpx
import jwt
import structlog
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from gateway.auth import (
    AuthError,
    Identity,
    UnknownKeyError,
    VerificationKey,
    identity_of_token,
)
from gateway.errors import ErrorCode
from gateway.settings import JWT_SECRET_MIN_BYTES, Settings, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

# How old a fetched key set may grow before it is fetched again.
JWKS_MAX_AGE_S: Final = 600.0
# Strangers with made-up key ids can make us fetch this often, no oftener.
JWKS_MIN_INTERVAL_S: Final = 10.0
JWKS_TIMEOUT_S: Final = 2.0
_RSA_MIN_BITS: Final = 2048

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class KeySet:
    """Keys by `kid`, with the claims that tokens must carry. Never changes once built."""

    __slots__ = ("_keys", "audience", "issuer")

    def __init__(
        self,
        keys: Mapping[str | None, VerificationKey],
        issuer: str | None = None,
        audience: str | None = None,
    ) -> None:
        self._keys = dict(keys)
        self.issuer = issuer
        self.audience = audience

    def find(self, key_id: str | None) -> VerificationKey:
        """The key named `key_id`. Where there is only one, a missing name on either side will do.

        Raises:
            UnknownKeyError: There is none.
        """
        key = self._keys.get(key_id)
        if key is None and len(self._keys) == 1 and None in (key_id, *self._keys):
            key = next(iter(self._keys.values()))
        if key is None:
            raise UnknownKeyError("The token is signed with a key that is not known here.")
        return key

    def __len__(self) -> int:
        return len(self._keys)


def secret_key(secret: str) -> VerificationKey:
    """HS256 with `secret`.

    Raises:
        SettingsError: The secret is shorter than the digest.
    """
    if len(secret.encode()) < JWT_SECRET_MIN_BYTES:
        raise SettingsError([f"DUET_JWT_SECRET: needs at least {JWT_SECRET_MIN_BYTES} bytes"])
    return VerificationKey("HS256", secret)


def public_key(pem: str) -> VerificationKey:
    """The one algorithm that fits the PEM public key.

    Raises:
        SettingsError: It is no public key, or of a kind that is not supported.
    """
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(["DUET_JWT_PUBLIC_KEY: is not a PEM public key"]) from None
    algorithm = _algorithm_of(key)
    if algorithm is None:
        raise SettingsError(
            ["DUET_JWT_PUBLIC_KEY: must be RSA of 2048 bits or more, EC on P-256, or Ed25519"]
        )
    return VerificationKey(algorithm, key)


def _algorithm_of(key: object) -> str | None:
    if isinstance(key, RSAPublicKey) and key.key_size >= _RSA_MIN_BITS:
        return "RS256"
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return "ES256"
    if isinstance(key, Ed25519PublicKey):
        return "EdDSA"
    return None


def keys_of_jwks(document: Any) -> dict[str | None, VerificationKey]:
    """The usable public keys of a decoded JSON Web Key Set; keys of other kinds are left out.

    Raises:
        AuthError: It is no key set, or holds no key for us.
    """
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise AuthError("The key set is not a JSON Web Key Set.", ErrorCode.UNAVAILABLE)
    found: dict[str | None, VerificationKey] = {}
    for entry in entries:
        # A symmetric key in a public document would let anyone sign.
        if not isinstance(entry, dict) or entry.get("kty") not in {"RSA", "EC", "OKP"}:
            continue
        if entry.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK.from_dict(entry).key
        except (jwt.PyJWTError, ValueError, TypeError):
            continue
        algorithm = _algorithm_of(key)
        key_id = entry.get("kid")
        usable = algorithm is not None and entry.get("alg", algorithm) == algorithm
        if algorithm is not None and usable and (key_id is None or isinstance(key_id, str)):
            found[key_id] = VerificationKey(algorithm, key)
    if not found:
        raise AuthError("The key set holds no key that can be used.", ErrorCode.UNAVAILABLE)
    return found


class KeysNotFetched(Exception):
    """The key set's server is not there, or what it serves is no key set for us."""


async def fetched_keys(client: httpx.AsyncClient, url: str) -> dict[str | None, VerificationKey]:
    """The keys that an address serves.

    Raises:
        KeysNotFetched: There are none to be had in time; one line that says why.
    """
    try:
        async with asyncio.timeout(JWKS_TIMEOUT_S):
            response = await client.get(url)
            response.raise_for_status()
            return keys_of_jwks(response.json())
    except httpx.HTTPStatusError as error:
        raise KeysNotFetched(f"status {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, AuthError) as error:
        raise KeysNotFetched(str(error) or type(error).__name__) from None


class FixedAuthorizer:
    """Checks tokens with keys that don't change while the process runs."""

    def __init__(self, keys: KeySet) -> None:
        self._keys = keys

    async def identity_of(self, token: str, now: datetime) -> Identity:
        """The identity that `token` proves at `now`; raises `AuthError`."""
        return identity_of_token(token, self._keys, now)

    async def close(self) -> None:
        """Holds nothing open."""


class JwksAuthorizer:
    """Checks tokens with a key set from the network, fetched again when old or lacking a key.

    While the set can't be fetched the known keys stay in use: the streams go on. Cancelling a
    caller is safe.
    """

    def __init__(
        self, url: str, issuer: str | None, audience: str | None, client: httpx.AsyncClient
    ) -> None:
        self._url = url
        self._client = client
        self._keys = KeySet({}, issuer, audience)
        self._fetching = asyncio.Lock()
        # Readings of the loop's clock; none before the first.
        self._fetched_at: float | None = None
        self._tried_at: float | None = None

    async def identity_of(self, token: str, now: datetime) -> Identity:
        """The identity that `token` proves at `now`; raises `AuthError`."""
        # While one caller fetches, the others go on with the keys there are.
        busy = self._fetching.locked() and len(self._keys) > 0
        if self._age_s(self._fetched_at) > JWKS_MAX_AGE_S and not busy:
            await self._refresh()
        try:
            return identity_of_token(token, self._keys, now)
        except UnknownKeyError:
            if not await self._refresh():
                raise
        return identity_of_token(token, self._keys, now)

    async def close(self) -> None:
        """Closes the connections to the key set's server."""
        await self._client.aclose()

    @staticmethod
    def _age_s(at: float | None) -> float:
        return float("inf") if at is None else asyncio.get_running_loop().time() - at

    async def _refresh(self) -> bool:
        """Whether the keys are newer now than when the caller looked.

        Raises:
            AuthError: `unavailable`: no key was ever fetched.
        """
        seen = self._fetched_at
        async with self._fetching:
            if self._fetched_at != seen:
                return True
            if self._age_s(self._tried_at) >= JWKS_MIN_INTERVAL_S:
                self._tried_at = asyncio.get_running_loop().time()
                await self._fetch()
        if not len(self._keys):
            raise AuthError("The keys for tokens can't be fetched.", ErrorCode.UNAVAILABLE)
        return self._fetched_at != seen

    async def _fetch(self) -> None:
        try:
            keys = await fetched_keys(self._client, self._url)
        except KeysNotFetched as error:
            log.warning("jwks_not_fetched", url=self._url, reason=str(error))
            return
        self._keys = KeySet(keys, self._keys.issuer, self._keys.audience)
        self._fetched_at = asyncio.get_running_loop().time()


def authorizer_of(settings: Settings) -> FixedAuthorizer | JwksAuthorizer:
    """The authorizer for the one key source of `settings`.

    Raises:
        SettingsError: There is none, or more than one, or it can't be used.
    """
    sources = key_sources(settings)
    if len(sources) != 1:
        given = " and ".join(sources) or "none"
        names = "DUET_JWT_SECRET, DUET_JWT_PUBLIC_KEY, DUET_JWT_JWKS_URL"
        raise SettingsError([f"{names}: exactly one must be set, not {given}"])
    if settings.jwt_jwks_url:
        client = httpx.AsyncClient(timeout=JWKS_TIMEOUT_S, follow_redirects=False)
        return JwksAuthorizer(
            settings.jwt_jwks_url, settings.jwt_issuer, settings.jwt_audience, client
        )
    if settings.jwt_public_key:
        key = public_key(settings.jwt_public_key)
    else:
        key = secret_key(settings.jwt_secret or "")
    return FixedAuthorizer(KeySet({None: key}, settings.jwt_issuer, settings.jwt_audience))


def key_sources(settings: Settings) -> list[str]:
    """The variables of the key sources that are set."""
    sources = {
        "DUET_JWT_SECRET": settings.jwt_secret,
        "DUET_JWT_PUBLIC_KEY": settings.jwt_public_key,
        "DUET_JWT_JWKS_URL": settings.jwt_jwks_url,
    }
    return [name for name, value in sources.items() if value]
