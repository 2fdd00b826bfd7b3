"""`import fedsgcg`: light to import, documented, and the same numbers as the command line."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedsgcg
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.read import read_volume
from tests.support import small

HEAVY = ("torch", "flwr", "ray", "nibabel", "pyarrow", "numpy")


def test_the_import_loads_nothing_heavy() -> None:
    code = f"import sys, fedsgcg\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", fedsgcg.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert len(inspect.getdoc(getattr(fedsgcg, name)) or "") > 20
    assert name in dir(fedsgcg)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fedsgcg.nothing  # noqa: B018
    assert fedsgcg.__version__[0].isdigit()


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError, match="SRV-402"):
        fedsgcg.read_results(tmp_path)
    with pytest.raises(FedsgcgError, match="SRV-402"):
        fedsgcg.read_report(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError, match="no such folder"):
        fedsgcg.read_results(tmp_path / "nowhere")


def test_settings_in_one_text_are_one_problem() -> None:
    with pytest.raises(FedsgcgError) as caught:
        fedsgcg.study("experiment=demo heldout=all")  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.action == "write ['experiment=demo', 'heldout=all']"


def test_completion_offers_the_interface_alone() -> None:
    assert set(dir(fedsgcg)) == {*fedsgcg.__all__, "__version__"}


@pytest.mark.slow
def test_a_study_from_python_gives_results_a_report_and_a_model(
    hospitals: Path, tmp_path: Path
) -> None:
    texts = small.overrides(
        hospitals, tmp_path / "run", "method=sgcg", "heldout=South", "runtime=inprocess"
    )
    outcome = fedsgcg.study(texts, quiet=True)
    assert outcome.status in ("completed", "degraded")
    again = fedsgcg.study(texts, quiet=True)
    assert again == outcome, "a finished study is not run again"

    results = fedsgcg.read_results(outcome.folder)
    assert results.schema.field("dice").metadata
    report = fedsgcg.read_report(outcome.folder)
    (row,) = report.summary.to_pylist()
    assert row["dice_mean"] == pytest.approx(np.mean(results["dice"].to_numpy()))
    assert report.protocol["Who was held out"]
    assert (outcome.folder / "tables" / "summary.tex").is_file()

    (cell,) = outcome.cells
    model = fedsgcg.load_model(cell, probability=True, confidence=True)
    assert model.structures == ("gland",)
    assert repr(model) == "SegmentationModel(structures=('gland',), kinds=('axial volume',))"
    image = sorted((hospitals / "South").glob("*_image.nii.gz"))[0]
    from_file = model.predict(image)
    from_array = model.predict(read_volume(image).array)
    np.testing.assert_array_equal(from_file.masks, from_array.masks)
    np.testing.assert_array_equal(from_file.probability, from_array.probability)
    assert from_file.confidence is not None
    assert repr(from_file).startswith(f"Prediction(masks {from_file.masks.shape}, labels")
    with pytest.raises(FedsgcgError, match="DAT-106"):
        model.predict(np.zeros((4, 4, 4, 4)))
    with pytest.raises(FedsgcgError, match="DAT-107"):
        model.predict(np.full((4, 32, 32), np.nan))
