"""Small plans for the coordinator's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsgcg.common.settings.plan import Plan

SITES = ["A", "B", "C", "D"]


def small_plan(output: Path, **changes: Any) -> Plan:
    """Return a plan of four hospitals, D held out, with two classes and a tiny network.

    `federation__rounds=2` changes a nested setting.
    """
    tree: dict[str, Any] = {
        "data": {
            "name": "test",
            "root": "hospitals",
            "classes": {"background": [0], "gland": [1]},
            "structures": {"gland": ["gland"]},
            "sites": SITES,
            "image_size": 32,
        },
        "network": {"base_width": 4},
        "method": {"name": "sgcg", "statistics": True},
        "federation": {"rounds": 3, "join_deadline_s": 0.3, "round_deadline_s": 0.3},
        "prototypes": {},
        "privacy": {},
        "site": {"home": "", "cache": ""},
        "heldout": "D",
        "output": str(output),
    }
    for name, value in changes.items():
        section, _, leaf = name.rpartition("__")
        (tree[section] if section else tree)[leaf] = value
    return Plan.from_tree(tree)
