"""The average of the global model over the rounds, against its definition."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.rules import rule_problems
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation.moving_average import average_of, with_average, without_average
from tests.support.plans import small_plan
from tests.support.scripted_run import run, status_of


def models(seed, number):
    rng = np.random.default_rng(seed)
    return [
        Weights.from_state({"a": rng.normal(size=5).astype(np.float32), "n": np.array(t)})
        for t in range(number)
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.9, 0.9999]))
def test_the_average_follows_its_recursion_from_the_plain_mean(seed, number, decay):
    given_models, state = models(seed, number), {}
    for model in given_models:
        state = with_average({"momentum": np.zeros(2)}, state, model, decay)
    values = np.stack([model.values for model in given_models]).astype(np.float64)
    found = average_of(state, given_models[-1])
    assert set(without_average(state)) == {"momentum"}
    if not decay:
        assert found is None
        return
    wanted = values[0]
    for t, value in enumerate(values[1:], 1):
        share = min(decay, t / (t + 1))
        wanted = share * wanted + (1 - share) * value
    np.testing.assert_allclose(found.values, wanted, rtol=1e-5, atol=1e-6)
    if decay > (number - 1) / number:
        np.testing.assert_allclose(found.values, values.mean(0), rtol=1e-5, atol=1e-6)
    assert found.to_state()["n"] == number - 1, "a counter is not averaged"


def test_the_average_is_the_model_of_a_run_and_the_training_does_not_depend_on_it(tmp_path):
    found = {}
    for name, changes in (("plain", {}), ("average", {"federation__ema": 0.5})):
        plan = small_plan(tmp_path / name, **changes)
        outcome, grid = run(plan)
        assert status_of(tmp_path / name)["status"] == outcome.status
        rows = pq.read_table(tmp_path / name / "rounds.parquet").to_pylist()
        losses = [row["value"] for row in rows if row["metric"] == "loss"]
        found[name] = load_file(tmp_path / name / "model.safetensors"), losses, rows
    assert found["plain"][1] == found["average"][1]
    assert any(
        (found["plain"][0][key] != found["average"][0][key]).any() for key in found["plain"][0]
    )
    assert not any(row["metric"] == "ema_dice" for row in found["plain"][2])


def test_an_average_with_layers_that_stay_at_the_sites_is_refused(tmp_path):
    plan = small_plan(tmp_path, federation__ema=0.9, federation__aggregator="fedbn")
    assert [problem.where for problem in rule_problems(plan, "ABC")] == ["federation.ema"]
    with pytest.raises(FedsgcgError, match="ema"):
        small_plan(tmp_path, federation__ema=1.0)
