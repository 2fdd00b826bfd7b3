"""`data.plan=auto`: each fold's preprocessing follows from its source hospitals' images.

The held-out hospital and the observers are not read for it. All cells of a fold have the same plan,
so that methods and seeds are compared on the same slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.facts import read_facts
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.image_summary import (
    PLANNED,
    HospitalSummary,
    merge_summaries,
    summarise,
)
from fedsgcg.common.settings.plan import Plan


@dataclass(frozen=True)
class FoldPlan:
    """The plan of a fold.

    Attributes:
        heldout: The held-out hospital, "" for none.
        settings: Setting of the data -> value.
        summaries: Source hospital -> summary.
    """

    heldout: str
    settings: Mapping[str, Any]
    summaries: Mapping[str, HospitalSummary]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for `study.yaml`."""
        found = {site: one.as_dict() for site, one in self.summaries.items()}
        return {"settings": dict(self.settings), "hospitals": _plain(found)}


@dataclass
class Planner:
    """Plans the folds of a study; each hospital is read once.

    Attributes:
        cache: Cache folder.
        given: Settings of the command line, as names; they are kept.
        step: Called with what is read.
        plans: The plan of each fold so far, by held-out hospital and kept settings.
    """

    cache: Path
    given: frozenset[str]
    step: Callable[[str], None]
    plans: dict[tuple[str, str], FoldPlan] = field(default_factory=dict)
    _summaries: dict[str, HospitalSummary | None] = field(default_factory=dict)

    def tree(
        self, tree: Mapping[str, Any], heldout: str, settings: Sequence[str] = ()
    ) -> Mapping[str, Any]:
        """Return the settings of a variant with the plan of a fold.

        Args:
            tree: Resolved settings of the variant.
            heldout: The held-out hospital, "" for none.
            settings: The variant's own settings as `name=value`, which are kept.

        Raises:
            FedsgcgError: CFG-030 or CFG-031 when no plan is possible.
        """
        if tree["data"]["plan"] != "auto":
            return tree
        own = {text.partition("=")[0] for text in settings} | self.given
        kept = {
            name: tree["data"][name]
            for name in PLANNED
            if f"data.{name}" in own or f"data/{name}" in own
        }
        key = heldout, str(sorted(kept.items()))
        if key not in self.plans:
            self.plans[key] = self._plan(tree, heldout, kept)
        # The cell itself has fixed settings; `study.yaml` records the request and the summaries.
        return {**tree, "data": {**tree["data"], **self.plans[key].settings, "plan": "fixed"}}

    def _plan(self, tree: Mapping[str, Any], heldout: str, kept: Mapping[str, Any]) -> FoldPlan:
        out = {heldout, *tree["observers"]}
        sites = [site for site in tree["data"]["sites"] if site not in out]
        found = {site: one for site in sites if (one := self._summary(tree, site)) is not None}
        millimetres = tree["data"]["spacing_unit"] == "mm"
        return FoldPlan(heldout, merge_summaries(found, millimetres=millimetres, given=kept), found)

    def _summary(self, tree: Mapping[str, Any], site: str) -> HospitalSummary | None:
        if site not in self._summaries:
            data = Plan.from_tree({**tree, "output": "."}).data
            try:
                # Only images are read, so that a hospital without masks is one like the others.
                opened = open_site(Path(data.root), site, data, masks=False)
                self._summaries[site] = summarise(read_facts(opened, self.cache, self.step))
            except FedsgcgError:
                self._summaries[site] = None  # reported when the hospital joins
        return self._summaries[site]


def plan_tables(plans: Sequence[FoldPlan]) -> list[Table]:
    """Return the hospitals' summaries, and the plan of each fold, to be shown before training."""
    hospitals: dict[str, HospitalSummary] = {}
    for plan in plans:
        hospitals |= plan.summaries
    images = Table(title="Images of the source hospitals (medians; longer side: upper quartile)")
    titles = ("hospital", "patients", "kind", "size", "spacing (mm)", "longer side", "values")
    for title in titles:
        images.add_column(title, overflow="fold")
    for site, one in sorted(hospitals.items()):
        images.add_row(
            site,
            str(one.patients),
            f"{'colour ' if one.colour else ''}{one.kind}",
            "x".join(map(str, one.shape)),
            "x".join(f"{side:g}" for side in one.spacing) if one.spacing else "unknown",
            f"{one.extent:g} mm" if one.extent else f"{one.longest:g} pixels",
            " / ".join(f"{value:g}" for value in one.values),
        )
    chosen = Table(title="data.plan=auto: one plan for all hospitals of a fold")
    for title in ("held out", *PLANNED):
        chosen.add_column(title, overflow="fold")
    for plan in plans:
        cells = [f"{plan.settings[name]}" for name in PLANNED]
        chosen.add_row(plan.heldout or "none", *cells)
    return [images, chosen]


def _plain(value: Any) -> Any:
    """Return a value with lists in place of tuples, as YAML writes it."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value
