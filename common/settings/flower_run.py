"""The plan of a Flower run, the same at both ends."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from fedsgcg.common.files.system import expand
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.plan import Plan


def plan_of_run(tree: Mapping[str, Any] | None, run_config: Mapping[str, Any], run_id: int) -> Plan:
    """Return the plan of a Flower run, the same at both ends.

    Args:
        tree: Resolved settings of a simulation; None reads the run config.
        run_config: Flower's flat run config.
        run_id: Name of the run's folder in $FEDSGCG_HOME (or ~/.fedsgcg) if `output` is not set.

    Raises:
        FedsgcgError: CFG-001 with every problem of the settings.
    """
    plan = Plan.from_tree(join(run_config=run_config) if tree is None else tree)
    if plan.output:
        return plan
    home = expand(os.environ.get("FEDSGCG_HOME") or "~/.fedsgcg", "output or FEDSGCG_HOME")
    return dataclasses.replace(plan, output=str(home / "runs" / str(run_id)))
