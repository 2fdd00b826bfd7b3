"""`python -m tests.benchmarks [PART…]`: every part beside its alternatives, as ratios in one run.

Writes `runs/benchmarks/benchmarks.parquet` and `benchmarks.md`, with machine and date.
"""

import argparse
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from deploy.preflight import look_at_machine
from deploy.record import describe_machine
from tests.benchmarks import (
    bench_amplitude,
    bench_federation,
    bench_loss,
    bench_metrics,
    bench_statistics,
    bench_step,
)

PARTS = {
    "loss": bench_loss.run,
    "statistics": bench_statistics.run,
    "amplitude": bench_amplitude.run,
    "metrics": bench_metrics.run,
    "step": bench_step.run,
    "federation": bench_federation.run,
}
FOLDER = Path("runs/benchmarks")


def main() -> None:
    """Run the parts that were asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}, known: {', '.join(PARTS)}")
    facts = {
        "machine": describe_machine(look_at_machine()),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "system": platform.platform(terse=True),
    }
    rows = [line for part in parts for line in PARTS[part]()]
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows).replace_schema_metadata(facts)
    pq.write_table(table, FOLDER / "benchmarks.parquet", compression="zstd")
    (FOLDER / "benchmarks.md").write_text(markdown(rows, facts))
    print(f"tables: {FOLDER}/benchmarks.parquet and benchmarks.md")


def markdown(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """The rows as a Markdown table under one line on machine and date."""
    lines = [
        ", ".join(facts.values()),
        "",
        "| part | case | measure | value | quartiles | target | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in rows:
        spread = f"{line['low']:.3g}–{line['high']:.3g}" if line["low"] != line["high"] else ""
        value = f"{line['value']:.3g} {line['unit']}"
        lines.append(
            "| "
            + " | ".join([line["part"], line["case"], line["measure"], value, spread, line["target"], line["met"]])
            + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
