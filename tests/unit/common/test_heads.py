"""Training-only heads are shared like all weights and are no part of the saved model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods import METHODS, Guide, Loss, Source
from fedsgcg.clients.predict.model import load_model
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.heads import CHILD, HEADS, build_trained, head, state_of, without_heads
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from fedsgcg.server.federation import initial_weights
from fedsgcg.server.records.journal import Journal
from tests.support import small
from tests.support.plans import small_plan


def heads_of(plan: Plan) -> dict[str, nn.Module]:
    """A head of every kind of layer, on the penultimate map."""
    width = plan.network.num_features
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {"score": nn.Sequential(nn.Conv2d(width, 4, 1), flat, norm, nn.Linear(4, 2))}


class Scored(Source):
    """Source with a term that trains the head."""

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        views = self.forward(batch)
        total, parts = self.supervised(batch, views)
        scores: Tensor = head(self.network, "score")(views[0].features.float())
        return total + (scores - 1).square().mean(), parts


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "source", heads_of)
    monkeypatch.setitem(METHODS, "source", Scored)


def test_heads_depend_on_the_seed_alone_and_leave_the_networks_weights_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(tmp_path, method__name="source")
    plain = initial_weights(plan)
    monkeypatch.setitem(HEADS, "source", heads_of)
    before = torch.get_rng_state()
    first = initial_weights(plan)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert initial_weights(plan).digest() == first.digest() != plain.digest()
    assert without_heads(first).digest() == plain.digest()
    assert without_heads(plain) is plain
    own = {name: array for name, array in first.to_state().items() if name.startswith(CHILD)}
    assert sorted(array.size for array in own.values()) == [2, 4, 4, 4, 8, 32]
    assert all(np.isfinite(array).all() for array in own.values())
    assert own[f"{CHILD}.score.0.weight"].std() > 0
    assert own[f"{CHILD}.score.3.weight"].std() > 0


def test_a_method_without_heads_trains_the_plain_network(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, method__name="source")
    channels = (3, plan.data.out_channels)
    plain = state_of(build_network(plan.network, *channels, generator_seed=3))
    trained = state_of(build_trained(plan, generator_seed=3))
    assert Weights.from_state(plain).digest() == Weights.from_state(trained).digest()


def test_a_head_with_running_moments_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS, "source", lambda plan: {"norm": nn.BatchNorm2d(4)})
    with pytest.raises(ValueError, match="running moments"):
        build_trained(small_plan(tmp_path, method__name="source"), None)


@pytest.mark.usefixtures("scored")
def test_a_federation_merges_heads_and_saves_a_model_without_them(
    hospitals: Path, tmp_path: Path
) -> None:
    settings = ("method=source", "heldout=South", "federation.rounds=2")
    (cell,) = small.plan(hospitals, tmp_path, *settings).cells
    run_cell_in_process(cell.tree)
    plan = Plan.from_tree(cell.tree)
    with Journal.of_plan(plan, Disk()) as journal:
        record = journal.resume()
    assert record is not None
    start, last = initial_weights(plan).to_state(), record.weights.to_state()
    own = [name for name in last if name.startswith(CHILD)]
    assert len(own) == 6
    assert all(np.abs(last[name] - start[name]).max() > 0 for name in own)
    model = load_model(cell.folder)
    assert not any(name.startswith(CHILD) for name in model.network.state_dict())
    assert model.card["digest"] == without_heads(record.weights).digest()
