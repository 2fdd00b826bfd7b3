"""The protocol: who may be asked to train, how a model is chosen, and what the report is told."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.wire.messages import ENROL, EVALUATE, STATISTICS, TRAIN
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.records.model_card import protocol
from fedsgcg.server.selection import best_so_far, guard_recipients, source_score
from tests.support.plans import small_plan

MODEL = Weights((("x", (1,)),), np.zeros(1, np.float32))
OTHER = Weights((("x", (1,)),), np.ones(1, np.float32))


@pytest.mark.parametrize("kind", [TRAIN, STATISTICS])
@pytest.mark.parametrize("recipient", ["D", "C"])
def test_neither_the_heldout_site_nor_an_observer_may_contribute(
    kind: str, recipient: str, tmp_path: Path
) -> None:
    plan = small_plan(tmp_path, observers=["C"])
    guard_recipients(plan, kind, ["A", "B"])
    with pytest.raises(FedsgcgError) as caught:
        guard_recipients(plan, kind, ["A", recipient])
    assert caught.value.code == "ROL-201"
    assert recipient in str(caught.value)


def test_everybody_may_enrol_and_be_evaluated(tmp_path: Path) -> None:
    for kind in (ENROL, EVALUATE):
        guard_recipients(small_plan(tmp_path), kind, ["A", "D"])


def test_source_score_weighs_sites_by_their_cases() -> None:
    assert source_score([(0.5, 1), (0.9, 3)]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "nonsense",
    [(np.nan, 2), (1.5, 2), (-0.1, 2), (0.5, 0), (0.5, -1), (0.5, np.inf), (0.5, np.nan)],
)
def test_source_score_leaves_nonsense_out(nonsense: tuple[float, float]) -> None:
    assert source_score([(0.5, 2), nonsense]) == 0.5
    assert source_score([nonsense]) is None


def test_best_model_is_kept_until_a_better_one_comes() -> None:
    first = best_so_far(None, 1, 0.5, MODEL)
    assert first is not None
    assert (first.round, first.score) == (1, 0.5)
    assert best_so_far(first, 2, 0.5, OTHER) is first  # an equal score keeps the earlier one
    assert best_so_far(first, 2, 0.4, OTHER) is first
    assert best_so_far(first, 2, None, OTHER) is first
    second = best_so_far(first, 3, 0.6, OTHER)
    assert second is not None
    assert (second.round, second.weights) == (3, OTHER)


def test_the_untrained_model_is_never_chosen() -> None:
    assert best_so_far(None, 0, 0.99, MODEL) is None


def test_protocol_says_who_trained_and_how_the_model_was_chosen(tmp_path: Path) -> None:
    plan = small_plan(
        tmp_path, federation__selection="source_validation", data__largest_component=True
    )
    found = protocol(plan, ["B", "A"], 2)
    assert found["trained"] == ["A", "B"]
    assert found["heldout"] == "D"
    assert found["selected_round"] == 2
    assert "training sites' own validation" in found["selection"]
    assert "20%" in found["splits"]
    assert found["post_processing"] == {
        "gland": "largest connected component; holes kept; empty stays empty"
    }
    assert found["structures"] == {"gland": ["gland"]}
    assert found["decision"].endswith("bilinear to the images' own size, then the likeliest class")
    sigmoid = small_plan(tmp_path, data__activation="sigmoid", data__threshold=0.75)
    assert protocol(sigmoid, ["A"], 3)["decision"].endswith("then above 0.75 for each structure")
    bare = small_plan(tmp_path)
    assert protocol(bare, ["A"], 3)["post_processing"] == {
        "gland": "every component kept; holes kept; empty stays empty"
    }


def test_protocol_says_for_each_structure_what_is_done_to_its_mask(
    tmp_path: Path, make_data: Callable[..., Any]
) -> None:
    plan = replace(small_plan(tmp_path), data=make_data("fundus"))
    steps = "largest connected component; holes filled in each slice"
    assert protocol(plan, ["A"], 3)["post_processing"] == {
        "disc": f"{steps}; empty stays empty",
        "cup": f"{steps}; cut to disc; empty stays empty",
    }


@pytest.mark.parametrize(
    ("name", "largest", "holes"),
    [
        ("prostate", True, False),
        ("promise12", True, False),
        ("fundus", True, True),
        ("spinegm", False, False),
        ("synthetic", True, True),
    ],
)
def test_post_processing_is_the_data_sets_own_rule(
    name: str, largest: bool, holes: bool, make_data: Callable[..., Any]
) -> None:
    """Off unless the data set asks for it: a structure of two parts would lose one."""
    data = make_data(name)
    assert (data.largest_component, data.fill_holes) == (largest, holes)
