"""RAM-DSIR: what the mixture, the losses, the schedule of rates and the restoration decoder promise (methods.md 2)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.batches import Batch
from clients.cases import SliceTable
from clients.methods import METHODS
from clients.methods.ram import Ram, consistency_loss
from clients.methods.supervised import segmentation_loss
from clients.mixing import LocalMixer, SharedMixer
from clients.slices import STEPS, Slices
from common.amplitude import window_amplitudes
from common.amplitudes import AmplitudeSummary, decode_bank, encode_bank
from common.errors import FedsgcgError
from common.networks import RestorationDecoder, build_network
from common.plan import Plan, RamSettings
from common.settings import join

SIDE = 32
CPU = torch.device("cpu")


def flat_table(level, count=4):
    """A table of slices of one constant intensity."""
    image = np.full((count, 1, SIDE, SIDE), round(level * STEPS), np.int16)
    label = np.zeros((count, SIDE, SIDE), np.uint8)
    stored = Slices(image, label, label, label, np.ones((count, 2), np.bool_), None)
    return SliceTable(np.zeros(count, np.int64), np.arange(count), np.ones(count, np.bool_), 1, [stored])


def plan_of(*overrides):
    return Plan.from_tree(join(["method=ram", "network.base_width=4", "data.image_size=32", *overrides]))


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
        for image, own, other in zip(mixed, [0.2] * 4 + [0.8] * 4, [0.8] * 4 + [0.2] * 4, strict=True):
            share = (image.mean().item() - other) / (own - other)
            assert share == pytest.approx(round(share, 1), abs=1e-3), "a tenth of the own amplitude, or more tenths"
            assert torch.allclose(image, image.mean(), atol=1e-4)
            seen.add(round(share, 1))
    assert seen == {step / 10 for step in range(1, 11)}
    mixer = LocalMixer(tables[:1], RamSettings(), np.random.default_rng(0))
    alone = mixer.mix(images[:4], *mixer.draw((4,)))
    assert torch.allclose(alone, images[:4], atol=1e-4)


def test_a_summary_without_spread_gives_the_others_amplitudes_and_never_ones_own():
    own, others = (window_amplitudes(torch.full((2, 3, SIDE, SIDE), level)).numpy() for level in (0.1, 0.5))
    total = AmplitudeSummary.from_amplitudes(own) + AmplitudeSummary.from_amplitudes(others)
    mixer = SharedMixer(total.encode(), AmplitudeSummary.from_amplitudes(own), RamSettings(), np.random.default_rng(0))
    images = torch.full((200, 3, SIDE, SIDE), 0.1)
    shares = {round((image.mean().item() - 0.5) / (0.1 - 0.5), 1) for image in mixer.mix(images, *mixer.draw((200,)))}
    assert shares == {step / 10 for step in range(1, 11)}


def test_a_bank_leaves_out_its_own_entries():
    windows = window_amplitudes(torch.stack([torch.full((3, SIDE, SIDE), level) for level in (0.1, 0.5)])).numpy()
    mixer = SharedMixer(encode_bank(windows, ["A", "B"]), "A", RamSettings(), np.random.default_rng(0))
    images = torch.full((50, 3, SIDE, SIDE), 0.1)
    levels = [image.mean().item() for image in mixer.mix(images, *mixer.draw((50,)))]
    assert max(levels) > 0.4
    with pytest.raises(FedsgcgError, match="no other site"):
        SharedMixer(encode_bank(windows[:1], ["A"]), "A", RamSettings(), np.random.default_rng(0))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_summaries_add_up_and_come_apart(first, second, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.gamma(2.0, 10.0, (count, 1, 2, 3, 3)).astype(np.float32) for count in (first, second)]
    one, two = (AmplitudeSummary.from_amplitudes(part) for part in parts)
    whole = AmplitudeSummary.from_amplitudes(np.concatenate(parts))
    np.testing.assert_allclose((one + two).mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose((one + two).without(one).deviation, two.deviation, atol=1e-6)
    logs = np.log(np.concatenate(parts).astype(np.float64))
    np.testing.assert_allclose(whole.mean, logs.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.deviation, logs.std(axis=0), atol=1e-6)
    back = AmplitudeSummary.decode(whole.encode())
    assert back.count == whole.count
    np.testing.assert_array_equal(back.first, whole.first)
    np.testing.assert_array_equal(back.second, whole.second)


def test_amplitudes_that_cannot_be_are_refused():
    good = AmplitudeSummary.from_amplitudes(np.ones((3, 1, 2, 2, 2), np.float32))
    for wrong, code in (
        (AmplitudeSummary(2.5, good.first, good.second), "STA-201"),
        (AmplitudeSummary(3.0, good.first + np.inf, good.second), "STA-201"),
        (AmplitudeSummary(3.0, good.first + 5.0, good.second), "STA-201"),
        (AmplitudeSummary(3.0, good.first, good.second - 1.0), "STA-201"),
    ):
        with pytest.raises(FedsgcgError) as caught:
            AmplitudeSummary.decode(wrong.encode())
        assert caught.value.code == code
    bank = encode_bank(np.ones((2, 1, 2, 2, 2), np.float32), ["A", "A"])
    assert decode_bank(bank)[1] == ["A", "A"]
    for data in (b"", b"nonsense", bank[:-40], good.encode()):
        with pytest.raises(FedsgcgError):
            decode_bank(data)
    with pytest.raises(FedsgcgError) as caught:
        decode_bank(encode_bank(np.full((1, 1, 2, 2, 2), -1, np.float32), ["A"]))
    assert caught.value.code == "STA-201"


# losses


def test_consistency_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): sum (p - q)(log p - log q) = (1/4)(log 3/2) + (-1/4)(log 1/2), over two elements.
    first, second = torch.tensor([0.75, 0.25]).view(1, 2, 1, 1), torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)
    valid = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    by_hand = (0.25 * math.log(1.5) - 0.25 * math.log(0.5)) / 2
    assert consistency_loss(first, second, valid).item() == pytest.approx(by_hand, rel=1e-6)
    assert consistency_loss(first, second, valid, symmetric=True).item() == pytest.approx(2 * by_hand, rel=1e-6)
    assert consistency_loss(first, second, ~valid).item() == 0


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_consistency_is_symmetric_not_negative_and_zero_for_equals(seed, symmetric):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(2, 2, 3, 3, generator=generator).clamp(1e-7, 1 - 1e-7) for _ in range(2))
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
    assert all(torch.isfinite(p.grad).all() for p in method.network.parameters() if p.grad is not None)


@pytest.mark.parametrize("sizes", [(4,), (2, 3)])
def test_the_total_is_the_sum_of_its_terms_with_the_papers_weights(sizes):
    plan, batch = plan_of(), batch_of(sizes)
    method = method_of(plan, len(sizes))
    total, parts = method.loss(batch, None)
    assert total.item() == pytest.approx(
        (parts["loss_supervised"] + 0.5 * parts["loss_consistency"] + 0.1 * parts["loss_restoration"]).item(), rel=1e-6
    )
    again = method_of(plan, len(sizes))
    decoder = again.local["restoration"]
    plain, _ = again.network(batch.images)
    maps = again.network.encode(batch.mixed)
    mixed, _ = again.network.decode(maps)
    both = sum(segmentation_loss(logits, batch.labels, plan.data) for logits in (plain, mixed))
    assert parts["loss_supervised"].item() == pytest.approx(both.item(), rel=1e-6)
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
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items() if "running_mean" in name}
    decoder(torch.rand(2, 64, 2, 2), 1)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, decoder.state_dict()[name])}
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
    weak, strong = (method_of(plan_of("method.ram.consistency=0", f"method.ram.restoration={w}")) for w in (0.1, 10))
    grads = []
    for method in (weak, strong):
        method.loss(batch, None)[0].backward()
        grads.append(torch.cat([p.grad.flatten() for p in method.network.encoder.parameters() if p.grad is not None]))
        assert all(p.grad is not None for p in method.local.parameters())
    assert not torch.allclose(grads[0], grads[1])
    assert plan.method.ram.restoration == 0.1
