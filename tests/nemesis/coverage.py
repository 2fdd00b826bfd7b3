"""What a recorded federation has exercised, and whether that is what its schedule promised.

Like the checker it reads only files, and shares no code with the program or the driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.nemesis.history import History, Violation, attempts, refusals

TWICE = "replies sent twice"


def promised(history: History) -> Iterator[Violation]:
    """Every kind of fault, bad reply and outcome that the schedule promised was seen."""
    promise = history.facts.get("promise", {})
    faults, replies, seen = made(history), bad_replies(history), outcomes(history)
    for name in promise.get("faults", ()):
        if name not in faults:
            yield Violation("promise", name, "was not made, or had no effect")
    for name in promise.get("replies", ()):
        sent, good = replies.get(name, (0, 0))
        if not good:
            yield Violation("promise", name, f"sent {sent} times, judged {good} times")
    for name in promise.get("outcomes", ()):
        if not seen.get(name):
            yield Violation("promise", name, "was not seen")


def went_on(history: History) -> list[tuple[str, int, bool]]:
    """Cut-off site, rounds that the others finished meanwhile, and whether it came back."""
    found = []
    ends = [line for line in history.lines if line["event"] == "cut.over"]
    for cut, over in zip(
        (line for line in history.lines if line["event"] == "cut"), ends, strict=False
    ):
        site, others, back = cut["site"], 0, False
        wanted = sorted(set(history.facts["training"]) - {site})
        for study in history.studies:
            starts = {}
            for event in study.events:
                if event["event"] == "round.started":
                    starts[event["round"]] = event["time"]
                if event["event"] != "round.done":
                    continue
                merged = study.contributors(event["round"])
                within = starts[event["round"]] > cut["time"] and event["time"] < over["time"]
                others += within and merged == wanted
                back |= event["time"] > over["time"] and site in merged
        found.append((site, others, back))
    return found


def pauses(history: History) -> list[tuple[str, bool]]:
    """Site that was paused, and whether it was merged after the pause."""
    found = []
    for study in history.studies:
        for events in attempts(study).values():
            for event in events:
                if event["event"] == "site.paused":
                    later = range(event["until"] + 1, int(study.outcome["rounds_done"]) + 1)
                    back = any(event["site"] in study.contributors(number) for number in later)
                    found.append((event["site"], back))
    return found


def outcomes(history: History) -> dict[str, int]:
    """How often each outcome that a run may promise was seen."""
    faults = {line["study"] for lines in made(history).values() for line in lines}
    ends = [(study.outcome["status"], study) for study in history.studies]
    starts = [sum(e["event"] == "run.started" for e in study.events) for study in history.studies]
    return {
        "completed with the simulation's model": sum(
            status == "completed"
            and study.facts["study"] in faults
            and study.facts["simulated"] == study.outcome["digest"]
            for status, study in ends
        ),
        "degraded with codes": sum(
            status == "degraded" and bool(study.outcome["problems"]) for status, study in ends
        ),
        "resumed": sum(max(0, count - 1) for count in starts),
        "void round": sum(len(study.void()) for study in history.studies),
        "the others went on for 3 rounds, and the site came back": sum(
            others >= 3 and back for _, others, back in went_on(history)
        ),
        "a site was paused, and asked again": sum(back for _, back in pauses(history)),
    }


def made(history: History) -> dict[str, list[dict[str, Any]]]:
    """Lines of the faults and bad replies that had their effect, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in history.lines:
        if line["event"] == "fault.over" and line["effect"]:
            found.setdefault(line["fault"], []).append(line)
    return found


def bad_replies(history: History) -> dict[str, tuple[int, int]]:
    """Kind of bad reply -> (sent, refused or, for replies sent twice, counted once)."""
    found: dict[str, tuple[int, int]] = {}
    for study in history.studies:
        rounds = attempts(study)
        for site in history.facts["training"]:
            for number, events in rounds.items():
                refused = site in refusals(events)
                once = study.contributors(number).count(site) == 1
                for reply in history.at(study, site, number):
                    for kind, good in ((reply.poison, refused), (TWICE * reply.twice, once)):
                        if kind:
                            sent, seen = found.get(kind, (0, 0))
                            found[kind] = (sent + 1, seen + good)
    return found
