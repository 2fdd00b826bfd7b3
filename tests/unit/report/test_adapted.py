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


def case(method, site, seed, name, dice, adapt=None, structure="gland"):
    found = {"method": method, "heldout": site, "site": site, "seed": seed, "case": name}
    return found | {"structure": structure, "dice": dice} | ({"adapt": adapt} if adapt else {})


def test_intervals_are_over_cases_and_those_of_differences_are_paired():
    rounds = [
        row("sgcg", "A", 0, "heldout_dice", 0.5),
        row("sgcg", "A", 0, "adapted_dice_batchnorm", 0.6),
    ]
    plain = [case("sgcg", "A", 0, f"{n}", 0.4 + 0.1 * n) for n in range(3)]
    moved = [case("sgcg", "A", 0, f"{n}", 0.5 + 0.1 * n, "batchnorm") for n in range(3)]
    other = [case("sgcg", "B", 0, "x", 0.9, "batchnorm") | {"heldout": "A"}]  # an observer
    table = adapted_table(rounds, ["sgcg"], plain, [*moved, *other])
    without, adapted = table.rows
    # Student's t with two degrees of freedom: 4.303 * 0.1 / sqrt(3) = 0.248
    assert without.intervals == ("0.252 to 0.748",)
    assert (without.gains, without.gain_intervals) == (("",), ("",))
    assert adapted.intervals == ("0.352 to 0.848",)
    # Every case gains the same.
    assert (adapted.gains, adapted.gain_intervals) == (("+0.100",), ("+0.100 to +0.100",))


def test_a_hospital_without_single_cases_has_means_and_no_intervals():
    table = adapted_table(ROWS, ["sgcg"])
    assert {end for one in table.rows for end in one.intervals} == {"–"}
    moments = next(one for one in table.rows if one.title == "BatchNorm moments")
    assert moments.gain_intervals == ("–", "–", "–")
