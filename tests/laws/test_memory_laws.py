"""Properties of statistics kept over rounds: a site that leaves is removed without a trace."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.settings.plan import PrototypeSettings
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.aggregation.prototypes import PrototypeMemory

FEW = settings(max_examples=80, deadline=None)
CLASSES, CHANNELS = 3, 2
SITES = ("A", "B", "C")
LEAVER = "B"

ROUNDS = st.lists(
    st.dictionaries(st.sampled_from(SITES), st.integers(0, 10**6), max_size=3),
    min_size=1,
    max_size=7,
)
"""For each round: the sites that sent statistics (possibly none) and the seed of the statistics."""


def sent(site: str, seed: int) -> ClassStatistics:
    """Statistics of up to 40 pixels, with often absent classes and means far from the origin."""
    rng = np.random.default_rng([ord(site), seed])
    pixels = int(rng.integers(1, 40))
    labels = rng.integers(0, rng.integers(1, CLASSES + 1), pixels)
    return ClassStatistics.from_features(
        rng.normal(size=(pixels, CHANNELS)) + rng.integers(0, 9), labels, CLASSES
    )


def remembered(
    memory: PrototypeMemory, rounds: list[dict[str, int]], never: str = ""
) -> dict[str, ClassStatistics]:
    parts: dict[str, ClassStatistics] = {}
    for answers in rounds:
        parts = memory.update(
            parts, [(site, sent(site, seed)) for site, seed in answers.items() if site != never]
        )
    return parts


def assert_same(found: ClassStatistics | None, wanted: ClassStatistics | None) -> None:
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        for name in ("count", "mean", "scatter"):
            np.testing.assert_allclose(
                getattr(found, name), getattr(wanted, name), rtol=1e-12, atol=1e-12
            )


@FEW
@pytest.mark.parametrize("weighting", ["pixels", "sites"])
@pytest.mark.parametrize("policy", ["cumulative", "discount"])
@given(before=ROUNDS, after=ROUNDS)
def test_after_a_departure_the_prototypes_are_those_of_a_federation_without_the_site(
    policy: str, weighting: str, before: list[dict[str, int]], after: list[dict[str, int]]
) -> None:
    memory = PrototypeMemory(PrototypeSettings(memory=policy, weighting=weighting, discount=0.75))  # type: ignore[arg-type]
    parts = memory.without(remembered(memory, before), [LEAVER])
    never = remembered(memory, before, never=LEAVER)
    assert_same(memory.prototypes(parts), memory.prototypes(never))
    for answers in after:
        stay = [(site, sent(site, seed)) for site, seed in answers.items() if site != LEAVER]
        parts, never = memory.update(parts, stay), memory.update(never, stay)
        assert_same(memory.prototypes(parts), memory.prototypes(never))


@FEW
@given(rounds=ROUNDS)
def test_cumulative_prototypes_are_those_of_all_pixels_ever_sent(
    rounds: list[dict[str, int]],
) -> None:
    memory = PrototypeMemory(PrototypeSettings(memory="cumulative"))
    found = memory.prototypes(remembered(memory, rounds))
    whole = ClassStatistics.empty(CLASSES, CHANNELS)
    for answers in rounds:
        for site, seed in answers.items():
            whole = whole + sent(site, seed)
    if found is None:
        assert whole.count.sum() == 0
        return
    assert found.count.tolist() == whole.count.tolist()
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


@FEW
@pytest.mark.parametrize(
    "policy", ["cumulative", "discount", "lagged", "restart", "overlay", "momentum"]
)
@given(rounds=ROUNDS, gone=st.sets(st.sampled_from(SITES)))
def test_taking_out_is_done_once_and_for_all(
    policy: str, rounds: list[dict[str, int]], gone: set[str]
) -> None:
    memory = PrototypeMemory(PrototypeSettings(memory=policy))  # type: ignore[arg-type]
    parts = remembered(memory, rounds)
    once = memory.without(parts, gone)
    assert not gone & set(once)
    assert memory.without(once, gone) == once
    assert memory.without(parts, []) == parts
