"""The slice cache: when it is built again, and that nothing else is read."""

import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.common.images.phantoms import write_hospitals
from tests.support import sites
from tests.support.cases import ramp, store_of, three_cases, write_case


@pytest.fixture
def one(tmp_path, make_data):
    """A hospital with three cases of known pixels."""
    return three_cases(tmp_path, make_data)


def test_no_image_file_is_opened_after_the_store_is_open(one):
    root, data, cache = one
    store = store_of(root, data, cache)
    before = store.slices("train").stack(range(12))
    shutil.rmtree(root)
    again = store.slices("train").stack(range(12))
    for left, right in zip(before, again, strict=True):
        np.testing.assert_array_equal(left, right)
    assert store.truth(store.cases[2]).sum() == ramp()[1].sum()


def test_opening_again_reads_no_image_and_writes_nothing(one, monkeypatch):
    root, data, cache = one
    first = store_of(root, data, cache)
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    site = open_site(root, "S", data)
    for case in site.cases:
        # Same size and time, other content: hashing it again would give another cache file.
        status = case.image.stat()
        case.image.write_bytes(bytes(status.st_size))
        os.utime(case.image, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = open_store(site, data, cache, heldout=False)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == files
    np.testing.assert_array_equal(
        second.slices("train").stack([5])[0], first.slices("train").stack([5])[0]
    )


def test_slices_are_views_of_the_mapped_file(one):
    store = store_of(*one)
    view = store.truth(store.cases[0])
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_both_roles_share_one_cache_file(one):
    root, data, cache = one
    store_of(root, data, cache)
    store_of(root, data, cache, heldout=True)
    assert len(list((cache / "slices").glob("*.arrow"))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 48},
        {"intensity": "zscore"},
        {"classes": {"background": [0, 9], "gland": [1]}},
    ],
)
def test_settings_that_shape_a_slice_make_a_new_cache(one, make_data, change):
    root, data, cache = one
    store_of(root, data, cache)
    base = {"image_size": 32, "intensity": "minmax", "validation_fraction": 0.0}
    store = store_of(root, make_data(**{**base, **change}), cache)
    assert len(list((cache / "slices").glob("*.arrow"))) == 2
    assert store.slices("train").stack([0])[0].shape[-1] == change.get("image_size", 32)


def test_a_changed_file_is_noticed(one):
    root, data, cache = one
    store_of(root, data, cache)
    image, mask = ramp()
    write_case(root / "S", "b", image, np.roll(mask, 2, axis=1))
    store = store_of(root, data, cache)
    np.testing.assert_array_equal(store.truth(store.cases[1]), np.roll(mask, 2, axis=1))


def test_an_alias_follows_the_case_and_not_its_company(one, make_data):
    root, data, cache = one
    before = {case.name: case.alias for case in store_of(root, data, cache).cases}
    (root / "S" / "a_image.nii.gz").unlink()
    after = {
        case.name: case.alias for case in store_of(root, make_data(image_size=48), cache).cases
    }
    assert after == {name: before[name] for name in ("b", "c")}


def test_an_alias_cannot_be_guessed_from_the_name(one):
    """Other pixels under the same name give another alias, so that names do not reveal aliases."""
    root, data, cache = one
    before = store_of(root, data, cache).cases[0].alias
    image, mask = ramp()
    write_case(root / "S", "a", image + 1, mask)
    after = store_of(root, data, cache).cases[0]
    assert after.name == "a"
    assert after.alias != before


def _open_in_process(root, data, cache):
    torch.set_num_threads(1)
    return int(store_of(root, data, cache).slices("train").stack([1])[1].sum())


def test_several_processes_may_open_a_cold_cache_at_once(one):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.starmap(_open_in_process, [one] * 3)
    assert sums == [ramp()[1][1].sum()] * 3
    assert len(list((one[2] / "slices").glob("*.arrow"))) == 1
    assert not list(one[2].rglob("*.partial"))


def test_a_store_of_the_written_hospitals_does_not_depend_on_the_folder(make_data, tmp_path):
    """Aliases and pixels depend only on content, so that two machines agree."""
    stores = [
        store_of(
            write_hospitals(tmp_path / name, sites=["A"], cases_per_site=2, shape=(4, 32, 32)),
            make_data(image_size=32),
            tmp_path / f"cache-{name}",
            heldout=True,
        )
        for name in ("x", "y")
    ]
    assert [c.alias for c in stores[0].cases] == [c.alias for c in stores[1].cases]
    for left, right in zip(
        *(store.slices("test").stack(range(8)) for store in stores), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_a_sites_salt_hides_its_aliases_and_nothing_else(tmp_path):
    root = sites.hospitals(tmp_path / "data")
    data = sites.plan_of(root, tmp_path).data
    site = open_site(root, "North", data)
    plain, one, same, other = (
        open_store(site, data, tmp_path / "cache", heldout=True, salt=salt)
        for salt in (b"", b"a" * 32, b"a" * 32, b"b" * 32)
    )
    aliases = [[case.alias for case in store.cases] for store in (plain, one, same, other)]
    assert aliases[1] == aliases[2]
    assert len({*aliases[0], *aliases[1], *aliases[3]}) == 12
    assert plain.key == one.key, "the salt must not make another cache file"
    assert not any(case.name in alias for case, alias in zip(one.cases, aliases[1], strict=True))
