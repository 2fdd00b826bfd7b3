"""Reference results of a small federation, to detect changes of the numerics on any processor.

Training amplifies rounding: Adam's first steps take the sign of gradients near zero, so that one
bit in an activation moves some weights by the whole learning rate. How far that carries each figure
is measured: the same training with the last bit of the weights, of the images and of every layer's
output flipped at every second to fifth place, on one and on two threads. `SAFETY` times the largest
deviation is the figure's tolerance. The figures of the first round, before a step was taken, and
the losses stay tight; a figure that is loose here (`between_site_trace`) is exact in
`tests/laws/test_statistics_laws.py`, which needs no training.

A change that means to alter the figures writes values and tolerances anew, in three minutes:
`python -m tests.golden.test_small_federation`.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fedsgcg.common.images.phantoms import write_hospitals
from fedsgcg.deploy.study.runtimes import run_cell_in_process
from tests.support import small

GOLDEN = Path(__file__).with_name("small_federation.json")
METRICS = ("loss", "loss_contrast", "between_site_trace", "within_site_trace", "prototype_count")
EXACT = "prototype_count"
SAFETY = 4.0
FLOOR = 1e-4
"""Least relative tolerance of a figure that is computed in float32."""

Figures = dict[str, list[float]]


def figures(hospitals: Path, output: Path) -> Figures:
    """Figures of every round, averaged over the sites that report them."""
    settings = (
        "method=sgcg",
        "heldout=South",
        "prototypes.warmup_rounds=0",
        "prototypes.weight=0.1",
    )
    (cell,) = small.plan(hospitals, output, *settings).cells
    run_cell_in_process(cell.tree)
    values: dict[str, dict[int, list[float]]] = {}
    for row in pq.read_table(cell.folder / "rounds.parquet").to_pylist():
        name = f"{row['metric']} {row['cls']}".strip()
        if row["metric"] in METRICS:
            values.setdefault(name, {}).setdefault(row["round"], []).append(row["value"])
    return {
        name: [sum(v) / len(v) for _, v in sorted(rounds.items())]
        for name, rounds in sorted(values.items())
    }


@contextmanager
def last_bits_flipped(every: int, threads: int) -> Iterator[None]:
    """Flip the last bit of every n-th input and output of a layer, as another processor may do."""

    def nudged(value: Tensor) -> Tensor:
        bits = value.detach().clone(memory_format=torch.contiguous_format).view(torch.int32)
        bits.view(-1)[::every] ^= 1
        return value + (bits.view(torch.float32) - value.detach())

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(nudged(value) if is_float32(value) else value for value in arguments)

    def after(module: nn.Module, _: object, output: Tensor) -> Tensor | None:
        return nudged(output) if is_float32(output) and not any(module.children()) else None

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        for hook in hooks:
            hook.remove()


def is_float32(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def deviations(found: Figures, wanted: Figures) -> dict[str, list[float]]:
    """Relative deviation of each figure of each round."""
    assert found.keys() == wanted.keys()
    return {
        name: [
            abs(one - other) / max(abs(other), 1e-12)
            for one, other in zip(found[name], values, strict=True)
        ]
        for name, values in wanted.items()
    }


def assert_golden(found: Figures) -> None:
    golden = json.loads(GOLDEN.read_text())
    for name, shares in deviations(found, golden["values"]).items():
        limits = golden["tolerances"][name]
        assert all(share <= limit for share, limit in zip(shares, limits, strict=True)), (
            name,
            shares,
            limits,
        )


def test_small_federation_gives_the_golden_figures(hospitals: Path, tmp_path: Path) -> None:
    assert_golden(figures(hospitals, tmp_path))


@pytest.mark.parametrize(("every", "threads"), [(3, 2)])
def test_the_tolerances_cover_what_one_bit_and_another_thread_do(
    hospitals: Path, tmp_path: Path, every: int, threads: int
) -> None:
    with last_bits_flipped(every, threads):
        assert_golden(figures(hospitals, tmp_path))


def write_golden() -> None:
    """Measure the figures and how far rounding carries them, and write both."""
    with tempfile.TemporaryDirectory() as place:
        root = write_hospitals(
            Path(place) / "hospitals", cases_per_site=5, shape=(6, 40, 40), seed=7
        )
        torch.set_num_threads(1)
        values = figures(root, Path(place) / "plain")
        spread = {name: [0.0] * len(rounds) for name, rounds in values.items()}
        for every, threads in ((2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (5, 1), (5, 2), (7, 1)):
            with last_bits_flipped(every, threads):
                found = deviations(figures(root, Path(place) / f"{every}-{threads}"), values)
            spread = {
                name: [max(pair) for pair in zip(spread[name], found[name], strict=True)]
                for name in spread
            }
    tolerances = {
        name: [0.0 if name.startswith(EXACT) else max(FLOOR, SAFETY * one) for one in rounds]
        for name, rounds in spread.items()
    }
    rounded = {name: [float(f"{one:.2g}") for one in rounds] for name, rounds in tolerances.items()}
    GOLDEN.write_text(json.dumps({"values": values, "tolerances": rounded}, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
