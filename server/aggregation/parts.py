"""The parts that the sites contribute to a merge, and what a rule knows besides them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedsgcg.common.settings.federation import FederationSettings
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.records.checkpoint import AggregatorState

Part = TypeVar("Part", bound=tuple[Any, ...])

Parts = Sequence[tuple[str, Weights, float]]
"""(site, weights, FedAvg weight) of each admitted payload."""


@dataclass(frozen=True)
class MergeContext:
    """What a rule knows besides the models.

    Attributes:
        settings: Settings of the federation.
        number: Number of the round.
        metrics: Metrics of each admitted payload, by site.
        control_variates: Control variates (L,) of each admitted payload, by site; SCAFFOLD alone.
    """

    settings: FederationSettings
    number: int = 1
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    control_variates: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)


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


def entry(quantity: str, site: str) -> str:
    """Return the name of a site's entry in the state of a rule."""
    return f"{quantity}/{site}"


def by_site(state: AggregatorState, quantity: str) -> dict[str, npt.NDArray[Any]]:
    """Return a quantity of a rule's state by site, in the order of the names."""
    prefix = entry(quantity, "")
    return {
        name.removeprefix(prefix): state[name] for name in sorted(state) if name.startswith(prefix)
    }


def numbers_by_site(state: AggregatorState, quantity: str) -> dict[str, float]:
    """Return a quantity with one number for each site; stored as (1,), as a file keeps no ()."""
    return {site: value.item() for site, value in by_site(state, quantity).items()}


def number_of(value: float) -> npt.NDArray[np.float64]:
    """Return a number as an entry of a state."""
    return np.array([value], np.float64)


def without_sites(state: AggregatorState, gone: Collection[str]) -> AggregatorState:
    """Return a rule's state without the entries of departed sites.

    What mixes all sites, such as a momentum, is kept, as the global model itself is.
    """
    return {name: array for name, array in state.items() if name.partition("/")[2] not in gone}
