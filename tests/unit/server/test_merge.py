"""The merge against hand-computed numbers, and every state key against the documented rule."""

from contextlib import suppress
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.federation import FederationSettings
from fedsgcg.common.settings.plan import NetworkSettings
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from fedsgcg.server.aggregation.aggregators import AGGREGATORS
from fedsgcg.server.aggregation.class_statistics import merge_statistics
from fedsgcg.server.aggregation.fedavg import merge_weights
from tests.support import small

LAYOUT = (("w", (2,)), ("b", ()))


def weights(*values: float, steps: int = 0) -> Weights:
    return Weights(LAYOUT, np.array(values, np.float32), (("steps", steps),))


def test_fedavg_by_hand() -> None:
    merged = merge_weights(
        [("A", weights(1, 2, 3, steps=4), 1.0), ("B", weights(5, 6, -1, steps=2), 3.0)]
    )
    np.testing.assert_array_equal(merged.values, np.array([4, 5, 0], np.float32))
    assert merged.values.dtype == np.float32
    assert merged.layout == LAYOUT
    assert merged.counters == (("steps", 4),)


def test_sum_is_taken_in_float64() -> None:
    # In float32 1e8 + 1 is 1e8: the ones would be lost.
    values = [1e8, *[1.0] * 16, -1e8]
    parts = [
        (f"{k:02d}", Weights((("x", (1,)),), np.array([v], np.float32)), 1.0)
        for k, v in enumerate(values)
    ]
    assert merge_weights(parts).values[0] == np.float32(16 / 18)


@pytest.mark.row(2)
@pytest.mark.attack("overflow-in-the-merge")
def test_largest_finite_weights_do_not_overflow() -> None:
    top = np.finfo(np.float32).max
    parts = [(site, Weights((("x", (1,)),), np.array([top], np.float32)), 1e12) for site in "AB"]
    assert merge_weights(parts).values[0] == top


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], "nothing to merge"),
        ([("A", weights(1, 2, 3), 1.0), ("A", weights(1, 2, 3), 1.0)], "twice"),
        (
            [
                ("A", weights(1, 2, 3), 1.0),
                ("B", Weights((("w", (3,)),), np.zeros(3, np.float32)), 1.0),
            ],
            "layout of B",
        ),
        (
            [("A", weights(1, 2, 3), 1.0), ("B", Weights(LAYOUT, np.zeros(3, np.float32)), 1.0)],
            "layout of B",
        ),
        ([("A", weights(1, 2, 3), 0.0)], "positive"),
        ([("A", weights(1, 2, 3), -2.0)], "positive"),
        ([("A", weights(1, 2, 3), float("nan"))], "positive"),
    ],
)
def test_parts_that_cannot_be_merged_are_refused(
    parts: list[tuple[str, Weights, float]], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        merge_weights(parts)


def rule_of(name: str) -> str:
    """What the documentation of `server.aggregation.fedavg` says about an entry of the U-Net."""
    leaf = name.rpartition(".")[2]
    if leaf in ("weight", "bias", "running_mean", "running_var"):
        return "mean"
    if leaf == "num_batches_tracked":
        return "largest"
    raise AssertionError(f"{name}: the merge rule of this entry is documented nowhere")


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_every_state_key_of_the_network_follows_the_documented_rule(norm: str) -> None:
    network = build_network(NetworkSettings("unet", 4, norm), 3, 2, 7)  # type: ignore[arg-type]
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    rng = np.random.default_rng(1)
    sites = {site: {name: _changed(array, rng) for name, array in state.items()} for site in "ABC"}
    shares = {"A": 1.0, "B": 2.0, "C": 5.0}
    parts = [(site, Weights.from_state(own), shares[site]) for site, own in sites.items()]
    merged = merge_weights(parts).to_state()
    assert set(merged) == set(state)
    for name in state:
        own = np.stack([sites[site][name] for site in "ABC"])
        if rule_of(name) == "largest":
            assert merged[name] == own.max()
            continue
        wanted = np.average(own.astype(np.float64), axis=0, weights=[1, 2, 5]).astype(np.float32)
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-6, err_msg=name)
    assert (norm == "batch") == any(rule_of(name) == "largest" for name in state)


def _changed(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if array.dtype == np.int64:
        return np.asarray(int(rng.integers(1, 1000)), np.int64)
    return rng.normal(size=array.shape).astype(np.float32)


def one_class(values: list[float]) -> ClassStatistics:
    return ClassStatistics.from_features(
        np.array(values, float)[:, None], np.zeros(len(values), int), 1
    )


def test_pixel_weighting_pools_all_pixels() -> None:
    merged = merge_statistics([("A", one_class([0, 2])), ("B", one_class([5, 5, 5, 5, 5, 5]))])
    assert merged.count.tolist() == [8]
    assert merged.mean[0, 0] == pytest.approx((2 + 30) / 8)
    assert merged.covariance[0, 0, 0] == pytest.approx(np.var([0, 2, 5, 5, 5, 5, 5, 5]))


def test_site_weighting_gives_each_site_the_same_say_and_keeps_the_pixel_count() -> None:
    merged = merge_statistics(
        [("A", one_class([0, 2])), ("B", one_class([5, 5, 5, 5, 5, 5]))], "sites"
    )
    assert merged.count.tolist() == [8]
    assert merged.mean[0, 0] == pytest.approx((1 + 5) / 2)  # mean of the means
    # within: (1 + 0) / 2, between: ((1 - 3)^2 + (5 - 3)^2) / 2
    assert merged.covariance[0, 0, 0] == pytest.approx(0.5 + 4)


def test_site_weighting_leaves_out_a_site_that_has_not_seen_the_class() -> None:
    absent = ClassStatistics.empty(1, 1)
    merged = merge_statistics([("A", one_class([1, 3])), ("B", absent)], "sites")
    assert merged.mean[0, 0] == 2
    assert merged.covariance[0, 0, 0] == pytest.approx(1)
    nobody = merge_statistics([("A", absent), ("B", absent)], "sites")
    assert nobody.count.tolist() == [0]
    assert np.isfinite(nobody.scatter).all()


def test_unknown_weighting_and_a_site_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="pixels, sites or median"):
        merge_statistics([("A", one_class([1]))], "cases")
    with pytest.raises(ValueError, match="twice"):
        merge_statistics([("A", one_class([1])), ("A", one_class([1]))])


def test_every_aggregator_of_the_settings_exists() -> None:
    (choices,) = [
        get_args(hint)
        for name, hint in get_type_hints(FederationSettings).items()
        if name == "aggregator"
    ]
    assert set(choices) == AGGREGATORS.keys()


def test_a_rule_gets_the_previous_model_and_its_own_state_again_after_a_resume(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def counting(previous, parts, state, settings):  # type: ignore[no-untyped-def]
        calls = int(state["calls"][0]) if state else 0
        seen.append((previous.digest(), calls))
        if len(seen) == 3:
            raise fail("SRV-401", found="the disk is full", expected="space")
        return merge_weights(parts), {"calls": np.array([calls + 1])}

    monkeypatch.setitem(AGGREGATORS, "fedavg", counting)  # type: ignore[arg-type]
    texts = ("method=source", "heldout=South", "federation.norm_policy=average")
    (cell,) = small.plan(hospitals, tmp_path / "run", *texts).cells
    with suppress(FedsgcgError):
        run_cell_in_process(cell.tree)
    assert cell.outcome()["status"] == "failed"
    run_cell_in_process(cell.tree)
    assert cell.outcome()["status"] == "completed"
    assert [calls for _, calls in seen] == [0, 1, 2, 2]
    assert seen[2] == seen[3], "the model of round 2, read from the checkpoint"
    assert len({digest for digest, _ in seen}) == 3
