"""A planned study: its cells, its folder, and what makes it the same study."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.study.cell import Cell
from deploy.study.preflight import Machine
from deploy.study.selection import Candidate

# Places and machines: changing them does not make another study.
NOT_IDENTITY = (
    *(
        "method",
        "heldout",
        "seed",
        "run",
        "output",
        "device",
        "runtime",
        "ray",
        "site",
        "grid",
        "select",
    ),
    "config_dir",
)


@dataclass(frozen=True)
class Study:
    """What was asked, resolved.

    Attributes:
        folder: The study's folder.
        cells: Its federations, in the order in which they are started.
        runtime: `ray` or `inprocess`.
        device: `cpu` or `cuda`.
        machine: What this machine offers.
        ray_address: `local`, `auto` or `host:port`.
        overrides: The command line, for the record.
        command: `study` or `simulate`, for the record.
        data: Fingerprint of the hospitals' files (`clients.data.store.data_fingerprint`).
        candidates: Name of a cell -> what its fold chooses between, with the federations that judge it.
        selection: How settings were chosen, in words.
        shared: Settings that all its cells have in common, whatever else is added to it (`shared_settings`).
    """

    folder: Path
    cells: tuple[Cell, ...]
    runtime: str
    device: str
    machine: Machine
    ray_address: str
    overrides: tuple[str, ...]
    command: str
    data: str
    candidates: Mapping[str, tuple[Candidate, ...]] = field(default_factory=dict)
    selection: str = ""
    shared: Mapping[str, Any] = field(default_factory=dict)


def exit_code(cells: Iterable[Cell]) -> int:
    """0 when every cell completed, 3 when one is degraded, 1 when one failed or never ended."""
    states = {cell.outcome().get("status", "failed") for cell in cells}
    return 1 if states - {"completed", "degraded"} else 3 if "degraded" in states else 0


def identity(tree: Mapping[str, Any]) -> str:
    """Hash of the settings that make two calls the same study: everything but the axes, places and machines."""
    return hashlib.sha256(json.dumps(_identifying(tree), sort_keys=True).encode()).hexdigest()


def shared_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make two calls the same study, wherever its data are."""
    kept = _identifying(tree)
    data = {name: value for name, value in kept["data"].items() if name != "root"}
    found: dict[str, Any] = json.loads(json.dumps(kept | {"data": data}))
    return found


def _identifying(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in tree.items() if name not in NOT_IDENTITY}
    kept["federation"] = {
        name: value
        for name, value in tree["federation"].items()
        if name not in ("ownership", "moments")
    }
    return kept
