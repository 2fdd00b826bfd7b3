"""A checkpoint: the coordinator's state after a round, as one file that contains its own hash.

Uses only PyArrow, safetensors and the standard library. Legend: P floating-point weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedsgcg.common.errors import FedsgcgError, Problem
from fedsgcg.common.run_folder.tables import ROWS_SCHEMA
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Identity, Weights, decode_statistics, encode_statistics
from fedsgcg.server.screening.history import History

KIND: Final = "fedsgcg.checkpoint"
SCHEMA_VERSION: Final = "3"
PART: Final = "part/"
"""Prefix of the tensors that hold the class statistics remembered for one site."""
AGGREGATOR: Final = "aggregator/"
"""Prefix of the tensors of the aggregation rule's state."""

AggregatorState = Mapping[str, npt.NDArray[Any]]
"""State of an aggregation rule between rounds: name -> array."""


@dataclass(frozen=True)
class Best:
    """The best model so far by source validation.

    Attributes:
        round: Round that produced it.
        score: Its source-validation Dice.
        weights: The model.
    """

    round: int
    score: float
    weights: Weights


@dataclass(frozen=True)
class RoundRecord:
    """The state of the federation after one round.

    Attributes:
        identity: Run, fold, round and plan.
        weights: Global model after the round.
        parts: Class statistics remembered after the round, by site
            (`server.aggregation.prototypes`).
        best: Best model so far by source validation, None without a score.
        aggregator_state: State of the aggregation rule after the round
            (`server.aggregation.aggregators`).
        history: What the screens remember about the sites (`server.screening.history`).
        notes: All problems up to this round; any makes the run `degraded` instead of `completed`.
        rows: Metrics of this round (`ROWS_SCHEMA`); empty in a record read from a checkpoint.
    """

    identity: Identity
    weights: Weights
    parts: Mapping[str, ClassStatistics] = field(default_factory=dict)
    best: Best | None = None
    aggregator_state: AggregatorState = field(default_factory=dict)
    history: History = field(default_factory=History)
    notes: tuple[Problem, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()

    @property
    def round(self) -> int:
        """Number of the round."""
        return self.identity.round


def encode_rows(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Encode rows (`ROWS_SCHEMA`) as an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, ROWS_SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=ROWS_SCHEMA))
    return bytes(sink.getvalue())


def decode_rows(data: bytes) -> list[dict[str, Any]]:
    """Decode the bytes of `encode_rows`."""
    with pa.ipc.open_file(pa.BufferReader(data)) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    return rows


def encode_checkpoint(record: RoundRecord, hashes: Sequence[str]) -> bytes:
    """Encode a record as one safetensors file.

    The file contains the flat weights, the class statistics of every site as Arrow bytes, and one
    JSON text with everything else and the hash.

    Args:
        record: The record; its rows are not part of the checkpoint.
        hashes: SHA-256 of the rows file of every round up to this one.
    """
    tensors: dict[str, npt.NDArray[Any]] = {"weights": np.ascontiguousarray(record.weights.values)}
    for site, part in record.parts.items():
        tensors[PART + site] = np.frombuffer(encode_statistics(part, record.identity), np.uint8)
    for name, array in record.aggregator_state.items():
        tensors[AGGREGATOR + name] = np.ascontiguousarray(array)
    if record.best is not None:
        tensors["best"] = np.ascontiguousarray(record.best.weights.values)
    best = None
    if record.best is not None:
        best = {
            "round": record.best.round,
            "score": record.best.score,
            "layout": record.best.weights.encode_layout(),
        }
    facts: dict[str, Any] = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "identity": record.identity.encode(),
        "layout": record.weights.encode_layout(),
        "best": best,
        "history": record.history.to_tree(),
        "notes": [asdict(note) for note in record.notes],
        "rounds": list(hashes),
    }
    facts["sha256"] = _checkpoint_sha(tensors, facts)
    # One key only: equal records must give equal bytes, and safetensors does not order keys.
    return bytes(save(tensors, metadata={"fedsgcg": json.dumps(facts, sort_keys=True)}))


def decode_checkpoint(path: Path) -> tuple[RoundRecord, list[str]]:
    """Read a file written by `encode_checkpoint`; raises SRV-402 for any other or damaged file."""
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["fedsgcg"])
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        stated = facts.pop("sha256")
        if stated != _checkpoint_sha(tensors, facts):
            raise FedsgcgError(damage(path, "content that does not match its own hash"))
        if facts["kind"] != KIND or facts["schema_version"] != SCHEMA_VERSION:
            raise FedsgcgError(damage(path, f"{facts['kind']} version {facts['schema_version']}"))
        return _record(tensors, facts), [str(text) for text in facts["rounds"]]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedsgcgError(damage(path, f"unreadable: {type(error).__name__}")) from error


def _record(tensors: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> RoundRecord:
    best = facts["best"]
    return RoundRecord(
        identity=Identity.decode(facts["identity"]),
        weights=Weights.decode(facts["layout"], tensors["weights"]),
        parts={
            name.removeprefix(PART): decode_statistics(tensors[name].tobytes())[0]
            for name in sorted(tensors)
            if name.startswith(PART)
        },
        best=best
        and Best(
            int(best["round"]),
            float(best["score"]),
            Weights.decode(best["layout"], tensors["best"]),
        ),
        aggregator_state={
            name.removeprefix(AGGREGATOR): tensors[name]
            for name in sorted(tensors)
            if name.startswith(AGGREGATOR)
        },
        history=History.from_tree(facts.get("history", {})),  # absent in older checkpoints
        notes=tuple(Problem(**note) for note in facts["notes"]),
    )


def _checkpoint_sha(tensors: Mapping[str, npt.NDArray[Any]], facts: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        sha.update(np.ascontiguousarray(tensors[name]).tobytes())
    return sha.hexdigest()


def damage(path: Path, found: str) -> Problem:
    """Return SRV-402 for a file whose content has changed since it was written."""
    action = "restore the file from a backup, or start again in another output=FOLDER"
    return Problem(
        "SRV-402",
        where=str(path),
        found=found,
        expected="the file as it was written",
        action=action,
    )
