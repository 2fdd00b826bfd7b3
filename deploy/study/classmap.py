"""A check in short before a study's first cell: do the masks fit the declared classes?

With a wrong class map every case of a hospital is left out, and every cell of the study fails for
the same reason. The check reads each hospital's cases until one can be used, which is normally the
first one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.slices import read_case
from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.names import number_of
from fedsgcg.common.settings.plan import DataSettings, Plan

CLASS_CODES: Final = ("DAT-109", "DAT-165")
"""Problems of masks that do not fit `data.classes`; of other problems a run survives some."""


def check_classes(plans: Sequence[Plan]) -> None:
    """Raise one error for all hospitals of which no mask fits the declared classes.

    Masks of a hospital that a plan hides are not read. A hospital without a usable case for other
    reasons, such as damaged files, is left to the run, which continues without it.

    Args:
        plans: The cells that are still to run.

    Raises:
        FedsgcgError: DAT-174, with the hospitals and the values found. No file is named.
    """
    sites: dict[tuple[str, str, str], DataSettings] = {}
    hidden = {site for plan in plans for site in plan.data.sites if plan.hides_masks(site)}
    for plan in plans:
        for site in plan.data.sites:
            if site not in hidden:
                classes = f"{plan.data.classes} {plan.data.structures}"
                sites.setdefault((plan.data.root, site, classes), plan.data)
    found: dict[tuple[str, str, str], list[str]] = {}
    for (_, site, _), data in sites.items():
        if (problem := _misfit(site, data)) is not None:
            key = (problem.found, problem.expected, problem.action)
            found.setdefault(key, []).append(site)
    if found:
        raise FedsgcgError(
            *(Problem("DAT-174", *texts, ", ".join(names)) for texts, names in found.items())
        )


def _misfit(site: str, data: DataSettings) -> Problem | None:
    """Return the most frequent misfit of a hospital without a usable case, None if there is one."""
    misfits: Counter[tuple[str, str]] = Counter()
    try:
        cases = open_site(Path(data.root), site, data).cases
    except FedsgcgError:
        return None  # reported when the site joins
    for case in cases:
        try:
            read_case(case, data)
            return None
        except FedsgcgError as error:
            misfits.update(
                (problem.found, problem.expected)
                for problem in error.problems
                if problem.code in CLASS_CODES
            )
    if not misfits:
        return None
    (found, expected), _ = misfits.most_common(1)[0]
    found += f"; none of {number_of(len(cases), 'case')} can be used"
    action = (
        "Declare the values of the masks in data.classes, or correct the masks; "
        "`fedsgcg data check` lists them by hospital."
    )
    return Problem("DAT-174", found, expected, action, site)
