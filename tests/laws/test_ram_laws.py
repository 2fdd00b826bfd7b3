"""Properties of RAM-DSIR: mixture, losses, learning-rate schedule and restoration decoder."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.data.slices import STEPS, Slices
from fedsgcg.clients.data.store import SliceTable
from fedsgcg.clients.methods import METHODS
from fedsgcg.clients.methods.amplitude import window_amplitudes
from fedsgcg.clients.methods.base import segmentation_loss
from fedsgcg.clients.methods.partners import BankMixer, LocalMixer, SummaryMixer
from fedsgcg.clients.methods.ram import Ram, consistency_loss
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.networks import RestorationDecoder, build_network
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.plan import Plan, RamSettings
from fedsgcg.common.wire.amplitudes import AmplitudeBank, AmplitudeSummary

SIDE = 32
CPU = torch.device("cpu")


def flat_table(level, count=4):
    """A table of slices of one constant intensity."""
    image = np.full((count, 1, SIDE, SIDE), round(level * STEPS), np.int16)
    label = np.zeros((count, SIDE, SIDE), np.uint8)
    stored = Slices(image, label, label, label, np.ones((count, 2), np.bool_), None)
    return SliceTable(
        np.zeros(count, np.int64), np.arange(count), np.ones(count, np.bool_), 1, [stored]
    )


def plan_of(*overrides):
    return Plan.from_tree(
        join(["method=ram", "network.base_width=4", "data.image_size=32", *overrides])
    )


def method_of(plan, domains=1):
    network = build_network(plan.network, 3, plan.data.out_channels, 0)
    return METHODS[plan.method.name](network.train(), plan, domains, CPU)


def batch_of(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    images = torch.rand(count, 3, SIDE, SIDE, generator=generator) * 2 - 1
    mixed = torch.rand(count, 3, SIDE, SIDE, generator=generator) * 2 - 1
    labels = torch.randint(0, 2, (count, SIDE, SIDE), generator=generator)
    labels[0, :4] = 255
    return Batch(images, labels, sizes, mixed)


# mixing


def test_a_pooled_client_mixes_with_another_domain_only_and_a_hospital_with_itself():
    tables = [flat_table(0.2), flat_table(0.8)]
    images = torch.from_numpy(np.concatenate([table.stack(range(4))[0] for table in tables]))
    seen = set()
    for seed in range(30):
        mixer = LocalMixer(tables, RamSettings(), np.random.default_rng(seed))
        mixed = mixer.mix(images, *mixer.draw((4, 4)))
        for image, own, other in zip(
            mixed, [0.2] * 4 + [0.8] * 4, [0.8] * 4 + [0.2] * 4, strict=True
        ):
            share = (image.mean().item() - other) / (own - other)
            assert share == pytest.approx(round(share, 1), abs=1e-3), (
                "a tenth of the own amplitude, or more tenths"
            )
            assert torch.allclose(image, image.mean(), atol=1e-4)
            seen.add(round(share, 1))
    assert seen == {step / 10 for step in range(1, 11)}
    mixer = LocalMixer(tables[:1], RamSettings(), np.random.default_rng(0))
    alone = mixer.mix(images[:4], *mixer.draw((4,)))
    assert torch.allclose(alone, images[:4], atol=1e-4)


def test_a_summary_without_spread_gives_the_others_amplitudes_and_never_ones_own():
    pattern = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 0.5
    faint, strong = (
        np.repeat(window_amplitudes((s * pattern).expand(1, 3, -1, -1)).numpy(), 2, 0)
        for s in (0.1, 0.5)
    )
    own, others = (
        AmplitudeSummary.from_amplitudes(part, SIDE, sites=(n,))
        for part, n in ((faint, "A"), (strong, "B"))
    )
    images = (0.1 * pattern).expand(200, 3, -1, -1)
    wanted = strong[0, 0, 0, 1, 1] / faint[0, 0, 0, 1, 1]
    for total, mine in (
        (own + others, "A"),
        (others, "A"),
    ):  # what a site sent may have come too late to count
        mixer = SummaryMixer(
            total.encode(), replace(own, sites=()), mine, RamSettings(), np.random.default_rng(0)
        )
        mixed = window_amplitudes(mixer.mix(images, *mixer.draw((200,))))[:, 0, 0, 1, 1].numpy()
        shares = {
            round(float((value / faint[0, 0, 0, 1, 1] - wanted) / (1 - wanted)), 1)
            for value in mixed
        }
        assert shares == {step / 10 for step in range(1, 11)}
    with pytest.raises(FedsgcgError, match="no other site"):
        SummaryMixer(own.encode(), own, "A", RamSettings(), np.random.default_rng(0))


def test_a_bank_leaves_out_its_own_entries():
    windows = window_amplitudes(
        torch.stack([torch.full((3, SIDE, SIDE), level) for level in (0.1, 0.5)])
    ).numpy()
    bank = AmplitudeBank(windows, ("A", "B"))
    mixer = BankMixer(bank.encode(), "A", "volume", RamSettings(), np.random.default_rng(0))
    images = torch.full((50, 3, SIDE, SIDE), 0.1)
    levels = [image.mean().item() for image in mixer.mix(images, *mixer.draw((50,)))]
    assert max(levels) > 0.4
    with pytest.raises(FedsgcgError, match="no other site"):
        BankMixer(
            AmplitudeBank(windows[:1], ("A",)).encode(),
            "A",
            "volume",
            RamSettings(),
            np.random.default_rng(0),
        )


# losses


def test_consistency_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): the sum of (p - q)(log p - log q) over two elements is
    # (1/4)(log 3/2) + (-1/4)(log 1/2).
    first, second = (
        torch.tensor([0.75, 0.25]).view(1, 2, 1, 1),
        torch.tensor([0.5, 0.5]).view(1, 2, 1, 1),
    )
    valid = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    by_hand = (0.25 * math.log(1.5) - 0.25 * math.log(0.5)) / 2
    assert consistency_loss(first, second, valid).item() == pytest.approx(by_hand, rel=1e-6)
    assert consistency_loss(first, second, valid, symmetric=True).item() == pytest.approx(
        2 * by_hand, rel=1e-6
    )
    assert consistency_loss(first, second, ~valid).item() == 0


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_consistency_is_symmetric_not_negative_and_zero_for_equals(seed, symmetric):
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.rand(2, 2, 3, 3, generator=generator).clamp(1e-7, 1 - 1e-7) for _ in range(2)
    )
    valid = torch.rand(2, 1, 3, 3, generator=generator) > 0.2
    value = consistency_loss(first, second, valid, symmetric=symmetric)
    assert value >= 0
    assert torch.allclose(value, consistency_loss(second, first, valid, symmetric=symmetric))
    assert consistency_loss(first, first, valid, symmetric=symmetric) == 0


def test_saturated_predictions_stay_finite():
    method = method_of(plan_of())
    with torch.no_grad():
        method.network.decoder.head.weight.mul_(1e6)
    total, _ = method.loss(batch_of((4,)), None)
    total.backward()
    assert torch.isfinite(total)
    assert all(
        torch.isfinite(p.grad).all() for p in method.network.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("sizes", [(4,), (2, 3)])
def test_the_total_is_the_sum_of_its_terms_with_the_papers_weights(sizes):
    plan, batch = plan_of(), batch_of(sizes)
    method = method_of(plan, len(sizes))
    total, parts = method.loss(batch, None)
    assert total.item() == pytest.approx(
        (
            2 * parts["loss_supervised"]
            + 0.5 * parts["loss_consistency"]
            + 0.1 * parts["loss_restoration"]
        ).item(),
        rel=1e-6,
    )
    again = method_of(plan, len(sizes))
    decoder = again.local["restoration"]
    plain, _ = again.network(batch.images)
    maps = again.network.encode(batch.mixed)
    mixed, _ = again.network.decode(maps)
    both = sum(segmentation_loss(logits, batch.labels, plan.data) for logits in (plain, mixed))
    assert parts["loss_supervised"].item() == pytest.approx(
        both.item() / 2, rel=1e-6
    )  # the mean of the views
    start, restored = 0, 0.0
    for domain, size in enumerate(sizes):
        part = slice(start, start + size)
        restored += (decoder(maps[-1][part], domain) - batch.images[part]).square().mean().item()
        start += size
    assert parts["loss_restoration"].item() == pytest.approx(restored, rel=1e-5)


# restoration decoder and rates


def test_published_parameter_counts():
    for domains, count in ((3, 614_755), (5, 617_635)):
        assert sum(p.numel() for p in RestorationDecoder(16, domains).parameters()) == count


def test_each_domain_has_a_batchnorm_of_its_own():
    decoder = RestorationDecoder(4, 2).train()
    before = {
        name: tensor.clone()
        for name, tensor in decoder.state_dict().items()
        if "running_mean" in name
    }
    decoder(torch.rand(2, 64, 2, 2), 1)
    changed = {
        name
        for name, tensor in before.items()
        if not torch.equal(tensor, decoder.state_dict()[name])
    }
    assert changed == {name for name in before if ".1.running_mean" in name}
    assert len(changed) == 12


def test_the_encoder_learns_at_half_the_rate_while_images_are_restored():
    method = method_of(plan_of())
    rates = {id(p): group["factor"] for group in method.groups() for p in group["params"]}
    assert {rates[id(p)] for p in method.network.encoder.parameters()} == {0.5}
    assert {rates[id(p)] for p in method.network.decoder.parameters()} == {1.0}
    assert {rates[id(p)] for p in method.local.parameters()} == {1.0}
    without = method_of(plan_of("method.ram.restoration=0"))
    assert not list(without.local.parameters())
    assert [group["factor"] for group in without.groups()] == [1.0]
    assert isinstance(without, Ram)


def test_restoring_trains_the_encoder_through_the_mixed_copy():
    plan, batch = plan_of("method.ram.consistency=0"), batch_of((4,))
    weak, strong = (
        method_of(plan_of("method.ram.consistency=0", f"method.ram.restoration={w}"))
        for w in (0.1, 10)
    )
    grads = []
    for method in (weak, strong):
        method.loss(batch, None)[0].backward()
        grads.append(
            torch.cat(
                [
                    p.grad.flatten()
                    for p in method.network.encoder.parameters()
                    if p.grad is not None
                ]
            )
        )
        assert all(p.grad is not None for p in method.local.parameters())
    assert not torch.allclose(grads[0], grads[1])
    assert plan.method.ram.restoration == 0.1
