"""The GPU benchmark runs completely, small and on a CPU, before anyone pays for a GPU."""

import importlib

import pytest
import torch

from tests.benchmarks.__main__ import ON_GPU
from tests.benchmarks.gpu_timing import gpu


@pytest.mark.slow
def test_every_row_of_the_issue_is_measured():
    modules = [importlib.import_module(f"tests.benchmarks.bench_{part}") for part in ON_GPU]
    rows = [row for module in modules for row in module.run(toy=True)]
    measures = {(row["part"], row["measure"]): row for row in rows}
    for part, measure in (
        ("training step, GPU", "ours, whole loop"),
        ("training step, GPU", "ours / eager float32"),
        ("training step, GPU", "share of SgCG in the step"),
        ("training step, GPU", "mixing, as a share of the step"),
        ("training step, GPU", "host waits in a warm loop"),
        ("evaluation, GPU", "a local epoch / evaluation"),
    ):
        assert measures[part, measure]["target"]
    shares = [row["value"] for row in rows if row["unit"] == "of the step"]
    assert sum(shares) == pytest.approx(1)
    errors = [row for row in rows if row["measure"].startswith("relative error")]
    assert len(errors) == 6
    assert all(row["met"] == "yes" for row in errors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_refuses_and_says_what_it_found():
    with pytest.raises(
        SystemExit,
        match=r"need a CUDA device.*found torch .* built for CUDA (none|[\d.]+); no NVIDIA driver",
    ):
        gpu(toy=False)
