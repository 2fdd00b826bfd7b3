"""Faults in a real federation for some seconds (`make nemesis`).

I1 to I11 hold, and every promised fault was made.

Not part of `make test`: it takes its time whatever the machine. `FEDSGCG_NEMESIS=90` runs it.
"""

import os
from pathlib import Path

import pytest

from tests.nemesis import checker, coverage, driver
from tests.nemesis.history import History

SECONDS = float(os.environ.get("FEDSGCG_NEMESIS") or 0)


@pytest.mark.row(19, 20, 22, 23, 24, 26, 28, 36)
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SECONDS, reason="FEDSGCG_NEMESIS is not set to a number of seconds")
def test_under_faults_the_invariants_hold(hospitals: Path, tmp_path: Path) -> None:
    driver.run(tmp_path, hospitals, SECONDS, seed=11, deadline_s=12)
    history = History.read(tmp_path)
    assert checker.check(history) == []
    assert list(coverage.promised(history)) == []
    assert sum(len(study.checkpoints) for study in history.studies) >= 6
