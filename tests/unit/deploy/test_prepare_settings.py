"""Prepared own data come with a settings file, which a study takes as it is or with own names."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.plan import Plan
from tests.support.prepared import prepare


def photographs(folder: Path, values: tuple[int, ...]) -> Path:
    """Two hospitals with two colour pictures each; the masks contain these values."""
    rng = np.random.default_rng(0)
    for site in ("Anna", "Bär b"):
        (folder / site).mkdir(parents=True)
        for case in range(2):
            image = rng.integers(0, 255, (32, 40, 3), np.uint8)
            mask = rng.choice(np.array(values, np.uint8), (32, 40))
            Image.fromarray(image).save(folder / site / f"{case}_image.png")
            Image.fromarray(mask).save(folder / site / f"{case}_mask.png")
    return folder


def test_the_settings_of_prepared_pictures_are_those_of_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my photos"
    assert prepare("manifest", photographs(tmp_path / "raw", (0, 3, 7)), "-o", out) == 0
    assert f"fedsgcg study data='{out / 'data.yaml'}' heldout=all" in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    plan = Plan.from_tree(join([f"data={out / 'data.yaml'}", "heldout=Anna"]))
    assert (plan.data.name, plan.data.root) == ("my photos", str(out))
    assert plan.data.classes == {"background": [0], "class_3": [3], "class_7": [7]}
    assert list(plan.data.structures) == ["class_3", "class_7"]
    assert plan.data.spacing_unit == "pixel"
    assert not plan.data.largest_component
    assert len(open_site(Path(plan.data.root), "Bär b", plan.data).cases) == 2


def test_settings_that_the_user_edited_are_kept(tmp_path: Path) -> None:
    raw, out = photographs(tmp_path / "raw", (0, 1)), tmp_path / "out"
    assert prepare("manifest", raw, "-o", out) == 0
    text = (out / "data.yaml").read_text().replace("class_1", "lesion")
    (out / "data.yaml").write_text(text)
    Image.linear_gradient("L").resize((40, 32)).save(raw / "Anna" / "0_image.png")
    assert prepare("manifest", raw, "-o", out) == 0
    assert (out / "data.yaml").read_text() == text


@pytest.mark.parametrize("values", [(0,), (1, 2)])
def test_masks_without_a_background_or_a_structure_give_no_settings(
    values: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("manifest", photographs(tmp_path / "raw", values), "-o", tmp_path / "out") == 0
    assert not (tmp_path / "out" / "data.yaml").exists()
    printed = capsys.readouterr().out
    assert "data=NAME" in printed
    counts = ", ".join(f"{value} in 4" for value in values)
    assert "note: no data.yaml: a study needs masks with the background, 0, and a" in printed
    assert f"these have {counts}" in printed
