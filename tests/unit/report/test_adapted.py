"""The table of results after an adaptation to the held-out hospital's images."""

from fedsgcg.server.report.sections.adapted import adapted_table


def row(method, site, seed, metric, value, number=5, heldout=None):
    return {
        "method": method,
        "heldout": site if heldout is None else heldout,
        "seed": seed,
        "site": site,
        "round": number,
        "metric": metric,
        "value": value,
    }


ROWS = [
    row("sgcg", "A", 0, "heldout_dice", 0.5),
    row("sgcg", "A", 0, "heldout_dice", 0.1, number=2),  # a point of the curve
    row("sgcg", "A", 1, "heldout_dice", 0.7),
    row("sgcg", "B", 0, "heldout_dice", 0.8),
    row("sgcg", "A", 0, "adapted_dice_batchnorm", 0.6),
    row("sgcg", "A", 1, "adapted_dice_batchnorm", 0.8),
    row("sgcg", "B", 0, "adapted_dice_batchnorm", 0.7),
    row("sgcg", "A", 0, "adapted_dice_prototypes", 0.5),
    row("sgcg", "C", 0, "adapted_dice_batchnorm", 0.9, heldout="A"),  # an observer
    row("source", "A", 0, "heldout_dice", 0.4),
]


def test_means_and_gains_by_hand():
    table = adapted_table(ROWS, ["source", "sgcg"])
    assert table.columns == ("A", "B", "average")
    assert table.transductive
    shown = {one.title: (one.values, one.gains) for one in table.rows}
    assert {one.method for one in table.rows} == {"sgcg"}
    assert shown["none: the model as trained"] == (("0.600", "0.800", "0.700"), ("", "", ""))
    moments = shown["BatchNorm moments"]
    assert moments == (("0.700", "0.700", "0.700"), ("+0.100", "−0.100", "+0.000"))
    assert shown["prototypes"][0] == ("0.500", "–", "–")


def test_a_study_without_adaptation_has_no_table():
    assert adapted_table([one for one in ROWS if "adapted" not in one["metric"]], ["sgcg"]) is None
    alone = [ROWS[0], row("sgcg", "A", 0, "adapted_dice_amplitude", 0.5)]
    table = adapted_table(alone, ["sgcg"])
    assert table.columns == ("A",)
    assert not table.transductive
