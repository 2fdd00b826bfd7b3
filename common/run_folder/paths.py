"""Names of the files and folders of a study and of its runs (cells).

A study has one folder with a folder for each cell in it: `<method>/<held-out hospital>/<seed>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

STUDY: Final = "study.yaml"
"""Settings of a study and what it ran on."""

REPORT: Final = "report.html"
RESULTS: Final = "results.parquet"
"""Metrics of every case (`tables.RESULTS_SCHEMA`), of one cell or of all cells of a study."""

ADAPTED: Final = "adapted.parquet"
"""Metrics of every case of a cell after an adaptation to the hospital's own images."""

ROUNDS: Final = "rounds.parquet"
"""Metrics of every round (`tables.ROUNDS_SCHEMA`), of one cell or of all cells of a study."""

MODEL_CARD: Final = "model.json"
WEIGHTS: Final = "model.safetensors"
PROTOTYPES: Final = "prototypes.arrow"
EVENTS: Final = "events.jsonl"
OUTCOME: Final = "outcome.json"
"""How a run ended; the last file that it writes."""

SEALED: Final = (RESULTS, ADAPTED, ROUNDS, OUTCOME, WEIGHTS, MODEL_CARD, PROTOTYPES)
"""Files of a cell that its seal covers (`common.files.seals`)."""

SEALED_TABLES: Final = (RESULTS, ROUNDS)
"""Files of a study that its seal covers."""

JOURNAL: Final = "journal"
"""Folder of the checkpoints of a run that has not finished."""

LOCK: Final = "lock"
RECORD_LOCK: Final = "study.lock"
"""Held for the moment in which `STUDY` is changed."""

ALL_SITES: Final = "all-sites"
"""Folder, in place of a held-out hospital, of cells that hold out none."""


def label_folder(label: str) -> str:
    """Return the name of a label's folder: commas for spaces, hyphens for slashes."""
    return label.replace(" ", ",").replace("/", "-")


def cell_path(label: str, heldout: str, seed: int, trained_on: str = "") -> Path:
    """Return the folder of a cell relative to the folder of its study.

    Args:
        label: Label of the variant: the method and its varied settings.
        heldout: Held-out hospital, "" for none.
        seed: Seed.
        trained_on: The single training hospital with `federation=local`, else "".
    """
    name = f"{seed}-{trained_on}" if trained_on else str(seed)
    return Path(label_folder(label), heldout or ALL_SITES, name)
