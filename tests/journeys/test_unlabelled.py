"""A hospital without masks takes part, its masks are never read, and the comparison is marked."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.study.run import run_study
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small

WATCHERS: list[set[str]] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Record every file that this process opens; an audit hook cannot be removed."""
    if event == "open":
        for opened in WATCHERS:
            opened.add(str(arguments[0]))


sys.addaudithook(watch)


def with_target(hospitals: Path, folder: Path, *, ruin: bool) -> Path:
    """Copy the hospitals; East has one test case and, if ruined, no usable training mask."""
    root = small.stated_splits(hospitals, folder, heldout="South")
    with (root / "manifest.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    columns = {name: place for place, name in enumerate(head)}
    own = [row for row in rows if row[columns["site"]] == "East"]
    for number, row in enumerate(own):
        row[columns["split"]] = "test" if number == 0 else "train"
        mask = root / row[columns["mask"]]
        if ruin and number % 2:
            mask.unlink()
        elif ruin and number:
            mask.write_bytes(b"not an image")
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return root


def figures(folder: Path, site: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in pq.read_table(folder / "rounds.parquet").to_pylist():
        if row["site"] == site:
            found.setdefault(row["metric"], []).append(row["value"])
    return found


@pytest.mark.parametrize("pairs", ["augment", "slices"])
def test_a_hospital_whose_masks_are_absent_or_garbage_takes_part(
    hospitals: Path, tmp_path: Path, pairs: str
) -> None:
    settings = (
        "method=segclr",
        "heldout=South",
        "unlabelled=[East]",
        f"method.segclr.pairs={pairs}",
        "federation.rounds=2",
    )
    digests = []
    for ruin in (True, False):
        root = with_target(hospitals, tmp_path / f"data-{ruin}", ruin=ruin)
        opened: set[str] = set()
        WATCHERS.append(opened)
        (cell,) = small.plan(root, tmp_path / f"run-{ruin}", *settings).cells
        run_cell_in_process(cell.tree)
        WATCHERS.remove(opened)
        masks = {path for path in opened if "East" in Path(path).parts and "_mask." in path}
        digests.append(small.digest(tmp_path / f"run-{ruin}"))
        outcome = json.loads((cell.folder / "outcome.json").read_text())
        assert (outcome["status"], outcome["sites"]["East"]["role"]) == ("completed", "unlabelled")
        assert len(masks) == 1  # that of the test case
        own, other = figures(cell.folder, "East"), figures(cell.folder, "North")
        assert len(own["examples"]) == 2
        assert own["examples"][0] == 4 * 6
        assert "loss_supervised" not in own
        assert "validation_dice" not in own
        assert len(own["observer_dice"]) == 1
        assert {"loss_supervised", "loss_contrast"} <= set(other)
    # Neither damage nor presence of the masks has any influence.
    assert digests[0] == digests[1]


def test_the_comparison_of_an_adaptation_is_one_study_and_the_upper_bound_is_marked(
    hospitals: Path, tmp_path: Path
) -> None:
    root = with_target(hospitals, tmp_path / "data", ruin=False)
    settings = ("experiment=segclr_adaptation", "heldout=South", "unlabelled=[East]")
    study = small.plan(
        root,
        tmp_path / "run",
        *settings,
        "federation.rounds=8",
        "method.steps_per_round=6",
        "method.learning_rate=5e-3",
        "runtime=inprocess",
        "federation.screening=off",  # with so few steps directions are noise
    )
    assert run_study(study, Screen(io.StringIO())) == 0
    rows = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    target = {row["method"]: row["dice"] for row in rows if row["site"] == "East"}
    assert set(target) == {"source_only", "segclr_pretrain", "segclr", "upper_bound"}
    for method in ("segclr", "segclr_pretrain"):
        unseen = [row["dice"] for row in rows if (row["site"], row["method"]) == ("South", method)]
        assert sum(unseen) / len(unseen) > 2 * CHANCE
    trained = {
        cell.method: figures(cell.folder, "East").get("examples", []) for cell in study.cells
    }
    rounds = {method: len(values) for method, values in trained.items()}
    # Fine-tuning has no term for images without labels.
    assert rounds == {"source_only": 0, "segclr_pretrain": 4, "segclr": 8, "upper_bound": 8}
    report = (tmp_path / "run" / "report.html").read_text()
    assert "upper_bound is an upper bound: it was trained with the masks of East" in report
    assert "trained without masks, with the contrastive term alone: East" in report


CHANCE = 0.06
"""Above the Dice of predicting every pixel as foreground, 2 f / (1 + f): f is below 0.03 here."""


def test_a_method_that_cannot_use_such_a_hospital_is_refused_before_the_start(
    hospitals: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedsgcgError) as caught:
        small.plan(hospitals, tmp_path, "method=sgcg", "heldout=South", "unlabelled=[East]")
    assert caught.value.code == "ROL-211"
