"""`--dry-run`: what a study would run, and the disk it would need."""

from __future__ import annotations

from collections import Counter
from typing import Final

from fedsgcg.common.console import Screen
from fedsgcg.common.networks import IN_CHANNELS, build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.study import Study

CHECKPOINTS: Final = 3
"""Checkpoints of a running cell on the disk: two are kept while the next is written."""


def show_plan(study: Study, console: Screen) -> None:
    """Print the cells of a study and an estimate of the disk it takes."""
    inner = [
        cell
        for found in study.candidates.values()
        for candidate in found
        for cell in candidate.inner
    ]
    missing = [cell for cell in study.cells if not cell.done]
    for label, count in Counter(cell.method for cell in study.cells).items():
        to_do = sum(cell.method == label for cell in missing)
        console.print(f"{label}: {count} cells, {to_do} to do")
    for cell in study.cells:
        console.print(f"  {cell.name}  {'done' if cell.done else 'to do'}")
    if inner:
        console.print(f"and {len(inner)} cells that choose settings inside the folds")
    kept = sum(model_bytes(cell) for cell in [*missing, *inner])
    at_once = min(len(missing) + len(inner), study.machine.cpus)
    running = CHECKPOINTS * at_once * max((model_bytes(cell) for cell in missing), default=0)
    disk = f"about {kept / 1e6:.0f} MB of models stay, {running / 1e6:.0f} MB more while it runs"
    console.print(
        f"disk: {disk}, in {study.folder}; pictures for the report and the slice cache come on top"
    )
    console.print("time: not measured; the progress display estimates it once a round is done")


def model_bytes(cell: Cell) -> int:
    """Bytes of the model of a cell."""
    plan = Plan.from_tree(cell.tree)
    state = build_network(
        plan.network, IN_CHANNELS, plan.data.out_channels, generator_seed=None
    ).state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
