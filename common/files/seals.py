"""Seals: the digests of finished files, so that a later change of a file is noticed.

A seal lists name and SHA-256 of files of one folder. The coordinator's server signs it
(`common.files.signing`); then nobody without the server's key can change a file and its seal. In a
simulation there is no such key: the seal notices a changed file, but not one who writes the seal
anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from fedsgcg.common.files.disk import Disk
from fedsgcg.common.files.signing import Signature, Signer

SEAL: Final = "seal.json"


def write_seal(
    disk: Disk, folder: Path, names: Iterable[str], signer: Signer | None, name: str = SEAL
) -> None:
    """Seal the files of a folder that exist.

    Args:
        disk: Disk access.
        folder: The folder.
        names: Names of the files.
        signer: Signs the seal; None leaves it unsigned.
        name: Name of the seal's file.

    Raises:
        FedsgcgError: SRV-401 when it cannot be written.
    """
    files = {name: digest_of(folder / name) for name in names if (folder / name).is_file()}
    disk.write(folder / name, encode_seal(files, signer))


def encode_seal(files: Mapping[str, str], signer: Signer | None) -> bytes:
    """Return the seal of files, given as name -> SHA-256."""
    tree: dict[str, object] = {"files": dict(files)}
    if signer is not None:
        signature = signer.sign(_content(files))
        tree |= {"certificate": signature.certificate, "signature": signature.signature}
    return (json.dumps(tree, indent=1) + "\n").encode()


def broken_seal(folder: Path, names: Iterable[str], name: str = SEAL) -> dict[str, str]:
    """Return file -> what is wrong with it; empty for intact files and for a folder never sealed.

    Args:
        folder: The folder of the seal.
        names: Names of the files that a seal covers when they exist.
        name: Name of the seal's file.
    """
    path, authority = folder / name, authority_of(folder)
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        files = {str(file): str(digest) for file, digest in tree["files"].items()}
        signature = Signature.from_tree(tree) if "signature" in tree else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {name: "a seal that cannot be read"}
    if authority is not None:
        if signature is None:
            return {name: "a seal without the coordinator's signature"}
        if not signature.fits(_content(files), authority):
            return {name: "a seal that the coordinator did not sign"}
    wrong = {}
    for file in sorted({*files, *names}):
        found = digest_of(folder / file) if (folder / file).is_file() else ""
        if found != files.get(file, ""):
            wrong[file] = "changed after the run" if found else "removed after the run"
    return wrong


def authority_of(folder: Path) -> Path | None:
    """Return the authority's certificate of the coordinator's kit that contains a folder."""
    for parent in folder.resolve().parents:
        if (parent / "project.yaml").is_file() and (parent / "ca.crt").is_file():
            return parent / "ca.crt"
    return None


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(files: Mapping[str, str]) -> bytes:
    return json.dumps(files, sort_keys=True).encode()
