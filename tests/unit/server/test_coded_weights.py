"""`federation.codec` in whole federations: the same model, or nearly, in fewer bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from fedsgcg.common.run_folder import paths
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small


def finished(root: Path, folder: Path, *texts: str) -> Cell:
    (cell,) = small.plan(root, folder, "heldout=North", "federation.rounds=2", *texts).cells
    run_cell_in_process(cell.tree)
    assert cell.outcome()["status"] == "completed", cell.outcome()["problems"]
    return cell


def bytes_up(cell: Cell) -> list[float]:
    rows = pq.read_table(cell.folder / paths.ROUNDS).to_pylist()
    return [row["value"] for row in rows if row["metric"] == "bytes_up" and row["site"]]


@pytest.mark.slow
def test_lossless_gives_the_same_model_and_bf16_a_near_one(hospitals: Path, tmp_path: Path) -> None:
    plain = finished(hospitals, tmp_path / "plain")
    lossless = finished(hospitals, tmp_path / "lossless", "federation.codec=lossless")
    rounded = finished(hospitals, tmp_path / "bf16", "federation.codec=bf16")
    assert lossless.outcome()["digest"] == plain.outcome()["digest"]
    assert rounded.outcome()["digest"] != plain.outcome()["digest"]
    sizes = [sum(bytes_up(cell)) for cell in (plain, lossless, rounded)]
    assert sizes[0] > sizes[1] > sizes[2]
    before, after = (load_file(cell.folder / paths.WEIGHTS) for cell in (plain, rounded))
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=0.05, abs=0.02), name
