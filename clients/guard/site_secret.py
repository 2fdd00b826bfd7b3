"""The site's secrets: created at the site, never sent, one file of 32 bytes each in its home.

Everything that a coordinator could recompute from names or images it knows is keyed by them: which
patients validate, the aliases of cases, the digest of the data. A simulation has no secret, so that
its splits and model hashes can be reproduced.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import fail

BYTES: Final = 32


def alias_salt(policy: SiteFile | None, study: str) -> bytes:
    """Return the secret salt of this site's case aliases in a study; b"" in a simulation.

    A coordinator that knows the case names, or even the images, cannot identify a case by its
    alias. Within a study a case keeps its alias, so that methods and seeds can be compared case by
    case; aliases of two studies cannot be linked.

    Args:
        policy: The site's own settings; None in a simulation.
        study: Name of the study (`study_of`).

    Raises:
        FedsgcgError: SITE-501 when the secret cannot be stored.
    """
    return _derived(policy, f"alias\x1f{study}")


def data_salt(policy: SiteFile | None) -> bytes:
    """Return the secret salt of the digest of this site's data; b"" in a simulation.

    Raises:
        FedsgcgError: SITE-501 when the secret cannot be stored.
    """
    return _derived(policy, "data")


def split_salt(policy: SiteFile | None) -> bytes:
    """Return the secret salt of the site's split; b"" in a simulation.

    Args:
        policy: The site's own settings; None in a simulation.

    Raises:
        FedsgcgError: SITE-501 when the secret cannot be stored.
    """
    if policy is None:
        return b""
    return _kept(Path(policy.home) / "split.salt", lambda: secrets.token_bytes(BYTES))


def study_of(run: str) -> str:
    """Return the study that a run belongs to, the first part of the run's name (`Plan.run`)."""
    return run.partition("/")[0]


def _derived(policy: SiteFile | None, purpose: str) -> bytes:
    if policy is None:
        return b""
    secret = _kept(Path(policy.home) / "site.secret", lambda: secrets.token_bytes(BYTES))
    text = f"{policy.project}\x1f{purpose}"
    return hashlib.blake2b(text.encode(), digest_size=BYTES, key=secret).digest()


def _kept(path: Path, draw: Callable[[], bytes]) -> bytes:
    """Return the secret in a file; draw and store it on first use.

    Two processes that start at the same time use the one that was stored first.
    """
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(draw())
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(partial, path)
            partial.unlink()
        secret = path.read_bytes()
    except OSError as error:
        expected = "a writable folder"
        raise fail("SITE-501", where=str(path), found=str(error), expected=expected) from error
    if len(secret) != BYTES:
        action = (
            "Restore the file from a backup. If there is none, remove it: the site then draws a "
            "new secret, and its aliases and splits change."
        )
        raise fail(
            "SITE-501",
            where=str(path),
            found=f"{len(secret)} bytes",
            expected=f"a secret of {BYTES} bytes",
            action=action,
        )
    return secret
