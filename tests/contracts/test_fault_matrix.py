"""Every row of the fault matrix has a test, or a reason why it has none."""

from pathlib import Path

import yaml

from tests.contracts.test_docs import load_generator

MATRIX = Path(__file__).resolve().parents[1] / "faults" / "matrix.yaml"
ATTACKS = MATRIX.with_name("attacks.yaml")


def test_every_row_has_a_test_or_a_reason_and_not_both() -> None:
    tests = load_generator().tests_by_row()
    rows = yaml.safe_load(MATRIX.read_text())["rows"]
    assert list(rows) == list(range(1, 73))
    assert set(tests) <= set(rows), "a test names a row that does not exist"
    neither = [
        number for number in rows if not tests.get(number) and "untested" not in rows[number]
    ]
    assert neither == []
    both = [number for number in rows if tests.get(number) and "untested" in rows[number]]
    assert both == [], "these rows have a test now: remove their `untested` from matrix.yaml"


def test_every_row_says_what_must_follow() -> None:
    matrix = yaml.safe_load(MATRIX.read_text())
    for row in matrix["rows"].values():
        assert row["layer"] in matrix["layers"]
        assert row["fault"]
        assert row["outcome"]


def test_every_attack_has_a_test() -> None:
    tests = load_generator().tests_by_attack()
    groups = yaml.safe_load(ATTACKS.read_text())
    names = [name for entries in groups.values() for name in entries]
    assert len(names) == len(set(names))
    assert sorted(tests) == sorted(names), "an attack without a test, or a test of an unknown one"
    assert all(set(entry) == {"attack", "outcome"} for e in groups.values() for entry in e.values())
