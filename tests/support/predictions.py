"""Small model folders, empty image files and error codes, for tests of prediction."""

import numpy as np
import pytest

import fedsgcg.server.records.model_card
import fedsgcg.server.records.results
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.server.records.checkpoint import Best


def code_of(call, *arguments, **keywords):
    with pytest.raises(FedsgcgError) as caught:
        call(*arguments, **keywords)
    return caught.value.code


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return paths


def store(folder, *overrides):
    """Write a model folder as the coordinator does, with random weights and prototypes."""
    plan = Plan.from_tree(
        compose(["network.base_width=4", "data.image_size=32", f"output={folder}", *overrides])
    )
    folder.mkdir()
    state = build_network(plan.network, 3, 2, 5).state_dict()
    weights = Weights.from_state({name: tensor.numpy() for name, tensor in state.items()})
    card = fedsgcg.server.records.model_card.model_card(
        plan, Best(1, 0.5, weights), ["A"], prototypes=True
    )
    fedsgcg.server.records.results.write_model(Disk(), plan, weights, card)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, plan.network.num_features))
    statistics = ClassStatistics.from_features(features, rng.integers(0, 2, 50), 2)
    fedsgcg.server.records.results.write_prototypes(
        Disk(), plan, statistics, Identity("run", "", 1, plan.digest())
    )
    return folder
