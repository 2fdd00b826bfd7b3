"""`python -m tests.benchmarks [PART…]`: every part against its alternatives, as ratios in one run.

Writes `runs/benchmarks/benchmarks.parquet` and `benchmarks.md`, with machine and date.
"""

import argparse
import importlib
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fedsgcg.deploy.study.preflight import inspect_machine
from fedsgcg.deploy.study.record import describe_machine

PARTS = (
    "loss",
    "statistics",
    "amplitude",
    "metrics",
    "codecs",
    "step",
    "federation",
    "secure_sums",
    "deployment",
    "end_to_end",
)
ON_GPU = ("gpu_kernels", "gpu_step", "gpu_evaluation", "gpu_trace")
"""Parts that need a CUDA device; `gpu` runs all of them."""

FOLDER = Path("runs/benchmarks")


def main() -> None:
    """Run the requested parts and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"any of {', '.join((*PARTS, 'gpu', *ON_GPU))}; default: all that need no GPU",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the tables")
    parser.add_argument(
        "--toy", action="store_true", help="the gpu parts with small sizes on a CPU, as a rehearsal"
    )
    options = parser.parse_args()
    asked = options.parts or PARTS
    parts = [name for part in asked for name in (ON_GPU if part == "gpu" else (part,))]
    if unknown := set(parts) - {*PARTS, *ON_GPU}:
        parser.error(f"unknown parts {sorted(unknown)}, known: {', '.join((*PARTS, *ON_GPU))}")
    facts = {
        "machine": describe_machine(inspect_machine()),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    for part in parts:
        print(f"{part} …", flush=True)
        # Imported here, because a machine with a GPU may lack the alternatives of other parts.
        module = importlib.import_module(f"tests.benchmarks.bench_{part}")
        rows += module.run(toy=options.toy) if part in ON_GPU else module.run()
        _write(rows, facts, options.folder)  # after each part: a later one may be cut off
    print(f"tables: {options.folder}/benchmarks.parquet and benchmarks.md")


def _write(rows: list[dict[str, Any]], facts: dict[str, str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows).replace_schema_metadata(facts)
    pq.write_table(table, folder / "benchmarks.parquet", compression="zstd")
    (folder / "benchmarks.md").write_text(markdown(rows, facts))


def markdown(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """Return the rows as a Markdown table below a line with machine and date."""
    lines = [
        ", ".join(facts.values()),
        "",
        "| part | case | measure | value | quartiles | target | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in rows:
        spread = f"{line['low']:.3g}–{line['high']:.3g}" if line["low"] != line["high"] else ""
        value = f"{line['value']:.3g} {line['unit']}"
        cells = [line["part"], line["case"], line["measure"], value, spread]
        cells += [line["target"], line["met"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
