"""One local round: reproducible, on the schedule, and it refuses to send what is not finite."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import CaseStore, open_store
from fedsgcg.clients.device import choose_device, precision
from fedsgcg.clients.methods import Guidance, View
from fedsgcg.clients.methods import base as supervised
from fedsgcg.clients.methods.guidance import pixel_features
from fedsgcg.clients.methods.ram import consistency_loss
from fedsgcg.clients.methods.sgcg import class_balanced_mean, contrast_of_views
from fedsgcg.clients.training import learning_rate, load_weights, train_round, weights_of
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.sgcg.loss import sgcg_loss
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Weights
from tests.support import sites

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("training")
    return sites.hospitals(folder / "data"), folder


def opened(hospital: tuple[Path, Path], *overrides: str) -> tuple[Plan, CaseStore]:
    root, folder = hospital
    plan = sites.plan_of(root, folder, *overrides)
    return plan, open_store(
        open_site(root, "North", plan.data), plan.data, folder / "cache", heldout=False
    )


def fresh(plan: Plan, seed: int = 0) -> torch.nn.Module:
    return build_network(plan.network, 3, plan.data.out_channels, seed)


def trained(plan: Plan, store: CaseStore, round_number: int = 1, guidance: Guidance | None = None):
    choose_device("cpu", threads=1)
    network = fresh(plan)
    figures, _ = train_round(
        network, [store], plan, round_number=round_number, guide=guidance, device=CPU
    )
    return weights_of(network).digest(), figures


def some_prototypes(plan: Plan) -> ClassStatistics:
    rng = np.random.default_rng(0)
    features = np.abs(rng.normal(size=(200, plan.network.num_features)))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return ClassStatistics.from_features(features, rng.integers(0, 2, 200), 2)


def test_the_same_seed_round_and_site_give_the_same_weights_and_any_other_does_not(hospital):
    plan, store = opened(hospital)
    first, _ = trained(plan, store)
    torch.manual_seed(123)  # the global generator has no say
    assert trained(plan, store)[0] == first
    assert trained(plan, store, round_number=2)[0] != first
    assert trained(plan, dataclasses.replace(store, site="Elsewhere"))[0] != first
    assert trained(dataclasses.replace(plan, seed=1), store)[0] != first


def test_figures_of_a_round(hospital):
    plan, store = opened(hospital)
    _, figures = trained(plan, store)
    assert figures["examples"] == len(store.slices("train")) == 12  # one of 4 patients validates
    assert figures["steps"] == 3  # 12 slices in batches of 4
    assert figures["learning_rate"] == pytest.approx(1e-3)
    assert figures["loss"] == pytest.approx(figures["loss_supervised"])
    assert figures["seconds"] > 0
    _, figures = trained(opened(hospital, "method.steps_per_round=5")[0], store)
    assert figures["steps"] == 5


def test_training_lowers_the_loss(hospital):
    plan, store = opened(hospital, "method.local_epochs=10", "method.poly_power=0")
    network = fresh(plan)
    before, _ = train_round(network, [store], plan, round_number=1, guide=None, device=CPU)
    after, _ = train_round(network, [store], plan, round_number=2, guide=None, device=CPU)
    assert after["loss"] < before["loss"]


def test_sgcg_adds_its_weighted_term_after_the_warm_up(hospital):
    plan, store = opened(hospital)
    prototypes = some_prototypes(plan)
    assert Guidance.from_prototypes(prototypes, plan.prototypes, 1, CPU) is None
    assert Guidance.from_prototypes(None, plan.prototypes, 2, CPU) is None
    guidance = Guidance.from_prototypes(prototypes, plan.prototypes, 2, CPU)
    assert guidance is not None
    _, figures = trained(plan, store, 2, guidance)
    assert figures["loss_contrast"] > 0
    assert figures["loss"] == pytest.approx(
        figures["loss_supervised"] + plan.prototypes.weight * figures["loss_contrast"]
    )


def test_a_class_below_min_count_is_not_active(hospital):
    plan, _ = opened(hospital, "prototypes.min_count=5")
    few = ClassStatistics(np.array([5.0, 4.0, 6.0]), np.ones((3, 8)), np.zeros((3, 8, 8)))
    guidance = Guidance.from_prototypes(few, plan.prototypes, 2, CPU)
    assert guidance is not None
    assert guidance.active.tolist() == [True, False, True]


def test_source_ignores_prototypes(hospital):
    plan, store = opened(hospital, "method=source")
    guidance = Guidance.from_prototypes(some_prototypes(plan), plan.prototypes, 2, CPU)
    assert trained(plan, store, 2, guidance)[0] == trained(plan, store, 2, None)[0]


def test_learning_rate_falls_over_all_rounds(hospital):
    plan, _ = opened(hospital)  # four rounds, lr 1e-3, power 0.9
    assert learning_rate(plan, 1, 0.0) == pytest.approx(1e-3)
    assert learning_rate(plan, 3, 0.0) == pytest.approx(1e-3 * 0.5**0.9)
    assert learning_rate(plan, 3, 0.5) == pytest.approx(1e-3 * 0.375**0.9)
    assert learning_rate(plan, 4, 1.0) == 0.0
    constant, _ = opened(hospital, "method.poly_power=0")
    assert learning_rate(constant, 4, 0.9) == pytest.approx(1e-3)


@pytest.mark.row(31)
def test_a_loss_that_is_not_finite_stops_the_round(hospital):
    plan, store = opened(hospital, "method.learning_rate=1e30")
    with pytest.raises(FedsgcgError) as caught:
        trained(plan, store)
    assert caught.value.code == "TRN-301"


def test_weights_that_became_infinite_in_the_last_step_stop_the_round(hospital):
    plan, store = opened(hospital, "method.learning_rate=1e39", "method.steps_per_round=1")
    with pytest.raises(FedsgcgError) as caught:  # the loss of the only step was finite
        trained(plan, store)
    assert caught.value.code == "TRN-301"


def test_a_site_without_training_slice_says_so(hospital):
    plan, _ = opened(hospital)
    root, folder = hospital
    store = open_store(
        open_site(root, "North", plan.data), plan.data, folder / "cache", heldout=True
    )
    with pytest.raises(FedsgcgError) as caught:
        trained(plan, store)
    assert caught.value.code == "TRN-302"


def test_weights_go_into_the_network_and_come_out_unchanged(hospital):
    plan, _ = opened(hospital)
    given = sites.weights(plan, seed=5)
    network = fresh(plan, seed=1)
    load_weights(network, given)
    assert weights_of(network).digest() == given.digest()


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_weights_of_another_network_are_refused(hospital, change):
    plan, _ = opened(hospital)
    state = dict(sites.weights(plan).to_state())
    name = next(iter(state))
    if change == "missing":
        del state[name]
    else:
        state[name if change == "shape" else "more"] = np.zeros((2, 2), np.float32)
    with pytest.raises(FedsgcgError) as caught:
        load_weights(fresh(plan), Weights.from_state(state))
    assert caught.value.code == "PAY-103"


def test_softmax_loss_by_hand():
    # Two pixels, two classes: p(class 1) = 3/4 and 1/2, labels 1 and 0.
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]]).view(1, 2, 1, 2)
    labels = torch.tensor([[[1, 0]]])
    entropy = (-math.log(0.75) - math.log(0.5)) / 2
    dice = 1 - (2 * 0.75 + 1e-5) / (0.75**2 + 0.5**2 + 1 + 1e-5)
    assert supervised.softmax_loss(logits, labels).item() == pytest.approx(entropy + dice, abs=1e-6)


def test_sigmoid_loss_by_hand_with_nested_structures():
    # One pixel of class 2: it belongs to the outer structure {1, 2} and to the inner one {2}.
    logits = torch.tensor([0.0, math.log(3.0)]).view(1, 2, 1, 1)
    labels = torch.tensor([[[2]]])
    entropy = (-math.log(0.5) - math.log(0.75)) / 2
    dice = 1 - (2 * (0.5 + 0.75) + 1e-5) / (0.25 + 0.5625 + 2 + 1e-5)
    value = supervised.sigmoid_loss(logits, labels, {"outer": [1, 2], "inner": [2]})
    assert value.item() == pytest.approx(entropy + dice, abs=1e-6)


def test_a_batch_of_ignored_pixels_has_a_finite_loss_and_no_gradient():
    logits = torch.randn(2, 2, 4, 4, requires_grad=True)
    labels = torch.full((2, 4, 4), 255)
    for value in (
        supervised.softmax_loss(logits, labels),
        supervised.sigmoid_loss(logits, labels, {"a": [1], "b": [1]}),
    ):
        (gradient,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(value)
        assert gradient.abs().max() == 0


def test_class_balance_is_the_mean_of_class_means():
    values = torch.tensor([1.0, 3.0, 10.0, 99.0, 50.0])
    labels = torch.tensor([0, 0, 1, 255, 2])
    active = torch.tensor([True, True, False])
    assert class_balanced_mean(values, labels, active).item() == pytest.approx((2.0 + 10.0) / 2)
    assert class_balanced_mean(values, torch.full((5,), 255), active).item() == 0.0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_losses_of_millions_of_equal_pixels_keep_five_digits(memory_format):
    """Equal terms are the worst case of a running sum: float32 rounding accumulates to percents."""
    logits = torch.full((16, 3, 256, 256), 0.1)
    logits[:, 1] += 0.37
    logits, labels = (
        logits.contiguous(memory_format=memory_format),
        torch.zeros(16, 256, 256, dtype=torch.int64),
    )
    classes, valid = (
        {"a": [1], "b": [1, 2], "c": [2]},
        torch.ones(16, 1, 256, 256, dtype=torch.bool),
    )

    def losses(logits):
        first, second = logits.softmax(1), (1.3 * logits).softmax(1)
        yield supervised.softmax_loss(logits, labels)
        yield supervised.sigmoid_loss(logits, labels, classes)
        yield consistency_loss(first, second, valid, symmetric=True)
        yield torch.nn.functional.mse_loss(first, second)
        yield class_balanced_mean(
            first[:, 0].reshape(-1), labels.reshape(-1), torch.ones(3, dtype=torch.bool)
        )

    for found, wanted in zip(losses(logits), losses(logits.double()), strict=True):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("balance", ["pixel", "class"])
def test_the_method_uses_all_pixels_as_its_settings_say(hospital, balance):
    plan, _ = opened(hospital, f"prototypes.balance={balance}")
    guidance = Guidance.from_prototypes(some_prototypes(plan), plan.prototypes, 2, CPU)
    assert guidance is not None
    torch.manual_seed(0)
    maps, logits, labels = (
        torch.rand(2, 8, 4, 4),
        torch.randn(2, 2, 4, 4),
        torch.randint(0, 2, (2, 4, 4)),
    )
    labels[0, 0, 0] = 255
    views = [View("source", logits, maps)]
    contrast = contrast_of_views(views, labels, guidance, plan)
    each = sgcg_loss(
        pixel_features(maps, True),
        labels.reshape(-1),
        guidance.mean,
        guidance.covariance,
        temperature=0.5,
        reduction="none",
    )
    flat = labels.reshape(-1)
    means = [each[flat == index].mean() for index in (0, 1)]
    expected = torch.stack(means).mean() if balance == "class" else each[flat != 255].mean()
    assert contrast.item() == pytest.approx(expected.item(), rel=1e-5)


def test_pixel_features_keep_the_order_of_the_labels():
    maps = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).view(2, 3, 2, 2)
    pixels = pixel_features(maps, False)
    assert pixels[5].tolist() == maps[1, :, 0, 1].tolist()  # image 1, row 0, column 1
    assert pixel_features(maps + 1, True).norm(dim=1).tolist() == pytest.approx([1.0] * 8)


def test_a_cpu_never_computes_in_bf16(hospital):
    plan, _ = opened(hospital)
    assert precision(plan.method, CPU) == torch.float32
    with pytest.raises(FedsgcgError) as caught:
        precision(dataclasses.replace(plan.method, precision="bf16"), CPU)
    assert caught.value.code == "CFG-004"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_what_was_found():
    with pytest.raises(FedsgcgError) as caught:
        choose_device("cuda")
    assert caught.value.code == "CFG-004"
    found = caught.value.problems[0].found
    assert torch.__version__ in found
    assert "CUDA_VISIBLE_DEVICES" in found
    assert choose_device("auto").type == "cpu"
