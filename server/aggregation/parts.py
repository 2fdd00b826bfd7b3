"""The parts that the sites contribute to a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

Part = TypeVar("Part", bound=tuple[Any, ...])


def sorted_by_site(parts: Sequence[Part]) -> list[Part]:
    """Return parts, tuples that start with the site's name, in the order of the names.

    Raises:
        ValueError: No part, or a duplicate site.
    """
    ordered = sorted(parts, key=lambda part: str(part[0]))
    sites = [part[0] for part in ordered]
    if not sites:
        raise ValueError("found nothing to merge, expected at least one site")
    if len(set(sites)) != len(sites):
        raise ValueError(f"found a site twice in {sites}, expected each once")
    return ordered
