"""References: which cells they need, and the best single hospital, which its peers choose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.run import RunSettings
from fedsgcg.deploy.study.references import (
    best_hospitals,
    best_rows,
    check_references,
    reference_variants,
)

SCORES = st.lists(st.floats(0, 1, width=16), min_size=9, max_size=9)
SOURCES = ("A", "B", "C")


def rows_of(scores, heldout_dice=(0.5, 0.5, 0.5)):
    """One case per model and hospital; D is held out."""
    rows = []
    for number, trained in enumerate(SOURCES):
        others = [site for site in SOURCES if site != trained]
        own = (*scores[2 * number : 2 * number + 2], heldout_dice[number])
        values = zip((*others, "D"), own, strict=True)
        rows += [
            {
                **{"method": "source local", "heldout": "D", "seed": 0, "trained_on": trained},
                **{"site": site, "dice": dice, "case": "1", "federation": "local", "chosen": ""},
            }
            for site, dice in values
        ]
    return rows


@given(SCORES, SCORES)
def test_the_other_training_hospitals_choose_and_the_heldout_one_never(scores, elsewhere):
    (best,) = best_hospitals(rows_of(scores))
    means = [(scores[2 * number] + scores[2 * number + 1]) / 2 for number in range(3)]
    assert best.scores == pytest.approx(dict(zip(SOURCES, means, strict=True)))
    assert best.hospital == SOURCES[means.index(max(means))]
    changed = rows_of(scores, elsewhere[:3])
    assert best_hospitals(changed) == [best]
    (row,) = best_rows(changed, [best])
    assert row["method"] == "source best_single"
    assert row["federation"] == "best_single"
    assert row["chosen"] == f"trained_on={best.hospital}"
    assert (row["site"], row["trained_on"]) == ("D", "")
    assert row["dice"] == elsewhere[SOURCES.index(best.hospital)]


def test_cases_then_hospitals_count_the_same():
    rows = rows_of([0.5] * 6)
    rows += [{**rows[0], "dice": 0.9, "case": str(number)} for number in range(5)]
    (best,) = best_hospitals(rows)
    assert best.scores["A"] == pytest.approx(((0.5 + 5 * 0.9) / 6 + 0.5) / 2)


def test_a_fold_without_every_model_has_no_best_hospital():
    rows = [row for row in rows_of([0.5] * 6) if row["trained_on"] != "B"]
    assert best_hospitals(rows) == []
    assert best_hospitals([{**row, "trained_on": ""} for row in rows]) == []


def test_the_best_hospital_needs_the_models_of_all():
    assert [one.federation for one in reference_variants(["best_single"])] == ["local"]
    both = reference_variants(["pooled", "best_single", "local"])
    assert [one.label for one in both] == ["source local", "source pooled"]


@pytest.mark.parametrize(
    ("sources", "text"),
    [({"": ["A", "B"]}, "heldout=all"), ({"A": ["B"]}, "1 training hospital and A held out")],
)
def test_a_best_hospital_that_nobody_could_judge_is_refused(sources, text):
    with pytest.raises(FedsgcgError, match="CFG-040") as caught:
        check_references(["best_single"], sources)
    assert text in str(caught.value)
    check_references(["local", "pooled"], sources)


def test_an_unknown_reference_is_refused():
    with pytest.raises(FedsgcgError, match="best_single"):
        RunSettings(references=("globl",))
