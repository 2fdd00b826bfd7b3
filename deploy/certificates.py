"""Keys and certificates of a federation: authority, server certificate and site keys.

TLS encrypts the connection and authenticates the server to the sites. A site authenticates itself
by signing each request with its own elliptic-curve key. Flower's SuperNode reads that key only in
OpenSSH format. Private key files are created with mode 0600 and are never printed.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsgcg.common.errors import fail
from fedsgcg.common.files.atomic import write_file

AUTHORITY_DAYS: Final = 3650
SERVER_DAYS: Final = 398
RENEW_WITHIN_DAYS: Final = 30
"""A certificate that expires within this time causes a warning that suggests `--renew`."""

BACKDATED: Final = timedelta(hours=1)
"""Certificates are valid from a little in the past, because a site's clock may be slow."""

LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Authority:
    """The federation's own certificate authority; its key never leaves the coordinator."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_authority(project: str, days: int = AUTHORITY_DAYS) -> Authority:
    """Make an authority that may sign server certificates but no further authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{project[:50]} authority")])
    builder = _builder(name, name, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    return Authority(builder.sign(key, hashes.SHA384()), key)


def make_server_certificate(
    authority: Authority, names: Sequence[str], days: int = SERVER_DAYS
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Make a server's certificate and key.

    Args:
        authority: The authority that signs it.
        names: Host names and IP addresses by which the server is reached; loopback is added,
            because the coordinator's own processes use it.
        days: Days of validity.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    issuer = authority.certificate
    builder = _builder(subject, issuer.subject, key.public_key(), days)
    entries = [_general_name(name) for name in dict.fromkeys([*names, *LOOPBACK])]
    builder = builder.add_extension(x509.SubjectAlternativeName(entries), critical=False)
    builder = builder.add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    builder = builder.add_extension(key_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    public = authority.key.public_key()
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False
    )
    return builder.sign(authority.key, hashes.SHA384()), key


def make_site_key(folder: Path, site: str) -> str:
    """Make a site's key pair: `site.key` (OpenSSH, mode 0600) and `site.pub`.

    An existing key is kept.

    Args:
        folder: Folder in which both files are written.
        site: Name of the site, used as the public key's comment.

    Returns:
        The public key as one OpenSSH line.

    Raises:
        FedsgcgError: DEP-603 when `site.key` exists but is not such a key.
    """
    path = folder / "site.key"
    if path.exists():
        key = read_site_key(path)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        write_secret(path, _private_bytes(key, serialization.PrivateFormat.OpenSSH))
    line = public_line(key, site)
    (folder / "site.pub").write_text(line + "\n", encoding="utf-8")
    return line


def read_site_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a site's private key; raises DEP-603 for a key that a SuperNode would reject."""
    action = "make it with `fedsgcg-site request`, or `ssh-keygen -t ecdsa -b 384 -N ''`"
    expected = "an elliptic-curve private key (P-384) in OpenSSH format without a passphrase"
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except FileNotFoundError as error:
        raise fail(
            "DEP-603", where=str(path), found="no such file", expected=expected, action=action
        ) from error
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        found = "a file that is not an OpenSSH private key without a passphrase"
        raise fail(
            "DEP-603", where=str(path), found=found, expected=expected, action=action
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise fail(
            "DEP-603",
            where=str(path),
            found="a key of another type",
            expected=expected,
            action=action,
        )
    return key


def read_public_key(path: Path) -> str:
    """Read a site's public key: its line without the comment.

    Raises:
        FedsgcgError: DEP-603 for a file that is not an EC P-384 public key in OpenSSH format.
    """
    expected = "one line 'ecdsa-sha2-nistp384 AAAA...', the site.pub of a hospital"
    try:
        text = path.read_text(encoding="utf-8")
        key = serialization.load_ssh_public_key(text.encode())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        found = _unreadable(error, "a public key")
        raise fail("DEP-603", where=str(path), found=found, expected=expected) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise fail(
            "DEP-603", where=str(path), found="a public key of another type", expected=expected
        )
    return " ".join(text.split()[:2])


def public_key_bytes(line: str) -> bytes:
    """Return a public key in the format in which Flower registers it (PEM)."""
    key = serialization.load_ssh_public_key(line.encode())
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def fingerprint(line: str) -> str:
    """Return a short identifier of a public key that does not depend on its comment."""
    return sha256(line.split()[1].encode()).hexdigest()[:16]


def spoken_fingerprint(line: str) -> str:
    """Return 128 bits of a public key's SHA-256 in pairs of digits, to be read over the phone."""
    return _pairs(sha256(base64.b64decode(line.split()[1])).hexdigest()[:32])


def certificate_fingerprint(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256 in pairs of digits, to be compared over the phone."""
    return _pairs(certificate.fingerprint(hashes.SHA256()).hex())


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate; raises DEP-603 when the file is missing or not a certificate."""
    expected = "a PEM certificate"
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        found = _unreadable(error, expected)
        raise fail("DEP-603", where=str(path), found=found, expected=expected) from error


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """Return the days until a certificate expires; negative when it has expired."""
    return (certificate.not_valid_after_utc - (now or datetime.now(UTC))) / timedelta(days=1)


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def names_of(certificate: x509.Certificate) -> list[str]:
    """Return the host names and addresses for which a certificate is valid."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in found.get_values_for_type(x509.IPAddress)]
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def write_authority(
    folder: Path, authority: Authority, key: Path | None = None, passphrase: bytes | None = None
) -> None:
    """Write `ca.crt` into a folder, and the private key (0600).

    Args:
        folder: Folder of `ca.crt`.
        authority: The authority.
        key: File of the private key; default: `ca.key` in the folder.
        passphrase: Encrypts the private key; None leaves it unencrypted.
    """
    write_authority_key(key or folder / "ca.key", authority.key, passphrase)
    (folder / "ca.crt").write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))


def write_authority_key(
    path: Path, key: ec.EllipticCurvePrivateKey, passphrase: bytes | None
) -> None:
    """Write an authority's private key (0600), encrypted if there is a passphrase."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    form = serialization.PrivateFormat.PKCS8
    write_secret(path, key.private_bytes(serialization.Encoding.PEM, form, encryption))


def is_encrypted(path: Path) -> bool:
    """Return whether a private key's file needs a passphrase; raises DEP-603 if unreadable."""
    try:
        return b"ENCRYPTED" in path.read_bytes().split(b"\n", 1)[0]
    except OSError as error:
        found = _unreadable(error, "a private key")
        raise fail("DEP-603", where=str(path), found=found) from error


def read_authority(
    folder: Path, key: Path | None = None, passphrase: bytes | None = None
) -> Authority:
    """Read an authority; raises DEP-603 when a file, the passphrase or their pair is wrong.

    Args:
        folder: Folder of `ca.crt`.
        key: File of the private key; default: `ca.key` in the folder.
        passphrase: Passphrase of an encrypted key.
    """
    path = key or folder / "ca.key"
    private = _read_pem_key(path, passphrase)
    certificate = read_certificate(folder / "ca.crt")
    if certificate.public_key() != private.public_key():
        expected = "the private key of ca.crt"
        raise fail("DEP-603", where=str(path), found="another authority's key", expected=expected)
    return Authority(certificate, private)


def write_server(
    folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> None:
    """Write `server.key` (0600) and then `server.crt`."""
    write_secret(folder / "server.key", _private_bytes(key, serialization.PrivateFormat.PKCS8))
    (folder / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def write_secret(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, replacing an older one atomically."""
    write_file(path, data, mode=0o600)


def _read_pem_key(path: Path, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), passphrase)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        found = _unreadable(error, "a private key that this passphrase opens")
        raise fail(
            "DEP-603", where=str(path), found=found, expected="the authority's private key"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise fail(
            "DEP-603",
            where=str(path),
            found="a key of another type",
            expected="an elliptic-curve key",
        )
    return key


def _pairs(digits: str) -> str:
    return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2)).upper()


def _unreadable(error: Exception, expected: str) -> str:
    """Return what was found where a key or certificate could not be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"a file that is not {expected}"


def _private_bytes(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def public_line(key: ec.EllipticCurvePrivateKey, comment: str = "") -> str:
    """Return the public key of a private one as one OpenSSH line."""
    line = (
        key.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )
    return f"{line} {comment}".rstrip()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - BACKDATED).not_valid_after(now + timedelta(days=days))


def key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    """Return the extension that says what a certificate's key is for."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
