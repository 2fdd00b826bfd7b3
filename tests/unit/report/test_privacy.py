"""The section on privacy: what it compares, and what it says of attacks."""

import pytest

from fedsgcg.server.report.differences import CaseValues
from fedsgcg.server.report.gallery import gallery
from fedsgcg.server.report.labels import labels_of
from fedsgcg.server.report.sections.privacy import privacy_section, short_names
from tests.unit.report.test_tables import row

FLOORS, WEAK, STRONG = "sgcg privacy=floors", "sgcg privacy=dp_weak", "sgcg privacy=dp_strong"
DICE = {FLOORS: 0.75, WEAK: 0.5, STRONG: 0.125}


def spent(method, value, site="A"):
    return {"method": method, "metric": "epsilon", "site": site, "value": value}


def attack(auc, low, high, **more):
    found = {"auc": auc, "auc_interval": [low, high], "tpr": 0.25}
    return {"membership_update": found, "membership_statistics": None, **more}


def section(attacks, rounds):
    rows = [row(name, case=f"c{n}", dice=value) for name, value in DICE.items() for n in range(3)]
    dp = {"delta": 1e-5, "channels": ["statistics", "weights"], "noise": "seeded"}
    settings = {name: {"privacy": {"dp": dp}} for name in DICE}
    labels = labels_of(rows)
    return privacy_section(CaseValues(rows), labels, ["gland"], rounds, settings, attacks)


def test_epsilon_is_the_largest_of_a_site_and_the_line_is_training_without_noise():
    found = section({}, [spent(WEAK, 9.0), spent(WEAK, 100.0, "B"), spent(STRONG, 7.5)])
    assert [line.epsilon for line in found.rows] == ["–", "100", "7.5"]
    (panel,) = found.panels  # no attacks, no second panel
    assert panel.drawing.alt == (
        "Mean Dice of gland by epsilon of a site: dp_weak 100: 0.500; dp_strong 7.5: 0.125."
    )
    assert found.plain
    assert found.seeded


def test_the_success_of_attacks_is_drawn_for_every_training_with_all_seeds():
    attacks = {
        FLOORS: [attack(0.75, 0.5, 0.875), attack(0.5, 0.25, 0.625)],
        WEAK: [attack(0.5, 0.375, 0.625)],
    }
    found = section(attacks, [spent(WEAK, 100.0), spent(STRONG, 7.5)])
    assert "floors 0.625: 0.750; dp_weak 0.5: 0.500." in found.panels[1].drawing.alt
    assert set(gallery({"privacy": found.drawings})) == {
        "privacy-dice-over-epsilon",
        "privacy-dice-over-the-success-of-an-attack",
    }
    assert found.rows[0].attacks[1] == "AUC 0.62 (0.25 to 0.88), TPR 25%"
    assert found.rows[0].attacks[2] == "–"


def test_reconstructions_are_sentences():
    more = {
        "difference": {"error": 0.001},
        "span": [
            {"pixels": 10, "rank": 9, "outside": 0.0, "chance": 0.5},
            {"pixels": 3, "rank": 2, "outside": 0.0, "chance": 0.75},
        ],
    }
    found = section({FLOORS: [attack(0.5, 0.4, 0.6, **more)]}, [])
    (line,) = [each for each in found.rows if each.label == FLOORS]
    assert line.others == (
        "difference of two releases: relative error 0.001",
        "span of 3 pixels (below the floor): rank 2, their features outside it 0 "
        "(other patients 0.75)",
    )


@pytest.mark.parametrize("rounds", [[], [{"method": FLOORS, "metric": "loss", "value": 1.0}]])
def test_a_study_without_noise_and_attacks_has_no_such_section(rounds):
    assert section({}, rounds) is None


def test_names_lose_what_all_have_and_never_everything():
    assert short_names(["sgcg privacy=a", "sgcg privacy=b shared=full"]) == {
        "sgcg privacy=a": "a",
        "sgcg privacy=b shared=full": "b full",
    }
    assert short_names(["sgcg"]) == {"sgcg": "sgcg"}
    assert short_names(["sgcg", "sgcg privacy=a"]) == {"sgcg": "sgcg", "sgcg privacy=a": "a"}
