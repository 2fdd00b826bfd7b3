"""Adaptation to a hospital's images: each way against its definition on tiny networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsgcg.clients.adaptation import (
    Reference,
    Refined,
    adapted,
    class_probabilities,
    hospital_batches,
    interpolated_moments,
    logits_of_classes,
)
from fedsgcg.clients.confidence import Gaussians
from fedsgcg.clients.data.slices import Slices
from fedsgcg.clients.data.store import SliceTable
from fedsgcg.clients.methods.partners import MeanMixer
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.adaptation import AdaptSettings
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.amplitudes import AmplitudeSummary
from tests.support.plans import small_plan

CPU = torch.device("cpu")


class TwoNorms(nn.Module):
    """Two BatchNorm layers with a rectifier between them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
        generator = torch.Generator().manual_seed(0)
        for layer in (self.layers[0], self.layers[2]):
            layer.running_mean.copy_(torch.randn(3, generator=generator))
            layer.running_var.copy_(torch.rand(3, generator=generator) + 0.5)

    def forward(self, images):
        found = self.layers(images)
        return found, found


def images_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 1.7 * torch.randn(count, 3, 4, 4, generator=generator)


def by_definition(network, images, share):
    """Interpolated moments and output of one batch, layer by layer in float64."""
    maps, moments = images.double(), []
    for layer in network.layers:
        if isinstance(layer, nn.ReLU):
            maps = maps.relu()
            continue
        own = maps.mean((0, 2, 3)), maps.var((0, 2, 3), correction=1)
        source = layer.running_mean.double(), layer.running_var.double()
        mean, variance = (
            (1 - share) * old + share * new for old, new in zip(source, own, strict=True)
        )
        moments.append((mean, variance))
        shape = (1, 3, 1, 1)
        maps = (maps - mean.view(shape)) / (variance.view(shape) + layer.eps).sqrt()
    return moments, maps


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_moments_of_one_batch_are_interpolated_layer_by_layer(share):
    network, images = TwoNorms().eval(), images_of(5)
    plain = network(images)[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    wanted, maps = by_definition(network, images, share)
    with interpolated_moments(network, [images], share, CPU):
        for layer, (mean, variance) in zip(network.layers[::2], wanted, strict=True):
            torch.testing.assert_close(layer.running_mean.double(), mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.running_var.double(), variance, atol=1e-5, rtol=1e-5)
        found = network(images)[0]
        torch.testing.assert_close(found.double(), maps, atol=1e-4, rtol=1e-4)
        if share == 0:
            assert torch.equal(found, plain)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_batches_are_pooled_and_an_error_restores_the_model():
    network, images = TwoNorms().eval(), images_of(7)
    first = network.layers[0]
    with interpolated_moments(network, [images[:3], images[3:]], 1.0, CPU):
        torch.testing.assert_close(first.running_mean, images.mean((0, 2, 3)))
        torch.testing.assert_close(first.running_var, images.var((0, 2, 3), correction=1))
    before = first.running_mean.clone()
    with (
        pytest.raises(RuntimeError),
        interpolated_moments(network, [images, images[:, :1]], 1, CPU),
    ):
        pass
    assert torch.equal(first.running_mean, before)
    assert not first._forward_pre_hooks


def test_a_hospital_is_measured_in_batches_that_mix_its_cases_the_same_way_each_time():
    stored = tuple(
        Slices(
            np.full((20, 1, 16, 16), case, np.int16),
            np.zeros((20, 16, 16), np.uint8),
            np.zeros((20, 16, 16), np.uint8),
            np.zeros((20, 16, 16), np.uint8),
            np.zeros((20, 2), np.bool_),
            None,
        )
        for case in range(3)
    )
    order = np.repeat(np.arange(3), 20), np.tile(np.arange(20), 3)
    table = SliceTable(*order, np.zeros(60, np.bool_), 1, stored)
    first, again = list(hospital_batches(table)), list(hospital_batches(table))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert [len(one) for one in first] == [16, 16, 16, 12]
    assert all(len(one.unique()) == 3 for one in first)


def data_of(tmp_path, activation):
    plan = small_plan(
        tmp_path,
        data__classes={"background": [0], "rim": [1], "cup": [2]},
        data__structures={"disc": ["rim", "cup"], "cup": ["cup"]},
        data__activation=activation,
    )
    return plan.data


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_of_classes_give_the_logits_of_these_probabilities(tmp_path, activation):
    data = data_of(tmp_path, activation)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, data.out_channels, 3, 3, generator=generator)
    found = class_probabilities(logits, data)
    assert found.shape == (2, 3, 3, 3)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 3, 3))
    if activation == "sigmoid":
        disc, cup = logits.sigmoid().unbind(1)
        parts = torch.stack([(1 - disc) * (1 - cup), disc * (1 - cup), disc * cup], 1)
        torch.testing.assert_close(found, parts / parts.sum(1, keepdim=True))
    back = logits_of_classes(found, data)
    if activation == "softmax":
        torch.testing.assert_close(class_probabilities(back, data), found)
    else:
        structures = torch.stack([found[:, 1] + found[:, 2], found[:, 2]], 1)
        torch.testing.assert_close(back.sigmoid(), structures)


class Fixed(nn.Module):
    """Features are the first two channels of the image, logits the difference to two centres."""

    def forward(self, images):
        features = images[:, :2]
        return torch.stack([-4 * features[:, 0], 4 * features[:, 0]], 1), features


def refined_of(tmp_path, **changes):
    data = small_plan(tmp_path).data
    statistics = ClassStatistics(
        np.array([100.0, 100.0]),
        np.array([[-1.0, 0.0], [1.0, 0.0]]),
        np.stack([100 * 0.25 * np.eye(2)] * 2),
    )
    settings = AdaptSettings(by=("prototypes",), **changes)
    gaussians = Gaussians.of(statistics, CPU)
    return Refined(Fixed(), gaussians, settings, data, normalize=False), gaussians


def pixels(*values):
    """One slice of one row with these features."""
    maps = torch.zeros(1, 3, 1, len(values))
    maps[0, :2, 0] = torch.tensor(values).T
    return maps


def test_prototypes_move_towards_confident_pixels_and_decide_uncertain_ones(tmp_path):
    refined, gaussians = refined_of(tmp_path, share=0.5, probability=0.9, distance=2.0)
    # Confident and near: the first two. Uncertain: the third. Confident but far: the last.
    seen = pixels((-0.8, 0.2), (0.9, 0.4), (0.05, 0.0), (9.0, 0.0))
    refined.measure([seen])
    wanted = torch.tensor([[-0.9, 0.1], [0.95, 0.2]])
    torch.testing.assert_close(refined._gaussians.mean, wanted)
    logits, features = Fixed()(seen)
    found = refined(seen)[0]
    certain = torch.tensor([True, True, False, True])
    assert torch.equal(found[..., certain], logits[..., certain])
    squares = refined._gaussians.squared_distance(features, normalize=False)[0, :, 0, 2] / 2
    prior = logits[0, :, 0, 2].softmax(0)
    joint = 0.5 * prior.log() + 0.5 * (-squares / 2).softmax(0).log()
    torch.testing.assert_close(found[0, :, 0, 2].softmax(0), joint.softmax(0))


def test_no_share_and_no_gate_change_nothing(tmp_path):
    seen = pixels((-0.8, 0.2), (0.05, 0.0), (0.1, 0.3))
    logits, _ = Fixed()(seen)
    far, gaussians = refined_of(tmp_path, share=0.5, distance=1e-6)
    far.measure([seen])
    assert torch.equal(far._gaussians.mean, gaussians.mean), "no pixel is near enough"
    assert torch.equal(far(seen)[0], logits)
    none, gaussians = refined_of(tmp_path, share=0.0, distance=5.0)
    none.measure([seen])
    assert torch.equal(none._gaussians.mean, gaussians.mean)
    torch.testing.assert_close(none(seen)[0].softmax(1), logits.softmax(1))


def test_each_image_gets_the_mean_amplitudes_of_the_training_hospitals(tmp_path):
    plan = small_plan(tmp_path, method__name="harmofl", method__statistics=False)
    rng = np.random.default_rng(0)
    side = int(32 * plan.method.ram.window) + 1
    windows = np.exp(rng.normal(size=(6, 3, 2, side, side))).astype(np.float32)
    summary = AmplitudeSummary.from_amplitudes(windows, 32, "volume")
    mixer = MeanMixer(summary, plan.method.ram, rng)
    images = torch.from_numpy(rng.uniform(-0.5, 0.5, (2, 3, 32, 32)).astype(np.float32))
    seen = []

    class Seen(nn.Module):
        def forward(self, given):
            seen.append(given)
            return given, given

    reference = Reference(mixer=mixer)
    with adapted(
        Seen(), "amplitude", lambda: [], AdaptSettings(), plan.data, reference, CPU
    ) as changed:
        changed(images)
        alone = changed(images[:1])[0]
    mean, ratio = mixer.draw((2,))
    torch.testing.assert_close(seen[0], mixer.mix(images, mean, ratio))
    torch.testing.assert_close(alone, seen[0][:1])  # an image does not depend on the others
    assert not torch.allclose(seen[0], images)


def test_a_model_without_what_is_adapted_is_refused(tmp_path):
    data, settings = small_plan(tmp_path).data, AdaptSettings()
    for way, found in (
        ("batchnorm", "BatchNorm"),
        ("prototypes", "no prototypes"),
        ("amplitude", "no mean amplitudes"),
    ):
        with (
            pytest.raises(FedsgcgError, match=found) as caught,
            adapted(Fixed(), way, lambda: [], settings, data, Reference(), CPU),
        ):
            pass
        assert caught.value.code == "TRN-330"


def test_a_plan_without_what_is_adapted_is_refused(tmp_path):
    def refused(*ways, **changes):
        with pytest.raises(FedsgcgError) as caught:
            small_plan(tmp_path, adapt={"by": list(ways)}, **changes)
        return [problem.expected for problem in caught.value.problems]

    assert "network.norm=group" in refused("batchnorm", network__norm="group")[0]
    source = {"method__name": "source", "method__statistics": False}
    assert "method.statistics=true" in refused("prototypes", **source)[0]
    assert "harmofl" in refused("amplitude")[0]
    assert "some of" in refused("everything")[0]
    assert "some of" in refused("batchnorm", "batchnorm")[0]
    plan = small_plan(tmp_path, adapt={"by": ["batchnorm", "prototypes"]})
    assert replace(plan, adapt=AdaptSettings()).digest() != plan.digest()
