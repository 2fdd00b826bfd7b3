"""`fedsgcg data check` finds every planted fault of own data, and a study starts with the map."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.cli.sheet import shown_part
from fedsgcg.deploy.study.classmap import ENOUGH, check_classes, spread
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.deploy.study.preflight import without_validation
from tests.support.prepared import prepare

TINY = ("data.image_size=32", "network.base_width=4", "device=cpu", "method.batch_size=2")


def photographs(folder: Path, cases: int = 2) -> Path:
    """Two hospitals with pictures of 40 x 32 pixels and a square of label 3 in each mask."""
    rng = np.random.default_rng(0)
    for site in ("Anna", "Bert"):
        (folder / site).mkdir(parents=True)
        for case in range(cases):
            mask = np.zeros((32, 40), np.uint8)
            mask[8:16, 10:20] = 3
            image = rng.integers(0, 255, (32, 40, 3), np.uint8)
            Image.fromarray(image).save(folder / site / f"{case}_image.png")
            Image.fromarray(mask).save(folder / site / f"{case}_mask.png")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    assert prepare("manifest", photographs(tmp_path / "raw"), "-o", folder) == 0
    return folder


def check(out: Path, capsys: pytest.CaptureFixture[str], *more: str):
    """Return the exit code, the findings by code, and the last event."""
    capsys.readouterr()
    code = main(["data", "check", str(out), *TINY, "--json", *more])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found: dict[str, list[dict[str, str]]] = {}
    for line in lines[:-1]:
        found.setdefault(line["code"], []).append(line)
    return code, found, lines[-1]


def test_sound_data_give_a_sheet_with_every_case_and_no_problem(out, capsys):
    code, found, end = check(out, capsys)
    assert code == 0, found
    assert set(found) == {"", "SITE-519", "DAT-193"}, (
        "notes: no patient is named, 20 % of 2 is none"
    )
    assert end["cases"] == {"Anna": 2, "Bert": 2}
    sheet = Path(end["sheet"])
    assert sheet.stat().st_mode & 0o077 == 0
    page = sheet.read_text()
    assert page.count("<figure>") == 4, "none is marked"
    assert page.count('class="contour"') == 4
    assert "http" not in page.replace("http://www.w3.org", "")
    # 80 of 1280 pixels, by hand: 6.25 % in both cases of each hospital.
    assert page.count("6.25 % in 2") == 2


def test_each_planted_fault_is_found_with_its_repair(out, capsys):
    blank = Image.new("L", (40, 32))
    blank.save(out / "Anna" / "0_mask.png")
    shutil.copy(out / "Anna" / "1_image.png", out / "Bert" / "1_image.png")
    (out / "Bert" / "0_image.png").write_bytes(b"cut")
    code, found, _ = check(out, capsys)
    assert code == 1
    assert [one["what"] for one in found["DAT-110"]] == ["Anna 0"]
    assert [one["what"] for one in found["DAT-171"]] == ["Bert 1"]
    assert "Anna 1" in found["DAT-171"][0]["found"]
    assert [one["what"] for one in found["DAT-103"]] == ["Bert 0"]
    assert all(one["action"] for code in found if code for one in found[code])


def test_a_class_that_one_hospital_lacks_is_a_warning_and_one_of_nobody_an_error(out, capsys):
    for case in range(2):
        Image.new("L", (40, 32)).save(out / "Anna" / f"{case}_mask.png")
    code, found, _ = check(out, capsys)
    (one,) = found["DAT-172"]
    assert (code, one["verdict"]) == (3, "warn")
    assert one["found"].endswith("Anna")
    text = (out / "data.yaml").read_text()
    (out / "data.yaml").write_text(text.replace("class_3: [3]", "class_3: [3]\n  cyst: [9]"))
    code, found, _ = check(out, capsys)
    assert code == 1
    assert {one["what"]: one["verdict"] for one in found["DAT-172"]} == {
        "class_3": "warn",
        "cyst": "fail",
    }


def test_a_folder_without_settings_says_what_to_add(tmp_path, capsys):
    assert main(["data", "check", str(photographs(tmp_path / "raw"))]) == 2
    assert "DAT-170" in capsys.readouterr().err


def test_a_wrong_class_map_is_one_message_before_the_first_cell(out, tmp_path):
    text = (out / "data.yaml").read_text().replace("[3]", "[1]")
    (out / "data.yaml").write_text(text)
    run = tmp_path / "run"
    arguments = [f"data={out / 'data.yaml'}", f"output={run}", "heldout=all", "seed=0,1", *TINY]
    with pytest.raises(FedsgcgError) as caught:
        plan_study(arguments)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("DAT-174", "Anna, Bert")
    assert problem.found.startswith("values 3;")
    assert problem.expected == "values 0, 1"
    assert not run.exists()


def test_one_usable_case_or_damaged_files_do_not_stop_a_study(out, tmp_path):
    """What a run survives is left to it: a wrong mask of one case, and files that are damaged."""
    Image.fromarray(np.full((32, 40), 77, np.uint8)).save(out / "Anna" / "0_mask.png")
    for case in range(2):
        (out / "Bert" / f"{case}_image.png").write_bytes(b"cut")
    arguments = [f"data={out / 'data.yaml'}", f"output={tmp_path / 'run'}", "heldout=Bert", *TINY]
    assert len(plan_study(arguments).cells) == 1


def plans_of(out: Path, run: Path, *more: str) -> list[Plan]:
    arguments = [f"data={out / 'data.yaml'}", f"output={run}", *TINY, *more]
    return [Plan.from_tree(cell.tree) for cell in plan_study(arguments).cells]


def wrong_masks(folder: Path) -> None:
    for path in folder.glob("*_mask.png"):
        Image.fromarray(np.full((32, 40), 77, np.uint8)).save(path)


def test_the_masks_of_a_held_out_hospital_are_not_read_before_it_is_evaluated(out, tmp_path):
    """Only a fold that trains on the hospital may see that its masks do not fit."""
    wrong_masks(out / "Bert")
    assert len(plans_of(out, tmp_path / "run", "heldout=Bert")) == 1
    with pytest.raises(FedsgcgError) as caught:
        plans_of(out, tmp_path / "all", "heldout=all")
    assert [(one.code, one.where) for one in caught.value.problems] == [("DAT-174", "Bert")]


def test_masks_of_a_hospital_without_labels_and_of_test_cases_are_never_opened(tmp_path):
    raw = photographs(tmp_path / "raw")
    shutil.copytree(raw / "Bert", raw / "Carl")
    for case in range(2):
        pixels = np.full((32, 40, 3), 100 + case, np.uint8)
        pixels[0, 0] = 0
        Image.fromarray(pixels).save(raw / "Carl" / f"{case}_image.png")
    out = tmp_path / "out"
    assert prepare("manifest", raw, "-o", out) == 0
    wrong_masks(out / "Bert")
    hidden = ("heldout=Anna", "unlabelled=[Bert]", "method=segclr", "method.segclr.pairs=augment")
    assert len(plans_of(out, tmp_path / "run", *hidden, "method.segclr.head_channels=8")) == 1
    rows = (out / "manifest.csv").read_text().splitlines()
    title = rows[0].split(",").index("split")
    for number, row in enumerate(rows):
        if row.startswith("Bert"):
            cells = row.split(",")
            cells[title] = "test"
            rows[number] = ",".join(cells)
    (out / "manifest.csv").write_text("\n".join(rows))
    assert len(plans_of(out, tmp_path / "tested", "heldout=Anna")) == 1


def test_few_cases_of_a_misfit_hospital_are_read_and_each_is_shown(tmp_path):
    out = tmp_path / "out"
    assert prepare("manifest", photographs(tmp_path / "raw", cases=20), "-o", out) == 0
    plans = plans_of(out, tmp_path / "run", "heldout=Bert")
    wrong_masks(out / "Anna")
    steps: list[str] = []
    with pytest.raises(FedsgcgError) as caught:
        check_classes(plans, steps.append)
    assert len(steps) == ENOUGH
    assert steps[0] == "masks of Anna, case 1 of 20"
    assert "none of 8 cases can be used, the other 12 were not read" in str(caught.value)
    shutil.copy(out / "Bert" / "10_mask.png", out / "Anna" / "10_mask.png")
    check_classes(plans)  # the middle case is among the first, and one that fits is enough


@given(st.integers(0, 70))
def test_spread_visits_every_item_once_and_the_ends_of_each_half_early(number):
    found = list(spread(range(number)))
    assert sorted(found) == list(range(number))
    first = sorted(found[:8])
    gaps = [b - a for a, b in pairwise([*first, number])]
    assert number <= 8 or max(gaps) <= number / 4 + 2


def listed(out: Path, **cells: str) -> None:
    """Write cells of the table by `site_case`."""
    head, *rows = [row.split(",") for row in (out / "manifest.csv").read_text().splitlines()]
    place = head.index("patient_id")
    for row in rows:
        key = "_".join(Path(row[head.index("image")]).with_suffix("").parts).removesuffix("_image")
        row[place] = cells.get(key, row[place])
    (out / "manifest.csv").write_text("\n".join(",".join(row) for row in [head, *rows]))


def test_missing_patients_are_listed_and_one_patient_of_two_hospitals_is_named(out, capsys):
    listed(out, Anna_0="P-77", Bert_0="P-77", Bert_1="P-78")
    code, found, _ = check(out, capsys)
    assert code == 3
    (missing,) = found["SITE-519"]
    assert (missing["what"], missing["verdict"]) == ("Anna", "warn")
    assert missing["found"].startswith("1 of 2 cases without a patient_id")
    assert missing["found"].endswith(": 1")
    (shared,) = found["DAT-191"]
    assert (shared["what"], shared["verdict"]) == ("Bert", "warn")
    assert shared["found"] == "1 patient id also at Anna: P-77"
    listed(out, Anna_0="1", Bert_0="1", Anna_1="2", Bert_1="3")
    code, found, _ = check(out, capsys)
    assert (code, found["DAT-191"][0]["verdict"]) == (0, "note"), "hospitals count their own"


def test_colour_and_grey_pictures_together_are_a_warning(out, capsys):
    for path in (out / "Bert").glob("*_image.png"):
        Image.open(path).convert("L").save(path)
    code, found, _ = check(out, capsys)
    (one,) = found["DAT-192"]
    assert (code, one["found"]) == (3, "Anna 2 colour, Bert 2 grey")


def test_a_study_says_which_hospital_has_no_validation_patient(out, tmp_path):
    plans = plans_of(out, tmp_path / "run", "heldout=Bert")
    (one,) = without_validation(plans)
    assert (one.code, one.where, one.found) == (
        "DAT-193",
        "Anna",
        "2 training patients, none for validation",
    )
    halved = plans_of(out, tmp_path / "run", "heldout=Bert", "data.validation_fraction=0.5")
    assert without_validation(halved) == []


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=4),
)
def test_the_part_of_a_slice_that_is_shown_has_all_of_its_structures(shape, places):
    marked = np.zeros(shape, bool)
    for y, x in places:
        marked[y % shape[0], x % shape[1]] = True
    part = marked[shown_part(marked)]
    assert part.sum() == marked.sum()
    assert marked.any() or part.shape == shape
    assert max(part.shape) >= round(0.4 * max(shape))
