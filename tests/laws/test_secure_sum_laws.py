"""Laws of secure sums: the total is exact, nothing less than the total can be read."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.secure_sums import shamir
from fedsgcg.common.secure_sums.contribution import Contribution, Scheme
from fedsgcg.common.secure_sums.fixed_point import Block, decode, encode, power_of_two
from fedsgcg.common.secure_sums.history import check_sums, smallest_group
from fedsgcg.common.secure_sums.party import threshold_of
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.norm_moments import NormMoments
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.class_statistics import merge_statistics
from fedsgcg.server.aggregation.fedavg import merge_moments, merge_weights
from tests.support.summing import STEPS, run_sum

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 100), st.integers(-20, 40))
def test_a_sum_is_that_of_the_numbers_up_to_the_stated_bound(
    seed: int, sites: int, exponent: int
) -> None:
    rng, largest = np.random.default_rng(seed), math.ldexp(1.0, exponent)
    block = Block("x", 5, largest)
    values = rng.uniform(-largest, largest, (sites, 5))
    values[0, 0] = largest
    words = [encode([block], {"x": row}, sites) for row in values]
    with np.errstate(over="ignore"):
        total = reduce(np.add, words)
    found = decode([block], total, sites, sites)["x"]
    for column in range(5):
        exact = sum((Fraction(value) for value in values[:, column].tolist()), Fraction(0))
        assert abs(Fraction(float(found[column])) - exact) <= Fraction(
            block.error(sites, float(abs(exact)))
        )


@pytest.mark.parametrize("sites", [1, 3, 64, 100, 4096])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_sum_overflows_when_every_site_sends_its_bound(sites: int, sign: float) -> None:
    block = Block("x", 1, 2.0**10)
    word = encode([block], {"x": np.array([sign * block.largest])}, sites)
    assert sites * abs(int(word.view(np.int64)[0])) < 2**63
    total = np.array([int(word[0]) * sites % 2**64], np.uint64)
    assert decode([block], total, sites, sites)["x"][0] == sign * sites * block.largest


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.data())
def test_any_threshold_of_shares_restores_the_secret(
    secret: bytes, threshold: int, data: st.DataObject
) -> None:
    number = data.draw(st.integers(threshold, 7))
    shares = dict(enumerate(shamir.split(secret, threshold, number), start=1))
    for places in itertools.combinations(shares, threshold):
        assert shamir.join({x: shares[x] for x in places}) == secret


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_one_share_less_fits_every_secret(secret: bytes, other: bytes) -> None:
    shares = shamir.split(secret, 3, 5)[:2]
    # The line of degree 2 through the two shares and another secret at 0 has a value at 3.
    prime, (one, two) = shamir.PRIME, (int.from_bytes(share, "big") for share in shares)
    third = (int.from_bytes(other, "big") - 3 * one + 3 * two) % prime
    known = {1: shares[0], 2: shares[1], 3: third.to_bytes(shamir.SHARE_BYTES, "big")}
    assert shamir.join(known) == other


def test_the_prime_is_one() -> None:
    assert shamir.PRIME > 2**256
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))


@pytest.mark.row(64)
@settings(max_examples=60, deadline=None)
@given(st.integers(3, 6), st.data())
def test_a_drop_out_at_any_step_recovers_the_sum_or_opens_nothing(
    number: int, data: st.DataObject
) -> None:
    names = [f"site {k}" for k in range(number)]
    gone = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(STEPS), max_size=2))
    rng = np.random.default_rng(number)
    numbers = {name: rng.integers(0, 2**64, 4, np.uint64) for name in names}
    wanted = [name for name in names if gone.get(name) not in ("keys", "shares", "answers")]
    there = {
        step: [n for n in names if n not in gone or gone[n] not in STEPS[: k + 1]]
        for k, step in enumerate(STEPS)
    }
    needed = threshold_of(len(there["keys"]))
    recovers = all(len(found) >= needed for found in there.values())
    if not recovers:
        with pytest.raises(FedsgcgError) as caught:
            run_sum(numbers, gone).opening.result()
        assert caught.value.code == "PRV-953"
        return
    total = run_sum(numbers, gone).opening.result()
    with np.errstate(over="ignore"):
        assert np.array_equal(total, reduce(np.add, [numbers[name] for name in wanted]))


def test_a_total_with_masks_is_no_possible_sum() -> None:
    block = Block("x", 64, 1024.0)
    names = ["A", "B", "C", "D"]
    zeros = {name: encode([block], {"x": np.zeros(64)}, 4) for name in names}
    found = run_sum(zeros, {"D": "open"})
    masked = found.opening.total.copy()
    with pytest.raises(FedsgcgError) as caught:
        decode([block], masked, 4, 4)
    assert caught.value.code == "PRV-960"
    assert not decode([block], found.opening.result(), 4, 4)["x"].any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6), min_size=3), min_size=1, max_size=3))
def test_no_combination_of_accepted_sums_isolates_fewer_sites(sums: list[set[int]]) -> None:
    family = [frozenset(map(str, one)) for one in sums]
    fewest = min(3, smallest_group(family))
    sites = sorted(frozenset().union(*family))
    rows = np.array([[site in one for site in sites] for one in family], int)
    for factors in itertools.product(range(-2, 3), repeat=len(family)):
        support = np.count_nonzero(np.array(factors) @ rows)
        assert support == 0 or support >= fewest


@pytest.mark.parametrize(
    ("earlier", "new", "allowed"),
    [
        (["ABCD"], "ABCD", True),
        (["ABCD"], "ABC", False),
        (["ABC"], "ABCD", False),
        (["ABCD"], "ABCE", False),
        (["ABCDEF"], "ABC", True),
        (["BCD", "ACD", "ABD"], "ABC", False),
    ],
)
def test_sums_that_differ_by_few_sites_are_refused(
    earlier: list[str], new: str, allowed: bool
) -> None:
    if allowed:
        check_sums(earlier, new, 3)
        return
    with pytest.raises(FedsgcgError) as caught:
        check_sums(earlier, new, 3)
    assert caught.value.code == "PRV-954"


def model(rng: np.random.Generator, spread: float = 0.1) -> Weights:
    """A model with one convolution and one BatchNorm layer."""
    layout = (("conv", (3, 4)), ("norm.running_mean", (3,)), ("norm.running_var", (3,)))
    values = rng.normal(0, spread, 18).astype(np.float32)
    return Weights(layout, values, (("norm.num_batches_tracked", 7),))


def summed(scheme: Scheme, own: dict[str, Contribution]) -> Contribution:
    """What the sum of some contributions gives."""
    words = [scheme.encode(part) for part in own.values()]
    with np.errstate(over="ignore"):
        return scheme.decode(reduce(np.add, words), len(own))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(3, 6), st.booleans())
def test_the_sum_of_the_weights_is_the_plain_merge(seed: int, sites: int, equal: bool) -> None:
    rng = np.random.default_rng(seed)
    received = model(rng)
    scheme = Scheme(sites, 256.0, 2.0**20, weights=received, equal=equal)
    own = {
        f"s{k}": Contribution(
            model(rng),
            metrics={"examples": float(rng.integers(1, 257)), "loss": float(rng.normal())},
        )
        for k in range(sites)
    }
    found = summed(scheme, own)
    shares = {name: 1.0 if equal else part.metrics["examples"] for name, part in own.items()}
    plain = merge_weights([(name, part.weights, shares[name]) for name, part in own.items()])  # type: ignore[misc]
    assert found.weights is not None
    assert found.weights.layout == plain.layout
    assert found.weights.counters == plain.counters
    total = sum(shares.values()) / (1.0 if equal else scheme.examples)
    block = next(block for block in scheme.blocks if block.name == "weights")
    bound = block.error(sites, 1.0) / total + np.finfo(np.float32).eps
    assert np.abs(found.weights.values - plain.values).max() <= bound
    examples = sum(part.metrics["examples"] for part in own.values())
    assert found.metrics["examples"] == examples
    loss = sum(part.metrics["examples"] * part.metrics["loss"] for part in own.values())
    assert found.metrics["loss"] == pytest.approx(loss / examples, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(3, 6))
def test_the_sum_of_the_statistics_is_the_plain_merge(seed: int, sites: int) -> None:
    rng = np.random.default_rng(seed)
    own = {}
    for k in range(sites):
        features = rng.normal(size=(200, 4))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        labels = rng.integers(0, 2, 200)  # class 2 is absent everywhere
        own[f"s{k}"] = ClassStatistics.from_features(features, labels, 3)
    centre = rng.normal(0, 0.2, (3, 4))
    scheme = Scheme(sites, 1.0, 2.0**30, shape=(3, 4), centre=centre)
    found = summed(scheme, {k: Contribution(statistics=part) for k, part in own.items()}).statistics
    plain = merge_statistics(list(own.items()))
    assert found is not None
    assert np.array_equal(found.count, plain.count)
    blocks = {block.name: block for block in scheme.blocks}
    seen = plain.count > 0
    first = blocks["first"].error(sites, 1.0) * scheme.pixels
    second = blocks["second"].error(sites, 1.0) * scheme.pixels
    assert (np.abs(found.mean - plain.mean)[seen] <= first / plain.count[seen, None] + 1e-12).all()
    gap = np.abs(found.covariance - plain.covariance)[seen]
    assert (gap <= ((second + 5 * first) / plain.count[seen])[:, None, None] + 1e-12).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(3, 6), st.sampled_from(["samples", "sites"]))
def test_the_sum_of_the_moments_is_the_plain_merge(seed: int, sites: int, weighting: str) -> None:
    rng = np.random.default_rng(seed)
    received = model(rng)
    own = {
        f"s{k}": NormMoments(
            {"norm": 3},
            np.array([count := float(rng.integers(100, 5000))]),
            rng.normal(size=3),
            count * rng.uniform(0.1, 4.0, 3),
        )
        for k in range(sites)
    }
    scheme = Scheme(sites, 1.0, 2.0**20, equal=weighting == "sites", measured=received)
    found = summed(scheme, {k: Contribution(moments=part) for k, part in own.items()}).moments
    plain = merge_moments(list(own.items()), weighting)
    assert found is not None
    assert found.count == pytest.approx(plain.count, rel=1e-12)
    blocks = {block.name: block for block in scheme.blocks}
    share, first, second = (
        blocks[name].error(sites, 1.0) for name in ("shares", "input_first", "input_second")
    )
    total = sites if weighting == "sites" else plain.count[0] / scheme.pixels
    largest = 6.0  # of |mean| and of the offset; the variance is below 30
    assert (np.abs(found.mean - plain.mean) <= (first + largest * share) / total + 1e-12).all()
    bound = (second + 4 * largest * first + 2 * (30 + largest**2) * share) / total + 1e-9
    assert (np.abs(found.variance - plain.variance) <= bound).all()


def test_a_long_update_is_shortened_to_the_norm_and_counted() -> None:
    rng = np.random.default_rng(1)
    received = model(rng)
    layout, counters = received.layout, received.counters
    far = Weights(layout, (received.values + 1).astype(np.float32), counters)
    scheme = Scheme(3, 4.0, 4.0, weights=received, update_norm=0.5)
    own = Contribution(far, metrics={"examples": 4.0})
    found = summed(scheme, dict.fromkeys("ABC", own))
    assert found.metrics["shortened_updates"] == 3
    assert found.weights is not None
    change = found.weights.values - received.values
    assert np.linalg.norm(change[:12]) == pytest.approx(0.5, abs=1e-6)
    assert change[12:] == pytest.approx(np.ones(6), abs=1e-6)  # moments are no update


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1025.0, -1e30])
def test_a_number_outside_the_range_is_refused(value: float) -> None:
    with pytest.raises(FedsgcgError) as caught:
        encode([Block("x", 1, 1024.0)], {"x": np.array([value])}, 3)
    assert caught.value.code == "PRV-957"


def test_a_bound_is_rounded_up_to_a_power_of_two() -> None:
    assert [power_of_two(x) for x in (0.3, 1.0, 1.1, 1000.0, 1024.0)] == [0.5, 1, 2, 1024, 1024]
