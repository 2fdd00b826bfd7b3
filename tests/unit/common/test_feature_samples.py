"""The file of sampled pixel features: what is written is read, and nothing else is believed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.feature_samples import (
    PIXELS_A_CLASS,
    read_feature_samples,
    sample_pixels,
    write_feature_samples,
)

FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3)
CLASSES = np.array([0, 1, 1, 2])


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "sites" / "A" / "features.arrow"
    write_feature_samples(path, FEATURES, CLASSES, "A", "sgcg")
    found = read_feature_samples(path)
    assert np.array_equal(found.features, FEATURES)
    assert np.array_equal(found.classes, CLASSES)
    assert (found.site, found.method) == ("A", "sgcg")
    assert [entry.name for entry in path.parent.iterdir()] == ["features.arrow"]


def test_no_pixel_at_all_is_a_file_too(tmp_path):
    write_feature_samples(tmp_path / "f", np.zeros((0, 3)), np.zeros(0), "A")
    assert read_feature_samples(tmp_path / "f").features.shape == (0, 3)


@pytest.mark.parametrize(
    ("features", "classes"),
    [
        (FEATURES, CLASSES[:3]),
        (FEATURES[0], CLASSES),
        (np.full((4, 3), np.nan), CLASSES),
        (np.zeros((4, 0)), CLASSES),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, features, classes):
    with pytest.raises(ValueError, match="features"):
        write_feature_samples(tmp_path / "f", features, classes, "A")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_has_a_code(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FedsgcgError) as refused:
        write_feature_samples(tmp_path / "file" / "f", FEATURES, CLASSES, "A")
    assert refused.value.code == "SITE-501"


def write_table(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("damage", ["kind", "version", "columns", "width", "null", "nan"])
def test_another_file_is_not_believed(tmp_path, damage):
    write_feature_samples(tmp_path / "good", FEATURES, CLASSES, "A")
    with pa.memory_map(str(tmp_path / "good")) as source:
        table = pa.ipc.open_file(source).read_all()
    metadata = dict(table.schema.metadata)
    metadata |= {"kind": {b"kind": b"other"}, "version": {b"schema_version": b"9"}}.get(damage, {})
    columns = {"class": table["class"], "features": table["features"]}
    if damage == "columns":
        del columns["class"]
    if damage == "width":
        columns["features"] = pa.array([[1.0], [2.0, 3.0], [], [4.0]], pa.list_(pa.float32()))
    if damage == "null":
        columns["class"] = pa.array([0, None, 1, 2], pa.int64())
    if damage == "nan":
        rows = pa.array(np.full(12, np.nan, np.float32))
        columns["features"] = pa.FixedSizeListArray.from_arrays(rows, 3)
    write_table(tmp_path / "bad", pa.table(columns).replace_schema_metadata(metadata))
    with pytest.raises(ValueError, match="feature samples"):
        read_feature_samples(tmp_path / "bad")


def test_a_sample_holds_every_class_and_never_too_much():
    classes = np.array([0] * 1000 + [1] * 5 + [255] * 50 + [-1] * 50)
    chosen = sample_pixels(classes, np.random.default_rng(0))
    counts = dict(zip(*np.unique(classes[chosen], return_counts=True), strict=True))
    assert counts == {0: PIXELS_A_CLASS, 1: 5}
    assert len(set(chosen.tolist())) == chosen.size
    assert sample_pixels(np.array([255, 255]), np.random.default_rng(0)).size == 0
