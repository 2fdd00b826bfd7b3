"""Training state that a site keeps between rounds and never sends.

It holds the restoration decoder, Adam's moments and sums of class statistics, in one safetensors
file per round, named after the run and its plan. Round r starts from the state of an earlier round,
so a coordinator that repeats a round after a restart gets the same answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fedsgcg.common.errors import fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.wire.payload import Identity

KEPT_ROUNDS: Final = 3
"""Number of files kept: the round that may be repeated, its predecessor and one spare."""


@dataclass(frozen=True)
class LocalState:
    """The state files of one run at one site.

    Attributes:
        folder: Folder of the files.
        key: Digest of run and plan.
    """

    folder: Path
    key: str

    @classmethod
    def of(cls, home: Path, identity: Identity) -> LocalState:
        """Return the state files of a run."""
        text = f"{identity.run}\x1f{identity.heldout}\x1f{identity.plan}"
        return cls(home / "state", hashlib.sha256(text.encode()).hexdigest()[:16])

    def load(self, round_number: int) -> tuple[int, dict[str, Tensor]]:
        """Read the newest state before a round.

        Returns:
            The state's round and its tensors by name; (0, {}) if there is none.

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
            action = "remove the file; the site then continues with a fresh state"
            raise fail("SITE-501", where=str(path), found=str(error), action=action) from error

    def store(self, round_number: int, tensors: dict[str, Tensor]) -> None:
        """Write the state after a round atomically and remove files that are no longer needed.

        Raises:
            FedsgcgError: SITE-501 when the folder cannot be written.
        """
        path = self._path(round_number)
        try:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            write_file(path, save(kept))
            for number in self._rounds():
                # Later rounds are left over from before the coordinator repeated this one.
                if number <= round_number - KEPT_ROUNDS or number > round_number:
                    self._path(number).unlink(missing_ok=True)
        except OSError as error:
            expected = "a writable site folder"
            raise fail("SITE-501", where=str(path), found=str(error), expected=expected) from error

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.key}-{number:05d}.safetensors"

    def _rounds(self) -> list[int]:
        return sorted(
            int(path.stem.rpartition("-")[2])
            for path in self.folder.glob(f"{self.key}-*.safetensors")
        )
