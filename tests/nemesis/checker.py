"""Judges a recorded federation by the invariants I1 to I11 of docs/explanation/reliability.md.

It reads only files: journal, events, results, the ledgers and the recorded replies of the sites,
and `history.jsonl` of `tests.nemesis`. It shares the file formats with the program, and no code.

    python -m tests.nemesis.checker HISTORY_FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from tests.nemesis.history import History, Study, Violation, attempts, refusals
from tests.nemesis.merges import exact_prototypes, explained

REFUSALS_FOR_A_PAUSE = 3
PAUSED_ROUNDS = 3


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


def at_most_once(study: Study, history: History) -> Iterator[Violation]:
    """I3: a site is merged at most once in a round."""
    for number in range(1, int(study.outcome["rounds_done"]) + 1):
        sites = study.contributors(number)
        for site in sorted({site for site in sites if sites.count(site) > 1}):
            yield Violation("I3", str(study.folder), f"{site} counts twice in round {number}")


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
