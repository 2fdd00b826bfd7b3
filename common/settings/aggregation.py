"""Settings of the aggregation rules (`federation.aggregator`), one section a rule.

Formulas and sources are in docs/explanation/aggregation.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from fedsgcg.common.settings.base import Checks, Section, at_most

Aggregator = Literal[
    "fedavg",
    "fedprox",
    "fedbn",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "scaffold",
    "feddg_ga",
    "fedce",
    "trimmed_mean",
    "median",
    "norm_clipping",
    "krum",
]
AGGREGATOR_NAMES: Final[tuple[str, ...]] = get_args(Aggregator)

VALIDATED: Final = ("feddg_ga", "fedce")
"""Rules whose weights follow from the sites' validation cases."""


@dataclass(frozen=True)
class FedProxSettings(Section):
    """FedProx.

    Attributes:
        mu: Weight of the proximal term mu/2 |x_s - x|^2 of a site's loss; 0 is FedAvg.
    """

    mu: float = at_most(1e4, 0.01)

    def checks(self) -> Checks:
        """The weight is not negative."""
        yield self.mu >= 0, "mu", "zero or more"


@dataclass(frozen=True)
class FedAvgMSettings(Section):
    """FedAvgM, a step of SGD with momentum at the coordinator.

    Attributes:
        rate: eta, the coordinator's learning rate.
        momentum: beta; 0 with rate 1 is FedAvg.
    """

    rate: float = at_most(10, 1.0)
    momentum: float = 0.9

    def checks(self) -> Checks:
        """The rate is positive, the momentum a fraction."""
        yield self.rate > 0, "rate", "more than zero"
        yield 0 <= self.momentum < 1, "momentum", "a fraction in [0, 1)"


@dataclass(frozen=True)
class AdaptiveSettings(Section):
    """FedAdam or FedYogi, an adaptive step at the coordinator.

    Attributes:
        rate: eta, the largest change of a weight in a round, up to a factor.
        beta1: Decay of the mean of the updates.
        beta2: Decay of the mean of their squares.
        tau: Size of an update below which steps shrink; the mean of squares starts at tau^2.
    """

    rate: float = at_most(10, 0.01)
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = at_most(1, 0.001)

    def checks(self) -> Checks:
        """Rate and tau are positive, the decays fractions."""
        yield self.rate > 0, "rate", "more than zero"
        yield 0 <= self.beta1 < 1, "beta1", "a fraction in [0, 1)"
        yield 0 <= self.beta2 < 1, "beta2", "a fraction in [0, 1)"
        yield self.tau >= 1e-9, "tau", "1e-9 or more"


@dataclass(frozen=True)
class ScaffoldSettings(Section):
    """SCAFFOLD.

    Attributes:
        rate: eta_g, the coordinator's learning rate: x + rate (mean - x).
    """

    rate: float = at_most(10, 1.0)

    def checks(self) -> Checks:
        """The rate is positive."""
        yield self.rate > 0, "rate", "more than zero"


@dataclass(frozen=True)
class FedDGGASettings(Section):
    """FedDG-GA.

    Attributes:
        step: Largest change of a site's weight in the first update, times the number of sites.
        decay_rounds: Updates in which the step decreases linearly to zero.
    """

    step: float = 0.2
    decay_rounds: int = at_most(100_000, 40)

    def checks(self) -> Checks:
        """The step is a share, the number of updates positive."""
        yield 0 < self.step <= 1, "step", "a share in (0, 1]"
        yield self.decay_rounds >= 1, "decay_rounds", "1 or more"


@dataclass(frozen=True)
class FedCESettings(Section):
    """FedCE.

    Attributes:
        mode: How a site's novelty and the loss without it are joined: `plus` or `times`.
    """

    mode: Literal["plus", "times"] = "plus"


@dataclass(frozen=True)
class KrumSettings(Section):
    """Krum and Multi-Krum; the number of broken sites is `federation.tolerated`.

    Attributes:
        selected: Models that are averaged: 1 is Krum, more is Multi-Krum.
    """

    selected: int = at_most(1000, 1)

    def checks(self) -> Checks:
        """At least one model is selected."""
        yield self.selected >= 1, "selected", "1 or more"
