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
    "step",
    "federation",
    "secure_sums",
    "deployment",
    "end_to_end",
    "gpu",
)
FOLDER = Path("runs/benchmarks")


def main() -> None:
    """Run the requested parts and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all but gpu"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the tables")
    options = parser.parse_args()
    parts = options.parts or [part for part in PARTS if part != "gpu"]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}, known: {', '.join(PARTS)}")
    facts = {
        "machine": describe_machine(inspect_machine()),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    # Imported here, because a machine with a GPU may lack the alternatives of the other parts.
    modules = [importlib.import_module(f"tests.benchmarks.bench_{part}") for part in parts]
    rows = [line for module in modules for line in module.run()]
    options.folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows).replace_schema_metadata(facts)
    pq.write_table(table, options.folder / "benchmarks.parquet", compression="zstd")
    (options.folder / "benchmarks.md").write_text(markdown(rows, facts))
    print(f"tables: {options.folder}/benchmarks.parquet and benchmarks.md")


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
