"""`fedsgcg data check` finds every planted fault of own data, and a study starts with the map."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.study.plan import plan_study
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
    assert set(found) == {""}
    assert end["cases"] == {"Anna": 2, "Bert": 2}
    sheet = Path(end["sheet"])
    assert sheet.stat().st_mode & 0o077 == 0
    page = sheet.read_text()
    assert page.count("<figure>") == 4
    assert page.count('class="truth"') == 4
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
