"""The table of all methods: results, costs and what leaves a hospital, from the study's files."""

import pytest

from fedsgcg.server.report.reader import SHOWN
from fedsgcg.server.report.sections.methods import (
    bytes_sent,
    in_domain,
    step_seconds,
    worst_hospitals,
)
from fedsgcg.server.report.tables import AVERAGE


def test_the_metrics_that_the_table_needs_are_read():
    assert {"seconds", "steps", "bytes_up"} <= SHOWN


def entry(method, metric, value, number=2, site="A", **more):
    row = {"method": method, "metric": metric, "value": value, "round": number, "site": site}
    return row | {"heldout": "B", "seed": 0, "trained_on": ""} | more


def step(method, seconds, steps, **more):
    return [entry(method, "seconds", seconds, **more), entry(method, "steps", steps, **more)]


def test_a_step_takes_the_median_of_hospitals_and_rounds_after_the_first():
    rows = [*step("source", 9.0, 1.0, number=1), *step("source", 4.0, 4.0)]
    rows += [*step("source", 6.0, 2.0, site="C"), *step("source", 4.0, 2.0, number=3)]
    rows += [*step("gin", 10.0, 2.0, number=1), entry("sgcg", "seconds", 3.0)]
    assert step_seconds(rows) == pytest.approx({"source": 2.0, "gin": 5.0})


def test_hospitals_that_train_alone_do_not_mix_their_numbers():
    rows = step("source local", 2.0, 1.0, trained_on="A")
    rows += step("source local", 6.0, 1.0, trained_on="C", heldout="B")
    assert step_seconds(rows) == pytest.approx({"source local": 4.0})


def test_bytes_are_those_of_one_hospital_in_a_round():
    sizes = {"A": 1, "B": 5, "C": 9}
    rows = [entry("source", "bytes_up", size, site=site) for site, size in sizes.items()]
    assert bytes_sent([*rows, entry("source", "bytes_down", 70.0)]) == {"source": 5.0}


def test_the_worst_hospital_is_that_of_the_lowest_mean_over_structures():
    dice = {"A": (0.9, 0.5), "B": (0.6, 0.7), AVERAGE: (0.1, 0.1)}
    rows = [
        {"method": "gin", "site": site, "structure": structure, "dice_mean": value}
        for site, values in dice.items()
        for structure, value in zip(("disc", "cup"), values, strict=True)
    ]
    rows.append({"method": "ram", "site": "A", "structure": "disc", "dice_mean": 0.2})
    assert worst_hospitals(rows, 2) == {"gin": (pytest.approx(0.65), "B")}
    assert worst_hospitals(rows[:2], 1) == {}


def test_in_domain_is_the_last_validation_of_every_fold():
    def seen(value, number, **more):
        return entry("gin", "validation_dice", value, number, cls="disc", **more)

    rows = [seen(0.1, 1), seen(0.8, 2), seen(0.6, 2, site="C"), seen(0.9, 3, heldout="D")]
    assert in_domain(rows) == {"gin": pytest.approx((0.7 + 0.9) / 2)}
