"""Nested selection: each fold's source sites choose its settings, never the held-out site."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.grid import split_select
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.deploy.study.record import read_record
from fedsgcg.deploy.study.run import run_study
from fedsgcg.deploy.study.selection import Candidate, choose, describe_selection
from fedsgcg.server.report.protocol import protocol_box
from fedsgcg.server.report.study_files import read_study
from tests.support import sites, small


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_hospitals(
        tmp_path_factory.mktemp("four"),
        sites=("A", "B", "C", "D"),
        cases_per_site=2,
        shape=(4, 40, 40),
    )


def planned(root: Path, tmp_path: Path, *more: str, single: bool = False):
    places = [
        f"data.root={root}",
        f"site.cache={tmp_path / 'cache'}",
        f"output={tmp_path / 'study'}",
        *sites.SMALL,
    ]
    return plan_study([*places, *more], single=single)


SWEEP = (
    "method=source,sgcg",
    "prototypes.weight=0.1,0.5",
    "prototypes.temperature=1,2",
    "select=prototypes.weight",
)


def test_a_fold_compares_what_varies_and_chooses_what_is_selected(root, tmp_path):
    study = planned(root, tmp_path, *SWEEP, "heldout=A,B", "observers=[D]")
    assert [cell.name for cell in study.cells] == [
        f"{method} · {heldout} · seed 0"
        for heldout in "AB"
        for method in ("source", "sgcg temperature=1", "sgcg temperature=2")
    ]
    assert set(study.candidates) == {cell.name for cell in study.cells if cell.method != "source"}
    for cell in study.cells:
        for candidate in study.candidates.get(cell.name, ()):
            plan = Plan.from_tree(candidate.tree)
            assert candidate.settings == f"prototypes.weight={plan.prototypes.weight}"
            assert plan.output == cell.tree["output"]
            assert plan.observers == ("D",)
            assert {part.heldout for part in candidate.inner} == {"A", "B", "C"} - {cell.heldout}
    inner = [
        part
        for found in study.candidates.values()
        for candidate in found
        for part in candidate.inner
    ]
    assert len(inner) == 2 * 2 * 2 * 2
    assert len({part.folder for part in [*inner, *study.cells]}) == len(inner) + len(study.cells)
    assert len({part.name for part in inner}) == len(inner)


@pytest.mark.parametrize("federation", ["by_site", "pooled"])
def test_the_heldout_hospital_and_observers_are_no_members_of_what_chooses(
    root, tmp_path, federation
):
    study = planned(
        root,
        tmp_path,
        *SWEEP,
        "heldout=A,B,C",
        "observers=[D]",
        f"federation={federation}",
        "seed=0,1",
    )
    checked = 0
    for cell in study.cells:
        for candidate in study.candidates.get(cell.name, ()):
            for part in candidate.inner:
                plan = Plan.from_tree(part.tree)
                assert not {cell.heldout, "D"} & {
                    *plan.data.sites,
                    *plan.members(),
                    plan.heldout,
                    *plan.observers,
                }
                assert plan.role(part.heldout) == "heldout"
                assert plan.seed == cell.seed
                checked += 1
    assert checked == 3 * 2 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("select=prototypes.wieght",), "CFG-001", "prototypes.weight"),
        (("select=method",), "CFG-001", "several values"),
        (("select=prototypes.weight", "data.sites=[A,B]"), "CFG-003", "two or more in every fold"),
        (("select=prototypes.weight", "federation=local"), "CFG-003", "federation=by_site"),
    ],
)
def test_what_cannot_be_chosen_is_named(root, tmp_path, more, code, words):
    with pytest.raises(FedsgcgError) as caught:
        planned(root, tmp_path, "method=sgcg", "prototypes.weight=0.1,0.5", "heldout=A", *more)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_simulate_has_no_room_for_a_choice(root, tmp_path):
    with pytest.raises(FedsgcgError, match="fedsgcg study"):
        planned(
            root,
            tmp_path,
            *SWEEP[1:2],
            "method=sgcg",
            "select=prototypes.weight",
            "heldout=A",
            single=True,
        )


def test_select_is_taken_off_the_command_line():
    assert split_select(["seed=0", "select=[a.b,c]"]) == (["seed=0"], ["a.b", "c"])
    assert split_select(["seed=0"]) == (["seed=0"], None)


def candidate(folder: Path, number: int, dice: dict[str, list[float]]) -> Candidate:
    """One that is judged at hospitals with these Dice values of cases."""
    cells = []
    for site, values in dice.items():
        output = folder / str(number) / site / "0"
        output.mkdir(parents=True, exist_ok=True)
        rows = [{"site": site, "dice": value} for value in values] + [
            {"site": "observer", "dice": 1.0}
        ]
        pq.write_table(pa.Table.from_pylist(rows), output / "results.parquet")
        cells.append(Cell("x", site, 0, {"output": str(output)}))
    return Candidate(f"v={number}", {}, tuple(cells))


unit = st.floats(0, 1)


@given(
    table=st.lists(
        st.fixed_dictionaries(
            {"A": st.lists(unit, max_size=3), "B": st.lists(unit, min_size=1, max_size=3)}
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_highest_mean_over_hospitals_of_the_means_over_cases_is_chosen(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    table = [{**row, "A": row["A"] if all(other["A"] for other in table) else []} for row in table]
    choice = choose([candidate(folder, number, row) for number, row in enumerate(table)])
    means = [[sum(values) / len(values) for values in row.values() if values] for row in table]
    scores = [sum(row) / len(row) for row in means]
    assert list(choice.scores.values()) == pytest.approx(scores)
    best = int(choice.settings.removeprefix("v="))
    assert scores[best] == pytest.approx(max(scores))


def test_of_equal_values_the_first_is_chosen_and_nobody_to_judge_is_an_error(tmp_path):
    equal = [candidate(tmp_path, number, {"A": [0.5], "B": []}) for number in range(3)]
    assert choose(equal).settings == "v=0"
    with pytest.raises(FedsgcgError, match="RND-403"):
        choose([candidate(tmp_path, 7, {"A": [], "B": []})])


def test_figures_whose_settings_were_not_chosen_in_the_folds_say_so():
    weight, temperature = "prototypes.weight", "prototypes.temperature"
    assert describe_selection([], [], contrasts=False) == ""
    assert (
        "may be optimistic; select=prototypes.weight,prototypes.temperature"
        in describe_selection([], [], contrasts=True)
    )
    both = describe_selection([weight, temperature], [], contrasts=True)
    assert "hospital had no influence on the choice" in both
    assert "optimistic" not in both
    assert describe_selection([], [weight], contrasts=True).startswith(
        f"{weight} was compared, not chosen"
    )


@pytest.mark.slow
def test_a_study_chooses_resumes_after_a_cut_and_trains_what_it_chose(hospitals, tmp_path, capsys):
    from fedsgcg.common.console import run_command

    def study(*more: str, folder: str):
        axes = ("method=source", "heldout=North", "federation.rounds=1", "ray.cpus=1", *more)
        return small.plan(hospitals, tmp_path / folder, "data.sites=[North,South,East]", *axes)

    swept = study(
        "method.learning_rate=0.000001,0.01", "select=method.learning_rate", folder="nested"
    )
    (cell,) = swept.cells
    assert run_command(lambda console: run_study(swept, console)) == 0
    assert "is chosen" in capsys.readouterr().out
    (chosen,) = read_record(swept.folder)["selection"]["chosen"]
    assert (chosen["method"], chosen["heldout"], chosen["seed"]) == ("source", "North", 0)
    assert chosen["scores"][chosen["settings"]] == max(chosen["scores"].values())
    assert {row["chosen"] for row in small.table(swept.folder / "results.parquet")} == {
        chosen["settings"]
    }
    assert {row["heldout"] for row in small.table(swept.folder / "results.parquet")} == {"North"}
    words = dict(protocol_box(read_study(swept.folder)[0]))["Choice of settings"]
    assert any(chosen["settings"] in line for line in words)

    alone = study(chosen["settings"], folder="alone")
    assert run_command(lambda console: run_study(alone, console)) == 0
    assert alone.cells[0].outcome()["digest"] == cell.outcome()["digest"]

    inner = sorted((swept.folder / "selection/North").glob("*/*/0"))
    assert len(inner) == 4
    for path in inner:  # the held-out hospital was asked for nothing
        assert sorted(folder.name for folder in (path / "sites").iterdir()) == ["East", "South"]
        events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
        assert "North" not in {event.get("site") for event in events} | {
            event["heldout"] for event in events
        }

    stamps = {path: (path / "results.parquet").stat().st_mtime_ns for path in inner}
    digest = cell.outcome()["digest"]
    for path in (inner[0], cell.folder):  # as a cut leaves them
        (path / "outcome.json").unlink()
        (path / "results.parquet").unlink()
    assert run_command(lambda console: run_study(swept, console)) == 0
    assert "1 of 4 inner cells to do" in capsys.readouterr().out
    assert cell.outcome()["digest"] == digest
    assert all((path / "results.parquet").stat().st_mtime_ns == stamps[path] for path in inner[1:])
    assert read_record(swept.folder)["selection"]["chosen"] == [chosen]
