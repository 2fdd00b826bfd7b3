"""Shards: every cell in one part, parallel calls on one folder, the refused inputs."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.common.console import Screen
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.run_folder import paths
from fedsgcg.deploy.study.plan import plan_study
from fedsgcg.deploy.study.run import run_study
from fedsgcg.deploy.study.shard import Shard
from fedsgcg.server.records.journal import lock_file


def shard(text: str, cells: int) -> Shard:
    found = Shard.parse(text, cells)
    assert found is not None
    return found


@given(st.integers(1, 60), st.data())
def test_every_cell_is_in_exactly_one_shard_and_sizes_differ_by_one(
    cells: int, data: st.DataObject
) -> None:
    of = data.draw(st.integers(1, cells))
    parts = [shard(f"{number}/{of}", cells).part(range(cells)) for number in range(1, of + 1)]
    assert sorted(cell for part in parts for cell in part) == list(range(cells))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == sorted(part) for part in parts)


def test_no_shard_has_only_one_method() -> None:
    """Four methods and four shards: dealing out in turn would give the slowest to one shard."""
    cells = [f"{method}{fold}" for fold in range(4) for method in "abcd"]
    for number in range(1, 5):
        assert {cell[0] for cell in shard(f"{number}/4", 16).part(cells)} == set("abcd")


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0", "-1/4", "1/9", "1/2/3", "1.0/2"])
def test_a_shard_outside_its_number_is_refused(text: str) -> None:
    with pytest.raises(FedsgcgError, match="CFG-001.*shard") as caught:
        Shard.parse(text, 8)
    assert "N at most 8" in str(caught.value)


def test_a_shard_does_not_run_on_ray(hospitals: Path, tmp_path: Path) -> None:
    with pytest.raises(FedsgcgError, match="CFG-001.*runtime"):
        plan_study(settings(hospitals, tmp_path, "shard=1/2", "runtime=ray"))


def settings(hospitals: Path, folder: Path, *more: str) -> Sequence[str]:
    return [
        *(f"data.root={hospitals}", f"output={folder}", "heldout=all", "method=source"),
        *("data.image_size=32", "network.base_width=4", "device=cpu"),
        *("federation.rounds=1", "method.steps_per_round=1", "method.batch_size=2", *more),
    ]


def test_shards_share_a_folder_and_the_plain_call_completes_and_reports(
    hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard is never run: the plain call runs its cells. A shard needs no Ray."""
    console = Screen(io.StringIO())
    first = plan_study(settings(hospitals, tmp_path, "shard=1/2"))
    whole = plan_study(settings(hospitals, tmp_path))
    with lock_file(tmp_path / paths.LOCK, shared=True):  # another shard that still runs
        with monkeypatch.context() as without_ray:
            without_ray.setitem(sys.modules, "ray", None)
            assert run_study(first, console) == 0
        with pytest.raises(FedsgcgError, match="CFG-006"):
            run_study(whole, console)
    assert not (tmp_path / paths.REPORT).exists()
    ran = {cell.name for cell in first.cells}
    assert [cell.done for cell in whole.cells] == [cell.name in ran for cell in whole.cells]
    before = {cell.name: cell.outcome() for cell in first.cells}
    assert run_study(whole, console) == 0
    assert all(cell.done for cell in whole.cells)
    assert {cell.name: cell.outcome() for cell in first.cells} == before
    assert (tmp_path / paths.REPORT).exists()


def test_a_shard_is_refused_while_the_study_runs_whole(hospitals: Path, tmp_path: Path) -> None:
    study = plan_study(settings(hospitals, tmp_path, "shard=1/2"))
    console = Screen(io.StringIO())
    with lock_file(tmp_path / paths.LOCK), pytest.raises(FedsgcgError, match="CFG-006"):
        run_study(study, console)
