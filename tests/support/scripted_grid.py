"""A Flower Grid with scripted hospitals: they use the real wire format and misbehave on demand.

Only the hospitals are scripted. Messages are Flower's, encoded and decoded by
`common.wire.messages`, and the coordinator is the real one. The answer of a well-behaved hospital
is a pure function of its name and the request, so two runs with the same history give the same
bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsgcg.common.seeding import stream
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.learnable import learnable
from fedsgcg.common.wire.messages import (
    ENROL,
    EVALUATE,
    SHARES,
    STATISTICS,
    TRAIN,
    Reply,
    Request,
    decode_request,
    encode_reply,
)
from fedsgcg.common.wire.norm_moments import NormMoments, norm_layers
from fedsgcg.common.wire.payload import DISTANCES, Weights, encode_cases

SILENCE = object()
FLOWER_ERROR = object()
LOST = object()  # the node dies with the request, and Flower says so after a while
PATIENT = "Jane Doe, born 1960"  # must never be seen outside the site

Script = Callable[["ScriptedGrid", str, str, Request, Reply], object]


@dataclass
class Sent:
    """One message that the coordinator sent."""

    site: str
    kind: str
    request: Request


@dataclass
class ScriptedGrid(Grid):
    """Hospitals by name; `script` may replace a reply, also by SILENCE, FLOWER_ERROR or records."""

    plan: Plan
    sites: tuple[str, ...]
    script: Script = lambda grid, site, kind, request, reply: reply
    shuffle: int = 0
    sent: list[Sent] = field(default_factory=list)
    replies: dict[str, Message] = field(default_factory=dict)
    activated: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        order = np.random.default_rng(self.shuffle).permutation(len(self.sites))
        self.nodes = {100 + int(k): self.sites[k] for k in order}

    def set_run(self, run: Run) -> None:
        pass

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):  # type: ignore[no-untyped-def]
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [node for node, site in self.nodes.items() if site not in self.away]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(
                node_id=node,
                last_activated_at=self.activated.get(node, ""),
                name=self.names.get(node, ""),
            )
            for node in self.get_node_ids()
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self._serve(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [identifier for identifier in message_ids if identifier in self.replies]
        # Arrival order is scrambled: nothing may depend on it.
        order = np.random.default_rng([self.shuffle, len(self.sent)]).permutation(len(wanted))
        return [self.replies.pop(wanted[k]) for k in order]

    def send_and_receive(self, messages, *, timeout=None):  # type: ignore[no-untyped-def]
        raise AssertionError("the coordinator has its own exchange")

    def _serve(self, message: Message) -> None:
        site, kind = self.nodes[message.metadata.dst_node_id], message.metadata.message_type
        request = decode_request(message.content)
        self.sent.append(Sent(site, kind, request))
        answer = self.script(
            self, site, kind, request, honest_reply(self.plan, site, kind, request)
        )
        if answer is SILENCE:
            return
        if answer in (FLOWER_ERROR, LOST):
            code = (
                ErrorCode.NODE_UNAVAILABLE
                if answer is LOST
                else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            )
            reply = Message(Error(code, PATIENT), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # as the SuperLink does for a dead node
        else:
            records = answer if isinstance(answer, RecordDict) else encode_reply(answer)  # type: ignore[arg-type]
            reply = Message(records, reply_to=message)
        self.replies[message.metadata.message_id] = reply


def honest_reply(plan: Plan, site: str, kind: str, request: Request) -> Reply:
    """Return a well-behaved hospital's answer: numbers that depend on its name and the request."""
    identity = request.identity
    rng = stream(plan.seed, identity.round, site, kind)
    reply = Reply(identity, site)
    with_training = plan.described_in_training(identity.round) or plan.prototypes.memory == "online"
    described = with_training if kind == TRAIN else bool(request.options.get("classes"))
    statistics = site_statistics(plan, rng) if plan.method.statistics and described else None
    if kind == ENROL:
        counts = {"train": examples_of(site), "validation": 2, "test": 2}
        details = {"site": site, "roles": ["train", "heldout", "observer"], "problems": []}
        return replace(
            reply, details=details | {"cases": counts, "patients": counts, "slices": counts}
        )
    assert request.weights is not None
    if kind == STATISTICS:
        moments = site_moments(request.weights, rng) if request.options.get("moments") else None
        return replace(reply, statistics=statistics, moments=moments)
    if kind == EVALUATE:
        rows = case_rows(plan, site, request.weights)
        return replace(
            reply,
            cases=encode_cases(rows),
            metrics={"dice": float(np.mean([row["dice"] for row in rows]))},
        )
    noise = rng.normal(scale=0.01, size=request.weights.values.size).astype(np.float32)
    counters = tuple((name, value + len(site)) for name, value in request.weights.counters)
    weights = Weights(request.weights.layout, request.weights.values + noise, counters)
    metrics = {
        "examples": float(examples_of(site)),
        "steps": 3.0,
        "loss": 1.0 / identity.round,
        "seconds": 1.5,
    }
    judged = {"validation_dice": score_of(request.weights), "validation_cases": 2.0}
    judged |= {"validation_dice_trained": score_of(weights)}
    control = None
    if plan.federation.aggregator == "scaffold":
        control = rng.normal(size=int(learnable(weights).sum())).astype(np.float32)
    if SHARES in request.options:
        judged["validation_dice_without"] = float(rng.uniform())
    return replace(
        reply,
        weights=weights,
        statistics=statistics,
        metrics=metrics | judged,
        control_variates=control,
    )


def site_statistics(plan: Plan, rng: np.random.Generator) -> ClassStatistics:
    """Statistics of 40 unit-length features of every class."""
    classes, width = plan.data.num_classes, plan.network.num_features
    features = rng.normal(size=(40 * classes, width))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return ClassStatistics.from_features(features, np.repeat(np.arange(classes), 40), classes)


def site_moments(weights: Weights, rng: np.random.Generator) -> NormMoments:
    """Moments of 50 inputs of every BatchNorm layer."""
    layers = norm_layers(weights)
    channels = sum(layers.values())
    mean, scatter = rng.normal(size=channels), 50 * rng.uniform(0.5, 1.5, channels)
    return NormMoments(layers, np.full(len(layers), 50.0), mean, scatter)


def case_rows(plan: Plan, site: str, weights: Weights) -> list[dict[str, object]]:
    """Two cases with a Dice that depends on the model."""
    distances = dict.fromkeys((*DISTANCES, *(f"{name}_mm" for name in DISTANCES)), 1.0)
    return [
        {
            "case": f"{site}-{k}",
            "structure": name,
            "dice": score_of(weights),
            "unit": "pixel",
            **distances,
        }
        | {
            "empty_prediction": False,
            "empty_truth": False,
            "dice_smooth1": score_of(weights),
            "asd_compat": 1.0,
        }
        for k in range(2)
        for name in plan.data.structures
    ]


def score_of(weights: Weights) -> float:
    """A number in [0, 1] that a model alone decides."""
    return int(weights.digest()[:8], 16) / 0xFFFFFFFF


def examples_of(site: str) -> int:
    """Training slices of a scripted hospital."""
    return 5 + 3 * (ord(site[-1]) % 5)
