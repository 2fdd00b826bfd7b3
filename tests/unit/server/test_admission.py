"""Every rule of admission bites, and nothing honest is turned away."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fedsgcg.common.errors import CODES
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.server.admission import RULES, Expectation, admit

IDENTITY = Identity("run", "D", 3, "plan")
LAYOUT = (("conv.weight", (2, 2)), ("bn.running_var", (2,)))
GLOBAL = Weights(LAYOUT, np.zeros(6, np.float32), (("bn.num_batches_tracked", 4),))


def statistics(seed: int = 0) -> ClassStatistics:
    features = np.random.default_rng(seed).normal(size=(60, 4))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return ClassStatistics.from_features(features, np.repeat([0, 1, 255], 20), 3)


@dataclass(frozen=True)
class Sent:
    identity: Identity = IDENTITY
    site: str = "A"
    weights: Weights | None = Weights(
        LAYOUT, np.arange(6, dtype=np.float32), (("bn.num_batches_tracked", 9),)
    )
    statistics: ClassStatistics | None = field(default_factory=statistics)
    metrics: dict[str, float] = field(default_factory=lambda: {"examples": 12.0})


EXPECTED = Expectation(IDENTITY, "A", GLOBAL, (3, 4), unit_norm=True, max_examples=12)


def values(*numbers: float) -> Weights:
    return Weights(LAYOUT, np.array(numbers, np.float32), GLOBAL.counters)


def bent(**changes: np.ndarray) -> ClassStatistics:
    return replace(statistics(), **changes)


def scatter_with(entry: tuple[int, int, int], value: float) -> ClassStatistics:
    scatter = statistics().scatter.copy()
    scatter[entry] = value
    return bent(scatter=scatter)


def count_with(value: float) -> ClassStatistics:
    count = statistics().count.copy()
    count[1] = value
    return bent(count=count)


def test_an_honest_payload_is_admitted() -> None:
    verdict = admit(Sent(), EXPECTED)
    assert verdict.accepted, verdict
    assert (verdict.site, verdict.code, verdict.detail) == ("A", "", "")


@pytest.mark.parametrize(
    ("code", "sent", "detail"),
    [
        ("PAY-120", Sent(identity=replace(IDENTITY, round=2)), "round 2 instead of 3"),
        ("PAY-120", Sent(identity=replace(IDENTITY, run="other")), "another run"),
        ("PAY-120", Sent(identity=replace(IDENTITY, heldout="A")), "another heldout"),
        (
            "PAY-120",
            Sent(identity=replace(IDENTITY, plan="x", run="y")),
            "another run and another plan",
        ),
        ("PAY-120", Sent(site="B"), "another site"),
        ("PAY-103", Sent(weights=None), "no weights"),
        (
            "PAY-103",
            Sent(weights=Weights(LAYOUT[:1], np.zeros(4, np.float32), GLOBAL.counters)),
            "bn.running_var",
        ),
        (
            "PAY-103",
            Sent(weights=Weights(LAYOUT[::-1], np.zeros(6, np.float32), GLOBAL.counters)),
            "another order",
        ),
        (
            "PAY-103",
            Sent(
                weights=Weights(
                    (("conv.weight", (4,)), LAYOUT[1]), np.zeros(6, np.float32), GLOBAL.counters
                )
            ),
            "shape (4,) instead of (2, 2)",
        ),
        (
            "PAY-103",
            Sent(
                weights=Weights((*LAYOUT, ("head", (1,))), np.zeros(7, np.float32), GLOBAL.counters)
            ),
            "1 entries that the network does not have",
        ),
        ("PAY-103", Sent(weights=Weights(LAYOUT, np.zeros(6, np.float32))), "counters"),
        *(
            ("PAY-112", Sent(weights=Weights(LAYOUT, np.zeros(6, np.float32), counter)), "counter")
            for counter in ((("bn.num_batches_tracked", -1),), (("bn.num_batches_tracked", 2**62),))
        ),
        ("PAY-112", Sent(weights=values(0, 0, 0, 2e9, 0, 0)), "larger than 1e+09"),
        ("PAY-112", Sent(weights=values(0, 0, 0, 0, 0, -0.1)), "negative running variance"),
        ("PAY-112", Sent(metrics={"examples": 12.0, "validation_dice": 1.01}), "1.01"),
        ("PAY-112", Sent(metrics={"examples": 12.0, "loss_contrast": np.inf}), "inf"),
        ("PAY-101", Sent(weights=values(0, 0, 0, 0, 0, np.nan)), "'bn.running_var'"),
        ("PAY-101", Sent(weights=values(np.inf, 0, 0, 0, 0, 0)), "'conv.weight'"),
        ("PAY-110", Sent(metrics={}), "nan"),
        *[
            ("PAY-110", Sent(metrics={"examples": n}), "examples")
            for n in (0.0, -3.0, 2.5, np.nan, np.inf, -np.inf)
        ],
        ("PAY-111", Sent(metrics={"examples": 13.0}), "13 examples"),
        ("PAY-111", Sent(metrics={"examples": 1e12}), "enrolled with 12"),
        ("STA-201", Sent(statistics=None), "no class statistics"),
        ("STA-201", Sent(statistics=ClassStatistics.empty(2, 4)), "(2, 4) instead of (3, 4)"),
        ("STA-201", Sent(statistics=ClassStatistics.empty(3, 5)), "(3, 5)"),
        ("STA-201", Sent(statistics=count_with(-1)), "negative"),
        ("STA-201", Sent(statistics=count_with(19.5)), "integer"),
        ("STA-201", Sent(statistics=count_with(np.nan)), "not finite"),
        ("STA-201", Sent(statistics=bent(mean=np.full((3, 4), np.inf))), "not finite"),
        ("STA-201", Sent(statistics=scatter_with((0, 0, 0), np.nan)), "not finite"),
        ("STA-201", Sent(statistics=scatter_with((0, 0, 1), 50.0)), "symmetric"),
        ("STA-201", Sent(statistics=scatter_with((1, 2, 2), -0.5)), "negative eigenvalue"),
        ("STA-201", Sent(statistics=bent(scatter=-statistics().scatter)), "negative eigenvalue"),
        ("STA-201", Sent(statistics=scatter_with((1, 2, 2), 1e6)), "unit length"),
        ("STA-201", Sent(statistics=bent(mean=np.full((3, 4), 1e6))), "unit length"),
        ("STA-201", Sent(statistics=bent(mean=np.full((3, 4), 1e300))), "too large"),
    ],
)
@pytest.mark.row(1, 2, 3, 4, 6, 7, 13, 16, 20)
@pytest.mark.attack("negative-variance")
def test_a_bad_payload_is_rejected_with_its_code(code: str, sent: Sent, detail: str) -> None:
    verdict = admit(sent, EXPECTED)
    assert not verdict.accepted
    assert verdict.code == code
    assert detail in verdict.detail
    assert code in CODES


def test_every_rule_has_a_sentence_in_the_catalogue() -> None:
    assert set(RULES) <= set(CODES)


def test_what_is_not_due_is_not_judged() -> None:
    bare = Expectation(IDENTITY, "A")
    assert admit(Sent(weights=None, statistics=None, metrics={}), bare).accepted
    assert admit(Sent(weights=None, metrics={}), replace(bare, statistics_shape=(3, 4))).accepted


def test_long_vectors_are_fine_where_unit_length_is_not_agreed() -> None:
    features = np.random.default_rng(3).normal(scale=100, size=(50, 4))
    long = ClassStatistics.from_features(features, np.zeros(50, int), 3)
    assert admit(Sent(statistics=long), replace(EXPECTED, unit_norm=False)).accepted
    assert admit(Sent(statistics=long), EXPECTED).code == "STA-201"


def test_rank_deficient_and_absent_classes_are_honest() -> None:
    one_pixel = ClassStatistics.from_features(np.array([[1.0, 0, 0, 0]]), np.array([2]), 3)
    line = ClassStatistics.from_features(
        np.array([[1.0, 0, 0, 0], [0.6, 0.8, 0, 0]]), np.array([1, 1]), 3
    )
    for found in (one_pixel, line, ClassStatistics.empty(3, 4)):
        assert admit(Sent(statistics=found), EXPECTED).accepted


def test_float32_round_off_of_a_device_is_honest() -> None:
    found = statistics(5)
    rounded = found.scatter.astype(np.float32).astype(np.float64)
    assert admit(Sent(statistics=replace(found, scatter=rounded)), EXPECTED).accepted


def test_a_very_small_scatter_is_judged_like_a_large_one() -> None:
    tiny = replace(statistics(), scatter=statistics().scatter * 1e-200)
    assert admit(Sent(statistics=tiny), EXPECTED).accepted
    assert admit(Sent(statistics=replace(tiny, scatter=-tiny.scatter)), EXPECTED).code == "STA-201"


@pytest.mark.row(70)
def test_text_of_a_site_never_gets_into_a_verdict() -> None:
    secret = "Jane Doe"
    layout = ((secret, (2, 2)), LAYOUT[1])
    for sent in (
        Sent(site=secret),
        Sent(identity=Identity(secret, secret, 3, secret)),
        Sent(weights=Weights(layout, np.zeros(6, np.float32), GLOBAL.counters)),
        Sent(weights=Weights((*LAYOUT, (secret, ())), np.zeros(7, np.float32), GLOBAL.counters)),
        Sent(weights=Weights(LAYOUT, np.zeros(6, np.float32), ((secret, 1),))),
    ):
        verdict = admit(sent, EXPECTED)
        assert not verdict.accepted
        assert secret not in verdict.detail
