"""The plan of workers: more hospitals than GPUs, and parts of a GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsgcg.deploy.study.preflight import Machine
from fedsgcg.deploy.study.runtimes import choose_runtime, gpu_share


@pytest.mark.row(50)
@given(st.integers(1, 200), st.integers(0, 16))
def test_law_workers_at_once_get_no_more_than_the_gpus(wanting: int, gpus: int) -> None:
    """Row 50: shares that add up to more than a GPU ran out of its memory."""
    share = gpu_share(wanting, Machine(8, gpus))
    if not gpus:
        assert share == 0
        return
    on_one = int(1 / share + 1e-9)  # Ray puts a task on a single GPU
    assert on_one >= 1
    assert on_one * share <= 1 + 1e-9
    if wanting <= gpus:
        assert share == 1
    else:
        assert share < 1
        # 20 tasks share a GPU at most; further ones wait.
        assert wanting * share <= max(gpus, 0.05 * wanting) + 1e-9


@pytest.mark.row(50)
def test_sites_run_in_parallel_only_where_one_cell_would_leave_gpus_idle() -> None:
    found = {gpus: choose_runtime("auto", 1, Machine(8, gpus)) for gpus in (0, 1, 2)}
    assert found == {0: "inprocess", 1: "inprocess", 2: "ray"}
    assert choose_runtime("auto", 4, Machine(8, 2)) == "inprocess"
    assert choose_runtime("ray", 4, Machine(8, 0)) == "ray"
