"""The axes of a study, from the command line and an experiment, and the resulting variants."""

from pathlib import Path

import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.run_folder.paths import cell_path
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.grid import Variant, split_axes, variants, with_grid
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.server.aggregation.amplitudes import sharing_level
from tests.support import sites


def labels(axes, method="source"):
    return [variant.label for variant in variants(axes, method, "by_site")]


def test_a_value_with_commas_is_an_axis_and_everything_else_stays():
    axes, rest = split_axes(
        [
            *(
                "method=[source,sgcg]",
                "prototypes.weight=0.1,0.5",
                "prototypes.views=[source],[source,ram]",
            ),
            *(
                "data.sites=[A,B]",
                "federation.rounds=3",
                "data.root=/a,/b",
                "heldout=A,'B'",
                "seed=0",
            ),
        ]
    )
    assert axes == {
        "method": ["source", "sgcg"],
        "prototypes.weight": ["0.1", "0.5"],
        "prototypes.views": ["[source]", "[source,ram]"],
        "heldout": ["A", "'B'"],
        "seed": ["0"],
    }
    assert rest == ["data.sites=[A,B]", "federation.rounds=3", "data.root=/a,/b"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seed=range(3)", ["0", "1", "2"]),
        ("seed=choice(4,5)", ["4", "5"]),
        ("method=choice(source,sgcg)", ["source", "sgcg"]),
        ("method=glob(*ram*)", ["ram", "ram_sgcg", "ram_sgcg_mixed"]),
        ("heldout=choice(A,B)", ["A", "B"]),
        ("prototypes.weight=range(0.1,0.5,0.1)", ["0.1", "0.2", "0.3", "0.4"]),
        ("prototypes.weight=1e-3,0.001,0.10", ["0.001", "0.1"]),
        ("prototypes.normalize=true,false", ["true", "false"]),
        (
            "data.intensity=choice(minmax,'zscore','a,b','true')",
            ["minmax", "zscore", '"a,b"', '"true"'],
        ),
        ("data.classes={a: [0], b: [1]},{a: [0], c: [1]}", ["{a:[0],b:[1]}", "{a:[0],c:[1]}"]),
    ],
)
def test_a_sweep_is_written_as_in_hydra(text, values):
    axes, rest = split_axes([text])
    assert list(axes.values()) == [values]
    assert not rest


def test_a_sweep_without_values_is_refused():
    with pytest.raises(FedsgcgError, match="a list of values"):
        split_axes(["prototypes.weight=interval(0,1)"])
    assert split_axes(["prototypes.weight=choice(0.5)"]) == ({}, ["prototypes.weight=0.5"])


def test_all_mistakes_of_the_axes_are_named_at_once():
    with pytest.raises(FedsgcgError) as caught:
        split_axes(["method=sgcq", "method=ram", "federation=by_sight", "data.sites=A,B"])
    text = str(caught.value)
    for words in ("method=sgcq and method=ram", "by_site", "data.sites=[A,B]"):
        assert words in text


def test_the_command_line_beats_the_experiment():
    grid = {
        "method": ["source", "sgcg"],
        "prototypes.weight": [0.1, 1.0],
        "prototypes.views": [["source"], ["source", "ram"]],
    }
    assert with_grid({"method": ["ram"]}, grid, ["prototypes.weight=0.3"]) == {
        "method": ["ram"],
        "prototypes.views": ["[source]", "[source,ram]"],
    }
    with pytest.raises(FedsgcgError, match="method"):
        with_grid({}, {"method": ["nonsense"]}, [])


def test_labels_name_what_differs_and_nothing_else():
    assert labels({}) == ["source"]
    assert labels({"method": ["source", "ram"]}) == ["source", "ram"]
    assert labels({"federation": ["pooled"]}) == ["source"]
    assert labels({"federation": ["pooled", "by_site"]}) == ["source pooled", "source by_site"]
    swept = {
        "method": ["ram", "ram_sgcg"],
        "prototypes.weight": ["0.1", "1"],
        "method.ram.sharing": ["local"],
    }
    assert labels(swept) == [
        "ram sharing=local",
        "ram_sgcg weight=0.1 sharing=local",
        "ram_sgcg weight=1 sharing=local",
    ]
    ends = {"prototypes.weighting": ["pixels"], "federation.weighting": ["sites"]}
    assert labels(ends, "sgcg") == ["sgcg prototypes.weighting=pixels federation.weighting=sites"]


def test_what_hospitals_share_of_their_amplitudes_varies_only_where_there_are_other_hospitals():
    sharing = {"method.ram.sharing": ["local", "bank"]}
    assert labels(
        {"method": ["source", "ram"], "federation": ["local", "pooled", "by_site"]} | sharing
    ) == [
        *("source local", "source pooled", "source by_site", "ram local", "ram pooled"),
        *("ram by_site sharing=local", "ram by_site sharing=bank"),
    ]
    assert [
        v.settings for v in variants({"federation": ["pooled"]} | sharing, "ram", "by_site")
    ] == [()]


def test_a_variant_is_a_command_line_of_its_own():
    variant = Variant("sgcg weight=1", "sgcg", "pooled", ("prototypes.weight=1",))
    assert variant.overrides == ["method=sgcg", "federation=pooled", "prototypes.weight=1"]
    assert cell_path("sgcg pooled root=a/b", "B", 3) == Path("sgcg,pooled,root=a-b/B/3")
    assert cell_path("source local", "", 0, "A") == Path("source,local/all-sites/0-A")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from fedsgcg.common.images.phantoms import write_hospitals

    return write_hospitals(
        tmp_path_factory.mktemp("grid"), sites=("A", "B", "C"), cases_per_site=2, shape=(4, 40, 40)
    )


def planned(root, tmp_path, *overrides):
    places = [f"data.root={root}", f"output={tmp_path / 'run'}", f"site.cache={tmp_path / 'cache'}"]
    return plan_study([*places, *sites.SMALL, *overrides])


def test_local_makes_a_cell_of_each_training_hospital(root, tmp_path):
    study = planned(root, tmp_path, "federation=local,by_site", "heldout=A,B", "method=source")
    found = [
        (cell.method, cell.heldout, cell.trained_on, cell.tree["data"]["sites"])
        for cell in study.cells
    ]
    assert found == [
        ("source local", "A", "B", ["A", "B"]),
        ("source local", "A", "C", ["A", "C"]),
        ("source by_site", "A", "", ["A", "B", "C"]),
        ("source local", "B", "A", ["A", "B"]),
        ("source local", "B", "C", ["B", "C"]),
        ("source by_site", "B", "", ["A", "B", "C"]),
    ]
    assert len({cell.folder for cell in study.cells}) == 6


def test_a_swept_value_of_the_wrong_kind_is_named(root, tmp_path):
    with pytest.raises(FedsgcgError) as caught:
        planned(root, tmp_path, "method=sgcg", "prototypes.weight=0.1,much")
    assert caught.value.problems[0].where == "prototypes.weight"
    assert "a number" in str(caught.value)
    with pytest.raises(FedsgcgError, match="more than zero"):
        planned(root, tmp_path, "method=sgcg", "prototypes.temperature=0.5,-1")


@pytest.mark.parametrize(
    ("experiment", "cells"),
    [
        *(("ablation", 4), ("federation_cost", 8), ("lambda_sweep", 6), ("temperature_sweep", 7)),
        *(("memory_policies", 7), ("ram_sharing", 6)),
    ],
)
def test_experiments_are_the_grids_they_say(root, tmp_path, experiment, cells):
    study = planned(root, tmp_path, f"experiment={experiment}", "heldout=A")
    assert len(study.cells) == cells
    assert len({cell.method for cell in study.cells}) == len(
        {cell.folder.parent.parent for cell in study.cells}
    )


def test_the_sharing_experiment_has_every_form_and_the_consent_that_it_needs(root, tmp_path):
    plans = [
        Plan.from_tree(cell.tree)
        for cell in planned(root, tmp_path, "experiment=ram_sharing", "heldout=A").cells
    ]
    mixing = [
        (plan.federation.ownership, plan.method.ram.sharing) for plan in plans if plan.method.mixes
    ]
    assert mixing == [
        ("pooled", "local"),
        *(("by_site", sharing) for sharing in ("local", "summary", "bank")),
    ]
    assert all(sharing_level(plan) in {"", *plan.site.shares} for plan in plans)


def test_the_same_grid_is_the_same_folder_and_more_values_are_too(root, tmp_path):
    places = [f"data.root={root}", f"site.cache={tmp_path / 'cache'}", *sites.SMALL]
    folders = [
        plan_study([*places, *more]).folder.name
        for more in (
            ["method=sgcg", "prototypes.weight=0.1,1"],
            ["method=sgcg", "prototypes.weight=0.1,1,2", "federation=pooled,by_site"],
            ["experiment=lambda_sweep"],
            ["method=sgcg", "federation.rounds=9"]
            if "federation.rounds=4" not in places
            else ["method=sgcg"],
        )
    ]
    assert folders[0] == folders[1] == folders[3]
    assert folders[2].startswith("synthetic-lambda_sweep-")


def test_a_study_with_cells_of_single_hospitals_is_of_the_same_data(root, tmp_path):
    whole, alone = (
        planned(root, tmp_path, "heldout=A", f"federation={name}") for name in ("by_site", "local")
    )
    assert whole.data == alone.data
    assert alone.cells[0].tree["data"]["sites"] == ["A", "B"]


def test_settings_of_one_method_vary_that_method_alone() -> None:
    axes = {"method": ["source", "moon", "jigen"], "method.moon.weight": ["1", "5"]}
    found = variants(axes, "source", "by_site")
    assert [one.label for one in found] == ["source", "moon weight=1", "moon weight=5", "jigen"]
