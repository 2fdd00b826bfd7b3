"""The accountant: closed forms by hand, independent accountants, and budgets at a site."""

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedsgcg.common.differential_privacy.accounting import ORDERS, Spending, epsilon_of

pytest.importorskip("dp_accounting", reason="needs the extra privacy (dp-accounting)")


def exact_epsilon(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism (Balle and Wang, ICML 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        low, high = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
        return norm.cdf(low) - math.exp(epsilon) * norm.cdf(high) - delta

    return float(brentq(excess, 0.0, 200.0))


def by_hand(noise: float, steps: int, delta: float) -> float:
    """Epsilon from the Rényi divergences a steps / (2 noise^2) of Gaussians."""
    return min(
        order * steps / (2 * noise**2)
        + math.log((order - 1) / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in ORDERS
    )


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 20), (10.0, 100), (2.0, 5)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_gaussians_cost_what_the_formula_says_and_never_less_than_the_exact_value(
    noise, steps, delta
):
    found = epsilon_of([Spending(noise, 1.0, steps)], delta)
    assert found == pytest.approx(by_hand(noise, steps, delta), rel=1e-9)
    # k Gaussians are one with noise / sqrt(k).
    exact = exact_epsilon(noise / math.sqrt(steps), delta)
    assert exact <= found <= 1.25 * exact + 0.02


def test_epsilon_is_zero_without_releases_and_grows_with_each():
    assert epsilon_of([], 1e-5) == 0
    weak, strong = Spending(4.0), Spending(1.0, 0.1, 50)
    costs = [epsilon_of(spent, 1e-5) for spent in ([weak], [weak, weak], [weak, weak, strong])]
    assert costs == sorted(costs)
    assert epsilon_of([strong, weak], 1e-5) == epsilon_of([weak, strong], 1e-5)
    assert epsilon_of([weak, weak], 1e-5) == epsilon_of([Spending(4.0, 1.0, 2)], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-3, math.nan])
def test_an_impossible_delta_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        epsilon_of([Spending(1.0)], delta)


@pytest.mark.parametrize("wrong", [Spending(0.0), Spending(1.0, 1.5), Spending(math.inf)])
def test_an_impossible_mechanism_is_refused(wrong):
    with pytest.raises(ValueError, match="Spending"):
        epsilon_of([wrong], 1e-3)


@pytest.mark.parametrize(
    ("sampling", "noise", "steps"), [(0.1, 2.0, 100), (0.01, 1.0, 1000), (0.25, 3.0, 100)]
)
def test_sampled_gaussians_cost_the_same_as_in_opacus(sampling, noise, steps):
    rdp = pytest.importorskip("opacus.accountants.analysis.rdp", reason="opacus is not installed")
    orders = [order for order in ORDERS if order >= 2]
    cost = rdp.compute_rdp(q=sampling, noise_multiplier=noise, steps=steps, orders=orders)
    cost += rdp.compute_rdp(q=1.0, noise_multiplier=20.0, steps=20, orders=orders)
    expected, _ = rdp.get_privacy_spent(orders=orders, rdp=cost, delta=1e-5)
    found = epsilon_of([Spending(noise, sampling, steps), Spending(20.0, 1.0, 20)], 1e-5)
    assert found == pytest.approx(expected, rel=1e-6)


def test_sampled_gaussians_cost_at_least_what_numerical_composition_finds():
    prv = pytest.importorskip("prv_accountant", reason="prv-accountant is not installed")
    accountant = prv.PRVAccountant(
        prvs=[
            prv.PoissonSubsampledGaussianMechanism(noise_multiplier=1.5, sampling_probability=0.1)
        ],
        max_self_compositions=[100],
        eps_error=0.05,
        delta_error=1e-8,
    )
    low, _, high = accountant.compute_epsilon(delta=1e-5, num_self_compositions=[100])
    found = epsilon_of([Spending(1.5, 0.1, 100)], 1e-5)
    assert low <= found <= 1.25 * high
