"""`data.plan=auto`: source hospitals plan a fold, the held-out one does not; all is recorded."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.deploy.study.planned import plan_tables
from fedsgcg.deploy.study.preflight import check_plan
from fedsgcg.deploy.study.record import check_same_study, write_record
from fedsgcg.deploy.study.study import Study
from tests.support.prepared import prepare

WIDTHS = {"Anna": 100, "Bert": 100, "Carl": 250}


def write(folder: Path, site: str, width: int) -> None:
    rng = np.random.default_rng(width)
    (folder / site).mkdir(parents=True, exist_ok=True)
    for case in range(2):
        mask = np.zeros((60, width), np.uint8)
        mask[8:16, 10:20] = 1
        image = rng.integers(0, 255, (60, width, 3), np.uint8)
        Image.fromarray(image).save(folder / site / f"{case}_image.png")
        Image.fromarray(mask).save(folder / site / f"{case}_mask.png")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for site, width in WIDTHS.items():
        write(tmp_path / "raw", site, width)
    assert prepare("manifest", tmp_path / "raw", "-o", tmp_path / "out") == 0
    return tmp_path / "out"


def planned(out: Path, *more: str) -> Study:
    given = [f"data={out / 'data.yaml'}", f"output={out.parent / 'run'}", "data.plan=auto"]
    return plan_study([*given, "network.base_width=4", "device=cpu", *more])


def sizes(study: Study) -> dict[str, int]:
    return {cell.heldout: cell.tree["data"]["image_size"] for cell in study.cells}


def test_each_fold_is_planned_by_its_source_hospitals_alone(out):
    study = planned(out, "heldout=all", "seed=0,1", "method=source,sgcg")
    # The median of 100 and 250 that half of the patients do not exceed is 100, i.e. 112 pixels.
    assert sizes(study) == {"Anna": 112, "Bert": 112, "Carl": 112}
    (fold,) = [plan for plan in study.plans if plan.heldout == "Carl"]
    assert set(fold.summaries) == {"Anna", "Bert"}
    assert fold.settings["intensity"] == "fixed"
    assert {cell.tree["data"]["plan"] for cell in study.cells} == {"fixed"}
    before = [cell.tree["data"] for cell in study.cells if cell.heldout == "Carl"]
    write(out, "Carl", 31)
    write(out, "Bert", 250)
    after = planned(out, "heldout=all", "seed=0,1", "method=source,sgcg")
    assert sizes(after) == {"Anna": 64, "Bert": 64, "Carl": 112}
    write(out, "Bert", 100)
    again = planned(out, "heldout=Carl", "seed=0,1", "method=source,sgcg")
    assert [cell.tree["data"] for cell in again.cells] == before, "Carl's images changed nothing"


def test_settings_of_the_command_line_are_kept_and_candidates_share_the_plan(out):
    study = planned(out, "heldout=Carl", "data.image_size=32", "data.intensity=minmax")
    data = study.cells[0].tree["data"]
    assert (data["image_size"], data["intensity"], data["aspect"]) == (32, "minmax", "pad")
    swept = planned(
        out, "heldout=Anna", "method=sgcg", "prototypes.weight=0.1,0.2", "select=prototypes.weight"
    )
    ((candidates,),) = [swept.candidates.values()]
    inner = [cell for one in candidates for cell in one.inner]
    assert {cell.tree["data"]["image_size"] for cell in inner} == {112}


def test_the_plans_are_shown_and_recorded_and_a_fold_can_be_added(out, capsys):
    study = planned(out, "heldout=Carl")
    study.folder.mkdir()
    write_record(study)
    record = yaml.safe_load((study.folder / "study.yaml").read_text())
    assert record["plans"]["Carl"]["settings"]["image_size"] == 112
    assert record["plans"]["Carl"]["hospitals"]["Anna"]["shape"] == [1, 60, 100]
    assert record["settings"]["sgcg"]["data"]["plan"] == "auto"
    other = planned(out, "heldout=Anna")
    check_same_study(other)
    write_record(other)
    record = yaml.safe_load((study.folder / "study.yaml").read_text())
    assert set(record["plans"]) == {"Anna", "Carl"}
    for table in plan_tables(study.plans):
        Screen(sys.stdout, 200).print(table)
    shown = capsys.readouterr().out
    assert "1x60x100" in shown
    assert "112" in shown


def test_real_hospitals_are_not_planned_while_a_run_starts(out):
    tree = compose([f"data={out / 'data.yaml'}", "data.plan=auto", "output=."])
    tree["data"]["sites"] = list(WIDTHS)
    with pytest.raises(FedsgcgError) as caught:
        check_plan(Plan.from_tree(tree), "cpu")
    assert "CFG-032" in [problem.code for problem in caught.value.problems]
