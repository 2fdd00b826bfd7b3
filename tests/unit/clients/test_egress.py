"""The only door: floors, the chained ledger, and nothing leaves without its line."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.egress import (
    LEDGER,
    apply_floors,
    payload_digest,
    release,
    release_error,
)
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.chain import seal
from fedsgcg.common.settings.privacy import PrivacySettings
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import Reply, decode_reply, encode_reply, payload_bytes
from fedsgcg.common.wire.payload import Identity, Weights

IDENTITY = Identity("run", "South", 3, "abc")
CLASSES = ["background", "gland", "lesion"]
FLOORS = PrivacySettings(min_pixels=100, min_patients=2)


def statistics(*counts: float) -> ClassStatistics:
    K = len(counts)
    return ClassStatistics(np.array(counts, float), np.full((K, 2), 7.0), np.full((K, 2, 2), 9.0))


def line(folder: Path, number: int, size: int = 5) -> None:
    ledger.append(
        folder / LEDGER,
        round_number=number,
        kind="train",
        parts={"weights": size},
        withheld=[],
        sha256=f"{number:064d}",
    )


@pytest.mark.row(48, 61, 66)
def test_floors_withhold_by_pixels_and_by_patients():
    kept, hidden = apply_floors(statistics(1000, 99, 100), np.array([5, 5, 1]), FLOORS)
    assert hidden == [1, 2]
    assert kept.count.tolist() == [1000, 0, 0]
    assert kept.mean[0].tolist() == [7, 7]
    assert not kept.mean[1:].any()
    assert not kept.scatter[1:].any()


def test_at_the_floor_a_class_may_leave():
    kept, hidden = apply_floors(statistics(100), np.array([2]), FLOORS)
    assert hidden == []
    assert kept.count.tolist() == [100]


@pytest.mark.row(66)
def test_the_covariance_of_few_patients_is_shrunk():
    floors = PrivacySettings(min_pixels=1, min_patients=1, shrinkage=True)
    kept, _ = apply_floors(statistics(100, 100, 100), np.array([1, 2, 3]), floors)
    # 3 = A + 1 patients keep everything, one keeps a third; 9 is the mean of the diagonal.
    third, two_thirds = [[9, 3], [3, 9]], [[9, 6], [6, 9]]
    assert np.allclose(kept.scatter, [third, two_thirds, [[9, 9], [9, 9]]])
    assert kept.mean.tolist() == statistics(100, 100, 100).mean.tolist()
    single = ClassStatistics(np.ones(1), np.zeros((1, 4)), np.outer(v := np.ones(4), v)[None])
    values = np.linalg.eigvalsh(single.shrunk([1]).scatter[0])
    assert values.min() > 0.1 * values.max()  # no direction is that of the one patient alone


def test_an_unseen_class_is_not_called_withheld():
    _, hidden = apply_floors(statistics(0, 5), np.array([0, 2]), FLOORS)
    assert hidden == [1]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    patients=st.lists(st.integers(0, 4), min_size=5, max_size=5),
    pixels=st.integers(1, 200),
    people=st.integers(1, 4),
)
def test_what_leaves_is_above_both_floors_or_zero(counts, patients, pixels, people):
    kept, hidden = apply_floors(
        statistics(*counts),
        np.array(patients[: len(counts)]),
        PrivacySettings(min_pixels=pixels, min_patients=people),
    )
    for index, count in enumerate(kept.count):
        if count:
            assert count == counts[index] >= pixels
            assert patients[index] >= people
            assert index not in hidden
        else:
            assert not kept.mean[index].any()
            assert not kept.scatter[index].any()


def test_a_release_names_what_was_withheld_and_writes_one_line(tmp_path):
    reply = Reply(IDENTITY, "North", statistics=statistics(1000, 20, 500), metrics={"loss": 1.0})
    records = release(
        reply, tmp_path, kind="train", privacy=FLOORS, classes=CLASSES, patients=np.array([3, 3, 1])
    )
    left = decode_reply(records)
    assert left.details == {"withheld": ["gland", "lesion"]}
    assert left.statistics is not None
    assert left.statistics.count.tolist() == [1000, 0, 0]
    (entry,) = [json.loads(text) for text in (tmp_path / LEDGER).read_text().splitlines()]
    assert entry["withheld"] == ["gland", "lesion"]
    assert (entry["seq"], entry["round"], entry["kind"]) == (0, 3, "train")
    assert entry["parts"] == payload_bytes(records)
    assert entry["sha256"] == payload_digest(records)


def test_statistics_without_patient_counts_do_not_leave(tmp_path):
    with pytest.raises(ValueError, match="patients"):
        release(
            Reply(IDENTITY, "North", statistics=statistics(1000)),
            tmp_path,
            kind="train",
            privacy=FLOORS,
        )
    assert not (tmp_path / LEDGER).exists()


def test_every_part_of_a_payload_is_in_its_digest():
    weights = Weights((("w", (2,)),), np.array([1.0, 2.0], np.float32))
    base = Reply(IDENTITY, "North", weights, statistics(100), {"loss": 1.0}, b"rows", {"a": 1})
    changed = [
        Reply(
            IDENTITY,
            "North",
            Weights(weights.layout, weights.values + 1),
            base.statistics,
            base.metrics,
            b"rows",
            {"a": 1},
        ),
        Reply(IDENTITY, "North", weights, statistics(101), base.metrics, b"rows", {"a": 1}),
        Reply(IDENTITY, "North", weights, base.statistics, {"loss": 2.0}, b"rows", {"a": 1}),
        Reply(IDENTITY, "North", weights, base.statistics, base.metrics, b"row2", {"a": 1}),
        Reply(IDENTITY, "North", weights, base.statistics, base.metrics, b"rows", {"a": 2}),
        Reply(IDENTITY, "South", weights, base.statistics, base.metrics, b"rows", {"a": 1}),
    ]
    digests = {payload_digest(encode_reply(reply)) for reply in [base, *changed]}
    assert len(digests) == 7
    assert payload_digest(encode_reply(base)) in digests


def test_the_chain_holds_as_written(tmp_path):
    for number in range(5):
        line(tmp_path, number)
    assert ledger.verify(tmp_path / LEDGER) == 5
    entries = [json.loads(text) for text in (tmp_path / LEDGER).read_text().splitlines()]
    assert entries[0]["previous"] == "0" * 64
    assert [entry["seq"] for entry in entries] == [0, 1, 2, 3, 4]
    assert all(
        after["previous"] == before["hash"]
        for before, after in zip(entries, entries[1:], strict=False)
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_byte_removed_or_swapped_line_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("ledger")
    for number in range(4):
        line(folder, number)
    path = folder / LEDGER
    lines = path.read_bytes().splitlines(keepends=True)
    kind = data.draw(st.sampled_from(["change", "remove", "swap", "repeat"]))
    if kind == "change":
        row = data.draw(st.integers(0, 3))
        at = data.draw(st.integers(0, len(lines[row]) - 2))
        old = lines[row][at : at + 1]
        new = data.draw(
            st.sampled_from([b"0", b"1", b"x", b'"', b"}"]).filter(lambda byte: byte != old)
        )
        lines[row] = lines[row][:at] + new + lines[row][at + 1 :]
    elif kind == "remove":
        del lines[data.draw(st.integers(0, 2))]  # the last line alone cannot be missed by any chain
    elif kind == "swap":
        row = data.draw(st.integers(0, 2))
        lines[row], lines[row + 1] = lines[row + 1], lines[row]
    else:
        lines.append(lines[data.draw(st.integers(0, 3))])
    path.write_bytes(b"".join(lines))
    with pytest.raises(FedsgcgError) as caught:
        ledger.verify(path)
    assert caught.value.code == "SITE-501"


@pytest.mark.attack("appended-ledger")
def test_a_forged_line_with_a_seal_of_its_own_breaks_the_next_one(tmp_path):
    for number in range(3):
        line(tmp_path, number)
    path = tmp_path / LEDGER
    entries = [json.loads(text) for text in path.read_text().splitlines()]
    entries[1]["parts"] = {"weights": 1}
    entries[1]["hash"] = seal(entries[1])
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with pytest.raises(FedsgcgError) as caught:
        ledger.verify(path)
    assert "line 2" in caught.value.problems[0].found


def test_a_line_that_a_crash_cut_off_is_dropped_because_its_message_never_left(tmp_path):
    line(tmp_path, 0)
    line(tmp_path, 1)
    path = tmp_path / LEDGER
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    line(tmp_path, 2)
    assert ledger.verify(path) == 2
    assert [json.loads(text)["round"] for text in path.read_text().splitlines()] == [0, 2]


@pytest.mark.attack("appended-ledger")
def test_nothing_is_added_to_a_ledger_whose_last_line_was_changed(tmp_path):
    line(tmp_path, 0, size=5)
    path = tmp_path / LEDGER
    path.write_text(path.read_text().replace('"weights": 5', '"weights": 1'))
    with pytest.raises(FedsgcgError) as caught:
        release(Reply(IDENTITY, "North"), tmp_path, kind="train", privacy=FLOORS)
    assert caught.value.code == "SITE-501"


def test_disk_full_on_the_ledger_lets_nothing_out_and_leaves_the_ledger_whole(tmp_path):
    line(tmp_path, 0)
    path = tmp_path / LEDGER
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))  # room for a part of the line
    try:
        with pytest.raises(FedsgcgError) as caught:
            release(
                Reply(IDENTITY, "North", metrics={"loss": 1.0}),
                tmp_path,
                kind="train",
                privacy=FLOORS,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "SITE-501"
    assert path.stat().st_size == size
    line(tmp_path, 1)
    assert ledger.verify(path) == 2


def test_a_folder_that_cannot_be_made_lets_only_the_code_out(tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    with pytest.raises(FedsgcgError) as caught:
        release(Reply(IDENTITY, "North"), tmp_path / "home", kind="train", privacy=FLOORS)
    assert caught.value.code == "SITE-501"
    left = decode_reply(release_error("SITE-501", IDENTITY, "North", tmp_path / "home", "train"))
    assert left == Reply(IDENTITY, "North", error="SITE-501")


def test_an_error_reply_has_its_line_too(tmp_path):
    left = decode_reply(release_error("TRN-301", IDENTITY, "North", tmp_path, "train"))
    assert left == Reply(IDENTITY, "North", error="TRN-301")
    assert ledger.verify(tmp_path / LEDGER) == 1
    assert os.path.getsize(tmp_path / LEDGER) > 0
