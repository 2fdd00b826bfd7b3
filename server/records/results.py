"""What a run leaves behind: results, curves, the selected model with its card, and the events as they happened.

results.parquet     one row a case and structure
rounds.parquet      figures of every round, long format
model.safetensors   the selected model;  model.json: how to use it and how it came about
prototypes.arrow    global class statistics after the last round
outcome.json        how the run ended; written last. `machine` is where it ended: in a simulation the machine that
                    trained, in a deployment the coordinator, which trains nothing
events.jsonl        one JSON object a line, as it happens
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from common.errors import FedsgcgError, Problem, fail
from common.files.disk import Disk, refusals
from common.settings.plan import Plan
from common.statistics import ClassStatistics
from common.wire.payload import CASES_SCHEMA, Identity, Weights, decode_cases, encode_statistics
from server.records.checkpoint import ROWS_SCHEMA, Best
from server.selection import protocol

SCHEMA_VERSION: Final = "1"
IN_CHANNELS: Final = 3
"""Channels of a training slice: a slice with its neighbours, a colour picture, or one slice three times."""

PREPROCESSING: Final = (
    *("image_size", "stack", "intensity", "activation", "threshold"),
    *("largest_component", "fill_holes", "spacing_unit"),
)

CELL_FIELDS = [
    pa.field("method", pa.string()),  # label of what is compared: the method, and what the study varies of it
    pa.field("heldout", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("trains", pa.string()),  # training method
    pa.field("federation", pa.string()),  # by_site | pooled | local
    pa.field("setting", pa.string()),  # swept settings, e.g. prototypes.weight=0.5
    pa.field("chosen", pa.string()),  # settings that this fold's source hospitals chose, likewise
    pa.field("trained_on", pa.string()),  # the one hospital that trained, with federation=local
]

RESULTS_SCHEMA = pa.schema(
    [*CELL_FIELDS, pa.field("site", pa.string()), *CASES_SCHEMA],
    metadata={"schema_version": SCHEMA_VERSION, "kind": "fedsgcg.results"},
)
ROUNDS_NOTE: Final = "validation_dice of row round=r was measured on the model received in round r, that of round r-1"
ROUNDS_SCHEMA = pa.schema(
    [*CELL_FIELDS, *ROWS_SCHEMA],
    metadata={"schema_version": SCHEMA_VERSION, "kind": "fedsgcg.rounds", "validation_dice": ROUNDS_NOTE},
)

OnEvent = Callable[[dict[str, Any]], None]


def ignore_event(event: dict[str, Any]) -> None:
    """Do nothing with an event."""


class EventLog:
    """Appends events to `events.jsonl`, each line flushed, and hands them to a listener.

    Args:
        plan: The plan; its method, held-out site, seed and number of rounds are in every event.
        on_event: The listener.
    """

    def __init__(self, plan: Plan, on_event: OnEvent = ignore_event) -> None:
        self.round = 0
        self._path = Path(plan.output) / "events.jsonl"
        self._fixed = cell_of(plan) | {"rounds": plan.federation.rounds}
        self._on_event = on_event

    def emit(self, event: str, **fields: Any) -> None:
        """Record one event of the current `round`; numbers that are not finite become null. Raises SRV-401."""
        found = {"time": round(time.time(), 3), "event": event, **self._fixed, "round": self.round, **fields}
        found = {name: _finite(value) for name, value in found.items()}
        with refusals(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        self._on_event(found)


def cell_of(plan: Plan) -> dict[str, Any]:
    """What names a cell of a study: label, held-out site, seed, and what lies behind the label."""
    return {
        "method": plan.label or plan.method.name,
        "heldout": plan.heldout,
        "seed": plan.seed,
        "trains": plan.method.name,
        "federation": plan.federation.ownership,
        "setting": plan.setting,
        "chosen": plan.chosen,
        "trained_on": plan.trained_on,
    }


def read_cases(data: bytes, site: str, plan: Plan) -> list[dict[str, Any]]:
    """Decode a site's per-case results, each row with the site's name added.

    Raises:
        FedsgcgError: PAY-106 or PAY-107 for bytes, structures or Dice values that cannot be.
    """
    try:
        rows = decode_cases(data)
    except Exception as error:  # as in `sites.exchange`: hostile bytes; and what was found may quote the site's text
        raise fail(error.code if isinstance(error, FedsgcgError) else "PAY-106", where=site) from error
    for row in rows:
        if row["structure"] not in plan.data.structures or not row["case"]:
            expected = f"an alias and one of {', '.join(plan.data.structures)}"
            raise fail(
                "PAY-106", where=site, found="a case without alias or of an unknown structure", expected=expected
            )
        for name in ("dice", "dice_smooth1"):
            if row[name] is None or not 0.0 <= row[name] <= 1.0:
                raise fail("PAY-106", where=site, found=f"{name} {row[name]!r}", expected="a number in [0, 1]")
    return [{"site": site, **row} for row in rows]


def mean_dice(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean Dice over cases and structures; NaN without a row."""
    return math.fsum(row["dice"] for row in rows) / len(rows) if rows else math.nan


def write_results(disk: Disk, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.parquet`, cases in the order of site, case and structure. Raises SRV-401."""
    order = sorted(rows, key=lambda row: (row["site"], row["case"], row["structure"]))
    disk.write(Path(plan.output) / "results.parquet", _parquet(order, RESULTS_SCHEMA, plan))


def write_rounds(disk: Disk, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rounds.parquet`. Raises SRV-401."""
    disk.write(Path(plan.output) / "rounds.parquet", _parquet(rows, ROUNDS_SCHEMA, plan))


def write_model(disk: Disk, plan: Plan, weights: Weights, card: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `model.json`. Raises SRV-401."""
    folder = Path(plan.output)
    state = {name: array.copy() for name, array in weights.to_state().items()}
    network = {"network": card["network"], "digest": card["digest"]}
    disk.write(folder / "model.safetensors", save(state, metadata={"fedsgcg": json.dumps(network, sort_keys=True)}))
    disk.write(folder / "model.json", _json(card))


def write_prototypes(disk: Disk, plan: Plan, prototypes: ClassStatistics | None, identity: Identity) -> None:
    """Write `prototypes.arrow`, or remove it where there are none any more. Raises SRV-401."""
    path = Path(plan.output) / "prototypes.arrow"
    if prototypes is None:
        disk.discard(path)
    else:
        disk.write(path, encode_statistics(prototypes, identity))


def write_outcome(disk: Disk, plan: Plan, outcome: Mapping[str, Any]) -> None:
    """Write `outcome.json`, the last file of a run. Raises SRV-401."""
    disk.write(Path(plan.output) / "outcome.json", _json(cell_of(plan) | dict(outcome)))


def model_card(
    plan: Plan, chosen: Best, training: Sequence[str], *, prototypes: bool, kinds: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what `model.json` says: how to use the model, and how it came about.

    Args:
        plan: The plan.
        chosen: The selected model, its round and its source-validation Dice (NaN if unknown).
        training: Sites that trained.
        prototypes: Whether `prototypes.arrow` lies beside it.
        kinds: What the training images were (`common.images.read.KINDS`); empty where the sites did not say.
    """
    data = asdict(plan.data)
    network = asdict(plan.network) | {"in_channels": IN_CHANNELS, "out_channels": plan.data.out_channels}
    return cell_of(plan) | {
        "schema_version": SCHEMA_VERSION,
        "run": plan.run,
        "plan": plan.digest(),
        "data": plan.data.name,
        "kinds": list(kinds),
        "weights": "model.safetensors",
        "digest": chosen.weights.digest(),
        "network": network,
        "classes": list(plan.data.classes),
        "labels": plan.data.classes,
        "structures": plan.data.structures,
        "preprocessing": {name: data[name] for name in PREPROCESSING},
        "selection": plan.federation.selection,
        "selected_round": chosen.round,
        "rounds": plan.federation.rounds,
        "validation_dice": chosen.score,
        "prototypes": "prototypes.arrow" if prototypes else None,
        "normalize": plan.prototypes.normalize,
        "protocol": protocol(plan, training, chosen.round, validated=math.isfinite(chosen.score))
        | {"images": ", ".join(f"{kind}s" for kind in kinds)},
    }


def public(problem: Problem) -> dict[str, str]:
    """Return a problem as plain text fields, without those that are empty."""
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
