"""Small hospitals on disk and messages to them, for tests of the client side."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, Metadata, RecordDict

from fedsgcg.clients.app import build_client_app
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import Reply, Request, decode_reply, encode_request
from fedsgcg.common.wire.payload import Identity, Weights

SITES = ("North", "South")
SMALL = (
    "network.base_width=4",
    "data.image_size=32",
    "federation.rounds=4",
    "method.batch_size=4",
    "privacy.min_pixels=1",
    "privacy.min_patients=1",
    "device=cpu",
)


def hospitals(root: Path, cases: int = 4) -> Path:
    """Write two hospitals of a few small volumes."""
    return write_hospitals(root, sites=SITES, cases_per_site=cases, shape=(4, 40, 40))


def tree_of(root: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """Resolved settings of a federation on `root` whose run and cache lie below `folder`."""
    return compose(
        [
            f"data.root={root}",
            f"output={folder / 'run'}",
            f"site.cache={folder / 'cache'}",
            *SMALL,
            *overrides,
        ]
    )


def plan_of(root: Path, folder: Path, *overrides: str) -> Plan:
    """Like `tree_of`, typed."""
    return Plan.from_tree(tree_of(root, folder, *overrides))


def weights(plan: Plan, seed: int = 0) -> Weights:
    """Fresh weights of the plan's network."""
    state = build_network(plan.network, 3, plan.data.out_channels, seed).state_dict()
    return Weights.from_state({name: tensor.numpy() for name, tensor in state.items()})


def identity(plan: Plan, round_number: int = 1) -> Identity:
    """Identity of a request of this plan."""
    return Identity(plan.run, plan.heldout, round_number, plan.digest())


def ask(
    tree: Mapping[str, Any] | None,
    kind: str,
    records: RecordDict,
    node: Mapping[str, Any],
    run: Any = None,
) -> RecordDict:
    """Give one message to the app, as Flower does, and return what leaves."""
    metadata = Metadata(
        run_id=1,
        message_id="1",
        src_node_id=0,
        dst_node_id=1,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=600.0,
        message_type=kind,
    )
    message = Message(records, metadata=metadata)
    context = Context(
        run_id=1, node_id=1, node_config=dict(node), state=RecordDict(), run_config=run or {}
    )
    return build_client_app(tree)(message, context).content


def answer(plan: Plan, kind: str, request: Request, site: str) -> Reply:
    """Ask a site of this plan and decode its reply."""
    return decode_reply(ask(asdict(plan), kind, encode_request(request), {"site": site}))
