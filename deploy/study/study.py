"""A planned study: its cells, its folder, and what makes it the same study."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsgcg.common.settings.run import TelemetrySettings
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.planned import FoldPlan
from fedsgcg.deploy.study.preflight import Machine
from fedsgcg.deploy.study.selection import Candidate
from fedsgcg.deploy.study.shard import Shard

NOT_IDENTITY = (
    "method",
    "heldout",
    "seed",
    "run",
    "output",
    "shard",
    "device",
    "runtime",
    "ray",
    "telemetry",
    "tracking",
    "mlflow_uri",
    "site",
    "grid",
    "select",
    "references",
    "config_dir",
)
"""Settings that do not make another study: axes, places and machines."""


@dataclass(frozen=True)
class Study:
    """A resolved study.

    Attributes:
        folder: The study's folder.
        cells: Its federations, in the order in which they are started.
        runtime: `ray` or `inprocess`.
        device: `cpu` or `cuda`.
        machine: Resources of this machine.
        ray_address: `local`, `auto` or `host:port`.
        overrides: The command line, for the record.
        command: `study` or `simulate`, for the record.
        data: Fingerprint of the sites' files (`clients.data.store.data_fingerprint`).
        candidates: Name of a cell -> candidates of its fold, with the inner federations that
            evaluate them.
        selection: A sentence on how settings were chosen.
        shared: Settings that all cells have in common, including cells added later
            (`shared_settings`).
        telemetry: Metrics of the study while it runs.
        tracking: Experiment trackers of the study.
        mlflow_uri: MLflow store; "" = in the study's folder.
        references: Rows for comparison that were asked for (`deploy.study.references`).
        plans: With `data.plan=auto`, the plan of each fold.
        shard: The part of the study that `cells` are; None = all.
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
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    tracking: tuple[str, ...] = ()
    mlflow_uri: str = ""
    references: tuple[str, ...] = ()
    plans: tuple[FoldPlan, ...] = ()
    shard: Shard | None = None


def exit_code(cells: Iterable[Cell]) -> int:
    """Return 1 when a cell failed or has not ended, 3 when one is degraded, else 0."""
    states = {cell.outcome().get("status", "failed") for cell in cells}
    if states - {"completed", "degraded"}:
        return 1
    return 3 if "degraded" in states else 0


def identity(tree: Mapping[str, Any]) -> str:
    """Return the hash of the settings that make two calls the same study."""
    return hashlib.sha256(json.dumps(_identifying(tree), sort_keys=True).encode()).hexdigest()


def shared_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make two calls the same study, without the data folder."""
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
