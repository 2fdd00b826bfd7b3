"""How good the estimate of the time left was: `python tests/benchmarks/time_left.py RUN...`.

Replays the event logs of finished studies, event by event, and prints the estimate relative to the
time that was really left (1 = exact) at the first estimate and after parts of the study.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.console import Screen
from fedsgcg.common.run_folder import paths
from fedsgcg.deploy.study.cell import Cell
from fedsgcg.deploy.study.progress import Progress

PARTS: Final = (0.0, 0.1, 0.25, 0.5, 0.75)
UNITS: Final = {"s": 1.0, "min": 60.0, "h": 3600.0}

Event = tuple[float, int, dict[str, Any]]


def recorded(study: Path) -> tuple[list[Cell], list[Event]]:
    """Return the cells of a study and their events in the order of time; empty after a resume."""
    cells: list[Cell] = []
    events: list[Event] = []
    for path in study.glob(f"*/*/*/{paths.EVENTS}"):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        names = [event["event"] for event in found]
        if names.count("run.started") != 1 or names[-1] != "run.finished":
            return [], []
        tree = {"output": "nowhere", "federation": {"rounds": found[0]["rounds"]}}
        cell = Cell(found[0]["method"], found[0]["heldout"], found[0]["seed"], tree)
        events += [(event["time"], len(cells), event) for event in found]
        cells.append(cell)
    return cells, sorted(events, key=lambda event: event[:2])


def most_at_once(events: list[Event]) -> int:
    """Return the largest number of cells that ran at the same time."""
    running, most = 0, 0
    for _, _, event in events:
        running += (event["event"] == "run.started") - (event["event"] == "run.finished")
        most = max(most, running)
    return most


def ratios(study: Path) -> list[float]:
    """Return estimate / actual time left at `PARTS` of a study; empty without an estimate."""
    cells, events = recorded(study)
    if not events:
        return []
    start, end = events[0][0], events[-1][0]
    progress = Progress(cells, Screen(io.StringIO()), most_at_once(events))
    found: list[float] = []
    for now, number, event in events:
        progress.states[number].take(event)
        words = progress.time_left(now).split()
        due = len(found) < len(PARTS) and now >= start + PARTS[len(found)] * (end - start)
        while words[0] == "about" and due and now < end:
            found.append(float(words[1]) * UNITS[words[2]] / (end - now))
            due = len(found) < len(PARTS) and now >= start + PARTS[len(found)] * (end - start)
    return found


def main() -> None:
    """Print one line per study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", nargs="+", type=Path)
    for study in parser.parse_args().studies:
        if found := ratios(study):
            print(*(f"{value:5.2f}" for value in found), study)


if __name__ == "__main__":
    main()
