"""Numbers of a small federation, so that a change of the numerics never goes unnoticed.

The hash of a model depends on the processor's vector width, so the golden values are figures with a tolerance. A change
that means to alter them writes new ones: `python -m tests.golden.test_small_federation`.
"""

import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.phantoms import write_hospitals
from deploy.simulate import run_cell_in_process
from tests.journeys import small

GOLDEN = Path(__file__).with_name("small_federation.json")
TOLERANCE = 2e-2


def figures(hospitals: Path, output: Path) -> dict[str, list[float]]:
    """Figures of every round, averaged over the sites that report them."""
    settings = ("method=sgcg", "heldout=South", "prototypes.warmup_rounds=0", "prototypes.weight=0.1")
    (cell,) = small.plan(hospitals, output, *settings).cells
    run_cell_in_process(cell.tree)
    values: dict[str, dict[int, list[float]]] = {}
    for row in pq.read_table(cell.folder / "rounds.parquet").to_pylist():
        name = f"{row['metric']} {row['cls']}".strip()
        if row["metric"] in ("loss", "loss_contrast", "between_site_trace", "within_site_trace", "prototype_count"):
            values.setdefault(name, {}).setdefault(row["round"], []).append(row["value"])
    return {name: [sum(v) / len(v) for _, v in sorted(rounds.items())] for name, rounds in sorted(values.items())}


def test_small_federation_gives_the_golden_figures(hospitals: Path, tmp_path: Path) -> None:
    found, golden = figures(hospitals, tmp_path), json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        root = write_hospitals(Path(folder) / "hospitals", cases_per_site=5, shape=(6, 40, 40), seed=7)
        GOLDEN.write_text(json.dumps(figures(root, Path(folder) / "run"), indent=1) + "\n")
