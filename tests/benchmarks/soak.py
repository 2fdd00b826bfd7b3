"""`python -m tests.benchmarks.soak`: many rounds with real clients; the memory must stay flat.

Coordinator and hospitals run in one process with the real apps and messages, on synthetic images
and a tiny network. The resident size is read after every round. After the first fifth of the
rounds, the median of the last tenth may exceed that of the first tenth by five per cent.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from fedsgcg.clients.app import build_client_app
from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.inprocess import InProcessGrid
from fedsgcg.server.federation import run_federation

MOST_GROWTH = 0.05
SITES = ("East", "North", "South")
SETTINGS = (
    "method=ram_sgcg",
    "network.base_width=4",
    "data.image_size=32",
    "method.batch_size=4",
    "method.steps_per_round=2",
    "privacy.min_pixels=1",
    "privacy.min_patients=1",
    "device=cpu",
    "heldout=South",
)


@dataclass(frozen=True)
class Soak:
    """Resident size in bytes and open files after each round.

    Attributes:
        resident: Bytes.
        files: Number of open files.
        status: How the run ended.
        seconds: Duration.
    """

    resident: list[int]
    files: list[int]
    status: str
    seconds: float

    @property
    def growth(self) -> float:
        """Relative growth of the memory after warm-up."""
        return growth(self.resident)


def growth(values: list[int]) -> float:
    """Return the relative growth from the first to the last tenth after the first fifth."""
    warm = values[len(values) // 5 :]
    tenth = max(1, len(values) // 10)
    first, last = statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])
    return last / first - 1


def soak(folder: Path, rounds: int) -> Soak:
    """Run a federation of two training hospitals and a held-out one."""
    torch.set_num_threads(1)
    root = write_hospitals(folder / "data", sites=SITES, cases_per_site=4, shape=(4, 40, 40))
    places = [f"data.root={root}", f"output={folder / 'run'}", f"site.cache={folder / 'cache'}"]
    tree = compose(
        [*places, *SETTINGS, f"federation.rounds={rounds}", f"data.sites=[{','.join(SITES)}]"]
    )
    plan = Plan.from_tree(tree)
    resident: list[int] = []
    files: list[int] = []

    def measure(event: dict[str, object]) -> None:
        if event["event"] == "round.done":
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
            files.append(len(os.listdir("/proc/self/fd")))

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    start = time.monotonic()
    grid = InProcessGrid(build_client_app(tree), SITES, 1)
    try:
        outcome = run_federation(grid, plan, measure)
    finally:
        grid.close()
    return Soak(resident, files, outcome.status, time.monotonic() - start)


def main() -> int:
    """Run the soak and print the figures; returns 1 if the memory grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = soak(Path(name), options.rounds)
    sizes = ", ".join(
        f"{size / 2**20:.1f}" for size in found.resident[:: max(1, options.rounds // 10)]
    )
    print(f"{found.status}, {len(found.resident)} rounds, {found.seconds:.0f} s")
    print(f"resident size in MiB over the run: {sizes}")
    print(
        f"growth after warm-up: {100 * found.growth:+.2f} % of memory, {found.files[-1]} open files"
    )
    return int(found.growth > MOST_GROWTH or found.files[-1] > found.files[len(found.files) // 5])


if __name__ == "__main__":
    sys.exit(main())
