"""Pixel features on the page: class similarity and neighbours, against hand-computed values."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.feature_samples import write_feature_samples
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.report.build import gc_disabled, make_report
from fedsgcg.server.report.gallery import gallery, write_gallery
from fedsgcg.server.report.sections.features import (
    Pixels,
    cosines,
    logit_shares,
    mean_of,
    neighbour_shares,
    similarity_section,
    temperature,
    thinned,
    tsne,
    tsne_section,
)
from fedsgcg.server.report.study_files import read_study
from tests.support.report_study import write_large_study

NAN = float("nan")
SMALL = {
    "sites": ("A", "B"),
    "seeds": (0,),
    "cases": 3,
    "weights": (),
    "temperatures": (),
    "memories": (),
}
SMALL |= {"federations": ("by_site",)}


def statistics(mean, count=None, covariance=None):
    mean = np.asarray(mean, float)
    count = np.ones(len(mean)) if count is None else np.asarray(count, float)
    width = mean.shape[1]
    covariance = (
        np.zeros((len(mean), width, width)) if covariance is None else np.asarray(covariance, float)
    )
    return ClassStatistics(count, mean, covariance * count[:, None, None])


def pixels(features, classes, sites, names=("A", "B")):
    return Pixels(np.asarray(features, float), np.asarray(classes), np.asarray(sites), names)


class TestLikeness:
    def test_cosine_of_a_right_angle_and_of_half_of_one(self):
        found = cosines(statistics([[2, 0], [0, 3], [1, 1], [0, 0]], count=[1, 1, 1, 0]))
        assert found[0, 0] == pytest.approx(1)
        assert found[0, 1] == pytest.approx(0)
        assert found[0, 2] == pytest.approx(math.sqrt(0.5))
        assert np.isnan(found[3]).all()
        assert np.isnan(found[:, 3]).all()

    def test_shares_are_the_softmax_of_the_logits_with_the_covariance(self):
        # q = (1, 0): z_0 = 1/tau, z_1 = q.S.q / (2 tau^2) = 0.5 * 3 / (2 * 0.25) = 3 at tau = 0.5.
        covariance = [np.zeros((2, 2)), [[1.5, 0], [0, 0]]]
        found = logit_shares(statistics([[1, 0], [0, 1]], covariance=covariance), 0.5)
        assert found[0, 0] == pytest.approx(math.exp(2) / (math.exp(2) + math.exp(3)))
        assert found[1, 1] == pytest.approx(math.exp(2) / (math.exp(2) + 1))

    def test_an_absent_class_takes_no_share(self):
        found = logit_shares(statistics([[1, 0], [0, 1], [0, 0]], count=[5, 5, 0]), 1.0)
        assert found[0, :2].sum() == pytest.approx(1)
        assert np.isnan(found[2]).all()
        assert np.isnan(logit_shares(statistics([[0.0, 0.0]], count=[0]), 1.0)).all()

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 1000), st.floats(0.05, 100))
    def test_law_rows_sum_to_one_and_stay_finite(self, seed, tau):
        rng = np.random.default_rng(seed)
        root = rng.normal(0, 1, (4, 3, 3))
        found = logit_shares(
            statistics(rng.normal(0, 3, (4, 3)), covariance=root @ root.transpose(0, 2, 1)), tau
        )
        assert found.sum(axis=1) == pytest.approx(np.ones(4))

    def test_mean_of_what_is_known(self):
        found = mean_of([np.array([[1.0, NAN]]), np.array([[3.0, NAN]])])
        assert found[0, 0] == 2
        assert math.isnan(found[0, 1])

    def test_temperature_is_that_of_the_settings(self):
        assert temperature({"prototypes": {"temperature": 100}}) == 100
        assert temperature({}) == temperature({"prototypes": {"temperature": "x"}}) == 0.5


class TestNeighbours:
    def test_two_classes_far_apart_with_hospitals_on_top_of_each_other(self):
        features = [[0, 0], [0.1, 0], [10, 0], [10.1, 0]]
        found = neighbour_shares(pixels(features, [0, 0, 1, 1], [0, 1, 0, 1]), neighbours=1)
        assert found == (1.0, 0.0, 0.0)  # one other pixel of the class, at the other hospital

    def test_hospitals_that_are_far_apart_are_found(self):
        features = [[0], [0.1], [0.2], [5], [5.1], [5.2]]
        same_class, same_site, chance = neighbour_shares(
            pixels(features, [0] * 6, [0, 0, 0, 1, 1, 1]), neighbours=2
        )
        assert (same_class, same_site) == (1.0, 1.0)
        assert chance == pytest.approx(2 / 5)

    def test_a_single_pixel_has_no_neighbour(self):
        assert all(map(math.isnan, neighbour_shares(pixels([[1.0]], [0], [0]))))

    def test_thinning_keeps_every_site_and_class(self):
        many = pixels(np.zeros((1000, 2)), [0] * 990 + [1] * 10, [0] * 500 + [1] * 500)
        found = thinned(many, most=60)
        assert np.bincount(found.classes).tolist() == [40, 10]
        assert np.bincount(found.sites).tolist() == [20, 30]


class TestTsne:
    def test_keeps_what_is_far_apart_apart_the_same_way_every_time(self):
        rng = np.random.default_rng(0)
        features = np.concatenate([rng.normal(0, 0.1, (30, 6)), rng.normal(3, 0.1, (30, 6))])
        plane = tsne(features)
        assert plane.shape == (60, 2)
        assert np.array_equal(plane, tsne(features))
        first, second = plane[:30], plane[30:]
        gap = np.linalg.norm(first.mean(0) - second.mean(0))
        assert gap > 2 * max(first.std(), second.std())


class TestSections:
    def test_before_and_after_are_one_fold_and_seed(self, tmp_path):
        study, reader = read_study(write_large_study(tmp_path, **SMALL))
        found = tsne_section(study, reader)
        assert [entry.method for entry in found.rows] == ["ram", "ram_sgcg"]
        assert found.sites == ("A (held out)", "B")
        assert found.classes == ("background", "prostate")
        shares = [entry.text for entry in found.rows]
        assert shares[0] != shares[1]

    def test_likeness_comes_from_prototypes_else_from_sampled_pixels(self, tmp_path):
        study, reader = read_study(write_large_study(tmp_path, **SMALL))
        panels = similarity_section(study, reader).panels
        details = {panel.title: panel.detail for panel in panels}
        assert details == {
            "source": "mean of 2 runs, from sampled pixels",
            "ram": "mean of 2 runs, from sampled pixels",
            "sgcg": "mean of 2 runs",
            "ram_sgcg": "mean of 2 runs",
        }
        assert len(panels) == 8

    def test_absent_features_are_said_in_a_line_and_damaged_ones_are_named(self, tmp_path):
        folder = write_large_study(tmp_path, **SMALL, features=False)
        study, reader = read_study(folder)
        assert tsne_section(study, reader) is None
        assert similarity_section(study, reader).panels == ()
        (folder / "ram/A/0/sites/B/features.arrow").write_bytes(b"no such thing")
        (folder / "sgcg/A/0/prototypes.arrow").write_bytes(b"no such thing")
        study, reader = read_study(folder)
        assert tsne_section(study, reader) is None
        similarity_section(study, reader)
        assert {problem.where for problem in reader.problems} == {
            "ram/A/0/sites/B/features.arrow",
            "sgcg/A/0/prototypes.arrow",
        }

    def test_one_method_and_few_pixels(self, tmp_path):
        folder = write_large_study(tmp_path, **SMALL, features=False)
        write_feature_samples(folder / "sgcg/B/0/sites/A/features.arrow", np.eye(3), [0, 1, 1], "A")
        study, reader = read_study(folder)
        (found,) = tsne_section(study, reader).rows
        assert (found.method, found.panels) == ("sgcg", ())


def test_names_of_figures_are_free_of_what_a_file_system_minds(tmp_path):
    study, reader = read_study(write_large_study(tmp_path, **SMALL))
    panels = similarity_section(study, reader).panels
    titles = ("a/b", "A b", "..", "<x>")
    names = list(gallery({"likeness": [((title,), panels[0].drawing) for title in titles]}))
    assert len(names) == len(titles)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") for name in names)
    assert not any(name.startswith((".", "-")) for name in names)


def test_a_figure_that_has_not_changed_is_not_drawn_as_pixels_again(tmp_path):
    study, reader = read_study(write_large_study(tmp_path / "study", **SMALL))
    drawings = {"likeness": similarity_section(study, reader).drawings}
    folder = tmp_path / "figures"
    folder.mkdir()
    write_gallery(folder, gallery(drawings), Disk())
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.rpartition(".")[2] for path in first} == {"svg", "png"}
    same, changed, lost = sorted(path.stem for path in folder.glob("*.png"))[:3]
    (folder / f"{same}.png").write_bytes(b"kept")  # next to an SVG that is the figure's verbatim
    (folder / f"{changed}.svg").write_bytes(b"<svg>of an earlier study</svg>")
    (folder / f"{changed}.png").write_bytes(b"of an earlier study")
    (folder / f"{lost}.png").unlink()
    write_gallery(folder, gallery(drawings), Disk())
    second = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert second.pop(f"{same}.png") == b"kept"
    assert second == {name: data for name, data in first.items() if name != f"{same}.png"}


def test_a_report_shows_its_steps_and_leaves_the_collector_as_it_was(tmp_path):
    folder, told = write_large_study(tmp_path, **SMALL), []
    assert gc.isenabled()
    make_report(folder, told.append)
    assert gc.isenabled()
    assert told == [
        "tables and claims",
        "curves",
        "features of single pixels",
        "overlays",
        "files of the figures",
    ]
    with pytest.raises(FedsgcgError), gc_disabled():
        raise fail("SRV-402")
    assert gc.isenabled()
