"""What a site keeps of its own training between rounds and never sends: restoration decoder, Adam's moments, sums.

One safetensors file a round in the site's folder, named after the run and its plan. Training of round r starts from the
state of an earlier round alone, so a coordinator that repeats a round after a restart gets the same answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from common.errors import fail
from common.wire.payload import Identity

KEPT_ROUNDS: Final = 3
"""Files that stay: the round that may be repeated, the one before it, and one more for a damaged journal."""


@dataclass(frozen=True)
class LocalState:
    """The state files of one run at one site.

    Attributes:
        folder: Where they lie.
        key: Digest of run and plan.
    """

    folder: Path
    key: str

    @classmethod
    def of(cls, home: Path, identity: Identity) -> LocalState:
        """Return the state of a run."""
        text = f"{identity.run}\x1f{identity.heldout}\x1f{identity.plan}"
        return cls(home / "state", hashlib.sha256(text.encode()).hexdigest()[:16])

    def load(self, round_number: int) -> tuple[int, dict[str, Tensor]]:
        """Read the newest state older than a round: (its round, tensors by name); (0, {}) when there is none.

        Raises:
            FedsgcgError: SITE-501 when the file cannot be read.
        """
        numbers = [number for number in self._rounds() if number < round_number]
        if not numbers or round_number == 1:
            return 0, {}
        path = self._path(numbers[-1])
        try:
            return numbers[-1], load_file(path)
        except (OSError, SafetensorError) as error:
            action = "remove the file: the site goes on with a fresh state"
            raise fail("SITE-501", where=str(path), found=str(error), action=action) from error

    def store(self, round_number: int, tensors: dict[str, Tensor]) -> None:
        """Write the state after a round, whole or not at all, and remove files that no round can need.

        Raises:
            FedsgcgError: SITE-501 when the folder cannot be written.
        """
        path = self._path(round_number)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(
                save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
            )
            partial.replace(path)
            for number in self._rounds():
                # A later round than this one belongs to a past that is being repeated.
                if number <= round_number - KEPT_ROUNDS or number > round_number:
                    self._path(number).unlink(missing_ok=True)
        except OSError as error:
            expected = "a site folder that can be written"
            raise fail("SITE-501", where=str(path), found=str(error), expected=expected) from error

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.key}-{number:05d}.safetensors"

    def _rounds(self) -> list[int]:
        return sorted(
            int(path.stem.rpartition("-")[2])
            for path in self.folder.glob(f"{self.key}-*.safetensors")
        )
