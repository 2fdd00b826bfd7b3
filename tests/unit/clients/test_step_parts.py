"""Parts of a step: gradients add up, and a process with little memory trains the same model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.methods.base import Source, segmentation_loss
from fedsgcg.clients.training import Session
from tests.support import sites
from tests.support.one_site import network_of, opened

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("memory")
    return sites.hospitals(folder / "data"), folder


# parts of a step


def batch_of(sizes, seed=0, classes=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(sum(sizes), 3, 32, 32, generator=generator) * 2 - 1
    return Batch(
        images, torch.randint(0, classes, (sum(sizes), 32, 32), generator=generator), sizes
    )


class Entropy(Source):
    """A loss that is a mean over slices, as the docstring of `Batch.parts` has it."""

    def supervised(self, batch, views):
        value = torch.nn.functional.cross_entropy(views[0].logits, batch.labels)
        return value, {"loss_supervised": value.detach()}


def gradients(plan, batch, parts, method=None):
    network = network_of(plan).double()
    session = Session(network, plan, len(batch.sizes), CPU, {})
    if method is not None:
        session.method = method(network, plan, len(batch.sizes), CPU)
    given = replace(batch, images=batch.images.double())
    figures = session.step(given, None, parts)
    return [parameter.grad.clone() for parameter in network.parameters()], figures, network


@pytest.mark.parametrize(("sizes", "parts"), [((8,), 2), ((8,), 4), ((7,), 3), ((4, 4), 2)])
def test_gradients_of_the_parts_add_up_to_those_of_the_whole_for_a_mean_over_slices(
    hospital, sizes, parts
):
    plan, _ = opened(hospital, "method=source", "network.norm=group")
    whole, figures, _ = gradients(plan, batch_of(sizes), 1, Entropy)
    cut, figures_of_parts, _ = gradients(plan, batch_of(sizes), parts, Entropy)
    for first, second in zip(whole, cut, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)  # logits are float32
    torch.testing.assert_close(figures_of_parts, figures, rtol=1e-5, atol=1e-6)


def test_dice_sees_the_parts_and_their_gradients_are_weighted_by_their_slices(hospital):
    plan, _ = opened(hospital, "method=source", "network.norm=group")
    batch = batch_of((7,))
    cut, figures, _ = gradients(plan, batch, 3)
    network = network_of(plan).double()
    own = [[0, 3, 6], [1, 4], [2, 5]]
    losses = [
        segmentation_loss(network(batch.images[i].double())[0], batch.labels[i], plan.data)
        for i in own
    ]
    total = (3 * losses[0] + 2 * losses[1] + 2 * losses[2]) / 7
    expected = torch.autograd.grad(total, list(network.parameters()))
    for first, second in zip(expected, cut, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-6)  # logits are float32
    assert figures[0].item() == pytest.approx(total.item())
    whole = segmentation_loss(network(batch.images.double())[0], batch.labels, plan.data)
    assert abs(whole.item() - total.item()) > 1e-6


def test_batchnorm_sees_the_parts_one_after_the_other(hospital):
    plan, _ = opened(hospital, "method=source")
    batch = batch_of((4,))
    convolution, norm = list(network_of(plan).double().encoder.modules())[4:6]
    assert isinstance(norm, torch.nn.BatchNorm2d)
    means = [convolution(batch.images[i].double()).mean((0, 2, 3)) for i in ([0, 2], [1, 3])]
    _, _, trained = gradients(plan, batch, 2)
    after = list(trained.encoder.modules())[5]
    assert int(after.num_batches_tracked) == 2
    torch.testing.assert_close(
        after.running_mean, 0.9 * (0.1 * means[0]) + 0.1 * means[1], rtol=1e-9, atol=1e-12
    )


# a process whose memory is limited


LIMITED = """
import json, resource, sys
from dataclasses import replace
from pathlib import Path
import torch
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.device import choose_device
from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.training import train_round, weights_of
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.plan import Plan

def pages(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024

tree, parts, room = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
choose_device("cpu", 1)
plan = Plan.from_tree(tree)
plan = replace(plan, site=replace(plan.site, micro_batches=parts))
site = open_site(plan.data.root, "North", plan.data)
store = open_store(site, plan.data, Path(sys.argv[4]), heldout=False)
network = build_network(plan.network, 3, plan.data.out_channels, 0)
tiny = torch.zeros(2, 3, 16, 16)  # first use, in which the libraries allocate memory of their own
network.eval()(tiny)[0].sum().backward()
torch.optim.Adam(network.parameters()).zero_grad()  # it loads torch's compiler
before = pages("VmSize")
if room:
    resource.setrlimit(resource.RLIMIT_AS, (before + room, before + room))
cpu = torch.device("cpu")
figures, _ = train_round(network, [store], plan, round_number=1, guide=None, device=cpu)
facts = {
    "digest": weights_of(network).digest(),
    "parts": figures["micro_batches"],
    "grown": pages("VmPeak") - before,
}
print(json.dumps(facts))
"""


def test_a_process_with_too_little_memory_trains_the_same_model_in_parts(hospital, tmp_path):
    """The limit lies between what the whole step and its halves were measured to need."""
    root, folder = hospital
    options = "method=source", "data.image_size=128", "network.base_width=8", "method.batch_size=8"
    tree = sites.tree_of(root, folder, *options, "method.steps_per_round=2")
    # Memory that is freed goes back to the system, so that the size of the process is what it uses.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
    }

    def trained(parts: int, room: int = 0):
        command = [
            sys.executable,
            "-c",
            LIMITED,
            json.dumps(tree),
            str(parts),
            str(room),
            str(tmp_path / "cache"),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout), done.stderr

    whole, _ = trained(1)
    halves, _ = trained(2)
    assert halves["grown"] < 0.8 * whole["grown"]
    limited, told = trained(1, (whole["grown"] + halves["grown"]) // 2)
    assert limited["parts"] == halves["parts"] == 2
    assert limited["digest"] == halves["digest"] != whole["digest"]
    assert "does not fit into the memory" in told
