"""A check in short before a study's first cell: do the masks fit the declared classes?

With a wrong class map every case of a hospital is left out, and every cell of the study fails for
the same reason. The check reads each hospital's cases until one can be used, which is normally the
first one.

Only masks that some remaining cell trains on or validates with are read. A hospital that every
remaining cell holds out or observes is read when it is evaluated and not before, so that nobody
adjusts the classes to it; masks of a hospital that a cell trains without are never opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.slices import read_case
from fedsgcg.common.console import silent
from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.names import number_of
from fedsgcg.common.settings.plan import DataSettings, Plan

CLASS_CODES: Final = ("DAT-109", "DAT-165")
"""Problems of masks that do not fit `data.classes`; of other problems a run survives some."""

ENOUGH: Final = 8
"""Misfits of one hospital, evenly spread over its cases, after which no further case is read."""

T = TypeVar("T")


def check_classes(plans: Sequence[Plan], step: Callable[[str], None] = silent) -> None:
    """Raise one error for all hospitals of which no mask that was read fits the declared classes.

    A hospital without a usable case for other reasons, such as damaged files, is left to the run,
    which continues without it.

    Args:
        plans: The cells that are still to run.
        step: Called with what is read.

    Raises:
        FedsgcgError: DAT-174, with the hospitals and the values found. No file is named.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for site, data in _readable(plans):
        if (problem := _misfit(site, data, step)) is not None:
            key = (problem.found, problem.expected, problem.action)
            found.setdefault(key, []).append(site)
    if found:
        raise FedsgcgError(
            *(
                Problem("DAT-174", *texts, ", ".join(sorted(names)))
                for texts, names in found.items()
            )
        )


def _readable(plans: Sequence[Plan]) -> list[tuple[str, DataSettings]]:
    """Return the hospitals whose masks train or validate in some plan, and never are hidden."""
    hidden = {site for plan in plans for site in plan.data.sites if plan.hides_masks(site)}
    sites: dict[tuple[str, str, str], tuple[str, DataSettings]] = {}
    for plan in plans:
        for site in plan.data.sites:
            if site not in hidden and plan.role(site) == "train":
                classes = f"{plan.data.classes} {plan.data.structures}"
                sites.setdefault((plan.data.root, site, classes), (site, plan.data))
    return list(sites.values())


def _misfit(site: str, data: DataSettings, step: Callable[[str], None]) -> Problem | None:
    """Return the most frequent misfit of a hospital without a usable case, None if there is one.

    Cases that the table assigns to `test` are only evaluated, and are not read.
    """
    misfits: Counter[tuple[str, str]] = Counter()
    try:
        listed = open_site(Path(data.root), site, data).cases
    except FedsgcgError:
        return None  # reported when the site joins
    cases = [case for case in listed if case.split != "test"]
    read = 0
    for case in spread(cases):
        if misfits.total() >= ENOUGH:
            break
        read += 1
        step(f"masks of {site}, case {read} of {len(cases)}")
        try:
            read_case(case, data)
            return None
        except FedsgcgError as error:
            fits = [one for one in error.problems if one.code in CLASS_CODES]
            misfits.update({(one.found, one.expected) for one in fits[:1]})
    if not misfits:
        return None
    (found, expected), _ = misfits.most_common(1)[0]
    found += f"; none of {number_of(read, 'case')} can be used"
    if read < len(cases):
        found += f", the other {len(cases) - read} were not read"
    action = (
        "Declare the values of the masks in data.classes, or correct the masks; "
        "`fedsgcg data check` lists them by hospital."
    )
    return Problem("DAT-174", found, expected, action, site)


def spread(items: Sequence[T]) -> Iterator[T]:
    """Yield all items, the first ones far apart: the first, then the middle, then the quarters."""
    step = 1
    while step < len(items):
        step *= 2
    seen: set[int] = set()
    while step:
        for place in range(0, len(items), step):
            if place not in seen:
                seen.add(place)
                yield items[place]
        step //= 2
