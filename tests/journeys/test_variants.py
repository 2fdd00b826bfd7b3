"""Pooled, local and swept studies, amplitude sharing and resuming, in a real federation."""

import io
import json

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file

from fedsgcg.clients.app import build_client_app
from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.inprocess import run_in_process
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.deploy.study.run import run_study
from fedsgcg.server.app import build_server_app
from fedsgcg.server.federation import run_federation
from tests.support import sites

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    return write_hospitals(folder, sites=("A", "B", "C"), cases_per_site=3, shape=(4, 40, 40))


def tree_of(root, folder, *overrides):
    places = [
        f"data.root={root}",
        f"output={folder / 'run'}",
        f"site.cache={folder / 'cache'}",
        "data.sites=[A,B,C]",
    ]
    return compose([*places, *sites.SMALL, "federation.rounds=3", "heldout=C", *overrides])


def federated(tree):
    run_in_process(build_server_app(tree), build_client_app(tree), Plan.from_tree(tree).members())


def ledger(folder, site):
    lines = (folder / "run" / "sites" / site / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("sharing", "consent"), [("summary", "amplitude_summary"), ("bank", "amplitude_bank")]
)
def test_amplitudes_leave_only_with_the_sites_consent_and_the_ledger_shows_them(
    root, tmp_path, sharing, consent
):
    asked = ["method=ram", f"method.ram.sharing={sharing}", "method.ram.bank_size=4"]
    with pytest.raises(FedsgcgError) as caught:
        federated(tree_of(root, tmp_path / "without", *asked))
    assert [problem.code for problem in caught.value.problems] == ["ROL-202", "ROL-202"]
    assert {problem.where for problem in caught.value.problems} == {"A", "B"}
    assert "amplitudes" not in json.dumps(ledger(tmp_path / "without", "A"))

    federated(tree_of(root, tmp_path / "with", *asked, f"site.shares=[{consent}]"))
    entries = [
        line for line in ledger(tmp_path / "with", "A") if line["kind"] == "query.amplitudes"
    ]
    assert len(entries) == 1
    assert entries[0]["parts"]["amplitudes"] > 0
    assert (
        json.loads((tmp_path / "with" / "run" / "outcome.json").read_text())["status"]
        == "completed"
    )
    assert "query.amplitudes" not in json.dumps(ledger(tmp_path / "with", "C")), (
        "a held-out site shares nothing"
    )


def test_local_only_keeps_everything_but_the_unets_weights_at_the_site(root, tmp_path):
    federated(tree_of(root, tmp_path, "method=ram_sgcg"))
    state = load_file(sorted((tmp_path / "run" / "sites" / "A" / "state").iterdir())[-1])
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert any(name.startswith("local.restoration") for name in state)
    assert not any("restoration" in name for name in model)
    assert {line["kind"] for line in ledger(tmp_path, "A")} == {
        "query.enrol",
        "train",
        "query.statistics",
        "evaluate",
    }


@pytest.mark.parametrize("memory", ["overlay", "momentum"])
@pytest.mark.parametrize("ownership", ["by_site", "pooled"])
def test_a_run_that_was_cut_off_ends_with_the_same_model(root, tmp_path, memory, ownership):
    options = [
        "method=ram_sgcg",
        f"federation={ownership}",
        "federation.moments=keep",
        f"prototypes.memory={memory}",
    ]
    whole, cut = (
        tree_of(root, tmp_path / "whole", *options),
        tree_of(root, tmp_path / "cut", *options),
    )
    federated(whole)

    class Enough(Exception):
        pass

    def stop(event):
        if event["event"] == "round.reply" and event["round"] == 3:
            raise Enough

    from fedsgcg.deploy.study.inprocess import InProcessGrid

    plan = Plan.from_tree(cut)
    grid = InProcessGrid(build_client_app(cut), plan.members(), 1)
    with pytest.raises(
        Enough
    ):  # after sites have stored the state of round 3, before the round counts
        run_federation(grid, plan, stop)
    grid.close()
    federated(cut)
    digests = [
        json.loads((tmp_path / name / "run" / "outcome.json").read_text())["digest"]
        for name in ("whole", "cut")
    ]
    assert digests[0] == digests[1]


def test_a_study_of_variants_runs_reports_and_goes_on(root, tmp_path, capsys):
    places = [
        f"data.root={root}",
        f"output={tmp_path / 'run'}",
        f"site.cache={tmp_path / 'cache'}",
        *sites.SMALL,
    ]
    places.remove("federation.rounds=4")
    varied = ["method=source,sgcg", "federation=local,pooled", "prototypes.weight=0.1,1"]
    varied.insert(0, "references=[best_single]")
    asked = [*places, "federation.rounds=1", "heldout=C", *varied]
    assert run_study(plan_study([*asked]), Screen(io.StringIO())) in (0, 3)
    table = pq.read_table(tmp_path / "run" / "results.parquet")
    found = {
        (row["method"], row["trains"], row["federation"], row["setting"], row["trained_on"])
        for row in table.to_pylist()
    }
    assert found == {
        ("source local", "source", "local", "", "A"),
        ("source local", "source", "local", "", "B"),
        ("source pooled", "source", "pooled", "", ""),
        *{
            (f"sgcg {owner} weight={weight}", "sgcg", owner, f"prototypes.weight={weight}", alone)
            for owner, alone in (("local", "A"), ("local", "B"), ("pooled", ""))
            for weight in ("0.1", "1")
        },
        ("source best_single", "source", "best_single", "", ""),
        *{
            (
                f"sgcg best_single weight={one}",
                "sgcg",
                "best_single",
                f"prototypes.weight={one}",
                "",
            )
            for one in ("0.1", "1")
        },
    }
    judged = [row for row in table.to_pylist() if row["trained_on"] and row["site"] != "C"]
    assert {(row["trained_on"], row["site"]) for row in judged} == {("A", "B"), ("B", "A")}
    record = yaml.safe_load((tmp_path / "run" / "study.yaml").read_text())
    assert {entry["method"] for entry in record["best_single"]} == {
        name for name in record["methods"] if " local" in name
    }
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What leaves a hospital" in page
    assert "is the best of single hospitals, judged by the other training hospitals" in page
    assert "every run has the same number of rounds and of passes per round" in page
    again = plan_study([*asked[:-1], "prototypes.weight=0.1,1,2"])
    assert [cell.name for cell in again.cells if not cell.done] == [
        "sgcg local weight=2 · C · seed 0 · A alone",
        "sgcg local weight=2 · C · seed 0 · B alone",
        "sgcg pooled weight=2 · C · seed 0",
    ]
