"""The memory of a round and of a long run is bounded (matrix row 40, invariant I10)."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.common.wire.messages import TRAIN, Reply, Request
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.aggregation import aggregators
from fedsgcg.server.federation import run_federation
from fedsgcg.server.sites.spill import spilled
from tests.benchmarks.soak import growth, soak
from tests.support.plans import small_plan
from tests.support.scripted_grid import ScriptedGrid

MEASURED = """
import sys
from pathlib import Path
import numpy as np
from fedsgcg.common.wire.payload import Weights
from fedsgcg.server.sites.spill import spilled

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

def model(k):
    return Weights((("w", (10**6,)),), np.full(10**6, k, np.float32))

folder = Path(sys.argv[1])
kept = [spilled(model(0), folder)]
before = anonymous()
kept += [spilled(model(k), folder) for k in range(1, 50)]
print(anonymous() - before, [float(weights.values[-1]) for weights in kept] == list(range(50)))
print(len(list(folder.iterdir())))
"""


@pytest.mark.attack("many-replies")
def test_row_40_the_models_of_fifty_sites_take_the_memory_of_a_few(tmp_path: Path) -> None:
    """Row 40: 200 MB of models wait on disk; anonymous memory grows by less than three models."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, equal, files = done.stdout.split()
    assert (equal, files) == ("True", "0")
    assert int(grown) < 12 * 10**6


def test_a_spilled_model_is_the_same_to_the_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=7).astype(np.float32)
    values[3] = np.nan
    weights = Weights((("w", (3, 2)), ("b", (1,))), values, (("n", 3),))
    back = spilled(weights, tmp_path)
    assert back.values.tobytes() == values.tobytes()
    assert back.digest() == weights.digest()
    with pytest.raises(ValueError, match="read-only"):
        back.values[0] = 1.0
    empty = Weights((), np.zeros(0, np.float32))
    assert spilled(empty, tmp_path) is empty


@pytest.mark.parametrize("shuffle", [0, 1, 2])
@pytest.mark.attack("many-replies")
def test_row_49_models_wait_on_disk_and_any_order_of_arrival_gives_the_same_bits(
    shuffle: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 49: what the rule gets is mapped from disk; the model is that of memory alone."""
    rule = aggregators.AGGREGATORS["fedavg"]
    sent: dict[str, Weights] = {}
    mapped: list[bool] = []

    def watched(previous, parts, state, settings):  # type: ignore[no-untyped-def]
        mapped.extend(isinstance(weights.values, np.memmap) for _, weights, _ in parts)
        plain = [(site, sent[site], share) for site, _, share in parts]
        merged, after = rule(previous, parts, state, settings)
        assert merged.digest() == rule(previous, plain, state, settings)[0].digest()
        return merged, after

    def script(grid: ScriptedGrid, site: str, kind: str, request: Request, reply: Reply) -> object:
        if kind == TRAIN and reply.weights is not None:
            sent[site] = reply.weights
        return reply

    monkeypatch.setitem(aggregators.AGGREGATORS, "fedavg", watched)  # type: ignore[arg-type]
    plan = small_plan(tmp_path, federation__rounds=2)
    grid = ScriptedGrid(plan, ("A", "B", "C", "D"), script, shuffle=shuffle)
    assert run_federation(grid, plan).status == "completed"
    assert mapped == [True] * 6


def test_growth_compares_the_ends_of_the_run_after_warm_up() -> None:
    assert growth([500] * 20 + [100] * 80) == 0
    assert growth([1] * 20 + [100] * 70 + [105] * 10) == pytest.approx(0.05)
    assert growth(list(range(100, 200))) > 0.5


@pytest.mark.attack("memory-over-rounds")
def test_row_34_twenty_rounds_with_real_clients_keep_memory_and_files(tmp_path: Path) -> None:
    """Row 34: a short form of `make soak`, with room for the noise of so few rounds."""
    found = soak(tmp_path, 20)
    assert found.status == "completed"
    assert len(found.resident) == 20
    assert found.growth < 0.2
    assert found.files[-1] <= found.files[5]
