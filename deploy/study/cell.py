"""A cell: one federation of a study, with its settings and its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsgcg.common.errors import fail
from fedsgcg.common.run_folder import paths


@dataclass(frozen=True)
class Cell:
    """One federation of a study.

    Attributes:
        method: Label of the variant: the method and its varied settings.
        heldout: Name of the held-out site, "" for none.
        seed: The seed.
        tree: The resolved settings (`common.settings.plan.Plan.from_tree`), with the cell's own
            `output`.
        trained_on: The single training site with `federation=local`, else "".
    """

    method: str
    heldout: str
    seed: int
    tree: dict[str, Any]
    trained_on: str = ""

    @property
    def folder(self) -> Path:
        """The cell's run folder."""
        return Path(self.tree["output"])

    @property
    def name(self) -> str:
        """Name of the cell on the console."""
        alone = f" · {self.trained_on} alone" if self.trained_on else ""
        return f"{self.method} · {self.heldout or 'all sites'} · seed {self.seed}{alone}"

    def outcome(self) -> dict[str, Any]:
        """Return what `server.app` wrote at the end of the run; empty before the cell has ended."""
        path = self.folder / paths.OUTCOME
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            action = "remove the cell's folder and call again"
            raise fail(
                "SRV-402", where=str(path), found="text that is not JSON", action=action
            ) from error
        return found

    @property
    def done(self) -> bool:
        """Whether the federation has finished and its results exist."""
        finished = self.outcome().get("status") in ("completed", "degraded")
        return finished and (self.folder / paths.RESULTS).exists()
