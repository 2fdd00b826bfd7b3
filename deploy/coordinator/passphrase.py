"""The passphrase that encrypts the authority's private key."""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import fail

VARIABLE: Final = "FEDSGCG_CA_PASSPHRASE"
FEWEST_CHARACTERS: Final = 12
ACTION: Final = (
    f"--ca-passphrase-file FILE, the environment variable {VARIABLE}, or a terminal to ask on"
)


@dataclass(frozen=True)
class Passphrase:
    """Where the passphrase comes from: a file, the environment, or a question on the terminal.

    Attributes:
        file: File whose first line is the passphrase; None = the environment or the terminal.
    """

    file: Path | None = None

    def given(self) -> bytes | None:
        """Return the passphrase of the file or the environment, None without one.

        Raises:
            FedsgcgError: DEP-616 for an unreadable file or a short passphrase.
        """
        if self.file is None:
            text = os.environ.get(VARIABLE, "")
            return _long_enough(text, VARIABLE) if text else None
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise fail(
                "DEP-616", where=str(self.file), found=str(error), expected="a passphrase"
            ) from error
        return _long_enough(lines[0] if lines else "", str(self.file))

    def for_new_key(self) -> bytes | None:
        """Return the passphrase for a new key, asking twice on a terminal; None without any.

        Raises:
            FedsgcgError: DEP-616 for a short passphrase, or two different ones.
        """
        if (found := self.given()) is not None or not sys.stdin.isatty():
            return found
        first = getpass.getpass("Passphrase for the authority's key (12 characters or more): ")
        if first != getpass.getpass("The same passphrase again: "):
            raise fail("DEP-616", found="two different passphrases", action="run it again")
        return _long_enough(first, "the terminal")

    def for_old_key(self, path: Path) -> bytes:
        """Return the passphrase of an encrypted key.

        Raises:
            FedsgcgError: DEP-616 without a passphrase and a terminal.
        """
        if (found := self.given()) is not None:
            return found
        if not sys.stdin.isatty():
            raise fail("DEP-616", where=str(path), found="an encrypted key", action=ACTION)
        return getpass.getpass(f"Passphrase of {path}: ").encode()


def _long_enough(text: str, where: str) -> bytes:
    if len(text) < FEWEST_CHARACTERS:
        expected = f"{FEWEST_CHARACTERS} characters or more"
        raise fail("DEP-616", where=where, found=f"{len(text)} characters", expected=expected)
    return text.encode()
