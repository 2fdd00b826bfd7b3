"""The held-out hospital takes no part, as the sent messages and its own ledger show."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from fedsgcg.clients.app import build_client_app
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import EVALUATE, STATISTICS, TRAIN, decode_reply
from fedsgcg.deploy.study.inprocess import InProcessGrid, run_in_process
from fedsgcg.server.app import build_server_app
from tests.support import small


def recorded(
    hospitals: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[Plan, dict[str, list[str]]]:
    """Run a small federation and return its plan and the message types that each site received."""
    (cell,) = small.plan(hospitals, folder, "heldout=South", "federation.rounds=2", *more).cells
    sent: dict[str, list[str]] = defaultdict(list)
    push = InProcessGrid.push_messages

    def record(grid: InProcessGrid, messages: list[Message]) -> object:
        messages = list(messages)
        for message in messages:
            site = grid._contexts[message.metadata.dst_node_id].node_config["site"]
            sent[str(site)].append(message.metadata.message_type)
        return push(grid, messages)

    monkeypatch.setattr(InProcessGrid, "push_messages", record)
    plan = Plan.from_tree(cell.tree)
    run_in_process(build_server_app(cell.tree), build_client_app(cell.tree), plan.data.sites)
    return plan, sent


@pytest.mark.parametrize("memory", ["lagged", "restart", "cumulative", "discount"])
def test_heldout_site_never_gets_a_training_message(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    plan, sent = recorded(
        hospitals, tmp_path, monkeypatch, "method=sgcg", f"prototypes.memory={memory}"
    )
    assert set(sent["South"]) == {"query.enrol", EVALUATE}
    assert sent["South"].count(EVALUATE) == 1
    for site in set(plan.data.sites) - {"South"}:
        assert sent[site].count(TRAIN) == plan.federation.rounds
        # After every merge, and once for the chosen model.
        assert sent[site].count(STATISTICS) == plan.federation.rounds + 1


def test_heldout_site_sends_no_weights_and_no_statistics(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = recorded(hospitals, tmp_path, monkeypatch, "method=sgcg")
    home = Path(plan.output) / "sites"
    for site in plan.data.sites:
        parts = [
            set(json.loads(line)["parts"])
            for line in (home / site / "ledger.jsonl").read_text().splitlines()
        ]
        contributed = any({"weights", "statistics", "moments"} & names for names in parts)
        assert contributed == (site != "South")


@pytest.mark.parametrize("kind", [TRAIN, STATISTICS])
@pytest.mark.row(72)
def test_heldout_site_refuses_a_training_message_that_reaches_it(
    hospitals: Path, tmp_path: Path, kind: str
) -> None:
    from fedsgcg.common.networks import build_network
    from fedsgcg.common.wire.messages import Request, encode_request
    from fedsgcg.common.wire.payload import Identity, Weights

    (cell,) = small.plan(hospitals, tmp_path, "heldout=South", "method=sgcg").cells
    plan = Plan.from_tree(cell.tree)
    network = build_network(plan.network, 3, plan.data.out_channels, 0)
    weights = Weights.from_state(
        {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    )
    request = Request(Identity(plan.run, plan.heldout, 1, plan.digest()), weights)
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(encode_request(request), dst_node_id=5, message_type=kind)
    context = Context(
        run_id=1, node_id=5, node_config={"site": "South"}, state=RecordDict(), run_config={}
    )
    reply = decode_reply(build_client_app(cell.tree)(message, context).content)
    assert reply.error == "ROL-201"
    assert reply.weights is None
    assert reply.statistics is None
