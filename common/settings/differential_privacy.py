"""Settings of differential privacy (`privacy.dp`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from fedsgcg.common.settings.base import Checks, Section, at_most

CHANNELS: Final = ("statistics", "weights")
"""What a site releases about its patients, each with noise of its own."""


@dataclass(frozen=True)
class DpSettings(Section):
    """Differential privacy of what a site sends (docs/explanation/privacy.md).

    Attributes:
        channels: Parts with noise: `statistics` (class statistics), `weights` (the trained model).
            Only both together protect a patient.
        epsilon: Budget of a site over all its releases; a spent budget ends its contribution. In a
            real federation the smaller of this and the site's own (`dp_epsilon`) applies.
        delta: Probability with which the bound may fail; below 1 / number of the site's patients.
        statistics_noise: Standard deviation of the noise of one release of class statistics,
            divided by the most that one patient can change.
        weights_noise: The same for one training step.
        clip: Longest gradient of one patient in a training step; longer ones are shortened.
        sampling_rate: Probability with which a patient takes part in a training step.
        slices_per_patient: Slices that a patient contributes to a training step, chosen at random.
        central_noise: Noise of the merged update at the coordinator, as a multiple of
            `central_clip`; 0 = none. It hides that a hospital took part, from those who see only
            the model. With few hospitals it is either no protection or no model.
        central_clip: Longest update of a hospital with `central_noise`.
        noise: `entropy`: from the operating system, different in every run. `seeded`: from the
            study's seed, so that a simulation can be repeated; it protects nobody, and a real
            hospital refuses it (PRV-979).
    """

    channels: tuple[str, ...] = ()
    epsilon: float = 8.0
    delta: float = 1e-3
    statistics_noise: float = 8.0
    weights_noise: float = 1.5
    clip: float = 1.0
    sampling_rate: float = 0.25
    slices_per_patient: int = at_most(1024, 4)
    central_noise: float = 0.0
    central_clip: float = 1.0
    noise: Literal["entropy", "seeded"] = "entropy"

    def checks(self) -> Checks:
        """Channels are known; budget, noise and clipping are positive and finite."""
        known = set(self.channels) <= set(CHANNELS) and len(set(self.channels)) == len(
            self.channels
        )
        yield known, "channels", "statistics, weights or both, each once"
        yield 0 < self.epsilon <= 1e6, "epsilon", "more than zero, at most 1 000 000"
        yield 0 < self.delta < 1, "delta", "a probability in (0, 1)"
        for name in ("statistics_noise", "weights_noise"):
            yield 0.01 <= getattr(self, name) <= 1e6, name, "0.01 to 1 000 000"
        for name in ("clip", "central_clip"):
            value = getattr(self, name)
            yield value > 0 and math.isfinite(value), name, "more than zero"
        yield 0 < self.sampling_rate <= 1, "sampling_rate", "a probability in (0, 1]"
        yield self.slices_per_patient >= 1, "slices_per_patient", "1 or more"
        central = self.central_noise == 0 or 0.01 <= self.central_noise <= 1e6
        yield central, "central_noise", "0 (none), or 0.01 to 1 000 000"

    @property
    def statistics(self) -> bool:
        """Whether class statistics have noise."""
        return "statistics" in self.channels

    @property
    def weights(self) -> bool:
        """Whether the weights are trained with noise."""
        return "weights" in self.channels
