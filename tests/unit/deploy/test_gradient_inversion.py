"""The inversion of a gradient works where it must, and noise stops it there."""

from pathlib import Path

import pytest

from fedsgcg.deploy.attacks.inversion import invert_gradient
from tests.benchmarks.gradient_inversion import group_plan, made, patient
from tests.support.plans import small_plan


def test_one_slice_and_one_step_of_a_small_network_show_the_slice(
    tmp_path: Path,
) -> None:
    own, other = patient(), patient(seed=6)
    mask = own.labels[0].double()
    assert abs(float(((mask - mask.mean()) * own.images[0, 1]).mean())) < 0.05  # it shows nothing
    found = invert_gradient(made(pool=True), own, [other], group_plan(tmp_path))
    assert found.correlation > 0.8
    assert found.chance < 0.5


def test_the_noise_of_private_training_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsgcg.deploy.attacks.inversion.STEPS", 100)
    dp = {"channels": ["weights"], "weights_noise": 1.5}
    plan = small_plan(tmp_path, network__norm="group", privacy__dp=dp)
    assert invert_gradient(made(pool=True), patient(), [], plan).correlation < 0.4
