"""The result files of a run.

results.parquet     one row per case and structure
adapted.parquet     the same after an adaptation to the hospital's own images (`adapt.by`)
rounds.parquet      metrics of every round, long format
model.safetensors   the selected model
model.json          how to use the model, and how it was trained
prototypes.arrow    global class statistics under the selected model
seal.json           hashes of these files but the events; a coordinator's server signs them
outcome.json        how the run ended; written last but for the seal. `machine` is the coordinator's
                    machine, which in a simulation is also the one that trained
events.jsonl        events, one JSON object per line (`server.records.events`)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.files.seals import digest_of, write_seal
from fedsgcg.common.files.signing import Signer
from fedsgcg.common.names import is_site_text
from fedsgcg.common.run_folder import paths
from fedsgcg.common.run_folder.tables import (
    ADAPTED_SCHEMA,
    RESULTS_SCHEMA,
    ROUNDS_SCHEMA,
    cell_of,
)
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import (
    SUMMARISED,
    Identity,
    Weights,
    decode_cases,
    encode_statistics,
)

LARGEST_DISTANCE: Final = 1e6
"""Largest mean distance that a summary may state, in pixels or mm."""
MOST_CASES: Final = 10**6
"""Most cases that a summary may state."""

UNITS: Final = ("pixel",)
"""Units of a site's distances."""


def read_cases(data: bytes, site: str, plan: Plan) -> list[dict[str, Any]]:
    """Decode a site's per-case results, each row with the site's name added.

    Raises:
        FedsgcgError: PAY-106 or PAY-107 for unreadable bytes, unknown structures or invalid Dice.
    """
    try:
        rows = decode_cases(data, len(plan.data.structures))
    except Exception as error:
        # Hostile bytes may raise any exception, whose text may quote the site: only a code is kept.
        code = error.code if isinstance(error, FedsgcgError) else "PAY-106"
        raise fail(code, where=site) from error
    for row in rows:
        if row["structure"] not in plan.data.structures or not is_site_text(row["case"]):
            expected = f"an alias and one of {', '.join(plan.data.structures)}"
            raise fail(
                "PAY-106",
                where=site,
                found="a case without alias or of an unknown structure",
                expected=expected,
            )
        if row["unit"] not in UNITS:
            raise fail("PAY-106", where=site, found="another unit", expected=" or ".join(UNITS))
        for name in ("dice", "dice_smooth1"):
            if row[name] is None or not 0.0 <= row[name] <= 1.0:
                raise fail(
                    "PAY-106",
                    where=site,
                    found=f"{name} {row[name]!r}",
                    expected="a number in [0, 1]",
                )
    return [{"site": site, **row} for row in rows]


def read_summary(stated: Any, site: str, plan: Plan) -> list[dict[str, Any]]:
    """Check a site's summary of an evaluation, sent instead of per-case results.

    Args:
        stated: What the reply's details have under `SUMMARY`; None for nothing.
        site: The site.
        plan: The structures.

    Returns:
        Rows with structure, metric, mean, sd (NaN if not stated) and count (NaN if suppressed).

    Raises:
        FedsgcgError: PAY-106 for anything else.
    """
    rows = [] if stated is None else stated
    expected = f"mean, sd and count of {', '.join(SUMMARISED)}, once for each structure"
    unusable = fail("PAY-106", where=site, found="a summary that cannot be used", expected=expected)
    if not isinstance(rows, list) or len(rows) > len(SUMMARISED) * len(plan.data.structures):
        raise unusable
    try:
        found = [_summary_row(row, plan) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise unusable from error
    if len({(row["structure"], row["metric"]) for row in found}) != len(found):
        raise unusable
    return found


def _summary_row(row: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return one entry of a summary; raises ValueError for a value that is out of range."""
    most = 1.0 if row["metric"] == "dice" else LARGEST_DISTANCE
    mean, sd, count = row["mean"], row["sd"], row["count"]
    numbers = [mean, 0.0 if sd is None else sd]
    if any(type(value) not in (int, float) or not 0.0 <= value <= most for value in numbers):
        raise ValueError("out of range")
    if count is not None and not (type(count) is int and 0 < count <= MOST_CASES):
        raise ValueError("not a number of cases")
    if row["structure"] not in plan.data.structures or row["metric"] not in SUMMARISED:
        raise ValueError("unknown name")
    return {
        "structure": row["structure"],
        "metric": row["metric"],
        "mean": float(mean),
        "sd": math.nan if sd is None else float(sd),
        "count": math.nan if count is None else float(count),
    }


def mean_dice(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean Dice over cases and structures; NaN without a row."""
    return math.fsum(row["dice"] for row in rows) / len(rows) if rows else math.nan


def write_results(disk: Disk, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.parquet`, sorted by site, case and structure. Raises SRV-401."""
    order = sorted(rows, key=lambda row: (row["site"], row["case"], row["structure"]))
    disk.write(Path(plan.output) / paths.RESULTS, _parquet(order, RESULTS_SCHEMA, plan))


def write_adapted(disk: Disk, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `adapted.parquet`, sorted by adaptation, site, case and structure. Raises SRV-401.

    Without an adaptation in the plan there is no such file.
    """
    if not plan.adapt.by:
        disk.discard(Path(plan.output) / paths.ADAPTED)
        return
    order = sorted(rows, key=lambda r: (r["adapt"], r["site"], r["case"], r["structure"]))
    disk.write(Path(plan.output) / paths.ADAPTED, _parquet(order, ADAPTED_SCHEMA, plan))


def write_rounds(disk: Disk, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rounds.parquet`. Raises SRV-401."""
    disk.write(Path(plan.output) / paths.ROUNDS, _parquet(rows, ROUNDS_SCHEMA, plan))


def write_model(disk: Disk, plan: Plan, weights: Weights, card: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `model.json`, after the prototypes. Raises SRV-401.

    The weights' file names the SHA-256 of the card, and the card that of the prototypes, so that a
    changed card or the prototypes of another model are noticed (`clients.predict.model`).
    """
    folder = Path(plan.output)
    state = {name: array.copy() for name, array in weights.to_state().items()}
    stored = folder / paths.PROTOTYPES
    digest = digest_of(stored) if card["prototypes"] and stored.is_file() else None
    text = _json({**card, "prototypes_sha256": digest})
    facts = {"network": card["network"], "digest": card["digest"]}
    facts |= {"card_sha256": hashlib.sha256(text).hexdigest()}
    disk.write(
        folder / paths.WEIGHTS,
        save(state, metadata={"fedsgcg": json.dumps(facts, sort_keys=True)}),
    )
    disk.write(folder / paths.MODEL_CARD, text)


def write_prototypes(
    disk: Disk, plan: Plan, prototypes: ClassStatistics | None, identity: Identity
) -> None:
    """Write `prototypes.arrow`, or remove it if there are no prototypes. Raises SRV-401."""
    path = Path(plan.output) / paths.PROTOTYPES
    if prototypes is None:
        disk.discard(path)
    else:
        disk.write(path, encode_statistics(prototypes, identity))


def write_outcome(disk: Disk, plan: Plan, outcome: Mapping[str, Any]) -> None:
    """Write `outcome.json`, the last file of a run, and the seal of its files. Raises SRV-401."""
    folder = Path(plan.output)
    disk.write(folder / paths.OUTCOME, _json(cell_of(plan) | dict(outcome)))
    write_seal(disk, folder, paths.SEALED, Signer.of_process())


def budget_of(plan: Plan) -> dict[str, Any]:
    """Return the budget of a run: its kind, the rounds, and what was derived from it.

    `steps` and `slices` (`Plan.planned_steps`) are missing if the rounds are the budget.
    """
    found: dict[str, Any] = {"kind": plan.budget, "rounds": plan.federation.rounds}
    if plan.budget != "rounds":
        found |= {"steps": plan.planned_steps, "slices": plan.planned_slices}
    return found


def problem_fields(problem: Problem) -> dict[str, str]:
    """Return the fields of a problem that are not empty."""
    return {name: text for name, text in asdict(problem).items() if text}


def _parquet(rows: Sequence[Mapping[str, Any]], schema: pa.Schema, plan: Plan) -> bytes:
    cell = cell_of(plan)
    table = pa.Table.from_pylist([cell | dict(row) for row in rows], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def _json(tree: Mapping[str, Any]) -> bytes:
    clean = {name: _finite(value) for name, value in tree.items()}
    return (json.dumps(clean, indent=1) + "\n").encode()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
