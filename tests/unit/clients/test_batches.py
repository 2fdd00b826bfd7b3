"""Batches and augmentation: every slice once, reproducible, image and label move together."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from fedsgcg.clients.data.augment import augment
from fedsgcg.clients.data.batches import (
    Batch,
    batch_indices,
    domain_sizes,
    gather,
    index_batches,
    steps_of,
)
from fedsgcg.clients.data.slices import STEPS, Slices
from fedsgcg.clients.data.store import SliceTable
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.plan import AugmentationSettings, MethodSettings

SIDE = 32


def table_of(count):
    """Return a table of one case whose slice z has the constant intensity z / 100 and label z."""
    level = np.arange(count)[:, None, None] + np.zeros((1, SIDE, SIDE))
    image = np.rint(level / 100 * STEPS).astype(np.int16)[:, None]
    label = level.astype(np.uint8)
    stored = Slices(image, label, label, label, np.ones((count, 2), np.bool_), (1.0, 1.0, 1.0))
    numbers = np.arange(count, dtype=np.int64)
    return SliceTable(np.zeros(count, np.int64), numbers, np.ones(count, np.bool_), 1, [stored])


def settings(**changes):
    return MethodSettings(name="source", statistics=False, **changes)


def order(table, method, seed=0):
    """Return the slice numbers of each batch."""
    chosen = index_batches([table], method, [np.random.default_rng(seed)])
    return [gather([table], numbers)[1][:, 0, 0].tolist() for numbers in chosen]


# batches


def test_what_a_batch_is():
    table = table_of(9)
    images, labels = gather(
        [table], next(index_batches([table], settings(batch_size=4), [np.random.default_rng(0)]))
    )
    assert (images.shape, images.dtype) == ((4, 3, SIDE, SIDE), torch.float32)
    assert (labels.shape, labels.dtype) == ((4, SIDE, SIDE), torch.int64)
    torch.testing.assert_close(images[:, 0], labels / 100.0, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (4, [4]), (5, [5]), (3, [3]), (1, [1])],
)
def test_sizes_of_batches(count, sizes):
    """A single slice left over joins the batch before it; a small table is one batch."""
    found = order(table_of(count), settings(batch_size=4))
    assert [len(batch) for batch in found] == sizes
    assert sorted(sum(found, [])) == list(range(count))


def test_epochs_are_shuffled_anew_and_complete():
    found = order(table_of(10), settings(batch_size=5, local_epochs=3))
    assert len(found) == 6
    epochs = [found[0] + found[1], found[2] + found[3], found[4] + found[5]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_generator_alone_decides_the_order():
    table, method = table_of(20), settings(batch_size=4)
    assert order(table, method, seed=3) == order(table, method, seed=3)
    assert order(table, method, seed=3) != order(table, method, seed=4)


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (2, 2), (5, 5), (11, 11)])
def test_steps_count_batches_over_as_many_passes_as_it_takes(steps, count):
    found = order(table_of(10), settings(batch_size=4, steps_per_round=steps))
    assert len(found) == count
    whole = [sum(found[start : start + 3], []) for start in range(0, count - 2, 3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in whole)


def test_settings_say_how_long_a_round_is():
    table = table_of(10)
    for method in (
        settings(batch_size=4, local_epochs=2),
        settings(batch_size=4, steps_per_round=7, local_epochs=2),
        settings(batch_size=3),
        settings(batch_size=32),
        settings(batch_size=9),
    ):
        assert len(order(table, method)) == steps_of([table], method)


def test_no_slice_is_an_error():
    table = table_of(3)
    with pytest.raises(FedsgcgError) as caught:
        next(
            index_batches(
                [table.only(np.zeros(3, np.bool_))], settings(), [np.random.default_rng(0)]
            )
        )
    assert caught.value.code == "TRN-302"


def test_a_pooled_epoch_is_the_longest_domain_and_the_others_start_over_newly_shuffled():
    tables, method = [table_of(12), table_of(4)], settings(batch_size=6, local_epochs=2)
    steps = list(
        index_batches(tables, method, [np.random.default_rng(1), np.random.default_rng(2)])
    )
    assert (
        len(steps) == steps_of(tables, method) == 8
    )  # three of each domain a step, twelve slices, two epochs
    long, short = ([numbers[domain].tolist() for numbers in steps] for domain in (0, 1))
    assert sorted(sum(long[:4], [])) == sorted(sum(long[4:], [])) == list(range(12))
    assert long[:4] != long[4:]
    assert [len(step) for step in short] == [4] * 8  # three and a single one left over join
    assert len({tuple(step) for step in short}) > 4, (
        "a replayed first pass would show one order only"
    )


def test_slices_of_each_domain_in_a_step():
    assert domain_sizes(settings(batch_size=8), 1) == (8,)
    assert domain_sizes(settings(batch_size=8), 3) == (3, 3, 2)
    assert domain_sizes(settings(batch_size=2), 3) == (1, 1, 1)
    assert domain_sizes(settings(batch_per_domain=(3, 6, 7)), 3) == (3, 6, 7)
    with pytest.raises(FedsgcgError, match="batch_per_domain"):
        domain_sizes(settings(batch_per_domain=(3, 6)), 3)


def test_parts_of_a_batch_hold_every_domain_and_every_slice_once():
    images = torch.arange(10.0).view(10, 1, 1, 1)
    whole = Batch(images, torch.arange(10).view(10, 1, 1), (6, 4), images + 100)
    assert [share for share, _ in whole.parts(1)] == [1.0]
    parts = whole.parts(3)
    assert [share for share, _ in parts] == [0.4, 0.3, 0.3]
    assert [part.sizes for _, part in parts] == [(2, 2), (2, 1), (2, 1)]
    assert sorted(torch.cat([part.labels for _, part in parts]).flatten().tolist()) == list(
        range(10)
    )
    for _, part in parts:
        assert part.mixed is not None
        assert (part.mixed - part.images == 100).all()
        assert part.images.flatten().tolist() == part.labels.flatten().tolist()
        assert (part.labels[: part.sizes[0]] < 6).all()
    assert len(whole.parts(100)) == 4, "no part without a slice of each domain"


def test_batch_indices_by_brute_force():
    for size in range(1, 40):
        for batch_size in range(2, 12):
            parts = batch_indices(size, batch_size, np.random.default_rng(size))
            assert sorted(np.concatenate(parts).tolist()) == list(range(size))
            assert all(len(part) == batch_size for part in parts[:-1])
            assert 2 <= len(parts[-1]) <= batch_size + 1 or size == 1


# augmentation


def batch(count=6, seed=0):
    generator = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(
        generator.standard_normal((count, 3, SIDE, SIDE)), (0, 0, 2, 2)
    )
    images = torch.from_numpy(np.clip(smooth / abs(smooth).max(), -1, 1)).float()
    return images, (images[:, 1] > 0.1).long()


def change(images, labels, seed=0, **amounts):
    return augment(
        images, labels, AugmentationSettings(**amounts), torch.Generator().manual_seed(seed)
    )


ALL = {
    "flip": 0.5,
    "rotate_degrees": 20.0,
    "scale": 0.2,
    "shift": 0.1,
    "gamma": 0.5,
    "brightness": 0.2,
    "noise": 0.1,
}


def test_nothing_changes_when_everything_is_off():
    images, labels = batch()
    moved, mapped = change(images, labels)
    torch.testing.assert_close(moved, images, atol=0, rtol=0)
    torch.testing.assert_close(mapped, labels, atol=0, rtol=0)


def test_the_generator_alone_decides_and_the_global_one_is_left_alone():
    images, labels = batch()
    before = torch.get_rng_state()
    one, two, other = (change(images, labels, seed=seed, **ALL) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_inputs_are_not_changed_and_types_stay():
    images, labels = batch()
    kept = images.clone()
    for dtype in (torch.int64, torch.uint8):
        moved, mapped = change(images, labels.to(dtype), **ALL)
        assert (moved.dtype, mapped.dtype, moved.shape, mapped.shape) == (
            images.dtype,
            dtype,
            images.shape,
            labels.shape,
        )
        assert moved.abs().max() <= 1
    assert torch.equal(images, kept)


def test_a_certain_flip_is_a_mirror_of_left_and_right():
    images, labels = batch()
    moved, mapped = change(images, labels, flip=1.0)
    assert torch.equal(moved, images.flip(-1))
    assert torch.equal(mapped, labels.flip(-1))


def test_half_of_many_slices_are_flipped():
    images = torch.linspace(-1, 1, 8).expand(4000, 1, 2, 8)
    moved, mapped = change(images, torch.zeros(4000, 2, 8).long(), flip=0.5)
    share = (moved[:, 0, 0, 0] > 0).double().mean()
    assert 0.45 < share < 0.55
    assert mapped.sum() == 0


def test_labels_move_with_their_image_and_keep_their_values():
    """Images that equal their label maps must still do so after all movements."""
    spots = (
        ndimage.gaussian_filter(
            np.random.default_rng(1).standard_normal((8, SIDE, SIDE)), (0, 3, 3)
        )
        > 0
    )
    labels = torch.from_numpy(np.where(spots, 255, 2)).long()
    images = torch.from_numpy(spots * 2.0 - 1.0).float()[:, None].expand(-1, 3, -1, -1)
    moved, mapped = change(images, labels, **{**ALL, "gamma": 0.0, "brightness": 0.0, "noise": 0.0})
    assert set(mapped.unique().tolist()) == {2, 255}
    clear = moved[:, 0].abs() > 0.99
    assert clear.float().mean() > 0.6
    assert torch.equal((moved[:, 0] > 0)[clear], (mapped == 255)[clear])
    assert not torch.equal(mapped, labels)


def test_moved_labels_stay_centred_on_their_moved_image():
    """Labels use the nearest pixel: over many slices their centroid equals that of the image."""
    rows = torch.arange(64) - 31.2
    disc = (torch.hypot(rows[:, None], rows[None]) < 14).long().expand(400, -1, -1)
    images = disc[:, None].float() * 2 - 1
    moved, labels = change(images, disc, rotate_degrees=10.0, scale=0.1, shift=0.05, zoom=0.0)
    weights = torch.stack([(moved[:, 0] + 1) / 2, labels.float()])
    places = torch.arange(64.0)
    share = weights / weights.sum((2, 3), keepdim=True)
    centroids = torch.stack([(share.sum(3) * places).sum(2), (share.sum(2) * places).sum(2)])
    apart = centroids[:, 0] - centroids[:, 1]
    assert apart.mean(1).abs().max() < 0.01, "pixels"


def test_geometry_stays_within_its_limits_by_tracking_a_spot():
    """The spot's distance from the centre changes at most by the scale, its place by the shift."""
    side = 65
    y, x = np.indices((side, side)) - side // 2
    spot = torch.from_numpy(np.exp(-((y + 16) ** 2 + x**2) / 18)).float() * 2 - 1
    images, labels = spot.expand(64, 1, -1, -1), torch.zeros(64, side, side).long()

    def places(**amounts):
        moved = (change(images, labels, **amounts)[0][:, 0] + 1).numpy()
        return np.array([ndimage.center_of_mass(one) for one in moved]) - side // 2

    turned = places(rotate_degrees=30.0)
    angles = np.degrees(np.arctan2(turned[:, 1], -turned[:, 0]))
    assert 20 < abs(angles).max() <= 30.5
    np.testing.assert_allclose(np.hypot(*turned.T), 16, atol=0.5)
    sized = places(scale=0.25)
    assert -16 * 1.25 - 0.5 <= sized[:, 0].min() < -18
    assert -14 < sized[:, 0].max() <= -16 * 0.75 + 0.5
    shifted = places(shift=0.1)
    assert abs(shifted - [-16, 0]).max() <= 6.5 + 0.2
    assert abs(shifted - [-16, 0]).max() > 4


def test_every_slice_draws_its_own_change():
    images, labels = batch(1)
    many = images.expand(8, -1, -1, -1), labels.expand(8, -1, -1)
    for name, amount in ALL.items():
        moved, _ = change(*many, **{name: amount})
        assert len({one.numpy().tobytes() for one in moved}) >= 2, name


def test_brightness_gamma_and_noise_by_hand():
    images = torch.full((500, 1, 4, 4), 0.0)
    labels = torch.zeros(500, 4, 4).long()
    offsets = change(images, labels, brightness=0.3)[0][:, 0, 0, 0]
    assert -0.3 <= offsets.min() < -0.25
    assert 0.25 < offsets.max() <= 0.3
    # At intensity 0, i.e. 0.5 on the unit scale, gamma g gives 0.5 ** exp(u), u in [-0.5, 0.5].
    curved = (change(images, labels, gamma=0.5)[0][:, 0, 0, 0] + 1) / 2
    assert 0.5 ** np.exp(0.5) <= curved.min() < 0.5 ** np.exp(0.4)
    assert 0.5 ** np.exp(-0.4) < curved.max() <= 0.5 ** np.exp(-0.5)
    spread = change(images, labels, noise=0.2)[0].std(dim=(1, 2, 3))
    assert spread.max() < 0.4
    assert spread.mean() == pytest.approx(0.1, abs=0.02), (
        "drawn uniformly between zero and the setting"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augmentation_on_the_device_never_waits_for_it():
    images, labels = (tensor.cuda() for tensor in batch())
    generator = torch.Generator("cuda").manual_seed(0)
    amounts = AugmentationSettings(**ALL)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved, mapped = augment(images, labels, amounts, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.device.type == mapped.device.type == "cuda"


def test_a_zoomed_window_lies_in_the_slice_and_moves_image_and_label_together():
    side, count = 64, 200
    columns = torch.linspace(-1, 1, side).expand(count, 3, side, side)
    labels = torch.arange(side).expand(count, side, side)
    moved, mapped = augment(
        columns, labels, AugmentationSettings(zoom=0.5), torch.Generator().manual_seed(0)
    )
    widths = (moved[:, 0, 0, -1] - moved[:, 0, 0, 0]).numpy() / (
        columns[0, 0, 0, -1] - columns[0, 0, 0, 0]
    ).item()
    whole = np.isclose(widths, 1, atol=1e-5)
    assert 0.35 < whole.mean() < 0.65, "half of the slices stay as they are"
    assert (widths[~whole] >= 1 / 1.5 - 1e-3).all()
    assert widths[~whole].min() < 0.72
    assert widths[~whole].max() > 0.9
    expected = (moved[:, 0] + 1) / 2 * (side - 1)
    assert (expected - mapped).abs().max() <= 0.51
