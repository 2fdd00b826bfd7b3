"""Central noise: the merged model hides whether a hospital took part (McMahan et al., ICLR 2018).

Each hospital's update is shortened to `privacy.dp.central_clip`, and Gaussian noise is added to the
sum, which is divided by the number of training hospitals. The coordinator itself still sees every
update; the promise is to those who see the models, and concerns the weights alone. Every hospital
takes part in every round, so nothing is gained by sampling: with a handful of hospitals the noise
that a useful epsilon needs is as large as the update.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedsgcg.common.differential_privacy.accounting import SITE, Spending, epsilon_of
from fedsgcg.common.differential_privacy.noise import Noise
from fedsgcg.common.errors import Problem
from fedsgcg.common.settings.dp_rules import FEW_SITES
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.parts import Parts, sorted_by_site


def noisy_mean(
    previous: Weights, parts: Parts, sites: int, clip: float, multiplier: float, noise: Noise
) -> Weights:
    """Return the previous model plus the noisy mean of the hospitals' shortened updates.

    Args:
        previous: The model that the hospitals received, without running moments.
        parts: (site, weights, FedAvg weight) of each admitted payload; the weights are ignored.
        sites: Number of training hospitals, whether they answered or not: the divisor must not
            depend on one of them.
        clip: Longest update.
        multiplier: Standard deviation of the noise divided by `clip`.
        noise: Source of the noise.
    """
    start = previous.values.astype(np.float64)
    total = np.zeros_like(start)
    for _, weights, _ in sorted_by_site(parts):
        update = weights.values - start
        length = float(np.linalg.norm(update))
        total += update if length <= clip else update * (clip / length * (1 - 1e-12))
    values = start + noise.rounded(total, clip * multiplier) / sites
    return replace(previous, values=values.astype(np.float32))


def noise_of_round(plan: Plan, number: int) -> Noise:
    """Return the source of a round's noise, from the seed or from the operating system."""
    if plan.privacy.dp.noise == "seeded":
        return Noise.seeded(plan.seed, number, "central", plan.digest())
    return Noise.from_entropy()


def central_epsilon(plan: Plan) -> float:
    """Return epsilon of all models of a run, at `privacy.dp.delta`."""
    dp = plan.privacy.dp
    return epsilon_of([Spending(dp.central_noise, 1.0, plan.federation.rounds)], dp.delta)


def few_sites(plan: Plan, sites: int) -> Problem | None:
    """Return the problem of central noise with too few training hospitals, None otherwise."""
    if not plan.privacy.dp.central_noise or sites >= FEW_SITES:
        return None
    relative = plan.privacy.dp.central_noise / sites
    found = (
        f"{sites} training hospitals: epsilon = {central_epsilon(plan):.3g} at "
        f"delta={plan.privacy.dp.delta:g} ({SITE}), with noise of {relative:.2g} times "
        "central_clip in each weight of a round"
    )
    expected = f"{FEW_SITES} or more"
    action = "protect patients instead: privacy.dp.channels=[statistics,weights]"
    return Problem("PRV-977", found, expected, action, "privacy.dp.central_noise")
