"""A hospital with its own `site.yaml`, asked by a coordinator that may ask for anything."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedsgcg.clients.guard.approval import approve, bundle_of_folder
from fedsgcg.clients.guard.policy import NODE_KEY
from fedsgcg.clients.guard.site_file import SiteFile, write_site_file
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Reply, Request, decode_reply, encode_request
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.certificates import make_site_key
from tests.conftest import REPOSITORY
from tests.support import sites


@dataclass
class Hospital:
    """The site North with its data, its policy and the real client app.

    Attributes:
        root: Its data folder.
        folder: Its kit: site.yaml and home.
        changes: Settings of its site.yaml.
    """

    root: Path
    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        facts = {
            "site": "North",
            "project": "test",
            "server": "127.0.0.1:1",
            "ca": str(self.folder / "ca.crt"),
            "key": str(self.folder / "site.key"),
            "data_root": str(self.root),
            "home": str(self.folder / "home"),
            "cache": str(self.root.parent / "cache"),
            "approved": str(self.folder / "approved.json"),
            "min_pixels": 1,
            "device": "cpu",
            **self.changes,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        make_site_key(self.folder, "North")
        self.policy = SiteFile(**facts)
        write_site_file(self.folder / "site.yaml", self.policy)
        approve(bundle_of_folder(REPOSITORY), Path(self.policy.approved), "test")

    def plan(self, *overrides: str, heldout: str = "South") -> Plan:
        """A coordinator's plan, which names no folder."""
        tree = sites.tree_of(self.root, self.folder, f"heldout={heldout}", *overrides)
        tree["data"]["root"] = ""
        return Plan.from_tree(tree)

    def ask(
        self,
        kind: str,
        plan: Plan | None = None,
        number: int = 1,
        weights: Weights | None = None,
        **request: Any,
    ) -> Reply:
        """Send one message to the client app and decode what leaves."""
        plan = plan or self.plan()
        sent = None if kind == wire.ENROL else weights or sites.weights(plan)
        records = encode_request(Request(sites.identity(plan, number), sent, **request))
        node = {"site": "North", NODE_KEY: str(self.folder / "site.yaml")}
        return decode_reply(sites.ask(plan.to_tree(), kind, records, node))


def keep_patients(root: Path, wanted: int) -> None:
    """Rewrite the manifest with the first patients of North only."""
    path = root / "manifest.csv"
    full = path.with_name("all.csv.txt")
    if not full.exists():
        full.write_text(path.read_text())
    with full.open(newline="") as file:
        head, *rows = csv.reader(file)
    kept = [row for row in rows if row[0] != "North" or int(row[3][-3:]) <= wanted]
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *kept])


def constant_model(plan: Plan, foreground: float = 50.0) -> Weights:
    """A model that predicts the last class everywhere: its output layer has only a bias."""
    state = {name: np.array(array) for name, array in sites.weights(plan).to_state().items()}
    names = [name for name, array in state.items() if array.shape[:1] == (plan.data.out_channels,)]
    for name in names[-2:]:
        state[name] = np.zeros_like(state[name])
    bias = next(name for name in names[-2:] if state[name].ndim == 1)
    state[bias][-1] = foreground
    return Weights.from_state(state)
