"""Central noise: bounded updates, the stated noise, and a plain remark with few hospitals."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.differential_privacy.noise import Noise
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.central_noise import central_epsilon, few_sites, noisy_mean
from tests.support.plans import small_plan

LAYOUT = (("w", (2000,)),)


def model(values: np.ndarray) -> Weights:
    return Weights(LAYOUT, values.astype(np.float32))


START = model(np.random.default_rng(0).normal(size=2000))


class Silent(Noise):
    """No noise, so that the sum itself is seen."""

    def rounded(self, values, std):
        return values


def silent() -> Noise:
    return Silent(bytes(32))


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1e4), st.integers(0, 99), st.floats(1e-3, 10))
def test_one_hospital_moves_the_sum_by_at_most_the_clip(scale, seed, clip):
    rng = np.random.default_rng(seed)
    parts = [(name, model(rng.normal(size=2000)), 1.0) for name in "AB"]
    more = [*parts, ("C", model(START.values + scale * rng.normal(size=2000)), 7.0)]
    # In float64 and about zero, where float32 does not hide the difference.
    zero = model(np.zeros(2000))
    sums = [
        noisy_mean(zero, some, 3, clip, 1.0, silent()).values.astype(np.float64) * 3
        for some in (parts, more)
    ]
    assert np.linalg.norm(sums[1] - sums[0]) <= clip * (1 + 1e-4)


def test_short_updates_are_averaged_exactly_and_the_noise_has_the_stated_deviation():
    parts = [(name, model(START.values + step), 1.0) for name, step in (("A", 1e-3), ("B", 3e-3))]
    plain = noisy_mean(START, parts, 2, 10.0, 1.0, silent())
    assert np.allclose(plain.values - START.values, 2e-3, atol=1e-6)
    noisy = noisy_mean(START, parts, 2, 10.0, 0.5, Noise.seeded(0, "central"))
    difference = noisy.values - plain.values
    assert np.std(difference) == pytest.approx(10.0 * 0.5 / 2, rel=0.06)  # 4 standard errors


def test_four_hospitals_get_a_plain_remark_with_the_cost(tmp_path):
    pytest.importorskip("dp_accounting", reason="needs the extra privacy (dp-accounting)")
    plan = small_plan(tmp_path, federation__weighting="sites")
    assert few_sites(plan, 4) is None
    dp = replace(plan.privacy.dp, central_noise=1.0)
    plan = replace(plan, privacy=replace(plan.privacy, dp=dp))
    assert few_sites(plan, 100) is None
    problem = few_sites(plan, 4)
    assert problem is not None
    assert problem.code == "PRV-977"
    assert f"{central_epsilon(plan):.3g}" in problem.found
    assert "4 training hospitals" in problem.found
