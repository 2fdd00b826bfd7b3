"""Signatures of the coordinator: with the server's key, verified with the federation's authority.

A signature contains the server's certificate, so it can be verified after the certificate was
renewed. ECDSA with SHA-384.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsgcg.common.errors import fail

KIT: Final = "FEDSGCG_COORDINATOR_KIT"
"""Environment variable with the coordinator's kit, for the processes of its server."""

ALGORITHM: Final = ec.ECDSA(hashes.SHA384())


@dataclass(frozen=True)
class Signature:
    """A signature of the coordinator.

    Attributes:
        certificate: The server's certificate (DER, base64).
        signature: The signature (DER, base64).
    """

    certificate: str
    signature: str

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Signature:
        """Read a signature from a JSON object; raises KeyError."""
        return cls(str(tree["certificate"]), str(tree["signature"]))

    def fits(self, content: bytes, authority: Path) -> bool:
        """Return whether the coordinator has signed these bytes.

        Args:
            content: The signed bytes.
            authority: Certificate of the authority that signs the server's certificate (PEM).

        Raises:
            FedsgcgError: DEP-603 when the authority's certificate cannot be read.
        """
        try:
            trusted = x509.load_pem_x509_certificate(authority.read_bytes())
        except (OSError, ValueError) as error:
            raise fail("DEP-603", where=str(authority), found=str(error)) from error
        try:
            certificate = x509.load_der_x509_certificate(base64.b64decode(self.certificate))
            certificate.verify_directly_issued_by(trusted)
            key = certificate.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                return False
            key.verify(base64.b64decode(self.signature), content, ALGORITHM)
        except (InvalidSignature, ValueError, TypeError):
            return False
        return True


@dataclass(frozen=True)
class Signer:
    """Signs with the server's key.

    Attributes:
        key: The server's private key.
        certificate: Its certificate (DER, base64).
    """

    key: ec.EllipticCurvePrivateKey
    certificate: str

    @classmethod
    def of_kit(cls, kit: Path) -> Signer:
        """Read key and certificate of a coordinator's kit.

        Raises:
            FedsgcgError: DEP-603 when either cannot be used.
        """
        try:
            key = serialization.load_pem_private_key((kit / "server.key").read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((kit / "server.crt").read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise fail(
                "DEP-603", where=str(kit), found=str(error), expected="server.key"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise fail("DEP-603", where=str(kit), found="a server.key of another type")
        der = certificate.public_bytes(serialization.Encoding.DER)
        return cls(key, base64.b64encode(der).decode())

    @classmethod
    def of_process(cls, variables: Mapping[str, str] = os.environ) -> Signer | None:
        """Return the signer of the server that started this process, None in a simulation.

        Raises:
            FedsgcgError: DEP-603 for a kit whose key cannot be used.
        """
        kit = variables.get(KIT)
        return cls.of_kit(Path(kit)) if kit else None

    def sign(self, content: bytes) -> Signature:
        """Sign bytes."""
        signature = base64.b64encode(self.key.sign(content, ALGORITHM)).decode()
        return Signature(self.certificate, signature)
