"""What each method costs against `source`: time of a step, and bytes that a hospital sends.

`costs.yaml` has the published figures; `fedsgcg methods --measure -o FILE` measures them again. The
time is that of `train_round`, images and augmentation included: a round of the method and one of
`source` alternate in one process, and each pair gives a ratio. On a CPU it is the processor time of
one thread, so that other load on the machine affects both sides equally; on a GPU it is wall-clock
time. The bytes are those of a round of a federation that really runs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import yaml

from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.common.machine import arithmetic_of
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.training import METHOD_NAMES

BASELINE: Final = "source"
SITES: Final = ("A", "B")
ROUND: Final = 2
"""The measured round; in the first one there are no prototypes."""
REPEATS: Final = 7
COMMON: Final = (
    *("data.sites=[A,B]", "federation.rounds=2", "privacy.min_pixels=1", "privacy.min_patients=1"),
    *("prototypes.warmup_rounds=1", "site.threads=1"),
)
TIMED: Final = (*COMMON, "data.image_size=96", "method.batch_size=8", "method.steps_per_round=2")
SENT: Final = (*COMMON, "data.image_size=32", "method.batch_size=2", "method.steps_per_round=1")

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Cost:
    """The cost of one method.

    Attributes:
        step: Time of a step relative to `source`, the median over the pairs.
        low: Lowest ratio of a pair.
        high: Highest ratio of a pair.
        bytes: Bytes that a hospital sends in a round.
        share: The same relative to `source`.
    """

    step: float
    low: float
    high: float
    bytes: int
    share: float


@dataclass(frozen=True)
class Costs:
    """Costs of all methods, measured in one run.

    Attributes:
        machine: Processor or GPU, and build of torch.
        date: Day of the measurement.
        protocol: What was measured, in one sentence.
        methods: Cost by method.
    """

    machine: str
    date: str
    protocol: str
    methods: Mapping[str, Cost]

    def to_yaml(self) -> str:
        """Return the content of `costs.yaml`."""
        facts = {name: getattr(self, name) for name in ("machine", "date", "protocol")}
        tree = facts | {"methods": {name: asdict(cost) for name, cost in self.methods.items()}}
        return yaml.safe_dump(tree, sort_keys=False, width=100)


@cache
def published_costs() -> Costs:
    """Return the published figures."""
    text = files("fedsgcg.deploy.study").joinpath("costs.yaml").read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    return Costs(
        **{**tree, "methods": {name: Cost(**one) for name, one in tree["methods"].items()}}
    )


def measure_costs(
    on_progress: OnProgress,
    names: Sequence[str] = METHOD_NAMES,
    *,
    device: str = "cpu",
    repeats: int = REPEATS,
    width: int = 16,
) -> Costs:
    """Measure methods in pairs with `source`; a minute or two per ten methods on a CPU.

    Args:
        on_progress: Called with the name of each method.
        names: The methods.
        device: `cpu` or `cuda`.
        repeats: Pairs per method.
        width: `network.base_width`.
    """
    with TemporaryDirectory() as folder:
        root = write_hospitals(
            Path(folder) / "hospitals", sites=SITES, cases_per_site=4, shape=(6, 96, 96)
        )
        places = [f"data.root={root}", f"site.cache={folder}/cache", f"network.base_width={width}"]
        places.append(f"site.device={device}")
        baseline_bytes = _sent([*places, *SENT, f"method={BASELINE}"], Path(folder) / BASELINE)
        found: dict[str, Cost] = {}
        for name in names:
            on_progress(name)
            settings = [*places, *TIMED]
            pair = [
                _round_of(Plan.from_tree(compose([*settings, f"method={one}"])))
                for one in (name, BASELINE)
            ]
            ratios = sorted(_ratios(*pair, repeats=repeats, on_cpu=device == "cpu"))
            sent = _sent([*places, *SENT, f"method={name}"], Path(folder) / name)
            middle, low, high = (
                round(value, 2) for value in (median(ratios), ratios[0], ratios[-1])
            )
            share = round(sent / baseline_bytes, 3)
            found[name] = Cost(middle, low, high, sent, share)
    protocol = (
        f"U-Net of base width {width}; a step of 8 slices of 96 x 96 pixels with the default "
        f"settings of each method; median, lowest and highest ratio of {repeats} pairs of 2 steps; "
        "one hospital's bytes in round 2 of a federation of two"
    )
    return Costs(_machine(device), datetime.now(UTC).date().isoformat(), protocol, found)


def _ratios(
    work: Callable[[], None], baseline: Callable[[], None], *, repeats: int, on_cpu: bool
) -> list[float]:
    """Return the ratio of the times of two works for each of their alternating runs."""
    clock = time.process_time if on_cpu else time.perf_counter

    def seconds(one: Callable[[], None]) -> float:
        start = clock()
        one()
        return clock() - start

    for one in (work, baseline):  # caches and the allocator are then those of a training loop
        one()
    gc.collect()
    return [seconds(work) / seconds(baseline) for _ in range(repeats)]


def _round_of(plan: Plan) -> Callable[[], None]:
    """Return a function that trains one hospital for a round, with prototypes if it needs them."""
    import torch

    from fedsgcg.clients.data.case_files import open_site, resolve_cache
    from fedsgcg.clients.data.store import open_store
    from fedsgcg.clients.device import choose_device
    from fedsgcg.clients.methods.class_statistics import site_statistics
    from fedsgcg.clients.methods.running_guide import build_guide
    from fedsgcg.clients.training import train_round
    from fedsgcg.common.heads import build_trained
    from fedsgcg.common.seeding import stream

    device = choose_device(plan.site.device, plan.site.threads)
    site = open_site(Path(plan.data.root), SITES[0], plan.data)
    store = open_store(site, plan.data, resolve_cache(plan.site), heldout=False)
    network = build_trained(plan, 0).to(device)
    prototypes = None
    if plan.method.contrasts:
        rngs = [stream(plan.seed, "costs")]
        prototypes = site_statistics(network, [store.slices("train")], plan, device, rngs)
    guide = build_guide(prototypes, {}, None, plan, ROUND, device)

    def work() -> None:
        train_round(network, [store], plan, round_number=ROUND, guide=guide, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return work


def _sent(settings: Sequence[str], output: Path) -> int:
    """Run a federation of two rounds and return the bytes that one hospital sent in the last."""
    import pyarrow.parquet as pq

    from fedsgcg.clients.app import build_client_app
    from fedsgcg.deploy.study.inprocess import run_in_process
    from fedsgcg.server.app import build_server_app

    tree = compose([*settings, f"output={output}"])
    apps = build_server_app(tree), build_client_app(tree)
    run_in_process(*apps, Plan.from_tree(tree).members())
    rows: list[dict[str, Any]] = pq.read_table(output / paths.ROUNDS).to_pylist()
    return int(
        next(
            row["value"]
            for row in rows
            if (row["round"], row["site"], row["metric"]) == (ROUND, SITES[0], "bytes_up")
        )
    )


def _machine(device: str) -> str:
    """Return what computed: a GPU, or a processor and its vector instructions."""
    import torch

    facts = arithmetic_of(1)
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {facts['torch']}"
    return f"{facts['cpu']}, {facts['capability']}, one thread, torch {facts['torch']}"
