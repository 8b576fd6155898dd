"""Signatures of the Pusher HTTP API: whose call it is, and that nobody changed it.

Pure. The libraries of the field differ in what they escape and in which path they sign, so the
raw path is tried before the decoded one, and every pair of the query is decoded before joining.

Source: docs/pusher-compatibility.md 2.1.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from gateway.auth import hmac_hex

if TYPE_CHECKING:
    from gateway.apps import App

# Stands in for an app that doesn't exist, so that its absence costs the time of its presence.
_NOBODYS_SECRETS = (secrets.token_hex(16),)
_EMPTY_MD5 = hashlib.md5(b"", usedforsecurity=False).hexdigest()
_MAX_PARAMETERS = 64


@dataclass(frozen=True, slots=True)
class SignatureFault:
    """Why a call is not accepted, for its sender; never the digest that would have been right."""

    message: str


class SignedQuery:
    """The parameters of a signed call: keys in lower case, values decoded, as they are signed."""

    __slots__ = ("_text", "parameters")

    def __init__(self, query: bytes) -> None:
        text = query.decode("latin-1")
        # Nearly no call holds one of these, and taking them out of every pair takes time.
        escaped = "%" in text or "+" in text or "[" in text
        parameters: dict[str, str] = {}
        for pair in text.split("&")[:_MAX_PARAMETERS]:
            if not pair:
                continue
            name, _, value = pair.partition("=")
            if escaped:
                # An array comes as `info[]=a&info[]=b` and is signed comma-joined under its name.
                name, value = unquote_plus(name).removesuffix("[]"), unquote_plus(value)
            key = name.lower()
            parameters[key] = f"{parameters[key]},{value}" if key in parameters else value
        self.parameters = parameters
        signed = sorted(item for item in self.parameters.items() if item[0] != "auth_signature")
        self._text = "&".join(f"{key}={value}" for key, value in signed)

    @property
    def auth_key(self) -> str | None:
        """The app's key that the caller names."""
        return self.parameters.get("auth_key")

    def fault(
        self,
        app: App | None,
        method: str,
        paths: tuple[str, ...],
        body: bytes,
        now_s: float,
        within_s: float,
    ) -> SignatureFault | None:
        """None when one of the app's secrets signed this call of one of `paths` just now.

        Args:
            app: Whose key `auth_key` is, None when it is nobody's: the answer is then the same as
                for a wrong signature.
            method: Of the call.
            paths: Which of them was signed doesn't matter.
            body: The raw body.
            now_s: Seconds since the epoch.
            within_s: How far `auth_timestamp` may be from `now_s`.
        """
        given = self.parameters
        if given.get("auth_version") != "1.0":
            return SignatureFault("auth_version must be 1.0")
        late = _timestamp_fault(given.get("auth_timestamp", ""), now_s, within_s)
        if late is not None:
            return late
        altered = _body_fault(given.get("body_md5"), body)
        if altered is not None:
            return altered
        known = app is not None and given.get("auth_key") == app.key
        if not self._digest_matches(app if known else None, method, paths) or not known:
            return SignatureFault("auth_key and auth_signature don't match this call")
        return None

    def _digest_matches(self, app: App | None, method: str, paths: tuple[str, ...]) -> bool:
        signature = self.parameters.get("auth_signature", "").encode(errors="replace")
        for secret in _NOBODYS_SECRETS if app is None else app.secrets:
            for path in paths:
                text = f"{method}\n{path}\n{self._text}".encode()
                if hmac.compare_digest(hmac_hex(secret, text).encode(), signature):
                    return True
        return False


def _timestamp_fault(timestamp: str, now_s: float, within_s: float) -> SignatureFault | None:
    if not timestamp.isascii() or not timestamp.isdigit() or len(timestamp) > 15:
        return SignatureFault("auth_timestamp must be a time in seconds")
    if abs(now_s - int(timestamp)) > within_s:
        return SignatureFault(
            f"auth_timestamp is more than {within_s:g} seconds away from this server's time"
        )
    return None


def _body_fault(body_md5: str | None, body: bytes) -> SignatureFault | None:
    """The digest must be the body's. Python's library sends that of the empty body on GET too."""
    if body_md5 is None:
        return SignatureFault("body_md5 is missing") if body else None
    actual = hashlib.md5(body, usedforsecurity=False).hexdigest() if body else _EMPTY_MD5
    if not hmac.compare_digest(actual.encode(), body_md5.lower().encode(errors="replace")):
        return SignatureFault("body_md5 is not the digest of this body")
    return None


def signed_paths(raw_path: str, path: str, prefix: str) -> tuple[str, ...]:
    """The paths that a caller may have signed: as sent, decoded, and both without our prefix."""
    if raw_path == path and not prefix:
        return (path,)
    candidates = [raw_path, path]
    if prefix:
        candidates += [each.removeprefix(prefix) for each in (raw_path, path)]
    return tuple(dict.fromkeys(candidates))
