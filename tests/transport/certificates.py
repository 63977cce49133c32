"""Certificates of our own making."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

YESTERDAY = datetime.now(UTC) - timedelta(days=1)
TOMORROW = datetime.now(UTC) + timedelta(days=1)
NEXT_YEAR = datetime.now(UTC) + timedelta(days=365)


class Certificates:
    """A folder of PEM files, and the CA that signs them unless another is named."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.ca_file = self.write_ca("ca", self.ca)

    def write_ca(self, name: str, ca: trustme.CA) -> str:
        path = self.folder / f"{name}.pem"
        replace_file(path, ca.cert_pem.bytes())
        return str(path)

    def pair(
        self, name: str, *hosts: str, ca: trustme.CA | None = None, folder: Path | None = None, **options: Any
    ) -> tuple[str, str]:
        """A certificate and its key, as paths. `folder`: where they replace those of the same name at once."""
        leaf = (ca or self.ca).issue_cert(*(hosts or ("localhost", "127.0.0.1")), **options)
        cert, key = (folder or self.folder) / f"{name}.pem", (folder or self.folder) / f"{name}.key"
        replace_file(cert, b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        replace_file(key, leaf.private_key_pem.bytes())
        return str(cert), str(key)

    def self_signed(self, name: str, usage: x509.ObjectIdentifier) -> tuple[str, str]:
        """A pair that is meant for one purpose alone."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(YESTERDAY)
            .not_valid_after(TOMORROW)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        )
        cert_path, key_path = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert_path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8
        key_path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, form, encryption_algorithm=serialization.NoEncryption())
        )
        return str(cert_path), str(key_path)

    def encrypted(self, key: str) -> str:
        """The same key under a passphrase; its path."""
        loaded = serialization.load_pem_private_key(Path(key).read_bytes(), None)
        path = Path(key).with_suffix(".encrypted")
        form = serialization.PrivateFormat.PKCS8
        secret = serialization.BestAvailableEncryption(b"passphrase")
        path.write_bytes(loaded.private_bytes(serialization.Encoding.PEM, form, secret))
        return str(path)


def replace_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """As tools that renew certificates do it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    fresh.chmod(mode)
    os.replace(fresh, path)


SERVERS, CLIENTS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
