"""Screens of models: what is found, and that honest sites of every kind are left alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.screening.history import WARMUP, History
from fedsgcg.server.screening.scores import Finding, excess
from fedsgcg.server.screening.weights import Model, Updates, screen_models

SIZE = 4000
LAYOUT = (("conv.weight", (SIZE,)), ("bn.running_mean", (3,)), ("bn.running_var", (3,)))
FEW = settings(max_examples=40, deadline=None)


def weights(values: np.ndarray, moments: float = 1.0) -> Weights:
    flat = np.concatenate([values, np.full(6, moments)]).astype(np.float32)
    return Weights(LAYOUT, flat, (("bn.num_batches_tracked", 3),))


START = weights(np.random.default_rng(0).normal(size=SIZE))


def updates(seed: int, sites: int, shared: float = 0.3, size: float = 0.01) -> list[np.ndarray]:
    """Random updates with a common part; `shared` is about their mean cosine."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=SIZE)
    noise = rng.normal(size=(sites, SIZE))
    return list(size * (np.sqrt(shared) * common + np.sqrt(1 - shared) * noise))


def models(moved: list[np.ndarray], steps: tuple[float, ...] = ()) -> list[Model]:
    return [
        Model(
            chr(ord("A") + k),
            weights(START.values[:SIZE] + update),
            steps[k] if steps else 1.0,
            10.0 + k,
        )
        for k, update in enumerate(moved)
    ]


def found(moved: list[np.ndarray], **more: object) -> list[tuple[str, str]]:
    findings, _ = screen_models(models(moved, **more), START, History())
    return [(finding.site, finding.code) for finding in findings]


@FEW
@given(
    st.integers(0, 10**6),
    st.integers(1, 7),
    st.floats(0.0, 0.9),
    st.floats(1e-4, 1.0),
    st.lists(st.floats(0.4, 2.5), min_size=7, max_size=7),
)
def test_honest_updates_that_differ_in_size_are_not_found(
    seed: int, sites: int, shared: float, size: float, factors: list[float]
) -> None:
    moved = [
        factor * update
        for factor, update in zip(factors, updates(seed, sites, shared, size), strict=False)
    ]
    assert found(moved) == []


@pytest.mark.parametrize("sites", [3, 4, 7])
@pytest.mark.parametrize(
    ("bend", "code"),
    [
        (lambda update: 100 * update, "PAY-113"),
        (lambda update: -1e6 * update, "PAY-113"),
        (lambda update: -update, "PAY-114"),
        (lambda update: 0 * update, "PAY-115"),
        (lambda update: 1e-4 * update, "PAY-115"),
    ],
)
def test_one_broken_site_is_found_and_no_other(bend, code: str, sites: int) -> None:  # type: ignore[no-untyped-def]
    """Row 17: replacement, sign flip and free rider, at every place in the order of the names."""
    for broken in range(sites):
        moved = updates(broken, sites)
        moved[broken] = bend(moved[broken])
        assert found(moved) == [(chr(ord("A") + broken), code)]


def test_two_sites_are_compared_by_what_the_model_itself_allows() -> None:
    one, other = updates(0, 2, size=0.05)
    assert found([one, 100 * other]) == [
        ("B", "PAY-113")
    ]  # it moved further than the model is long
    assert found([one, 0 * other]) == [("B", "PAY-115")]
    assert found([one, 15 * other]) == []  # which of the two is wrong?
    assert found([one, -other]) == []


def test_a_site_alone_is_not_compared() -> None:
    (update,) = updates(0, 1)
    assert found([1e3 * update]) == []
    assert found([0 * update]) == []


def test_no_step_of_anybody_is_a_matter_of_the_settings() -> None:
    assert found([0 * update for update in updates(0, 3)]) == []


def test_a_site_with_more_steps_may_move_further() -> None:
    moved = updates(0, 4)
    moved[3] = 60 * moved[3]
    assert found(moved) == [("D", "PAY-113")]
    assert found(moved, steps=(10, 10, 10, 100)) == []
    moved[3] = 1e-5 * moved[3]
    assert found(moved, steps=(1000, 1000, 1000, 1)) == []


def test_the_copy_with_more_examples_is_left_out() -> None:
    """Row 17: two sites send one model; it counts once, with the smaller weight."""
    moved = updates(0, 4)
    moved[2] = moved[1] + 1e-6 * moved[0]
    findings, _ = screen_models(models(moved), START, History())
    assert findings == [Finding("C", "PAY-116", "the model of B as well", counts=False)]


def test_a_model_of_an_earlier_round_is_found_whoever_sent_it() -> None:
    first = models(updates(0, 4))
    _, history = screen_models(first, START, History())
    second = first[1].weights
    later = [Model(model.site, second, 1.0, 1.0) for model in first[:1]] + models(updates(1, 4))[1:]
    findings, _ = screen_models(later, weights(START.values[:SIZE] + 0.5), history)
    assert [(one.site, one.code) for one in findings] == [("A", "PAY-116")]


def test_moments_of_batch_norm_are_no_part_of_an_update() -> None:
    moved = models(updates(0, 3))
    large = weights(moved[2].weights.values[:SIZE], moments=1e6)
    findings, _ = screen_models([*moved[:2], Model("C", large)], START, History())
    assert findings == []


def grown(factor: float, rounds: int, sites: int, broken: str = "A") -> int:
    """Round in which a site is found whose updates grow by a factor per round; 0 if never."""
    history = History()
    for number in range(1, rounds + 1):
        moved = updates(number, sites, shared=0.0)
        moved[ord(broken) - ord("A")] *= factor**number
        findings, history = screen_models(models(moved), START, history)
        assert {finding.site for finding in findings} <= {broken}
        if findings:
            return number
    return 0


def test_slow_growth_is_found_by_the_first_rounds() -> None:
    """Row 17: 30 % more a round, against the beginning and not against the round before."""
    assert 8 <= grown(1.3, 20, sites=2) <= 14
    assert 8 <= grown(1.3, 20, sites=4) <= 14
    assert grown(1.0, 20, sites=2) == 0


def test_the_site_that_shrinks_does_not_make_the_other_one_large() -> None:
    history = History()
    for number in range(1, 10):
        one, other = updates(number, 2, shared=0.0)
        shrunk = other * (1.0 if number < 6 else 0.01)
        findings, history = screen_models(models([one, shrunk]), START, history)
        assert findings == []


def test_honest_sites_whose_updates_cancel_late_are_not_found() -> None:
    """At the optimum of a mean, a hospital with other images points away from the others."""
    history = History()
    for number in range(1, 20):
        moved = updates(number, 4, shared=0.3 if number <= WARMUP else 0.05)
        if number > WARMUP:
            moved[0] = -0.7 * sum(moved[1:]) + moved[0]
        findings, history = screen_models(models(moved), START, history)
        assert findings == []


def test_a_site_that_joins_late_is_not_judged_by_its_direction() -> None:
    history = History()
    for number in range(1, 12):
        moved = updates(number, 4)
        late = [*moved[:3], -moved[3]] if number > 6 else moved[:3]
        findings, history = screen_models(models(late), START, history)
        assert findings == []


@pytest.mark.attack("flipped-sign")
def test_a_flipped_sign_stays_found() -> None:
    history = History()
    for number in range(1, 10):
        moved = updates(number, 4)
        moved[1] = -moved[1]
        findings, history = screen_models(models(moved), START, history)
        assert [(one.site, one.code) for one in findings] == [("B", "PAY-114")]


def test_the_order_of_arrival_changes_nothing() -> None:
    moved = models(updates(0, 5))
    moved[3] = Model("D", weights(START.values[:SIZE] + 99 * (updates(0, 5)[3])))
    assert screen_models(moved, START, History()) == screen_models(moved[::-1], START, History())


@FEW
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_inner_products_are_those_of_plain_numpy(seed: int, sites: int) -> None:
    moved = models(updates(seed, sites))
    values = np.stack([model.weights.values[:SIZE] for model in moved]).astype(np.float64)
    differences = values - START.values[:SIZE]
    found = Updates.of(moved, START)
    np.testing.assert_allclose(found.gram, differences @ differences.T, rtol=1e-10)
    np.testing.assert_allclose(found.norms, np.linalg.norm(differences, axis=1), rtol=1e-10)
    assert found.size == SIZE


def test_a_robust_score_by_hand() -> None:
    # Median 2, deviations 1, 0, 2: the median of them is 1, the standard deviation 1.4826.
    assert excess(8.0, [1.0, 2.0, 4.0]) == pytest.approx((6.0, 6.0 / 1.4826))
    # Equal sites: the floor of 0.25.
    assert excess(2.5, [2.0, 2.0]) == pytest.approx((0.5, 2.0))
