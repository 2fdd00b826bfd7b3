"""`--dry-run`: the cells a study would run, and an estimate of its disk space and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from fedsgcg.clients.data.batches import steps_of
from fedsgcg.clients.data.case_files import open_site, splits
from fedsgcg.clients.device import choose_device
from fedsgcg.common.console import Screen
from fedsgcg.common.heads import build_trained
from fedsgcg.common.images.read import slices_in
from fedsgcg.common.names import number_of
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.site.check_step import measure_step
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.planned import plan_tables
from fedsgcg.deploy.study.study import Study
from fedsgcg.server.report.format import show_seconds

CHECKPOINTS: Final = 3
"""Checkpoints of a running cell on disk: two are kept while the next is written."""

MOMENTS: Final = {"fedavgm": 2, "fedadam": 4, "fedyogi": 4}
"""Aggregation rule -> size of its moments in models; they have twice the precision."""

VIEWS_OF_A_MIX: Final = 2.0
"""Cost of a step that trains on the image and on its amplitude-mixed copy."""
VIEWS_OF_A_PAIR: Final = 1.5
"""Cost of a step that also encodes two images of a pair for each slice; measured on a CPU."""


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of the cells that are still to do.

    Attributes:
        steps: Training steps of all cells, sites and rounds.
        seconds: Duration of these steps on this machine, with as many sites in parallel as it has
            cores or GPUs for.
        model_bytes: Models that stay on disk.
        running_bytes: Additional disk space while the study runs.
    """

    steps: int
    seconds: float
    model_bytes: int
    running_bytes: int


def show_plan(study: Study, console: Screen) -> Estimate:
    """Print the cells of a study and an estimate of its disk space and time."""
    inner = [
        cell
        for found in study.candidates.values()
        for candidate in found
        for cell in candidate.inner
    ]
    missing = [cell for cell in study.cells if not cell.done]
    for label, count in Counter(cell.method for cell in study.cells).items():
        to_do = sum(cell.method == label for cell in missing)
        console.print(f"{label}: {number_of(count, 'cell')}, {to_do} to do")
    for cell in study.cells:
        console.print(f"  {cell.name}  {'done' if cell.done else 'to do'}")
    for table in plan_tables(study.plans) if study.plans else ():
        console.print(table)
    if inner:
        console.print(f"and {number_of(len(inner), 'cell')} that choose settings inside the folds")
    with console.status("measuring a training step"):
        found = estimate([*missing, *inner], study)
    console.print(
        f"disk: about {found.model_bytes / 1e6:.0f} MB of models in {study.folder}, "
        f"{found.running_bytes / 1e6:.0f} MB more while it runs; pictures for the report and the "
        "slice cache are not included"
    )
    console.print(
        f"time: about {show_seconds(max(found.seconds, 1.0))} for {found.steps:,} training steps "
        "on this machine; evaluation and the report are not included"
    )
    return found


def estimate(cells: Sequence[Cell], study: Study) -> Estimate:
    """Estimate the cost of cells from one measured training step per network, batch and image size.

    The number of slices comes from the headers of the images. It is an upper bound where only
    slices with a structure train (`data.train_slices=foreground`).
    """
    device = choose_device(study.device, 1)
    steps, seconds, sizes, stored = 0, 0.0, [0], [0]
    measured: dict[str, float] = {}
    for cell in cells:
        plan = Plan.from_tree(cell.tree)
        key = repr((plan.network, plan.method.batch_size, plan.data.image_size, plan.site.threads))
        if key not in measured:
            choose_device(study.device, plan.site.threads)
            measured[key] = measure_step(plan, device).seconds
        views = VIEWS_OF_A_MIX if plan.method.mixes else 1.0
        views = VIEWS_OF_A_PAIR if plan.method.pairs else views
        places = study.machine.cpus // plan.site.threads
        parallel = max(1, study.machine.gpus if study.device == "cuda" else places)
        own = training_steps(plan)
        steps += own
        seconds += own * measured[key] * views / parallel
        sizes.append(model_bytes(plan))
        stored.append(sizes[-1] * models_in_checkpoint(plan))
    at_once = min(len(cells), study.machine.cpus)
    return Estimate(steps, seconds, sum(sizes), CHECKPOINTS * at_once * max(stored))


def training_steps(plan: Plan) -> int:
    """Return the number of training steps of a federation, over all sites and rounds."""
    training = [site for site in plan.members() if plan.trains(site)]
    per_round = sum(
        steps_of([range(_slices(plan, name)) for name in plan.hospitals_of(site)], plan.method)
        for site in training
    )
    return per_round * plan.federation.rounds


def models_in_checkpoint(plan: Plan) -> int:
    """Return the size of a checkpoint in models: the model and the state of the aggregation rule.

    SCAFFOLD keeps a control variate of every site; moments are float64.
    """
    if plan.federation.aggregator == "scaffold":
        return 1 + sum(plan.trains(site) for site in plan.members())
    return 1 + MOMENTS.get(plan.federation.aggregator, 0)


def model_bytes(plan: Plan) -> int:
    """Return the size of a model in bytes."""
    state = build_trained(plan, generator_seed=None).state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _slices(plan: Plan, hospital: str) -> int:
    """Return the number of slices of a hospital's training cases."""
    if plan.method.steps_per_round:
        return 0  # the number of steps does not depend on it
    hidden, target = plan.hides_masks(hospital), hospital in plan.unlabelled
    site = open_site(Path(plan.data.root), hospital, plan.data, masks=not hidden)
    data = plan.data
    chosen = splits(
        site.cases, data.validation_fraction, heldout=False, target=target, rule=data.split
    )
    used = [case for case, split in zip(site.cases, chosen, strict=True) if split == "train"]
    return sum(_depth(case.image) for case in used if case.masks or hidden)


_depth = cache(slices_in)
