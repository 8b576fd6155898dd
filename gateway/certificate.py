"""The certificate and its key, looked at before anybody shakes hands with them.

OpenSSL's own words name neither the file nor the remedy, and it asks the terminal for a passphrase.
"""

from __future__ import annotations

import ssl
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

# As long before its end as a certificate that is renewed by itself has long been renewed.
_SOON: Final = timedelta(days=14)
_REMEDIES: Final = {
    "KEY_VALUES_MISMATCH": "the key is another certificate's",
    "NO_START_LINE": "no PEM",
}


class _Encrypted(Exception):
    """The key's file wants a passphrase."""


def pair_fault(cert: Path, key: Path) -> str | None:
    """Why a listener can't use them, in one line; none when it can."""
    for path in (cert, key):
        try:
            path.read_bytes()
        except OSError as error:
            return f"{path}: {error.strerror or error}"
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, _refuse)
    except _Encrypted:
        return f"{key}: has a passphrase, which nobody is there to type: openssl pkey takes it off"
    except ssl.SSLError as error:
        return _REMEDIES.get(error.reason, "a certificate chain and its key, both PEM, are needed")
    return None


def _refuse() -> str:
    raise _Encrypted


def validity_fault(cert: Path, now: datetime) -> str | None:
    """Why clients refuse the certificate, or will soon; none when they don't."""
    try:
        first = x509.load_pem_x509_certificates(cert.read_bytes())[0]
    except (OSError, ValueError):
        # OpenSSL takes it all the same.
        return None
    begins_at, ends_at = first.not_valid_before_utc, first.not_valid_after_utc
    if now >= ends_at:
        return f"expired on {ends_at:%Y-%m-%d}: clients refuse it"
    if now < begins_at:
        return f"is valid from {begins_at:%Y-%m-%d %H:%M} UTC on: until then clients refuse it"
    if now >= ends_at - _SOON:
        return f"expires on {ends_at:%Y-%m-%d}; it is read when the gateway starts"
    return None
