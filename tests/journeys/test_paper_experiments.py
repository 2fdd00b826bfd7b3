"""The papers' experiments at reduced size, from files in the original layouts to the report."""

import json

import pyarrow.parquet as pq
import pytest

from fedsgcg.deploy.cli.coordinator import main
from fedsgcg.deploy.prepare.fundus import PUBLISHED
from tests.support import downloads

pytestmark = pytest.mark.slow

SMALL = (
    "network.base_width=4",
    "data.image_size=32",
    "federation.rounds=1",
    "seed=0",
    "device=cpu",
)
FLOORS = ("privacy.min_pixels=1", "privacy.min_patients=1")


def prepared_fundus(folder):
    names = {
        key: sorted(cases)[: 4 if key[1] == "train" else 2] for key, cases in PUBLISHED.items()
    }
    downloads.released(folder / "down", 48, names)
    return "fundus", folder / "down"


def prepared_prostate(folder):
    for place, site in enumerate(("ISBI", "ISBI_1.5", "I2CVB", "UCL", "BIDMC", "HK")):
        for number in range(3):
            image, mask = downloads.scan(10 * place + number)
            downloads.volume(folder / "down" / site / f"Case{number:02d}.nii.gz", image)
            downloads.volume(folder / "down" / site / f"Case{number:02d}_segmentation.nii.gz", mask)
    return "prostate", folder / "down"


@pytest.mark.parametrize(
    ("prepare", "experiment", "heldout", "structures", "cases"),
    [
        (prepared_fundus, "fundus_paper", "Domain1", {"cup", "disc"}, 2),
        (prepared_prostate, "prostate_paper", "HK", {"prostate"}, 3),
    ],
)
def test_an_experiment_from_the_original_files_to_the_table(
    prepare, experiment, heldout, structures, cases, tmp_path, capsys
):
    name, source = prepare(tmp_path)
    assert main(["data", "prepare", name, str(source), "-o", str(tmp_path / "data")]) in (
        0,
        3,
    )  # fewer than published
    asked = [
        f"experiment={experiment}",
        f"heldout={heldout}",
        f"data.root={tmp_path / 'data'}",
        *SMALL,
        *FLOORS,
    ]
    places = [f"output={tmp_path / 'run'}", f"site.cache={tmp_path / 'cache'}"]
    assert main(["study", *asked, *places]) in (0, 3)
    rows = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    judged = [row for row in rows if row["site"] == heldout]
    assert {row["trains"] for row in judged} == {"source", "ram", "sgcg", "ram_sgcg"}
    assert {row["federation"] for row in judged} == {"pooled"}
    assert {row["structure"] for row in judged} == structures
    assert len(judged) == 4 * cases * len(structures)
    assert all(0 <= row["dice"] <= 1 for row in judged)
    ledger = (
        tmp_path / "run" / "ram_sgcg" / heldout / "0" / "sites" / "pooled" / "ledger.jsonl"
    ).read_text()
    kinds = ["query.enrol", "train", "query.statistics", "evaluate", "query.statistics"]
    assert [json.loads(line)["kind"] for line in ledger.splitlines()] == kinds
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_an_experiment_whose_data_is_not_there_says_what_to_fetch(tmp_path, capsys):
    assert main(["study", "experiment=fundus_paper", f"data.root={tmp_path / 'nowhere'}"]) == 2
    told = capsys.readouterr().err
    assert "fedsgcg data prepare fundus" in told
    assert main(["study", "experiment=prostate_paper"]) == 2
    assert "fedsgcg data prepare prostate" in capsys.readouterr().err
