from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gateway.certificate import pair_fault, validity_fault

if TYPE_CHECKING:
    from pathlib import Path

BEGINS_AT = datetime(2026, 1, 1, tzinfo=UTC)
ENDS_AT = datetime(2026, 4, 1, tzinfo=UTC)
PEM = serialization.Encoding.PEM


def write_pair(folder: Path, name: str, passphrase: bytes | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    certificate = x509.CertificateBuilder(
        subject, subject, key.public_key(), x509.random_serial_number(), BEGINS_AT, ENDS_AT
    ).sign(key, hashes.SHA256())
    kept = (
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption()
    )
    files = folder / f"{name}-cert.pem", folder / f"{name}-key.pem"
    files[0].write_bytes(certificate.public_bytes(PEM))
    files[1].write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, kept))
    return files


def test_a_certificate_with_its_key_has_no_fault(tmp_path: Path) -> None:
    assert pair_fault(*write_pair(tmp_path, "a")) is None


def test_what_is_wrong_with_a_pair_is_said_so_that_it_can_be_mended(tmp_path: Path) -> None:
    cert, key = write_pair(tmp_path, "a")
    _, other = write_pair(tmp_path, "b")
    missing = tmp_path / "missing.pem"

    assert pair_fault(cert, other) == "the key is another certificate's"
    assert pair_fault(cert, missing) == f"{missing}: No such file or directory"
    assert pair_fault(missing, key) == f"{missing}: No such file or directory"
    swapped = pair_fault(key, cert)
    assert swapped is not None
    assert "PEM" in swapped


def test_nobody_is_asked_for_a_passphrase(tmp_path: Path) -> None:
    cert, key = write_pair(tmp_path, "a", passphrase=b"hush")

    fault = pair_fault(cert, key)

    assert fault is not None
    assert fault.startswith(f"{key}: has a passphrase")


@pytest.mark.parametrize(
    ("at", "why"),
    [
        (BEGINS_AT - timedelta(seconds=1), "is valid from 2026-01-01 00:00 UTC on"),
        (BEGINS_AT, None),
        (ENDS_AT - timedelta(days=15), None),
        (ENDS_AT - timedelta(days=13), "expires on 2026-04-01"),
        (ENDS_AT, "expired on 2026-04-01: clients refuse it"),
    ],
)
def test_a_certificate_that_clients_refuse_or_soon_will_is_told(
    tmp_path: Path, at: datetime, why: str | None
) -> None:
    cert, _ = write_pair(tmp_path, "a")

    told = validity_fault(cert, at)

    assert told == why if told is None or why is None else told.startswith(why)
