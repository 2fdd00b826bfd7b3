"""Images that two hospitals of a run share, found by salted hashes (`common.images.contents`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedsgcg.common.errors import Problem
from fedsgcg.common.names import is_site_text
from fedsgcg.common.settings.data import SPLITS
from fedsgcg.common.settings.plan import Plan

SHOWN: Final = 5
LEARNS: Final = ("train", "validation")
"""Splits of a training site that determine the model: one trains it, the other selects it."""


@dataclass(frozen=True)
class Image:
    """One image of an enrolled site, as the coordinator knows it.

    Attributes:
        site: The site that answered; in a pooled run, the one that holds all source domains.
        hospital: The hospital that the image comes from.
        alias: Pseudonym of the case outside the hospital.
        split: `train`, `validation` or `test`.
    """

    site: str
    hospital: str
    alias: str
    split: str


def images_of(plan: Plan, site: str, contents: Any) -> Iterator[tuple[str, Image]]:
    """Yield (salted hash, image) from a site's enrolment.

    Malformed entries, and those of a hospital whose data the site does not own, are skipped.
    """
    own = plan.hospitals_of(site)
    for hospital, images in contents.items() if isinstance(contents, Mapping) else ():
        for alias, entry in images.items() if isinstance(images, Mapping) else ():
            if hospital in own and isinstance(entry, list) and len(entry) == 2:
                mark, split = entry
                if is_site_text(mark) and is_site_text(alias) and split in SPLITS:
                    yield mark, Image(site, hospital, alias, split)


def learned_from(plan: Plan, contents: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return hospital -> sorted salted hashes of the images that train or select the model.

    Args:
        plan: The plan.
        contents: Site -> `contents` of its enrolment.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for mark, image in _all(plan, contents):
        if plan.trains(image.site) and image.split in LEARNS:
            found[image.hospital].append(mark)
    return {hospital: sorted(marks) for hospital, marks in sorted(found.items())}


def shared_images(plan: Plan, contents: Mapping[str, Any]) -> tuple[list[Problem], list[Problem]]:
    """Compare the images of all sites that sent hashes.

    Args:
        plan: The plan.
        contents: Site -> `contents` of its enrolment.

    Returns:
        RND-408 for every hospital that is tested on images of a training hospital, and for every
        pair of training hospitals with the same images.
    """
    training: dict[str, list[Image]] = defaultdict(list)
    tested: dict[str, list[Image]] = defaultdict(list)
    for mark, image in _all(plan, contents):
        trains = plan.trains(image.site)
        if trains and image.split in LEARNS:
            training[mark].append(image)
        elif image.split == "test" and (not trains or image.site in plan.unlabelled):
            tested[mark].append(image)
    leaks = _pairs(
        (one, other)
        for mark in training
        for one in training[mark]
        for other in tested.get(mark, [])
    )
    duplicates = _pairs(
        (one, other)
        for images in training.values()
        for number, one in enumerate(images)
        for other in images[number + 1 :]
        if one.hospital != other.hospital
    )
    expected = "no training image at a hospital whose images test the model"
    refused = "or continue with federation.shared_images=flag, which ends as degraded"
    counts = "because they count twice, and may be training at one and validation at the other"
    return (
        [_problem(pair, images, expected, refused) for pair, images in leaks],
        [
            _problem(pair, images, "every image at one hospital", counts)
            for pair, images in duplicates
        ],
    )


def _all(plan: Plan, contents: Mapping[str, Any]) -> Iterator[tuple[str, Image]]:
    for site in sorted(contents):
        yield from images_of(plan, site, contents[site])


def _pairs(
    images: Iterable[tuple[Image, Image]],
) -> list[tuple[tuple[str, str], list[tuple[str, str]]]]:
    """Group pairs of equal images by their hospitals.

    Returns:
        ((hospital, hospital), [(alias, alias)]) of each pair of hospitals, sorted.
    """
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
    number = "1 image is" if len(images) == 1 else f"{len(images)} images are"
    found = f"{number} at both {one} and {other}, by alias: {named}{more}"
    action = (
        f"Remove them at one of the two (aliases.csv of each site lists the cases), {otherwise}."
    )
    return Problem("RND-408", found, expected, action, other)
