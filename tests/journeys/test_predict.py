"""Prepare images in their original layout, train a small federation, use its model on new files."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.evaluation import predict_cases
from fedsgcg.clients.predict.model import load_model
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.images.read import read_volume, to_native
from fedsgcg.deploy.cli.coordinator import main as coordinator
from fedsgcg.deploy.cli.site import main
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import downloads, small

pytestmark = pytest.mark.slow
LEARNS = (
    "method=sgcg",
    "federation.rounds=4",
    "method.steps_per_round=8",
    "method.learning_rate=1e-2",
    "device=cpu",
)


def trained(hospitals: Path, output: Path, *more: str) -> Path:
    """Run one federation in this process and return its cell's folder."""
    (cell,) = small.plan(hospitals, output, "runtime=inprocess", *LEARNS, *more).cells
    run_cell_in_process(cell.tree)
    return cell.folder


@pytest.fixture(scope="module")
def cell(hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of volumes whose held-out hospital is West."""
    return trained(hospitals, tmp_path_factory.mktemp("volumes"), "heldout=West")


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few fundus pictures in the released layout, prepared."""
    folder = tmp_path_factory.mktemp("eyes")
    names = {
        (f"Domain{domain}", part): [f"{part}{domain}{number}" for number in range(count)]
        for domain in (1, 2, 3, 4)
        for part, count in (("train", 3), ("test", 2))
    }
    for (domain, part), cases in names.items():
        shape = (48, 56)
        lines = []
        for number, case in enumerate(cases):
            centre, radius = (22.0 + number, 26.0 + 2 * number), 14.0 + number
            grey = downloads.grey_mask(shape, centre, radius)
            tint = np.array([200, 120, 60]) - 10 * int(domain[-1])
            image = tint * (1.3 - grey[..., None] / 400) + downloads.colours(shape, number) * 0.1
            paths = [f"{domain}/{part}/ROIs/{kind}/{case}.png" for kind in ("image", "mask")]
            downloads.picture(folder / "down" / paths[0], image.clip(0, 255).astype(np.uint8))
            downloads.picture(folder / "down" / paths[1], grey)
            lines.append(" ".join(paths))
        (folder / "down" / f"{domain}_{part}.list").write_text("\n".join(lines) + "\n")
    assert (
        coordinator(["data", "prepare", "fundus", str(folder / "down"), "-o", str(folder / "data")])
        == 3
    )
    return folder / "data"


@pytest.fixture(scope="module")
def eye_cell(eyes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of fundus pictures whose held-out hospital is Domain1."""
    return trained(
        eyes,
        tmp_path_factory.mktemp("pictures"),
        "data=fundus",
        "heldout=Domain1",
        "method.batch_size=2",
    )


def predict(*arguments: object) -> int:
    return main(["predict", *map(str, arguments), "--device", "cpu", "--threads", "1"])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def evaluated(cell: Path, root: Path, site: str, cache: Path) -> dict[str, np.ndarray]:
    """Return case -> prediction (S, Z, Y, X) of the evaluation at a held-out hospital."""
    model = load_model(cell)
    store = open_store(open_site(root, site, model.data), model.data, cache, heldout=True)
    found = predict_cases(model.network, store, model.data, "test", torch.device("cpu"))
    return {result.case.name: result.prediction for result in found}


def test_masks_and_scores_are_those_of_evaluation(
    cell: Path, hospitals: Path, tmp_path: Path
) -> None:
    assert predict(cell, "--data", hospitals, "--site", "West", "-o", tmp_path / "out") == 0
    wanted = evaluated(cell, hospitals, "West", tmp_path / "cache")
    assert len(wanted) == 5
    assert any(masks.any() for masks in wanted.values()), (
        "a model that finds nothing proves nothing"
    )
    for case, masks in wanted.items():
        image, mask = (
            hospitals / f"West/{case}_image.nii.gz",
            nib.load(tmp_path / f"out/West/{case}_mask.nii.gz"),
        )
        np.testing.assert_array_equal(
            np.asarray(mask.dataobj), to_native(masks[0], read_volume(image))
        )
        np.testing.assert_array_equal(mask.affine, nib.load(image).affine)
    judged = sorted(row["dice"] for row in pq.read_table(cell / "results.parquet").to_pylist())
    scored = sorted(float(row["dice"]) for row in rows_of(tmp_path / "out/scores.csv"))
    np.testing.assert_allclose(scored, judged, rtol=0, atol=1e-12)


def test_pictures_with_nested_structures(eye_cell: Path, eyes: Path, tmp_path: Path) -> None:
    card = json.loads((eye_cell / "model.json").read_text())
    assert (card["input"]["images"], card["input"]["colour"]) == (["picture"], True)
    out = tmp_path / "out"
    call = (eye_cell, "--data", eyes, "--site", "Domain1", "--split", "test", "-o", out)
    assert predict(*call, "--probability", "--confidence", "--overlay") == 0
    wanted = evaluated(eye_cell, eyes, "Domain1", tmp_path / "cache")
    assert sorted(wanted) == ["test10", "test11"]
    assert any(masks[0].any() for masks in wanted.values()), (
        "a model that finds nothing proves nothing"
    )
    for case, (disc, cup) in wanted.items():
        mask = np.asarray(Image.open(out / f"Domain1/{case}_mask.png"))
        np.testing.assert_array_equal(mask, np.where(cup[0], 2, np.where(disc[0], 1, 0)))
        for name in ("probability_disc", "probability_cup", "confidence"):
            assert Image.open(out / f"Domain1/{case}_{name}.png").size == (56, 48)
        assert (out / f"Domain1/{case}_overlay.png").is_file()
    judged = sorted(row["dice"] for row in pq.read_table(eye_cell / "results.parquet").to_pylist())
    assert sorted(float(row["dice"]) for row in rows_of(out / "scores.csv")) == pytest.approx(
        judged, abs=1e-12
    )


def test_a_folder_survives_broken_files_and_lists_them(
    cell: Path, hospitals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(hospitals / "North", images / "ward")
    (images / "broken.nii.gz").write_bytes(b"\x1f\x8bno gzip")
    picture = downloads.picture(images / "photo.png", downloads.colours((40, 40)))
    before = {path: path.read_bytes() for path in images.rglob("*") if path.is_file()}
    assert predict(cell, images, "-o", out, "--probability", "--confidence") == 3
    told = capsys.readouterr().out
    assert "5 of 7 images predicted, 2 failed" in told
    assert f"[DAT-103] A file cannot be read as an image. ({images / 'broken.nii.gz'})" in told
    assert "[MOD-806]" in told
    assert "5 files named like masks or results" in told
    assert len([line for line in told.splitlines() if line.startswith("[")]) == 7 + 2, (
        "one line a case, then the problems"
    )
    assert picture.shape == (40, 40, 3)
    assert {path: path.read_bytes() for path in images.rglob("*") if path.is_file()} == before
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    cases = [f"ward/North-00{number}" for number in range(1, 6)]
    kinds = ("confidence", "mask", "probability")
    results = [f"{case}_{kind}.nii.gz" for case in cases for kind in kinds]
    assert names == sorted(["predictions.jsonl", *results])
    image = nib.load(images / "ward/North-002_image.nii.gz")
    for kind in ("probability", "confidence"):
        drawn = nib.load(out / f"ward/North-002_{kind}.nii.gz")
        values = np.asarray(drawn.dataobj)
        assert (drawn.shape, values.dtype) == (image.shape, np.float32)
        assert 0 <= values.min() < values.max() <= 1
        np.testing.assert_array_equal(drawn.affine, image.affine)
    assert predict(cell, images / "broken.nii.gz", "-o", tmp_path / "none") == 1


def test_masks_of_other_labels_are_reported_case_by_case_and_nothing_is_scored(
    cell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, labels = downloads.scan(3, (40, 40, 4))
    downloads.volume(tmp_path / "d/A/x_image.nii.gz", image)
    downloads.volume(tmp_path / "d/A/x_mask.nii.gz", labels)
    assert predict(cell, "--data", tmp_path / "d", "-o", tmp_path / "out") == 1
    told = capsys.readouterr().out
    assert "[MOD-805]" in told
    assert "values 2" in told
    assert not (tmp_path / "out/scores.csv").exists()


def test_the_same_call_writes_the_same_bytes(cell: Path, hospitals: Path, tmp_path: Path) -> None:
    image = hospitals / "South/South-001_image.nii.gz"
    for name in ("a", "b"):
        assert predict(cell, image, "-o", tmp_path / name, "--probability", "--overlay") == 0
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("a", "b")
    )
    assert first == second
    assert len(first) == 4, "mask, probability, overlay and the record"


def test_the_six_prostate_sites_are_prepared_trained_on_and_predicted(tmp_path: Path) -> None:
    """Prepare, leave-one-out federation, predict and scores from the original layout, reduced."""
    names = {
        "ISBI": "RUNMC",
        "ISBI_1.5": "BMC",
        "I2CVB": "I2CVB",
        "UCL": "UCL",
        "BIDMC": "BIDMC",
        "HK": "HK",
    }
    write_hospitals(tmp_path / "made", sites=tuple(names), cases_per_site=2, shape=(5, 40, 40))
    for site in names:
        for number, path in enumerate(sorted((tmp_path / "made" / site).glob("*_image.nii.gz"))):
            target = tmp_path / f"down/{site}/Case{number:02d}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
            mask = path.with_name(path.name.replace("_image", "_mask"))
            mask.rename(target.with_name(target.name.replace(".nii", "_segmentation.nii")))
    data = tmp_path / "data"
    assert (
        coordinator(["data", "prepare", "prostate", str(tmp_path / "down"), "-o", str(data)]) == 3
    ), "few cases"
    quick = ("data.image_size=32", "federation.rounds=2", "method.steps_per_round=2")
    cell = trained(data, tmp_path / "run", "data=prostate", "heldout=HK", *quick)
    outcome = json.loads((cell / "outcome.json").read_text())
    assert outcome["status"] == "completed"
    rows = pq.read_table(cell / "results.parquet").to_pylist()
    assert {(row["site"], row["structure"]) for row in rows} == {("HK", "prostate")}
    assert predict(cell, "--data", data, "--site", "HK", "-o", tmp_path / "out") == 0
    scored = sorted(float(row["dice"]) for row in rows_of(tmp_path / "out/scores.csv"))
    assert scored == pytest.approx(sorted(row["dice"] for row in rows), abs=1e-12)
