"""What was last submitted with a kit: `state/run.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from common.errors import fail
from common.files.disk import Disk
from deploy.coordinator.project import Kit


@dataclass(frozen=True)
class Started:
    """What was last submitted, kept in the kit.

    Attributes:
        run_id: Flower's number.
        folder: The cell's run folder.
        overrides: The command line.
        bundle: Hash of the app bundle.
        time: When, in seconds since 1970.
    """

    run_id: int
    folder: str
    overrides: tuple[str, ...]
    bundle: str
    time: float


def remember(kit: Kit, started: Started) -> None:
    """Write what was submitted."""
    Disk().write(kit.state / "run.json", (json.dumps(asdict(started), indent=1) + "\n").encode())


def last_started(kit: Kit) -> Started:
    """What was last submitted; raises DEP-613 when nothing was."""
    path = kit.state / "run.json"
    try:
        found = json.loads(path.read_text())
        return Started(**{**found, "overrides": tuple(found["overrides"])})
    except FileNotFoundError as error:
        action = f"fedsgcg run {kit.folder}"
        raise fail(
            "DEP-613", where=str(kit.folder), found="no state/run.json", action=action
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise fail(
            "SRV-402", where=str(path), found="not what was written", action="remove it"
        ) from error
