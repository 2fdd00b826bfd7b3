"""Judges a recorded federation by the invariants I1 to I11 of docs/explanation/reliability.md.

It reads only files: journal, events, results, the ledgers and the recorded replies of the sites,
and `history.jsonl` of `tests.nemesis`. It shares the file formats with the program, and no code.

    python -m tests.nemesis.checker HISTORY_FOLDER
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Arrays = dict[str, Any]
MOMENTS = ("running_mean", "running_var")
RECORDS = ("message", "metrics", "weights")
"""Records of a reply that a ledger line covers."""

REFUSALS = ("PAY-", "STA-", "TRN-301")
"""Codes that count towards a pause."""

STALE = "reply of an earlier round"
REFUSALS_FOR_A_PAUSE = 3
PAUSED_ROUNDS = 3

ROUNDING = 1e-6
"""Relative tolerance of statistics that were summed in another order."""


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


def check(history: History) -> list[Violation]:
    """Return every violation that is found."""
    found = list(one_door(history)) + list(held_out(history))
    found += list(no_leak(history)) + list(bounded(history))
    for study in history.studies:
        for rule in RULES:
            found.extend(rule(study, history))
    return found


def durable(study: Study, history: History) -> Iterator[Violation]:
    """I1: a round that was reported is there after every restart, and there is one of it."""
    done = 0
    for event in study.events:
        if event["event"] in ("round.done", "round.void"):
            if event["round"] != done + 1:
                found = f"round {event['round']} was reported after round {done}"
                yield Violation("I1", str(study.folder), found)
            done = int(event["round"])
        # A round may be on disk although the process died before it reported it.
        if event["event"] == "run.started":
            if event["round"] not in (done, done + 1):
                found = f"resumed after round {event['round']}, but {done} were reported"
                yield Violation("I1", str(study.folder), found)
            done = max(done, int(event["round"]))
    seen: dict[int, str] = {}
    for checkpoint in study.checkpoints:
        digest = hashlib.sha256(checkpoint.path.read_bytes()).hexdigest()
        if seen.setdefault(checkpoint.round, digest) != digest:
            yield Violation("I1", str(checkpoint.path), "two checkpoints of one round")
    last = study.checkpoints[-1]
    for number, wanted in enumerate(last.facts["rounds"], start=1):
        path = study.folder / "journal" / "rounds" / f"{number:05d}.arrow"
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            yield Violation("I1", str(path), "not the rows that the checkpoint names")


def explained(study: Study, history: History) -> Iterator[Violation]:
    """I2: every model is the merge of the honest replies of the sites of its round.

    After a void round it is the model of the round before.
    """
    models: dict[int, Any] = {}
    for checkpoint in study.checkpoints:
        number = checkpoint.round
        models[number] = checkpoint.tensors["weights"]
        if number in study.void():
            before = models.get(number - 1)
            if before is not None and not np.array_equal(before, models[number]):
                yield Violation("I2", str(checkpoint.path), "a void round changed the model")
            continue
        sites = study.contributors(number)
        offers = [history.of(study, site, "train", number) for site in sites]
        if not sites or not all(offers):
            yield Violation("I2", str(checkpoint.path), f"merged {sites}, recorded {len(offers)}")
            continue
        choices = list(itertools.product(*(unique(replies) for replies in offers)))
        fitting = [choice for choice in choices if merges_to(checkpoint, choice)]
        if not fitting:
            found = f"not the merge of what {', '.join(sites)} sent in round {number}"
            yield Violation("I2", str(checkpoint.path), found)
        elif all(any(reply.poison for reply in choice) for choice in fitting):
            kinds = sorted({reply.poison for reply in fitting[0] if reply.poison})
            yield Violation("I2", str(checkpoint.path), f"a poisoned reply was merged: {kinds}")
        yield from explained_moments(study, history, checkpoint)


def unique(replies: list[Sent]) -> list[Sent]:
    """One of each content: a site may train a round twice, with the same bits."""
    return list({reply.digest(): reply for reply in replies}.values())


def merges_to(checkpoint: Checkpoint, replies: tuple[Sent, ...]) -> bool:
    """Whether the weights are the mean by training slices, to the last bit of float32."""
    layout, merged = checkpoint.layout, checkpoint.tensors["weights"]
    if any(reply.layout["layout"] != layout["layout"] for reply in replies):
        return False
    total = sum(np.longdouble(reply.examples) for reply in replies)
    mean = sum(reply.weights.astype(np.longdouble) * reply.examples for reply in replies) / total
    exact = mean.astype(np.float32)
    below, above = np.nextafter(exact, -np.inf), np.nextafter(exact, np.inf)
    fits = (merged == exact) | (merged == below) | (merged == above)
    counters = {
        name: max(reply.layout["counters"][name] for reply in replies)
        for name in layout["counters"]
    }
    return bool(fits[~moment_places(layout)].all()) and layout["counters"] == counters


def moment_places(layout: dict[str, Any]) -> Any:
    """(P,) whether a weight is a running moment of BatchNorm."""
    flags = [
        np.full(int(np.prod(shape)), name.endswith(MOMENTS)) for name, shape in layout["layout"]
    ]
    return np.concatenate(flags)


def explained_moments(
    study: Study, history: History, checkpoint: Checkpoint
) -> Iterator[Violation]:
    """BatchNorm's moments are those of all inputs of the sites that measured them."""
    sites = sorted(checkpoint.parts())
    offers = [
        [
            reply.table("moments")
            for reply in unique(history.of(study, site, "query.statistics", checkpoint.round))
            if reply.table("moments") and not reply.poison
        ]
        for site in sites
    ]
    state = entries_of(checkpoint)
    for choice in itertools.product(*offers):
        if all(close(state[name], value) for name, value in pooled_moments(choice).items()):
            return
    found = f"moments that {', '.join(sites)} did not measure in round {checkpoint.round}"
    yield Violation("I2", str(checkpoint.path), found)


def entries_of(checkpoint: Checkpoint) -> Arrays:
    """Weights by name."""
    found, start = {}, 0
    for name, shape in checkpoint.layout["layout"]:
        size = int(np.prod(shape))
        found[name] = checkpoint.tensors["weights"][start : start + size].reshape(shape)
        start += size
    return found


def pooled_moments(parts: tuple[Any, ...]) -> Arrays:
    """Mean and unbiased variance of each layer's inputs over several sites."""
    found = {}
    for index, layer in enumerate(parts[0]["layer"]):
        counts = np.array([part["count"][index] for part in parts])
        means = np.array([part["mean"][index] for part in parts])
        scatters = np.array([part["scatter"][index] for part in parts])
        mean = (counts[:, None] * means).sum(0) / counts.sum()
        scatter = scatters.sum(0) + (counts[:, None] * (means - mean) ** 2).sum(0)
        found[f"{layer}.running_mean"] = mean
        found[f"{layer}.running_var"] = scatter / (counts.sum() - 1)
    return found


def close(found: Any, wanted: Any) -> bool:
    """Whether two arrays agree up to rounding, relative to their largest value."""
    wanted = np.asarray(wanted, dtype=float)
    scale = float(np.abs(wanted).max(initial=1e-30))
    return bool(
        np.abs(np.asarray(found, dtype=float) - wanted).max(initial=0.0) <= ROUNDING * scale
    )


def at_most_once(study: Study, history: History) -> Iterator[Violation]:
    """I3: a site is merged at most once in a round."""
    for number in range(1, int(study.outcome["rounds_done"]) + 1):
        sites = study.contributors(number)
        for site in sorted({site for site in sites if sites.count(site) > 1}):
            yield Violation("I3", str(study.folder), f"{site} counts twice in round {number}")


def exact_prototypes(study: Study, history: History) -> Iterator[Violation]:
    """I4: statistics are what the sites sent, and the prototypes pool them."""
    for checkpoint in study.checkpoints:
        if checkpoint.round in study.void():
            continue
        for site, part in checkpoint.parts().items():
            replies = history.of(study, site, "query.statistics", checkpoint.round)
            tables = [reply.table("statistics") for reply in replies if not reply.poison]
            if part not in tables:
                found = f"statistics that {site} did not send in round {checkpoint.round}"
                yield Violation("I4", str(checkpoint.path), found)
    path = study.folder / "prototypes.arrow"
    if not path.exists():
        return
    found_table = columns(path.read_bytes())
    done = set(range(1, int(study.outcome["rounds_done"]) + 1)) - study.void()
    last = max(done, default=0)
    offers = {
        site: [
            reply.table("statistics")
            for reply in unique(history.of(study, site, "query.statistics", last))
            if reply.table("statistics") and not reply.poison
        ]
        for site in history.facts["training"]
    }
    present = [tables for tables in offers.values() if tables]
    subsets = [
        choice
        for size in range(1, len(present) + 1)
        for some in itertools.combinations(present, size)
        for choice in itertools.product(*some)
    ]
    if not any(is_pool(found_table, choice) for choice in subsets):
        yield Violation("I4", str(path), "not the pooled statistics of what the sites sent")
    for index, scatter in enumerate(scatters_of(found_table)):
        lowest = np.linalg.eigvalsh(scatter).min() if np.isfinite(scatter).all() else -np.inf
        if lowest < -1e-5 * max(np.trace(scatter), 1e-30):
            yield Violation("I4", str(path), f"class {index}: not finite and positive semidefinite")


def scatters_of(table: Arrays) -> list[Any]:
    """Symmetric scatter matrices (A, A) of each class."""
    found = []
    for packed, mean in zip(table["scatter_upper"], table["mean"], strict=True):
        square = np.zeros((len(mean), len(mean)))
        square[np.triu_indices(len(mean))] = packed
        found.append(square + square.T - np.diag(np.diag(square)))
    return found


def is_pool(table: Arrays, parts: tuple[Any, ...]) -> bool:
    """Whether statistics are those of all pixels of several sites."""
    counts = np.array([part["count"] for part in parts])
    means = np.array([part["mean"] for part in parts])
    scatters = np.array([scatters_of(part) for part in parts])
    total = counts.sum(0)
    if not np.array_equal(total, table["count"]):
        return False
    mean = np.einsum("sk,ska->ka", counts, means) / np.maximum(total, 1.0)[:, None]
    apart = means - mean
    scatter = scatters.sum(0) + np.einsum("sk,ska,skb->kab", counts, apart, apart)
    return close(table["mean"], mean) and close(np.array(scatters_of(table)), scatter)


def one_door(history: History) -> Iterator[Violation]:
    """I5: the chain of every ledger is whole, and every reply of an honest site is in it."""
    for site, kit in history.facts["kits"].items():
        path = Path(kit) / "home" / "ledger.jsonl"
        previous, listed = "0" * 64, set()
        for number, line in enumerate(path.read_bytes().splitlines()):
            entry = json.loads(line)
            content = {name: value for name, value in entry.items() if name != "hash"}
            seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            if (entry["seq"], entry["previous"], entry["hash"]) != (number, previous, seal):
                yield Violation("I5", str(path), f"line {number} breaks the chain")
            previous = entry["hash"]
            listed.add((entry["kind"], entry["sha256"]))
        for reply in history.sent[site]:
            # An error code alone may leave although the ledger cannot be written.
            known = reply.error or reply.poison or (reply.kind, reply.digest()) in listed
            if not known:
                yield Violation("I5", str(reply.path), f"left {site} without a line of its ledger")


def held_out(history: History) -> Iterator[Violation]:
    """I6: the held-out hospital sends neither weights nor statistics, and nothing names it."""
    heldout = history.facts["heldout"]
    for reply in history.sent[heldout]:
        if reply.kind in ("train", "query.statistics", "query.amplitudes") and not reply.error:
            yield Violation("I6", str(reply.path), f"{heldout} answered {reply.kind}")
    for study in history.studies:
        for checkpoint in study.checkpoints:
            merged = {*study.contributors(checkpoint.round), *checkpoint.parts()}
            if heldout in merged:
                found = f"{heldout} contributed to round {checkpoint.round}"
                yield Violation("I6", str(checkpoint.path), found)
        card = json.loads((study.folder / "model.json").read_text())
        if heldout in card.get("trained_on", card.get("sites", [])):
            yield Violation("I6", str(study.folder), f"the model says that {heldout} trained it")


def same_out(study: Study, history: History) -> Iterator[Violation]:
    """I7: a study without any note has the model of a simulation."""
    wanted = study.facts.get("simulated", "")
    if study.outcome["status"] == "completed" and wanted and study.outcome["digest"] != wanted:
        yield Violation("I7", str(study.folder), "another model than the simulation's")


def truthful(study: Study, history: History) -> Iterator[Violation]:
    """I8: `completed` only without anything missing; otherwise codes say why."""
    outcome, where = study.outcome, str(study.folder / "outcome.json")
    everyone = sorted(history.facts["training"])
    gaps = [
        checkpoint.round
        for checkpoint in study.checkpoints
        if study.contributors(checkpoint.round) != everyone
    ]
    status, problems = outcome["status"], outcome["problems"]
    if status == "completed" and (gaps or problems):
        yield Violation("I8", where, f"completed, with rounds {gaps} not of all sites")
    if status != "completed" and not problems:
        yield Violation("I8", where, f"{status} without a reason")
    if status != "failed":
        if outcome["rounds_done"] != study.facts["rounds"]:
            yield Violation("I8", where, f"{outcome['rounds_done']} rounds instead of all")
        card = json.loads((study.folder / "model.json").read_text())
        scored = pq.read_table(study.folder / "results.parquet").num_rows
        # Without consent to results of single cases a hospital states means.
        scored += (
            "dice_mean" in pq.read_table(study.folder / "rounds.parquet")["metric"].to_pylist()
        )
        if card["digest"] != outcome["digest"] or not scored:
            yield Violation("I8", where, "the model or the results of another run")
    final = study.events[-1]
    if (final["event"], final.get("status")) != ("run.finished", status):
        yield Violation("I8", where, "the last event says something else")


def no_leak(history: History) -> Iterator[Violation]:
    """I9: no private text of a site in any file of the coordinator."""
    secrets = [secret.encode() for secret in history.facts["secrets"]]
    for folder in history.facts["coordinator"]:
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file():
                continue
            data = path.read_bytes()
            for secret in secrets:
                if secret in data:
                    yield Violation("I9", str(path), f"contains {secret.decode()!r}")


def bounded(history: History) -> Iterator[Violation]:
    """I10: rounds end in time, replies have a size, memory stays below its bound."""
    limits = history.facts["limits"]
    for site, replies in history.sent.items():
        for reply in replies:
            if reply.size() > limits["reply_bytes"]:
                yield Violation("I10", str(reply.path), f"{site} sent {reply.size()} bytes")
    for study in history.studies:
        start = None
        for event in study.events:
            if event["event"] == "round.started":
                start = event["time"]
            elif event["event"] == "run.started":
                start = None
            elif event["event"] == "round.done" and start is not None:
                took = event["time"] - start
                if took > study.facts.get("round_s", limits.get("round_s", 0)):
                    found = f"round {event['round']} took {took:.0f} s"
                    yield Violation("I10", str(study.folder), found)
    for line in history.lines:
        if line["event"] == "memory" and line["rss_mb"] > limits["rss_mb"]:
            yield Violation("I10", line["process"], f"{line['rss_mb']} MB")


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


def deserved(study: Study, history: History) -> Iterator[Violation]:
    """I11: a pause follows three refusals in a row, or one after a pause, and is kept."""
    rounds = attempts(study)
    ends: dict[str, int] = {}  # last round of a site's latest pause
    counts: dict[str, int] = {}
    for number in range(1, int(study.outcome["rounds_done"]) + 1):
        events = rounds.get(number, [])
        refused = refusals(events)
        trained = {e["site"] for e in events if e["event"] == "round.reply" and e["accepted"]}
        for site in history.facts["training"]:
            if number <= ends.get(site, 0):
                asked = history.at(study, site, number)
                if asked or site in study.contributors(number):
                    found = f"{site} is paused in round {number} and took part"
                    yield Violation("I11", str(study.folder), found)
                counts[site] = REFUSALS_FOR_A_PAUSE - 1
            elif site in refused:
                counts[site] = counts.get(site, 0) + 1
            elif site in trained:
                counts[site] = 0
        paused = {e["site"]: e["until"] for e in events if e["event"] == "site.paused"}
        for site, until in paused.items():
            if counts.get(site, 0) < REFUSALS_FOR_A_PAUSE or until != number + PAUSED_ROUNDS:
                found = f"{site} was paused until {until} after {counts.get(site, 0)} refusals"
                yield Violation("I11", str(study.folder), found)
        ends |= paused


RULES = (durable, explained, at_most_once, exact_prototypes, same_out, truthful, deserved)
"""Rules of a single study."""


def main() -> int:
    """Check a folder and print what does not hold."""
    history = History.read(Path(sys.argv[1]))
    found = check(history)
    rounds = sum(len(study.checkpoints) for study in history.studies)
    replies = sum(len(sent) for sent in history.sent.values())
    print(f"{len(history.studies)} studies, {rounds} rounds, {replies} replies")
    print("\n".join(str(violation) for violation in found) or "I1 to I11 hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
