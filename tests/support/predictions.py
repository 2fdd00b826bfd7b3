"""Small model folders, empty image files and error codes, for tests of prediction."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load, save

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
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, plan.network.num_features))
    statistics = ClassStatistics.from_features(features, rng.integers(0, 2, 50), 2)
    fedsgcg.server.records.results.write_prototypes(
        Disk(), plan, statistics, Identity("run", "", 1, plan.digest())
    )
    fedsgcg.server.records.results.write_model(Disk(), plan, weights, card)
    return folder


def write_card(folder, card):
    """Write a `model.json` and name it in the weights' file, as the coordinator would have."""
    text = json.dumps(card).encode()
    (folder / "model.json").write_bytes(text)
    path = folder / "model.safetensors"
    facts = {"card_sha256": hashlib.sha256(text).hexdigest()}
    path.write_bytes(save(load(path.read_bytes()), metadata={"fedsgcg": json.dumps(facts)}))
