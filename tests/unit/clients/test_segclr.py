"""SegCLR in a local round: its terms, its heads, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.pairs import check_pairs, make_pairs
from fedsgcg.clients.data.store import CaseStore, open_store
from fedsgcg.clients.methods.base import segmentation_loss
from fedsgcg.clients.methods.segclr import SegCLR
from fedsgcg.clients.training import Session, round_batches, train_round, weights_of
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.heads import CHILD, build_trained
from fedsgcg.common.settings.plan import Plan, Terms
from fedsgcg.deploy.study.preflight import check_plan
from tests.support import sites

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("segclr")
    return sites.hospitals(folder / "data"), folder


def plan_of(hospital: tuple[Path, Path], *overrides: str) -> Plan:
    return sites.plan_of(*hospital, "method=segclr", *overrides)


def opened(hospital: tuple[Path, Path], plan: Plan, *, masks: bool = True) -> CaseStore:
    root, folder = hospital
    site = open_site(root, "North", plan.data, masks=masks)
    cache = folder / "cache"
    return open_store(site, plan.data, cache, heldout=False, masks=masks, target=not masks)


def a_batch(plan: Plan, **changes: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 32, 32, generator=generator) * 2 - 1
    labels = (images[:, 0] > 0).long()
    pairs = make_pairs(images, None, plan.method.segclr, generator)
    return replace(Batch(images, labels, (6,), pairs=pairs), **changes)


def method_of(plan: Plan) -> SegCLR:
    return SegCLR(build_trained(plan, 0).train(), plan, 1, CPU)


@pytest.mark.parametrize("contrast", ["simclr", "simsiam"])
@pytest.mark.parametrize("head", ["channel", "pool"])
def test_the_joint_loss_is_half_the_contrast_plus_lambda_times_the_supervised_loss(
    hospital: tuple[Path, Path], contrast: str, head: str
) -> None:
    plan = plan_of(
        hospital,
        f"method.segclr.contrast={contrast}",
        f"method.segclr.head={head}",
        "method.segclr.supervised_weight=7",
    )
    batch = a_batch(plan)
    total, parts = method_of(plan).loss(batch, None)
    expected = parts["loss_contrast"] / 2 + 7 * parts["loss_supervised"]
    assert torch.allclose(total, expected)
    plain = method_of(plan)
    assert torch.allclose(
        parts["loss_supervised"],
        segmentation_loss(plain.forward(batch)[0].logits, batch.labels, plan.data),
    )
    assert torch.allclose(parts["loss_contrast"], method_of(plan).contrast(batch.pairs, (6,)))


def test_terms_follow_what_a_batch_allows(hospital: tuple[Path, Path]) -> None:
    plan = plan_of(hospital)
    batch = a_batch(plan, labels=torch.full((6, 32, 32), 255), labelled=False)
    method = method_of(plan)
    total, parts = method.loss(batch, None)
    assert set(parts) == {"loss_contrast"}
    assert torch.allclose(total, parts["loss_contrast"] / 2)
    total.backward()
    moved = {
        name.split(".")[0]
        for name, parameter in method.network.named_parameters()
        if parameter.grad is not None
    }
    assert moved == {"encoder", CHILD}
    total, parts = method_of(plan).loss(a_batch(plan, pairs=None), None)
    assert torch.allclose(total, parts["loss_supervised"])


def test_domains_of_a_pooled_client_are_contrasted_apart(hospital: tuple[Path, Path]) -> None:
    # With one pair per domain there is no negative, and NT-Xent is zero.
    plan = plan_of(hospital)
    pairs = a_batch(plan).pairs
    assert method_of(plan).contrast(pairs, (1,) * 6).abs() < 1e-6
    assert method_of(plan).contrast(pairs, (6,)) > 0.1


@pytest.mark.parametrize("contrast", ["simclr", "simsiam"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_first_steps_lower_the_methods_own_loss(
    hospital: tuple[Path, Path], contrast: str, labelled: bool
) -> None:
    plan = plan_of(hospital, f"method.segclr.contrast={contrast}", "method.learning_rate=3e-3")
    batch = a_batch(plan, labelled=labelled)
    session = Session(build_trained(plan, 0), plan, 1, CPU, {})
    losses = [float(session.step(batch, None)[0]) for _ in range(12)]
    assert min(losses[-3:]) < losses[0]


def test_micro_batches_keep_pairs_and_role(hospital: tuple[Path, Path]) -> None:
    batch = a_batch(plan_of(hospital), labelled=False)
    parts = batch.parts(3)
    assert [len(part.images) for _, part in parts] == [2, 2, 2]
    assert not any(part.labelled for _, part in parts)
    again = torch.cat([part.pairs for _, part in parts if part.pairs is not None])
    assert torch.equal(again.sort(0).values, batch.pairs.sort(0).values)


@pytest.mark.parametrize("pairs", ["augment", "slices", "slices+augment"])
def test_a_round_is_reproducible_and_the_pairs_leave_the_supervised_batches_alone(
    hospital: tuple[Path, Path], pairs: str
) -> None:
    plan = plan_of(hospital, f"method.segclr.pairs={pairs}")
    store = opened(hospital, plan)
    digests = set()
    for _ in range(2):
        network = build_trained(plan, 0)
        figures, _ = train_round(network, [store], plan, round_number=1, guide=None, device=CPU)
        digests.add(weights_of(network).digest())
    assert len(digests) == 1
    assert {"loss_supervised", "loss_contrast"} <= set(figures)
    table = store.slices("train")
    with_pairs, without = (
        list(round_batches([table], plan, 1, ["North"], CPU, None, terms))
        for terms in (Terms(True, True), Terms(True, False))
    )
    for one, other in zip(with_pairs, without, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert (one.pairs is None, other.pairs is None) == (False, True)


def test_a_store_without_masks_trains_the_encoder_and_the_heads_alone(
    hospital: tuple[Path, Path],
) -> None:
    plan = plan_of(hospital, "data.train_slices=foreground", "unlabelled=[North]")
    store = opened(hospital, plan, masks=False)
    assert not store.labelled
    assert {case.split for case in store.cases} == {"train"}
    assert len(store.slices("train")) == sum(case.num_slices for case in store.cases)
    network = build_trained(plan, 0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    figures, _ = train_round(network, [store], plan, round_number=1, guide=None, device=CPU)
    assert "loss_supervised" not in figures
    changed = {
        name.split(".")[0]
        for name, tensor in network.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"encoder", CHILD}


def test_pretraining_has_one_term_after_the_other(hospital: tuple[Path, Path]) -> None:
    plan = plan_of(hospital, "method.segclr.pretraining=0.4", "federation.rounds=5")
    assert plan.pretraining_rounds == 2
    assert plan.terms(2) == plan.terms(2, labelled=False) == Terms(False, True)
    assert plan.terms(3) == Terms(True, False)
    store = opened(hospital, plan, masks=False)
    with pytest.raises(FedsgcgError) as caught:
        train_round(build_trained(plan, 0), [store], plan, round_number=3, guide=None, device=CPU)
    assert caught.value.code == "ROL-212"


def test_pairs_of_slices_are_refused_for_pictures(tmp_path: Path) -> None:
    root = tmp_path / "pictures" / "North"
    root.mkdir(parents=True)
    for number in range(3):
        picture = torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8).numpy()
        mask = (picture[..., 0] > 128).astype("uint8")
        Image.fromarray(picture).save(root / f"{number}_image.png")
        Image.fromarray(mask).save(root / f"{number}_mask.png")
    plan = sites.plan_of(tmp_path / "pictures", tmp_path, "method=segclr")
    store = open_store(
        open_site(tmp_path / "pictures", "North", plan.data), plan.data, tmp_path, heldout=False
    )
    check_pairs([store], plan)
    sliced = sites.plan_of(
        tmp_path / "pictures",
        tmp_path,
        "method=segclr",
        "method.segclr.pairs=slices",
        "data.sites=[North]",
    )
    with pytest.raises(FedsgcgError) as caught:
        check_pairs([store], sliced)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("TRN-311", "North")
    assert "3 pictures" in problem.found
    assert "volumes" in problem.expected
    with pytest.raises(FedsgcgError) as caught:  # in a simulation before the first cell starts
        check_plan(sliced, "cpu")
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("TRN-311", "method.segclr.pairs")
    assert "pictures at North" in problem.found
    assert problem.action == "set method.segclr.pairs=augment"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("method.segclr.supervised_weight=-1", "method.segclr.supervised_weight"),
        ("method.segclr.supervised_weight=1e9", "method.segclr.supervised_weight"),
        ("method.segclr.tau=0", "method.segclr.tau"),
        ("method.segclr.head_channels=65", "method.segclr.head_channels"),
        ("method.segclr.pretraining=1", "method.segclr.pretraining"),
        ("method.segclr.crop=0", "method.segclr.crop"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_by_name(
    hospital: tuple[Path, Path], override: str, where: str
) -> None:
    with pytest.raises(FedsgcgError) as caught:
        plan_of(hospital, override)
    (problem,) = caught.value.problems
    assert problem.code == "CFG-001"
    assert problem.where == where
    assert problem.found
    assert problem.expected


def test_a_head_with_too_many_inputs_is_refused(hospital: tuple[Path, Path]) -> None:
    wide = ("data.image_size=512", "network.base_width=16", "method.segclr.head_channels=17")
    with pytest.raises(FedsgcgError, match="at most 16 "):
        plan_of(hospital, *wide)
    plan_of(hospital, *wide[:2], "method.segclr.head_channels=16")
