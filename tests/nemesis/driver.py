"""Runs studies on a real federation, makes faults, and records what happened."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from tests.nemesis.faults import FAULTS
from tests.nemesis.link import Link
from tests.nemesis.resident import POISONS
from tests.support import small
from tests.support.federation import Federation, descendants, free_ports

TRAINING: Final = ("East", "North", "South")
HELDOUT: Final = "West"
CANARY: Final = "CANARY-7f3a"
PLAN: Final = ("method=sgcg", f"heldout={HELDOUT}")
BAD_REPLIES: Final[dict[str, dict[str, object]]] = {
    "replies sent twice": {"duplicate": True},
    **{name: {"poison": name} for name in POISONS},
}
"""What is wrong with a hospital's replies -> content of its `nemesis.json`."""

TAKES_A_SITE: Final = ("site cut off for 3 rounds",)
"""Faults in which the other two sites must go on."""

MOST_RESUMES: Final = 40
"""Resumes of one study, after which the federation counts as unable to finish."""


@dataclass
class Driver:
    """One federation under faults.

    Attributes:
        folder: Everything is written here.
        federation: Its processes.
        links: Each hospital's link to the server.
        rounds: Rounds of a study.
        random: Source of all choices.
    """

    folder: Path
    federation: Federation
    rounds: int
    random: random.Random
    links: dict[str, Link] = field(default_factory=dict)
    training: tuple[str, ...] = TRAINING
    seed: int = 0
    resumes: int = 0
    ended: bool = False
    counted: int = 0
    table: list[dict[str, Any]] = field(default_factory=list)

    def record(self, event: str, **facts: Any) -> None:
        """Append a line to the history."""
        with (self.folder / "history.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")

    def cell(self) -> Path | None:
        """Run folder of the current study."""
        paths = list(self.federation.kit.runs.glob(f"*/*/*/{self.seed}/events.jsonl"))
        return paths[0].parent if paths else None

    def events(self) -> list[dict[str, Any]]:
        """Events of the current study."""
        cell = self.cell()
        lines = (cell / "events.jsonl").read_text().splitlines() if cell else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def round(self) -> int:
        """Rounds that have started, over all studies; a round that is repeated counts again."""
        return self.counted + sum(event["event"] == "round.started" for event in self.events())

    def await_rounds(self, count: int, seconds: float) -> bool:
        """Wait until some more rounds have started or the study has ended; resume it if needed."""
        wanted, end = self.round() + count, time.monotonic() + seconds
        while self.round() < wanted and not self.ended:
            if time.monotonic() > end:
                return False
            self.keep_running()
            time.sleep(0.3)
        return True

    def keep_running(self) -> None:
        """Resume the study if its command has ended without a result."""
        process = self.federation.processes.get("run")
        if process is not None and process.poll() is None:
            return
        self.federation.processes.pop("run", None)
        cell = self.cell()
        outcome: dict[str, Any] = {}
        if cell and (cell / "outcome.json").exists():
            outcome = json.loads((cell / "outcome.json").read_text())
        if outcome.get("status") in ("completed", "degraded"):
            self.ended = True
            return
        self.resumes += 1
        assert self.resumes <= MOST_RESUMES, self.federation.logs()
        self.record("resume", study=str(self.seed), error=outcome.get("error", ""))
        time.sleep(2)  # the server may still count the last run as in progress
        self.federation.run(*self.overrides())

    def overrides(self) -> list[str]:
        """Settings of the current study."""
        return [f"seed={self.seed}", f"federation.rounds={self.rounds}"]

    def configure(self, site: str, **facts: object) -> None:
        """Write a hospital's `nemesis.json`."""
        path = self.federation.site(site) / "nemesis.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(facts))
        partial.rename(path)

    def join(self, site: str) -> None:
        """Start a hospital, recorded (`tests.nemesis.hospital`)."""
        self.federation.start(site, "tests.nemesis.hospital", "join", self.federation.site(site))

    def problems_since(self, start: int, site: str) -> str:
        """Codes of the site in the events since some started round, with the number of each."""
        codes: dict[str, int] = {}
        started = self.counted
        for event in self.events():
            started += event["event"] == "round.started"
            code = event.get("code")
            if started >= start and code and event.get("site", site) == site:
                codes[code] = codes.get(code, 0) + 1
        return ", ".join(f"{code} ({count})" for code, count in sorted(codes.items()))

    def study(self, seed: int, faults: Iterator[tuple[str, str]], seconds: float) -> None:
        """Run one study to its end; make faults, two at a time, for some time."""
        self.seed, self.resumes, self.ended = seed, 0, False
        self.federation.run(*self.overrides())
        self.await_rounds(1, 200)
        end = time.monotonic() + seconds
        while not self.ended:
            if time.monotonic() < end:
                self.inject(*next(faults))
            else:
                self.await_rounds(1, 120)
        self.counted = self.round()
        cell = self.cell()
        assert cell is not None
        outcome = json.loads((cell / "outcome.json").read_text())
        self.record(
            "study",
            study=str(seed),
            folder=str(cell),
            rounds=self.rounds,
            status=outcome["status"],
            resumes=self.resumes,
            digest=outcome["digest"],
            simulated=self.simulate(seed) if outcome["status"] == "completed" else "",
        )
        self.measure()

    def inject(self, fault: str, reply: str) -> None:
        """Make one fault, while another hospital sends bad replies, and record what was seen."""
        site, other = self.random.sample(self.training, 2)
        if fault in TAKES_A_SITE:  # with one more the quorum could not be met
            reply = "replies sent twice"
        start, started_at, before = self.round(), time.monotonic(), self.resumes
        self.record(
            "fault",
            fault=fault,
            site=site,
            replies=reply,
            of=other,
            study=str(self.seed),
            round=start,
        )
        self.configure(other, **BAD_REPLIES[reply])
        seen = FAULTS[fault](self, site)
        self.await_rounds(1, 90)
        self.configure(other)
        took = round(time.monotonic() - started_at, 1)
        for name, where, what in ((fault, site, seen), (reply, other, "")):
            line = {
                "fault": name,
                "site": where,
                "seen": what,
                "codes": self.problems_since(start, where),
                "resumes": (self.resumes - before) if name == fault else 0,
                "seconds": took,
            }
            self.table.append(line)
            self.record("fault.over", **line)
            print(json.dumps(line), flush=True)

    def simulate(self, seed: int) -> str:
        """Model hash of the same study in one process."""
        output = self.folder / "simulated" / str(seed)
        settings = (f"data.sites={json.dumps([*TRAINING, HELDOUT])}", *PLAN, *self.overrides())
        done = small.run(
            "simulate",
            *small.overrides(self.federation.hospitals, output, "runtime=inprocess", *settings),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return small.digest(output)

    def measure(self) -> None:
        """Record the memory of every process."""
        for name, process in self.federation.processes.items():
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(OSError, StopIteration):
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    rss = next(line for line in lines if line.startswith("VmRSS"))
                    command = Path(f"/proc/{pid}/comm").read_text().strip()
                    size = int(rss.split()[1]) // 1024
                    self.record("memory", process=f"{name}/{command}/{pid}", pid=pid, rss_mb=size)

    def copy_checkpoints(self, stop: threading.Event) -> None:
        """Keep a link to every checkpoint that appears, until stopped."""
        while not stop.wait(0.1):
            for path in self.federation.kit.runs.glob("*/*/*/*/journal/checkpoint-*.safetensors"):
                folder = self.folder / "checkpoints" / path.parents[1].name
                folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):
                    inode = path.stat().st_ino
                    copy = folder / f"{path.stem}-{inode}.safetensors"
                    if not copy.exists():
                        os.link(path, copy)


def schedule(source: random.Random) -> Iterator[tuple[str, str]]:
    """Pairs of a fault and bad replies; each kind once in a random order, again and again."""

    def endless(names: Iterable[str]) -> Iterator[str]:
        while True:
            mixed = list(names)
            source.shuffle(mixed)
            yield from mixed

    return zip(endless(FAULTS), endless(BAD_REPLIES), strict=True)


def run(folder: Path, hospitals: Path, seconds: float, seed: int, deadline_s: float) -> Driver:
    """Run studies under faults for some time; returns when the last one has ended.

    The history is in `folder/history.jsonl`, ready for `tests.nemesis.checker`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["FEDSGCG_CANARY"] = CANARY
    federation = Federation(folder, hospitals)
    federation.port = free_ports(2)
    source = random.Random(seed)
    driver = Driver(folder, federation, 6 if seconds < 200 else 10, source)
    sites = (*TRAINING, HELDOUT)
    deadlines = {"round_deadline_s": deadline_s, "quorum": 2}
    federation.provision(sites, *PLAN, **deadlines)
    stop = threading.Event()
    copying = threading.Thread(target=driver.copy_checkpoints, args=(stop,), daemon=True)
    with contextlib.ExitStack() as stack:
        stack.callback(federation.close)
        for number, site in enumerate(sites):
            driver.links[site] = stack.enter_context(Link(federation.port, seed=seed + number))
            reach(federation.site(site), f"127.0.0.1:{driver.links[site].port}")
            driver.configure(site)
        driver.record("federation", **facts_of(driver, sites, deadline_s))
        federation.serve()
        copying.start()
        for site in sites:
            driver.join(site)
        end = time.monotonic() + seconds
        faults = schedule(source)
        for number in itertools.count():
            driver.study(seed + number, faults, end - time.monotonic() if number else seconds)
            if time.monotonic() >= end:
                break
        stop.set()
        copying.join(10)
    return driver


def reach(kit: Path, address: str) -> None:
    """Set the server's address in a hospital's file."""
    path = kit / "site.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "server": address}))


def facts_of(driver: Driver, sites: Sequence[str], deadline_s: float) -> dict[str, Any]:
    """What the checker has to know."""
    federation = driver.federation
    cases = {path.name.partition("_")[0] for path in federation.hospitals.glob("*/*.nii.gz")}
    return {
        "training": list(TRAINING),
        "heldout": HELDOUT,
        "kits": {site: str(federation.site(site)) for site in sites},
        "coordinator": [str(federation.kit.folder)],
        "secrets": sorted({str(federation.hospitals), CANARY, *cases}),
        "limits": {
            # Three exchanges of a round, and a server that is suspended or away in between.
            "round_s": 3 * deadline_s + 60,
            "reply_bytes": 16 * 2**20,
            "rss_mb": 2048,
        },
    }
