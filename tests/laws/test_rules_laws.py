"""Aggregation rules: hand-computed values, brute force, Flower's own, and no say for the order."""

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy import FedAvgM, FedYogi
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsgcg.common.settings.aggregation import (
    AdaptiveSettings,
    FedAvgMSettings,
    FedCESettings,
    FedDGGASettings,
    KrumSettings,
    ScaffoldSettings,
)
from fedsgcg.common.settings.federation import FederationSettings
from fedsgcg.common.wire.learnable import join_learnable, learnable, split_learnable
from fedsgcg.common.wire.messages import SHARES
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.aggregators import AGGREGATORS, additions
from fedsgcg.server.aggregation.fedavg import merge_weights
from fedsgcg.server.aggregation.fedce import consensus_cosines, contributions, merged_shares
from fedsgcg.server.aggregation.feddg_ga import adjusted, step_of
from fedsgcg.server.aggregation.krum import krum_scores
from fedsgcg.server.aggregation.parts import MergeContext, without_sites
from fedsgcg.server.aggregation.scaffold import global_control

FEW = settings(max_examples=30, deadline=None)
SIZE = 5  # four learnable weights and one running variance
VALUES = hnp.arrays(np.float32, SIZE, elements=st.floats(-100, 100, width=32))
SITES = st.lists(st.tuples(VALUES, st.integers(1, 10**4).map(float)), min_size=1, max_size=6)
STATEFUL = ("fedavgm", "fedadam", "fedyogi", "scaffold", "feddg_ga", "fedce")

Parts = list[tuple[str, Weights, float]]


def weights(values: npt.ArrayLike, counter: int = 3) -> Weights:
    layout = (("x", (SIZE - 1,)), ("bn.running_var", (1,)))
    return Weights(layout, np.asarray(values, np.float32), (("steps", counter),))


START = weights(np.zeros(SIZE))


def context(parts: Parts, number: int = 1, **changes: object) -> MergeContext:
    """Settings, and metrics and control variates that depend on the site's model alone."""
    metrics = {
        site: {
            "validation_dice": 0.5,
            "validation_dice_trained": float(model.values[0] % 1),
            "validation_dice_without": float(model.values[1] % 1),
        }
        for site, model, _ in parts
    }
    controls = {site: model.values[: SIZE - 1] for site, model, _ in parts}
    return MergeContext(FederationSettings(**changes), number, metrics, controls)  # type: ignore[arg-type]


def named(sites: list[tuple[npt.NDArray[np.float32], float]]) -> Parts:
    return [(f"site {k}", weights(values), share) for k, (values, share) in enumerate(sites)]


def merged(rule: str, parts: Parts, state=None, previous: Weights = START, **changes):  # type: ignore[no-untyped-def]
    number = changes.pop("number", 1)
    return AGGREGATORS[rule](previous, parts, state or {}, context(parts, number, **changes))


@pytest.mark.parametrize("rule", AGGREGATORS)
@FEW
@given(SITES, st.randoms(use_true_random=False))
def test_order_of_arrival_changes_no_bit_of_model_and_state(rule: str, sites, rng) -> None:  # type: ignore[no-untyped-def]
    parts = named(sites)
    shuffled = parts.copy()
    rng.shuffle(shuffled)
    first, state = merged(rule, parts)
    other, other_state = merged(rule, shuffled)
    assert first.digest() == other.digest()
    assert {n: np.asarray(a).tobytes() for n, a in state.items()} == {
        n: np.asarray(a).tobytes() for n, a in other_state.items()
    }
    again, _ = merged(rule, parts, state, first, number=2)
    shuffled_again, _ = merged(rule, shuffled, other_state, first, number=2)
    assert again.digest() == shuffled_again.digest()


@pytest.mark.parametrize("rule", [name for name in AGGREGATORS if name not in STATEFUL[:3]])
@FEW
@given(VALUES)
def test_a_single_site_is_its_own_model(rule: str, values) -> None:  # type: ignore[no-untyped-def]
    (part,) = named([(values, 7.0)])
    found, state = merged(rule, [part])
    np.testing.assert_array_equal(found.values, part[1].values)
    again, _ = merged(rule, [part], state, found, number=2)
    np.testing.assert_array_equal(again.values, part[1].values)


@pytest.mark.parametrize("rule", STATEFUL[:3])
def test_moments_are_averaged_and_never_stepped_and_counters_are_the_largest(rule: str) -> None:
    parts = [
        ("A", weights([1, 2, 3, 4, 5], counter=9), 1.0),
        ("B", weights([1, 2, 3, 4, 1], counter=7), 3.0),
    ]
    found, state = merged(rule, parts)
    found, _ = merged(rule, parts, state, found)
    assert found.values[-1] == 2.0
    assert found.counters == (("steps", 9),)
    assert found.values[0] != 1.0  # the learnable ones were


def test_fedavgm_by_hand() -> None:
    """beta 0.5, eta 1: x 0 -> 1 (v -1); mean 3: v -0.5 - 2 = -2.5, x 3.5."""
    settings_ = FedAvgMSettings(momentum=0.5)
    one, state = merged("fedavgm", named([(np.full(SIZE, 1, np.float32), 1.0)]), fedavgm=settings_)
    two, state = merged(
        "fedavgm", named([(np.full(SIZE, 3, np.float32), 1.0)]), state, one, fedavgm=settings_
    )
    assert one.values.tolist() == [1.0] * SIZE
    assert two.values.tolist() == [3.5] * 4 + [3.0]
    assert state["momentum"].tolist() == [-2.5] * 4


@FEW
@given(SITES)
def test_fedavgm_without_momentum_is_fedavg(sites) -> None:  # type: ignore[no-untyped-def]
    parts = named(sites)
    found, _ = merged("fedavgm", parts, fedavgm=FedAvgMSettings(momentum=0.0))
    np.testing.assert_array_equal(found.values, merge_weights(parts).values)


def test_the_first_step_of_fedadam_by_hand() -> None:
    """d = 1: m = 0.1, v = 0.99 * 1e-6 + 0.01, x = 0.01 * 0.1 / (sqrt(v) + 1e-3)."""
    found, state = merged("fedadam", named([(np.full(SIZE, 1, np.float32), 1.0)]))
    v = 0.99 * 1e-6 + 0.01
    np.testing.assert_allclose(state["m"], 0.1, rtol=1e-12)
    np.testing.assert_allclose(state["v"], v, rtol=1e-12)
    np.testing.assert_allclose(found.values[:-1], 0.001 / (math.sqrt(v) + 0.001), rtol=1e-6)
    still, state = merged("fedadam", named([(np.zeros(SIZE, np.float32), 1.0)]))
    assert not still.values.any()  # nobody moved
    np.testing.assert_allclose(state["v"], 0.99 * 1e-6, rtol=1e-12)  # v0 = tau^2


class Oracle:
    """Flower's optimisers without its messages; its state is what the constructor leaves open."""

    def __init__(self, strategy) -> None:  # type: ignore[no-untyped-def]
        self.strategy = strategy

    def step(self, previous: Weights, mean: Weights) -> npt.NDArray[np.float64]:
        """One round: what Flower's FedAvg returns is replaced by our mean."""
        arrays = {"x": previous.values[:-1].astype(np.float64)}
        strategy = self.strategy
        record = ArrayRecord({"x": Array(mean.values[:-1].astype(np.float64))})
        if isinstance(strategy, FedAvgM):
            strategy.current_arrays = ArrayRecord({"x": Array(arrays["x"])})
        else:
            strategy.current_arrays = arrays
        parent = type(strategy).__mro__[1 if isinstance(strategy, FedAvgM) else 2]
        original = parent.aggregate_train
        parent.aggregate_train = lambda *_: (record, None)
        try:
            found, _ = strategy.aggregate_train(1, [])
        finally:
            parent.aggregate_train = original
        return np.asarray(found["x"].numpy())


@FEW
@given(st.lists(SITES, min_size=2, max_size=4))
def test_fedavgm_is_flowers(rounds) -> None:  # type: ignore[no-untyped-def]
    oracle = Oracle(FedAvgM(server_learning_rate=0.7, server_momentum=0.9))
    model, state = START, {}
    for sites in rounds:
        parts = named(sites)
        wanted = oracle.step(model, merge_weights(parts))
        model, state = merged(
            "fedavgm", parts, state, model, fedavgm=FedAvgMSettings(rate=0.7, momentum=0.9)
        )
        np.testing.assert_allclose(model.values[:-1], wanted, rtol=1e-5, atol=1e-5)


@FEW
@given(st.lists(SITES, min_size=2, max_size=4))
def test_fedyogi_is_flowers_with_v_at_tau_squared(rounds) -> None:  # type: ignore[no-untyped-def]
    flower = FedYogi(eta=0.05, beta_1=0.8, beta_2=0.9, tau=0.01)
    flower.v_t = {"x": np.full(SIZE - 1, 0.01**2)}
    oracle = Oracle(flower)
    model, state = START, {}
    own = AdaptiveSettings(rate=0.05, beta1=0.8, beta2=0.9, tau=0.01)
    for sites in rounds:
        parts = named(sites)
        wanted = oracle.step(model, merge_weights(parts))
        model, state = merged("fedyogi", parts, state, model, fedyogi=own)
        np.testing.assert_allclose(model.values[:-1], wanted, rtol=1e-5, atol=1e-5)
        assert (state["v"] >= 0).all()


@FEW
@given(SITES)
def test_the_corrections_of_scaffold_cancel_under_the_weights_of_the_merge(sites) -> None:  # type: ignore[no-untyped-def]
    parts = named(sites)
    found, state = merged("scaffold", parts)
    assert found.digest() == merge_weights(parts).digest()
    c = additions("scaffold", state).control_variates
    assert c is not None
    assert c.dtype == np.float32
    shares = np.array([share for *_, share in parts]) / sum(share for *_, share in parts)
    own = np.stack([model.values[: SIZE - 1] for _, model, _ in parts]).astype(np.float64)
    np.testing.assert_allclose(c, shares @ own, rtol=1e-5, atol=1e-4)


def test_a_late_site_keeps_its_control_variate_and_a_departed_one_loses_it() -> None:
    parts = named([(np.full(SIZE, x, np.float32), 1.0) for x in (1, 2, 6)])
    assert global_control({}) is None
    _, state = merged("scaffold", parts)
    moved = named([(np.full(SIZE, 4, np.float32), 1.0)])  # site 0 alone answers
    _, state = merged("scaffold", moved, state)
    assert global_control(state).tolist() == [4.0] * 4  # (4 + 2 + 6) / 3
    gone = without_sites(state, {"site 2"})
    assert global_control(gone).tolist() == [3.0] * 4
    assert additions("fedavg", state).control_variates is None


def test_scaffold_with_a_rate_by_hand() -> None:
    parts = named([(np.full(SIZE, 2, np.float32), 1.0)])
    found, _ = merged("scaffold", parts, scaffold=ScaffoldSettings(rate=0.5))
    assert found.values.tolist() == [1.0] * 4 + [2.0]


def test_feddg_ga_by_hand() -> None:
    """Gaps 0.3, 0, -0.1 of three sites, step 0.2: changes 1/15, 0, -1/45 of 1/3 each."""
    weights_ = {"A": 1 / 3, "B": 1 / 3, "C": 1 / 3}
    found = adjusted(weights_, {"A": 0.3, "B": 0.0, "C": -0.1}, 0.2)
    total = 1 + 1 / 15 - 1 / 45
    assert found == pytest.approx(
        {"A": (1 / 3 + 1 / 15) / total, "B": 1 / 3 / total, "C": (1 / 3 - 1 / 45) / total}
    )
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("gap", [0.0, 0.3, -0.1])
def test_equal_gaps_and_no_gaps_change_nothing(gap: float) -> None:
    uneven = {"A": 0.7, "B": 0.2, "C": 0.1}
    assert adjusted(uneven, dict.fromkeys(uneven, gap), 0.2) == uneven
    assert adjusted(uneven, {}, 0.2) == uneven


@FEW
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
    st.lists(st.floats(-1, 1), min_size=6, max_size=6),
    st.floats(0, 1),
)
def test_no_site_gains_more_than_its_step(raw, gaps, step) -> None:  # type: ignore[no-untyped-def]
    total = sum(raw)
    if not total > 1e-6:
        return
    before = {f"{k}": value / total for k, value in enumerate(raw)}
    after = adjusted(before, {site: gaps[int(site)] for site in before}, step)
    assert sum(after.values()) == pytest.approx(1.0)
    assert min(after.values()) >= 0
    for site, value in after.items():  # the sum before the division is at least 1 - step
        assert value <= (before[site] + step / len(before)) / max(1 - step, 1e-12) + 1e-9


def test_the_step_decays_linearly_from_its_full_size_to_zero() -> None:
    settings_ = FedDGGASettings()
    assert step_of(settings_, 1) == 0.2
    assert step_of(settings_, 21) == pytest.approx(0.1)
    assert step_of(settings_, 41) == step_of(settings_, 100) == 0.0


def test_feddg_ga_compares_the_merged_model_with_the_sites_own_of_the_round_before() -> None:
    parts = [("A", weights([1, 0, 0, 0, 1]), 5.0), ("B", weights([3, 0, 0, 0, 1]), 1.0)]

    def told(number: int, **dice: tuple[float, float]) -> MergeContext:
        metrics = {
            site: {"validation_dice": received, "validation_dice_trained": trained}
            for site, (received, trained) in dice.items()
        }
        return MergeContext(FederationSettings(), number, metrics)

    rule = AGGREGATORS["feddg_ga"]
    model, state = rule(START, parts, {}, told(1, A=(0.1, 0.8), B=(0.1, 0.6)))
    assert model.values[0] == 2.0  # 1/D, whatever the examples
    # The merged model has 0.5 at A, which lost 0.3, and 0.6 at B, which lost nothing.
    model, state = rule(model, parts, state, told(2, A=(0.5, 0.8), B=(0.6, 0.6)))
    a = (0.5 + 0.1) / 1.1
    assert state["weight/A"].item() == pytest.approx(a)
    assert model.values[0] == pytest.approx(a + 3 * (1 - a))
    # B was not there in round 2: nothing is known about its loss in the merge.
    alone, late = rule(START, parts[:1], state, told(3, A=(0.8, 0.8)))
    assert alone.values[0] == 1.0
    _, back = rule(START, parts, late, told(4, A=(0.8, 0.8), B=(0.1, 0.9)))
    assert back["weight/A"].item() == pytest.approx(late["weight/A"].item())
    assert set(without_sites(back, {"A"})) == {"weight/B", "trained/B"}


@FEW
@given(
    hnp.arrays(np.float64, (5, 3), elements=st.floats(-10, 10)),
    hnp.arrays(np.float64, 5, elements=st.floats(0.1, 10)),
)
def test_consensus_cosines_by_brute_force(updates, shares) -> None:  # type: ignore[no-untyped-def]
    found = consensus_cosines(updates @ updates.T, shares)
    for s in range(5):
        others = sum(shares[t] * updates[t] for t in range(5) if t != s)
        norms = np.linalg.norm(updates[s]) * np.linalg.norm(others)
        if norms > 1e-3:
            assert found[s] == pytest.approx(updates[s] @ others / norms, abs=1e-6)


def test_contributions_by_hand() -> None:
    novelty, needs = np.array([0.2, 0.6]), np.array([0.3, 0.1])
    np.testing.assert_allclose(contributions(novelty, needs, "plus"), [0.5, 0.5])
    np.testing.assert_allclose(contributions(novelty, needs, "times"), [0.5, 0.5])
    np.testing.assert_allclose(contributions(np.zeros(2), needs, "plus"), [0.625, 0.375])
    np.testing.assert_allclose(contributions(np.zeros(2), np.zeros(2), "times"), [0.5, 0.5])


@pytest.mark.parametrize("mode", ["plus", "times"])
def test_fedce_weights_and_what_it_sends(mode: str) -> None:
    parts = named(
        [
            (np.array(v, np.float32), s)
            for v, s in [
                ([1, 0.25, 0, 0, 1], 3.0),
                ([1, 0.5, 1, 0, 1], 1.0),
                ([-1, 0.75, 0, 0, 1], 2.0),
            ]
        ]
    )
    quiet = MergeContext(FederationSettings(), 1)
    first, state = AGGREGATORS["fedce"](START, parts, {}, quiet)
    assert first.digest() == merge_weights(parts).digest()  # nobody has stated a Dice
    sent = additions("fedce", state).options[SHARES]
    assert sent == pytest.approx(
        dict(zip([m.digest() for _, m, _ in parts], [1 / 2, 1 / 6, 1 / 3], strict=True))
    )
    second, after = merged("fedce", parts, state, START, number=2, fedce=FedCESettings(mode=mode))
    moved = np.stack([m.values[:4].astype(float) for _, m, _ in parts])
    cosines = consensus_cosines(moved @ moved.T, np.array([3, 1, 2]) / 6)
    needs = 1 - np.array([0.25, 0.5, 0.75])
    wanted = contributions(1 - cosines, needs, mode)  # both rounds had the same cosines
    np.testing.assert_allclose([after[f"weight/site {k}"].item() for k in range(3)], wanted)
    np.testing.assert_allclose(second.values[:4], wanted @ moved, rtol=1e-6)
    assert sum(merged_shares(after).values()) == pytest.approx(1.0)
    assert after["cosines/site 0"][1] == 2.0


@FEW
@given(SITES, st.integers(1, 2), st.integers(1, 4))
def test_krum_by_brute_force(sites, tolerated: int, selected: int) -> None:  # type: ignore[no-untyped-def]
    parts = named(sites)
    moved = np.stack([values[: SIZE - 1].astype(np.float64) for values, _ in sites])
    scores = []
    for k in range(len(sites)):
        distances = sorted(
            float(np.square(moved[k] - moved[other]).sum())
            for other in range(len(sites))
            if other != k
        )
        scores.append(sum(distances[: max(len(sites) - tolerated - 2, 1)]))
    np.testing.assert_allclose(
        krum_scores(moved @ moved.T, tolerated), scores, rtol=1e-6, atol=1e-6
    )
    found, _ = merged("krum", parts, tolerated=tolerated, krum=KrumSettings(selected))
    size = min(selected, len(sites))
    best = min(
        itertools.combinations(range(len(sites)), size), key=lambda c: sum(scores[k] for k in c)
    )
    if len({round(score, 3) for score in scores}) == len(scores):  # no tie but for rounding
        assert found.digest() == merge_weights([parts[k] for k in best]).digest()


def test_krum_is_flowers_where_float32_suffices() -> None:
    rng = np.random.default_rng(0)
    sites = [(rng.normal(size=SIZE).astype(np.float32), 1.0) for _ in range(7)]
    sites[3] = (np.full(SIZE, 50, np.float32), 1.0)
    # Flower measures all entries, so the running variance is the same everywhere here.
    for values, _ in sites:
        values[-1] = 1.0
    contents = [RecordDict({"w": ArrayRecord({"x": Array(values)})}) for values, _ in sites]
    (wanted,) = select_multikrum(contents, 2, 1)
    found, _ = merged("krum", named(sites), tolerated=2)
    np.testing.assert_array_equal(found.values, wanted["w"]["x"].numpy())


def test_a_broken_minority_is_never_krums_choice() -> None:
    rng = np.random.default_rng(1)
    honest = [(rng.normal(size=SIZE).astype(np.float32), 1.0) for _ in range(5)]
    far = [(np.full(SIZE, 1e9, np.float32), 1e9), (np.full(SIZE, -1e9, np.float32), 1e9)]
    found, _ = merged("krum", named([*far, *honest]), tolerated=2)
    assert any(np.array_equal(found.values, values) for values, _ in honest)


@FEW
@given(VALUES)
def test_learnable_entries_survive_splitting_and_joining(values) -> None:  # type: ignore[no-untyped-def]
    model = weights(values)
    assert learnable(model).tolist() == [True] * 4 + [False]
    entries = split_learnable(model, values[:4])
    assert list(entries) == ["x"]
    np.testing.assert_array_equal(join_learnable(model, entries), values[:4])
    assert not join_learnable(model, {}).any()
    with pytest.raises(ValueError, match="expected"):
        split_learnable(model, values)
