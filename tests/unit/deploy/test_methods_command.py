"""`fedsgcg methods`: the list, a card, and costs that are measured in pairs with `source`."""

import io

import pytest
import yaml

from fedsgcg.clients.methods import METHODS
from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.training import METHOD_NAMES
from fedsgcg.deploy.cli import coordinator
from fedsgcg.deploy.study.costs import Cost, measure_costs, published_costs


def shown(*arguments):
    options = coordinator._parsed(["methods", *arguments])
    sink = io.StringIO()
    assert options.run(options, Screen(sink, 200)) == 0
    return sink.getvalue()


def test_the_list_has_every_method_with_its_published_cost():
    text = shown()
    costs = published_costs().methods
    assert set(costs) == set(METHODS) == set(METHOD_NAMES)
    for name in METHODS:
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert f"{costs[name].step:.2f}" in line


def test_a_card_has_formula_sharing_cost_and_citation():
    text = " ".join(shown("moon").split())
    assert "cos(z, z_p)" in text
    assert "the previous model stays at the site" in text
    assert "method.moon.temperature" in text
    assert "times that of source" in text
    assert "CVPR 2021" in text


def test_an_unknown_method_is_answered_with_the_nearest_name():
    with pytest.raises(FedsgcgError, match="mixstyle"):
        shown("mixstyl")
    with pytest.raises(FedsgcgError, match="--measure"):
        shown("-o", "costs.yaml")


def test_costs_are_measured_in_pairs_and_read_back(tmp_path):
    names = []
    costs = measure_costs(names.append, ("source", "sgcg"), repeats=1, width=4)
    assert names == ["source", "sgcg"]
    assert costs.methods["source"].share == 1.0
    assert costs.methods["sgcg"].bytes > costs.methods["source"].bytes
    assert all(cost.low <= cost.step <= cost.high for cost in costs.methods.values())
    tree = yaml.safe_load(costs.to_yaml())
    assert {name: Cost(**one) for name, one in tree["methods"].items()} == costs.methods
