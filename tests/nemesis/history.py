"""What a run of `tests.nemesis` has recorded, read from its files.

It shares the file formats with the program, and no code.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Arrays = dict[str, Any]
RECORDS = ("message", "metrics", "weights")
"""Records of a reply that a ledger line covers."""

REFUSALS = ("PAY-", "STA-", "TRN-301")
"""Codes that count towards a pause."""

STALE = "reply of an earlier round"


@dataclass(frozen=True)
class Violation:
    """An invariant that does not hold, and where."""

    invariant: str
    where: str
    found: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.where}: {self.found}"


@dataclass(frozen=True)
class Sent:
    """One recorded reply: its entries as bytes by `record/key`, and what is wrong with it."""

    path: Path
    entries: dict[str, bytes]
    kind: str
    poison: str
    twice: bool = False

    @classmethod
    def read(cls, path: Path) -> Sent:
        with np.load(path) as file:
            entries = {name: file[name].tobytes() for name in file.files}
        facts = json.loads(entries.pop("facts"))
        return cls(path, entries, facts["kind"], facts["poison"], facts.get("twice", False))

    @cached_property
    def identity(self) -> dict[str, Any]:
        return dict(json.loads(json.loads(self.entries["message/identity"])))

    @property
    def error(self) -> str:
        return str(json.loads(self.entries["message/error"]))

    @cached_property
    def weights(self) -> Any:
        return np.load(io.BytesIO(self.entries["weights/values"]))

    @property
    def layout(self) -> dict[str, Any]:
        return dict(json.loads(json.loads(self.entries["message/layout"])))

    @property
    def examples(self) -> float:
        return float(json.loads(self.entries["metrics/examples"]))

    def table(self, name: str) -> Arrays | None:
        data = self.entries.get(f"message/{name}")
        return columns(data) if data else None

    def digest(self) -> str:
        """SHA-256 over the records in the order of their names, as a ledger line states it."""
        sha = hashlib.sha256()
        for name, data in sorted(self.entries.items(), key=lambda item: item[0].split("/", 1)):
            if name.partition("/")[0] not in RECORDS:
                continue
            sha.update(f"{name}/{len(data)}\n".encode())
            sha.update(data)
        return sha.hexdigest()

    def size(self) -> int:
        return sum(len(data) for data in self.entries.values())


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a journal: tensors and facts."""

    path: Path
    tensors: Arrays
    facts: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        facts = json.loads(header.pop("__metadata__")["fedsgcg"])
        types = {"F32": "<f4", "F64": "<f8", "U8": "u1", "I64": "<i8"}
        tensors = {}
        for name, entry in header.items():
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            array = np.frombuffer(data[start:end], types[entry["dtype"]])
            tensors[name] = array.reshape(entry["shape"])
        return cls(path, tensors, facts)

    @property
    def round(self) -> int:
        return int(json.loads(self.facts["identity"])["round"])

    @property
    def layout(self) -> dict[str, Any]:
        return dict(json.loads(self.facts["layout"]))

    def parts(self) -> dict[str, Arrays]:
        """Class statistics remembered for each site."""
        return {
            name.removeprefix("part/"): columns(array.tobytes())
            for name, array in self.tensors.items()
            if name.startswith("part/")
        }


@dataclass
class Study:
    """One run folder with the checkpoints that were copied from it as they appeared."""

    folder: Path
    checkpoints: list[Checkpoint]
    events: list[dict[str, Any]]
    outcome: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, snapshots: Path, facts: dict[str, Any]) -> Study:
        copies = [Checkpoint.read(path) for path in sorted(snapshots.glob("*.safetensors"))]
        lines = (folder / "events.jsonl").read_text().splitlines()
        outcome = json.loads((folder / "outcome.json").read_text())
        return cls(folder, copies, [json.loads(line) for line in lines], outcome, facts)

    def void(self) -> set[int]:
        """Rounds with too few admitted replies: the model stays that of the round before."""
        return {
            int(problem["where"].removeprefix("round "))
            for problem in self.outcome["problems"]
            if problem["code"] == "RND-421"
        }

    def rows(self, number: int) -> list[dict[str, Any]]:
        path = self.folder / "journal" / "rounds" / f"{number:05d}.arrow"
        if not path.exists():  # `durable` names it
            return []
        with pa.ipc.open_file(pa.BufferReader(path.read_bytes())) as reader:
            return list(reader.read_all().to_pylist())

    def contributors(self, number: int) -> list[str]:
        """Sites whose weights were merged, once per merge."""
        return sorted(
            row["site"]
            for row in self.rows(number)
            if row["phase"] == "train" and row["metric"] == "examples"
        )


@dataclass
class History:
    """Everything that was recorded: facts, studies, and each site's ledger and replies."""

    folder: Path
    facts: dict[str, Any]
    studies: list[Study]
    sent: dict[str, list[Sent]]
    lines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> History:
        lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        facts = next(line for line in lines if line["event"] == "federation")
        studies = [
            Study.read(Path(line["folder"]), folder / "checkpoints" / line["study"], line)
            for line in lines
            if line["event"] == "study"
        ]
        sent = {
            site: [Sent.read(path) for path in sorted(Path(kit).glob("sent/*.npz"))]
            for site, kit in facts["kits"].items()
        }
        return cls(folder, facts, studies, sent, lines)

    def at(self, study: Study, site: str, number: int) -> list[Sent]:
        """Replies of a site to training requests of a round of a study, without error codes."""
        kinds = ("train", "query.statistics")
        return [reply for kind in kinds for reply in self.of(study, site, kind, number)]

    def of(self, study: Study, site: str, kind: str, number: int) -> list[Sent]:
        """Replies of a site to one request of a study that have no error code."""
        wanted = json.loads(study.checkpoints[0].facts["identity"]) | {"round": number}
        wanted_late = wanted | {"round": number - 1}
        return [
            reply
            for reply in self.sent[site]
            if reply.kind == kind
            # The one poison that changes the identity states the round before.
            and reply.identity == (wanted_late if reply.poison == STALE else wanted)
            and not reply.error
        ]


def columns(data: bytes) -> Arrays:
    """Columns of an Arrow stream; lists of equal length become a matrix."""
    with pa.ipc.open_stream(pa.BufferReader(data)) as reader:
        table = reader.read_all()
    return {name: table[name].to_pylist() for name in table.column_names}


def attempts(study: Study) -> dict[int, list[dict[str, Any]]]:
    """Events of the last attempt of each round; one that was interrupted is repeated whole."""
    found: dict[int, list[dict[str, Any]]] = {}
    for event in study.events:
        if event["event"] == "round.started":
            found[event["round"]] = []
        found.setdefault(event["round"], []).append(event)
    return found


def refusals(events: list[dict[str, Any]]) -> set[str]:
    """Sites of which a reply was refused among some events."""
    return {
        event["site"]
        for event in events
        if event["event"] == "round.reply"
        and not event["accepted"]
        and event["code"].startswith(REFUSALS)
    }
