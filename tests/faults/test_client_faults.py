"""Faults inside a site: an error code leaves the site, the text stays there."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.egress import UNKNOWN_IDENTITY
from fedsgcg.clients.request import SiteRequest, handle
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Reply, Request, decode_reply, encode_request
from fedsgcg.common.wire.payload import Weights
from tests.support import sites

CANARY = "Mueller-Anna-1957"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture
def root(clean: Path, tmp_path: Path) -> Path:
    """A copy of the hospitals in which every name of a file and patient holds the canary."""
    copy = tmp_path / "data"
    shutil.copytree(clean, copy)
    with (copy / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for kind in ("image", "mask"):
            renamed = row[kind].replace("-0", f"-{CANARY}-0")
            (copy / row[kind]).rename(copy / renamed)
            row[kind] = renamed
        row["patient_id"] = f"{CANARY}-{row['patient_id']}"
    with (copy / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return copy


def leaves(plan: Plan, kind: str, request: Request, site: str = "North") -> tuple[Reply, bytes]:
    """What a site answers, decoded and as bytes on the wire."""
    records = sites.ask(plan.to_tree(), kind, encode_request(request), {"site": site})
    return decode_reply(records), recorddict_to_proto(records).SerializeToString()


def trained(plan: Plan, **changes) -> tuple[Reply, bytes]:
    weights = changes.pop("weights", None) or sites.weights(plan)
    return leaves(plan, wire.TRAIN, Request(sites.identity(plan), weights, **changes))


def trace(plan: Plan, site: str = "North") -> str:
    return (Path(plan.output) / "sites" / site / "errors.log").read_text()


def visited(work: Callable[[SiteRequest], RecordDict], plan: Plan) -> RecordDict:
    content = encode_request(Request(sites.identity(plan)))
    metadata = Metadata(1, "1", 0, 1, "", "", 0.0, 600.0, "train")
    context = Context(
        run_id=1, node_id=1, node_config={"site": "North"}, state=RecordDict(), run_config={}
    )
    return handle(work, Message(content, metadata=metadata), context, plan.to_tree())


def test_no_name_leaves_when_all_is_well(root, tmp_path):
    plan = sites.plan_of(root, tmp_path, "heldout=South")
    enrolled = leaves(plan, wire.ENROL, Request(sites.identity(plan, 0)))
    evaluated = leaves(
        plan, wire.EVALUATE, Request(sites.identity(plan), sites.weights(plan)), "South"
    )
    for reply, data in (enrolled, evaluated, trained(plan)):
        assert reply.error == ""
        assert CANARY.encode() not in data
        assert str(tmp_path).encode() not in data
    assert CANARY in (Path(plan.output) / "sites/South/aliases.csv").read_text()


@pytest.mark.parametrize(
    "error", [RuntimeError, KeyError, MemoryError, OSError, ZeroDivisionError, UnicodeError]
)
@pytest.mark.row(27)
def test_an_unforeseen_error_becomes_a_code_and_its_trace_stays(root, tmp_path, error):
    plan = sites.plan_of(root, tmp_path)

    def broken(task: SiteRequest) -> RecordDict:
        raise error(f"cannot read {CANARY}")

    records = visited(broken, plan)
    code = "SITE-502" if error is MemoryError else "SITE-500"
    assert decode_reply(records) == Reply(sites.identity(plan), "North", error=code)
    assert CANARY.encode() not in recorddict_to_proto(records).SerializeToString()
    assert CANARY in trace(plan)
    assert "in broken" in trace(plan)


def test_traces_are_appended(root, tmp_path):
    plan = sites.plan_of(root, tmp_path)

    def broken(task: SiteRequest) -> RecordDict:
        raise RuntimeError("once more")

    visited(broken, plan)
    visited(broken, plan)
    assert trace(plan).count("RuntimeError: once more") == 2


def test_an_error_of_the_catalogue_that_names_a_patient_leaves_as_its_code(root, tmp_path):
    for path in root.glob("North/*_image.nii.gz"):
        path.write_bytes(path.read_bytes()[:100])  # every image is cut off
    plan = sites.plan_of(root, tmp_path)
    for kind in (wire.ENROL, wire.TRAIN):
        reply, data = leaves(plan, kind, Request(sites.identity(plan), sites.weights(plan)))
        assert reply == Reply(sites.identity(plan), "North", error="DAT-102")
        assert CANARY.encode() not in data
    assert CANARY in trace(plan)


def test_a_broken_case_is_reported_by_code_and_the_rest_goes_on(root, tmp_path):
    broken = sorted(root.glob("North/*_image.nii.gz"))[0]
    broken.write_bytes(b"this is not an image")
    plan = sites.plan_of(root, tmp_path)
    reply, data = leaves(plan, wire.ENROL, Request(sites.identity(plan, 0)))
    assert reply.details["problems"] == [{"code": "DAT-103", "case": ""}]
    assert reply.details["cases"]["train"] + reply.details["cases"]["validation"] == 3
    assert CANARY.encode() not in data
    assert CANARY in (Path(plan.output) / "sites/North/problems.txt").read_text()


@pytest.mark.row(31)
def test_a_loss_that_is_not_finite_sends_no_weights(root, tmp_path):
    plan = sites.plan_of(root, tmp_path)
    good = sites.weights(plan)
    bad = Weights(good.layout, np.full_like(good.values, np.nan), good.counters)
    plan_source = sites.plan_of(root, tmp_path, "method=source")
    reply, _ = trained(plan_source, weights=bad)
    assert reply == Reply(sites.identity(plan_source), "North", error="TRN-301")


def test_weights_of_another_network_are_refused(root, tmp_path):
    plan = sites.plan_of(root, tmp_path)
    wider = sites.weights(sites.plan_of(root, tmp_path, "network.base_width=8"))
    assert trained(plan, weights=wider)[0].error == "PAY-103"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.row(33)
def test_a_gpu_that_is_not_there_is_refused(root, tmp_path):
    plan = sites.plan_of(root, tmp_path, "device=cuda")
    assert trained(plan)[0].error == "CFG-004"


def test_a_cache_that_cannot_be_written_is_a_code(root, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    plan = sites.plan_of(root, tmp_path)
    assert trained(plan)[0].error == "DAT-113"


def test_without_a_ledger_nothing_but_the_code_leaves(root, tmp_path):
    plan = sites.plan_of(root, tmp_path)
    (tmp_path / "run/sites/North/ledger.jsonl").mkdir(parents=True)
    reply, data = trained(plan)
    assert reply == Reply(sites.identity(plan), "North", error="SITE-501")
    assert len(data) < 1000


def test_a_changed_ledger_stops_what_would_leave(root, tmp_path):
    plan = sites.plan_of(root, tmp_path)
    leaves(plan, wire.ENROL, Request(sites.identity(plan, 0)))
    path = tmp_path / "run/sites/North/ledger.jsonl"
    entry = json.loads(path.read_text())
    entry["parts"] = {"text": 1}
    path.write_text(json.dumps(entry) + "\n")
    assert trained(plan)[0].error == "SITE-501"


@pytest.mark.parametrize("tree", [{}, {"data": {}}, {"data": 3, "site": CANARY}])
def test_settings_that_make_no_plan_are_a_code_too(tree):
    records = sites.ask(
        tree, wire.TRAIN, encode_request(Request(UNKNOWN_IDENTITY)), {"site": "North"}
    )
    assert decode_reply(records).error == "CFG-001"
    assert decode_reply(records).site == ""
    assert CANARY.encode() not in recorddict_to_proto(records).SerializeToString()


def test_a_run_config_that_is_no_json_is_a_code_too():
    run_config = {"config-json": "{" + CANARY}
    records = sites.ask(
        None, wire.TRAIN, encode_request(Request(UNKNOWN_IDENTITY)), {"site": "North"}, run_config
    )
    assert decode_reply(records) == Reply(UNKNOWN_IDENTITY, "", error="SITE-500")


@pytest.mark.parametrize(
    "content", [RecordDict(), RecordDict({"message": ConfigRecord({"identity": "nonsense"})})]
)
def test_a_message_that_is_no_request_is_a_code_too(root, tmp_path, content):
    plan = sites.plan_of(root, tmp_path)
    reply = decode_reply(sites.ask(plan.to_tree(), wire.TRAIN, content, {"site": "North"}))
    assert reply == Reply(UNKNOWN_IDENTITY, "North", error="PAY-106")


@pytest.mark.row(72)
def test_the_heldout_site_gives_nothing_away_when_it_is_asked_by_mistake(root, tmp_path):
    plan = sites.plan_of(root, tmp_path, "heldout=South")
    for kind in (wire.TRAIN, wire.STATISTICS):
        reply, data = leaves(
            plan, kind, Request(sites.identity(plan), sites.weights(plan)), "South"
        )
        assert reply == Reply(sites.identity(plan), "South", error="ROL-201")
        assert len(data) < 1000
    assert ledger.verify(tmp_path / "run/sites/South/ledger.jsonl") == 2


def test_a_site_without_a_training_patient_says_so(root, tmp_path):
    with (root / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0].keys(), "split"])
        writer.writeheader()
        writer.writerows(row | {"split": "validation"} for row in rows)
    plan = sites.plan_of(root, tmp_path)
    assert trained(plan)[0].error == "TRN-302"
