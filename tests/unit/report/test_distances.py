"""Distances of hospitals in the report, and their rank correlation with the Dice."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from fedsgcg.server.report.sections.distances import distances_section, spearman
from fedsgcg.server.report.sections.results import CaseRow

NAN = math.nan
NUMBERS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=12)


def row(number, heldout, site, value, cls="gland"):
    facts = {"method": "sgcg", "heldout": heldout, "seed": 0, "phase": "merge"}
    return facts | {
        "round": number,
        "site": site,
        "cls": cls,
        "metric": "site_distance",
        "value": value,
    }


def case(site, dice):
    return CaseRow("gland", site, "sgcg", "c", 1, dice, NAN, NAN, NAN, "")


def test_the_last_round_of_the_runs_in_which_a_hospital_trained():
    rounds = [
        *(row(1, "B", "A", 9.0), row(2, "B", "A", 1.0), row(2, "B", "A", 99.0, "background")),
        *(row(2, "C", "A", 3.0), row(2, "A", "B", 4.0), row(2, "A", "C", 0.5)),
        {**row(2, "A", "C", 7.0), "metric": "loss"},
    ]
    found = distances_section(rounds, [case("A", 0.5), case("B", 0.25), case("C", 1.0)], ["sgcg"])
    assert [(entry.site, entry.distance, entry.dice) for entry in found.rows] == [
        ("B", "4.000", "0.250"),
        ("A", "2.000", "0.500"),
        ("C", "0.500", "1.000"),
    ]
    (note,) = found.notes
    assert "−1.00, n = 3; no verdict" in note.replace("-1", "−1")
    assert distances_section([], [], ["sgcg"]).rows == ()


@given(NUMBERS)
def test_law_the_correlation_is_that_of_scipy(pairs):
    columns = list(zip(*pairs, strict=True))
    if min(map(len, map(set, columns))) < 2:
        assert math.isnan(spearman(pairs))
    else:
        assert spearman(pairs) == pytest.approx(spearmanr(*columns).statistic, abs=1e-12)
