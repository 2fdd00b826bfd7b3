"""Images that more than one hospital of a run has, found by their salted content hashes (`common.images.contents`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from common.errors import Problem
from common.settings.plan import Plan

SHOWN: Final = 5
LEARNS: Final = ("train", "validation")
"""Splits of a training site by which a model is made: it learns from one and is chosen by the other."""


@dataclass(frozen=True)
class Image:
    """One image of an enrolled site, as the coordinator knows it.

    Attributes:
        site: The site that answered; of a pooled run the one that owns all source domains.
        hospital: The hospital whose image it is.
        alias: Its name outside the hospital.
        split: `train`, `validation` or `test`.
    """

    site: str
    hospital: str
    alias: str
    split: str


def images_of(site: str, contents: Any) -> Iterator[tuple[str, Image]]:
    """Yield (salted hash, image) of what a site told at its enrolment; whatever has another form is passed over."""
    for hospital, images in contents.items() if isinstance(contents, Mapping) else ():
        for alias, entry in images.items() if isinstance(images, Mapping) else ():
            if (
                isinstance(entry, list)
                and len(entry) == 2
                and all(isinstance(part, str) for part in entry)
            ):
                yield entry[0], Image(site, str(hospital), str(alias), entry[1])


def learned_from(plan: Plan, told: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return hospital -> salted hashes of the images that make the model, sorted.

    Args:
        plan: The plan.
        told: Site -> `contents` of its enrolment.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for mark, image in _all(told):
        if plan.role(image.site) == "train" and image.split in LEARNS:
            found[image.hospital].append(mark)
    return {hospital: sorted(marks) for hospital, marks in sorted(found.items())}


def shared_images(plan: Plan, told: Mapping[str, Any]) -> tuple[list[Problem], list[Problem]]:
    """Compare the images of all sites that told their hashes.

    Args:
        plan: The plan.
        told: Site -> `contents` of its enrolment.

    Returns:
        RND-408 for every hospital that is judged on images of a training hospital; and for every two training hospitals
        with the same images.
    """
    training: dict[str, list[Image]] = defaultdict(list)
    judged: dict[str, list[Image]] = defaultdict(list)
    for mark, image in _all(told):
        trains = plan.role(image.site) == "train"
        if trains and image.split in LEARNS:
            training[mark].append(image)
        elif not trains and image.split == "test":
            judged[mark].append(image)
    leaks = _pairs(
        (one, other)
        for mark in training
        for one in training[mark]
        for other in judged.get(mark, [])
    )
    twice = _pairs(
        (one, other)
        for images in training.values()
        for number, one in enumerate(images)
        for other in images[number + 1 :]
        if one.hospital != other.hospital
    )
    refused = "or go on with federation.shared_images=flag, which ends as degraded"
    counts = "for they count twice, and may be training at one and validation at the other"
    return (
        [
            _problem(pair, images, "no training image at a hospital that is judged", refused)
            for pair, images in leaks
        ],
        [_problem(pair, images, "every image at one hospital", counts) for pair, images in twice],
    )


def _all(told: Mapping[str, Any]) -> Iterator[tuple[str, Image]]:
    for site in sorted(told):
        yield from images_of(site, told[site])


def _pairs(
    images: Iterable[tuple[Image, Image]],
) -> list[tuple[tuple[str, str], list[tuple[str, str]]]]:
    """Group pairs of equal images by their hospitals: ((hospital, hospital), [(alias, alias)]), sorted."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for one, other in images:
        found[one.hospital, other.hospital].add((one.alias, other.alias))
    return [(pair, sorted(aliases)) for pair, aliases in sorted(found.items())]


def _problem(
    pair: tuple[str, str], images: list[tuple[str, str]], expected: str, otherwise: str
) -> Problem:
    one, other = pair
    named = ", ".join(f"{first} = {second}" for first, second in images[:SHOWN])
    more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
    number = f"{len(images)} image{' is' if len(images) == 1 else 's are'}"
    found = f"{number} at {one} and at {other}, by alias: {named}{more}"
    action = (
        f"Take them out at one of the two (aliases.csv of each site names the cases), {otherwise}."
    )
    return Problem("RND-408", found, expected, action, other)
