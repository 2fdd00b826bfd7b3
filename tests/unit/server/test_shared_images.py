"""Images shared within a hospital, between hospitals, and with the training images of a model."""

import gzip
import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from fedsgcg.clients.data.case_files import open_site
from fedsgcg.clients.data.store import open_store
from fedsgcg.clients.guard.contents import TrainedOn, shared_contents
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.contents import TRAINING_IMAGES, content_hash, salt_of, salted_content
from fedsgcg.common.images.read import affine_as, read_volume, write_volume
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import ENROL
from fedsgcg.common.wire.payload import Identity
from fedsgcg.server.federation import run_federation
from fedsgcg.server.sites.shared_images import learned_from, shared_images
from tests.support.plans import small_plan
from tests.support.scripted_grid import ScriptedGrid
from tests.unit.clients.test_policy import policy_for


def write(folder, name, seed, codes=("L", "P", "S")):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 900, (3, 32, 32)).astype(np.int16)
    mask = np.zeros((3, 32, 32), np.uint8)
    mask[1:, 8:20, 8:20] = 1
    affine = affine_as(codes, np.diag([-1.0, -1.0, 3.0, 1.0]), image.shape)
    write_volume(folder / f"{name}_image.nii.gz", image, affine)
    write_volume(folder / f"{name}_mask.nii.gz", mask, affine)


@pytest.mark.row(46)
def test_a_copy_is_found_whatever_its_name_compression_axes_and_header(tmp_path, make_data):
    site = tmp_path / "data/S"
    write(site, "a", 1)
    write(site, "turned", 1, ("R", "S", "A"))
    write(site, "other", 2)
    for kind in ("image", "mask"):
        plain = gzip.decompress((site / f"a_{kind}.nii.gz").read_bytes())
        (site / f"unpacked_{kind}.nii").write_bytes(plain)
        image = nib.Nifti1Image.from_bytes(plain)
        saved = nib.Nifti1Image(
            image.get_fdata(), image.affine
        )  # 64-bit floats, and nothing else of the header
        saved.header["descrip"] = b"saved again"
        nib.save(saved, site / f"saved_{kind}.nii")
    data = make_data(image_size=32)
    for heldout in (False, True):
        store = open_store(
            open_site(tmp_path / "data", "S", data), data, tmp_path / "cache", heldout=heldout
        )
        assert [case.name for case in store.cases] == ["a", "other"]
        copies = [(p.code, p.where, p.found) for p in store.problems]
        assert copies == [
            ("SITE-511", name, "the same image as a") for name in ("saved", "turned", "unpacked")
        ]


def test_the_hash_is_of_what_is_seen():
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(2, 3, 4)).astype(np.float32)

    def hashed(array, picture=False):
        from fedsgcg.common.images.read import Volume

        return content_hash(Volume(array, np.eye(4), (1.0, 1.0, 1.0), picture))

    assert hashed(volume) == hashed(volume.copy(order="F"))
    assert hashed(volume) != hashed(volume.reshape(2, 4, 3))
    changed = volume.copy()
    changed[1, 2, 3] = np.nextafter(changed[1, 2, 3], 9, dtype=np.float32)
    assert hashed(volume) != hashed(changed)
    grey = rng.normal(size=(1, 5, 6)).astype(np.float32)
    assert hashed(grey, True) == hashed(np.repeat(grey, 3, 0), True)
    assert hashed(grey, True) != hashed(grey, False)


def test_hashes_of_two_runs_cannot_be_compared():
    salts = {
        salt_of(Identity(*parts))
        for parts in (("r", "", 1, "p"), ("s", "", 1, "p"), ("r", "A", 1, "p"), ("r", "", 1, "q"))
    }
    assert len({salted_content("00ff", salt) for salt in salts}) == 4
    assert salt_of(Identity("r", "", 1, "p")) == salt_of(Identity("r", "", 7, "p"))


# what the coordinator makes of it


def told(plan):
    """A trains on 1 and 2, tests on 9; B trains on 2, validates on 3; C tests on 1, 3, 4, 9."""
    return {
        "A": {"A": {"a1": ["1", "train"], "a2": ["2", "train"], "a9": ["9", "test"]}},
        "B": {"B": {"b2": ["2", "train"], "b3": ["3", "validation"], "b5": ["5", "train"]}},
        "C": {
            "C": {
                "c1": ["1", "test"],
                "c3": ["3", "test"],
                "c4": ["4", "test"],
                "c9": ["9", "test"],
            }
        },
        "D": "no mapping",
        "E": {"E": {"e1": "1", "e2": ["1"], "e3": [1, "train"]}},
    }


def plan_of(*more):
    return Plan.from_tree({**join(["heldout=C", *more]), "output": "runs"})


def test_copies_are_named_by_hospital_and_alias():
    plan = plan_of()
    leaks, twice = shared_images(plan, told(plan))
    assert [(problem.code, problem.where, problem.found) for problem in leaks] == [
        ("RND-408", "C", "1 image is at both A and C, by alias: a1 = c1"),
        ("RND-408", "C", "1 image is at both B and C, by alias: b3 = c3"),
    ]
    assert [problem.found for problem in twice] == ["1 image is at both A and B, by alias: a2 = b2"]
    assert learned_from(plan, told(plan)) == {"A": ["1", "2"], "B": ["2", "3", "5"]}
    nobody, _ = shared_images(replace(plan, heldout=""), told(plan))
    assert nobody == []
    observed, _ = shared_images(replace(plan, heldout="", observers=("C",)), told(plan))
    assert len(observed) == 2


def test_a_pooled_run_is_compared_by_hospital():
    plan = plan_of("federation=pooled", "data.sites=[A,B,C]")
    given = told(plan)
    pooled = {"pooled": given["A"] | given["B"], "C": given["C"]}
    leaks, twice = shared_images(plan, pooled)
    assert [problem.found.partition(",")[0] for problem in leaks] == [
        "1 image is at both A and C",
        "1 image is at both B and C",
    ]
    assert len(twice) == 1


def test_many_copies_are_counted_and_the_first_named():
    many = {f"a{k}": [str(k), "train"] for k in range(7)}
    same = {f"c{k}": [str(k), "test"] for k in range(7)}
    (problem,), _ = shared_images(plan_of(), {"A": {"A": many}, "C": {"C": same}})
    assert problem.found.startswith("7 images are at both A and C, by alias: a0 = c0, ")
    assert problem.found.endswith("a4 = c4 and 2 more")


# consent, and what a model knows


def test_a_hospital_sends_hashes_only_if_its_own_file_allows_it(tmp_path, make_data):
    write(tmp_path / "data/S", "a", 1)
    data, identity = make_data(image_size=32), Identity("r", "", 0, "p")
    store = open_store(
        open_site(tmp_path / "data", "S", data), data, tmp_path / "cache", heldout=False
    )
    policy = policy_for(tmp_path / "data", tmp_path)
    assert shared_contents([store], identity, policy) is None
    allowed = replace(policy, sharing=(*policy.sharing, "content_hashes"))
    found = shared_contents([store], identity, allowed)
    assert found == shared_contents([store], identity, None)
    ((alias, (mark, split)),) = found["S"].items()
    image = read_volume(tmp_path / "data/S/a_image.nii.gz")
    assert (alias, split) == (store.cases[0].alias, store.cases[0].split)
    assert mark == salted_content(content_hash(image), salt_of(identity))
    assert content_hash(image) not in json.dumps(found)
    salt = salt_of(identity)
    (tmp_path / TRAINING_IMAGES).write_text(json.dumps({"salt": salt, "images": {"S": [mark]}}))
    known = TrainedOn.of_model(tmp_path)
    assert known.hospital_of(image) == "S"
    assert known.hospital_of(replace(image, array=image.array + 1)) == ""
    assert TrainedOn.of_model(tmp_path / "data") is None
    for damaged in ("{", "[]", '{"salt": "x", "images": {}}', '{"images": {}}'):
        (tmp_path / TRAINING_IMAGES).write_text(damaged)
        with pytest.raises(FedsgcgError, match="MOD-801"):
            TrainedOn.of_model(tmp_path)
    shutil.rmtree(tmp_path / "cache")


# the coordinator's run


def with_hashes(**marks):
    """A script in which sites tell at the enrolment the hash of one image each."""

    def script(grid, site, kind, request, reply):
        if kind != ENROL or site not in marks:
            return reply
        split = "test" if site == grid.plan.heldout else "train"
        hashes = {site: {f"alias-{site}": [marks[site], split]}}
        return replace(reply, details=reply.details | {"content_hashes": hashes})

    return script


@pytest.mark.parametrize("way", ["refuse", "flag"])
def test_a_run_whose_held_out_hospital_has_training_images_is_refused_or_degraded(way, tmp_path):
    plan = small_plan(tmp_path, federation__rounds=1, federation__shared_images=way)
    grid = ScriptedGrid(plan, ("A", "B", "C", "D"), script=with_hashes(A="x", B="y", D="x"))
    outcome = run_federation(grid, plan)
    told = outcome.failure if way == "refuse" else outcome.problems
    assert outcome.status == {"refuse": "failed", "flag": "degraded"}[way]
    assert [(problem.code, problem.where) for problem in told] == [("RND-408", "D")]
    assert told[0].found == "1 image is at both A and D, by alias: alias-A = alias-D"
    assert outcome.rounds_done == (way == "flag")
    if way == "flag":
        kept = json.loads((tmp_path / TRAINING_IMAGES).read_text())
        assert kept["images"] == {"A": ["x"], "B": ["y"]}
        assert kept["salt"] == salt_of(Identity(plan.run, plan.heldout, 0, plan.digest()))


def test_copies_at_two_training_hospitals_degrade_and_silence_of_all_says_nothing(tmp_path):
    plan = small_plan(tmp_path / "twice", federation__rounds=1)
    script = with_hashes(A="x", B="x", D="z")
    outcome = run_federation(ScriptedGrid(plan, ("A", "B", "C", "D"), script=script), plan)
    assert [problem.found for problem in outcome.problems] == [
        "1 image is at both A and B, by alias: alias-A = alias-B"
    ]
    plan = small_plan(tmp_path / "silent", federation__rounds=1)
    assert run_federation(ScriptedGrid(plan, ("A", "B", "C", "D")), plan).status == "completed"
    assert not (tmp_path / "silent" / TRAINING_IMAGES).exists()
