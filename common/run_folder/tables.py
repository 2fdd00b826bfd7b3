"""Schemas of the tables in a run folder, shared by coordinator, report and tools."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.payload import CASES_SCHEMA

ROWS_VERSION: Final = "1"

ROWS_SCHEMA = pa.schema(
    [
        pa.field("round", pa.int32()),
        pa.field("phase", pa.string()),  # train | merge | heldout | observer | validation | adapted
        pa.field("site", pa.string()),  # "" = all sites
        pa.field("cls", pa.string()),  # "" or the name of a class or structure
        pa.field("metric", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("other", pa.string()),  # second site of a pair; null in all other rows
    ],
    metadata={"schema_version": ROWS_VERSION, "kind": "fedsgcg.rounds"},
)

SCHEMA_VERSION: Final = "1"

CELL_FIELDS = [
    pa.field("method", pa.string()),  # label of the variant: the method and what the study varies
    pa.field("heldout", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("trains", pa.string()),  # training method
    pa.field("federation", pa.string()),  # by_site | pooled | local
    pa.field("setting", pa.string()),  # swept settings, e.g. prototypes.weight=0.5
    pa.field("chosen", pa.string()),  # settings that this fold's source hospitals chose
    pa.field("trained_on", pa.string()),  # the one hospital that trained, with federation=local
]

RESULTS_SCHEMA = pa.schema(
    [*CELL_FIELDS, pa.field("site", pa.string()), *CASES_SCHEMA],
    metadata={"schema_version": SCHEMA_VERSION, "kind": "fedsgcg.results"},
)
ADAPTED_SCHEMA = pa.schema(
    [*CELL_FIELDS, pa.field("adapt", pa.string()), pa.field("site", pa.string()), *CASES_SCHEMA],
    metadata={"schema_version": SCHEMA_VERSION, "kind": "fedsgcg.adapted"},
)
ROUNDS_NOTE: Final = (
    "validation_dice of row round=r was measured on the model received in round r, "
    "that of round r-1"
)
ROUNDS_SCHEMA = pa.schema(
    [*CELL_FIELDS, *ROWS_SCHEMA],
    metadata={
        "schema_version": SCHEMA_VERSION,
        "kind": "fedsgcg.rounds",
        "validation_dice": ROUNDS_NOTE,
    },
)


def cell_of(plan: Plan) -> dict[str, Any]:
    """Return the columns that identify a cell of a study (`CELL_FIELDS`)."""
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
