"""Budgets: steps and slices of a round, matched between federations before training."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.clients.data.batches import index_batches, slices_in
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.plan import MethodSettings, Plan
from fedsgcg.deploy.study.budget import amounts, matching_steps
from fedsgcg.deploy.study.plan import plan_study
from tests.support import sites

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=4)
METHODS = st.builds(
    MethodSettings,
    name=st.just("source"),
    statistics=st.just(False),
    batch_size=st.integers(2, 12),
    local_epochs=st.integers(1, 3),
    steps_per_round=st.sampled_from([0, 1, 7]),
)


def tables(counts):
    return [range(count) for count in counts]


@given(COUNTS, METHODS, st.integers(1, 30))
def test_the_slices_of_a_round_are_those_of_its_batches(counts, method, steps):
    rngs = [np.random.default_rng(number) for number in range(len(counts))]
    batches = index_batches(tables(counts), replace(method, steps_per_round=steps), rngs)
    taken = sum(len(chosen) for batch in batches for chosen in batch)
    assert slices_in(tables(counts), method, steps) == taken


@given(COUNTS, METHODS)
def test_pooled_training_matches_the_federation(counts, method):
    by_site, pooled = [[one] for one in tables(counts)], [tables(counts)]
    longest, slices = amounts(by_site, method)
    assert matching_steps(by_site, pooled, method, "steps") == longest
    steps = matching_steps(by_site, pooled, method, "slices")
    gaps = {
        number: abs(slices_in(tables(counts), method, number) - slices)
        for number in range(1, slices + 2)
    }
    assert gaps[steps] == min(gaps.values())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    return write_hospitals(folder, sites=("A", "B", "C"), cases_per_site=3, shape=(3, 32, 32))


@pytest.mark.parametrize("budget", ["steps", "slices"])
def test_a_study_derives_the_steps_of_every_cell_before_it_trains(root, tmp_path, budget):
    places = [f"data.root={root}", f"output={tmp_path}", f"site.cache={tmp_path / 'cache'}"]
    small = [text for text in sites.SMALL if not text.startswith("method.")]
    settings = [*places, *small, "method=source", "heldout=C", "method.batch_size=2"]
    study = plan_study([*settings, f"budget={budget}", "references=[local,pooled]"])
    plans = {cell.name: Plan.from_tree(cell.tree) for cell in study.cells}
    assert [plan.trained_on for plan in plans.values()] == ["", "A", "B", ""]
    found = {plan.federation.ownership: plan for plan in plans.values()}
    same = {getattr(plan, f"planned_{budget}") for plan in plans.values()}
    spread = max(same) - min(same)
    most = found["pooled"].federation.rounds * 2  # half a batch of two slices in each round
    assert len(same) == 1 if budget == "steps" else spread <= most
    assert found["by_site"].method.steps_per_round == 0
    assert found["pooled"].method.steps_per_round > 0
