"""Runs studies on a real federation, makes faults, and records what happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from tests.nemesis.faults import FAULTS, Seen
from tests.nemesis.link import Link
from tests.nemesis.schedule import BAD_REPLIES, PARTITION, Act, Promise, Step, acts
from tests.support import small
from tests.support.federation import Federation, descendants, free_ports

TRAINING: Final = ("East", "North", "South")
HELDOUT: Final = "West"
CANARY: Final = "CANARY-7f3a"
PLAN: Final = ("method=sgcg", f"heldout={HELDOUT}")
MOST_RESUMES: Final = 40
"""Resumes of one study, after which the federation counts as unable to finish."""


@dataclass
class Driver:
    """One federation under faults.

    Attributes:
        folder: Everything is written here.
        federation: Its processes.
        links: Each hospital's link to the server.
        random: Source of all choices.
        promise: What the run must exercise.
        rounds: Rounds of the current study.
        deadline_s: Seconds of an exchange in the current study.
    """

    folder: Path
    federation: Federation
    random: random.Random
    promise: Promise
    rounds: int = 0
    deadline_s: float = 0.0
    links: dict[str, Link] = field(default_factory=dict)
    training: tuple[str, ...] = TRAINING
    seed: int = 0
    resumes: int = 0
    ended: bool = False
    counted: int = 0

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
        return [
            f"seed={self.seed}",
            f"federation.rounds={self.rounds}",
            f"federation.round_deadline_s={self.deadline_s}",
        ]

    def configure(self, site: str, **facts: object) -> None:
        """Write a hospital's `nemesis.json`."""
        path = self.federation.site(site) / "nemesis.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(facts))
        partial.rename(path)

    def join(self, site: str) -> None:
        """Start a hospital, recorded (`tests.nemesis.hospital`)."""
        self.federation.start(site, "tests.nemesis.hospital", "join", self.federation.site(site))

    def codes_since(self, start: float, site: str) -> str:
        """Codes of the site in the events since some time, with the number of each."""
        codes: dict[str, int] = {}
        for event in self.events():
            code = event.get("code")
            if event["time"] >= start and code and event.get("site", site) == site:
                codes[code] = codes.get(code, 0) + 1
        return ", ".join(f"{code} ({count})" for code, count in sorted(codes.items()))

    def act(self, act: Act, seed: int) -> int:
        """Run the studies of an act until it has no step left; returns the next free seed."""
        while act.peek() is not None:
            self.study(seed, act)
            seed += 1
        return seed

    def study(self, seed: int, act: Act) -> None:
        """Run one study to its end, with the steps for which it has rounds."""
        self.seed, self.resumes, self.ended = seed, 0, False
        self.rounds, self.deadline_s = act.rounds, act.deadline_s
        self.federation.run(*self.overrides())
        self.await_rounds(1, 200)
        while not self.ended:
            step = act.peek()
            if step is not None and self.rounds - self.events()[-1]["round"] >= step.rounds - 1:
                act.take()
                self.inject(step)
            else:
                self.await_rounds(1, 120)
        self.counted = self.round()
        cell = self.cell()
        assert cell is not None
        outcome = json.loads((cell / "outcome.json").read_text())
        self.record(
            "study",
            study=str(seed),
            act=act.name,
            folder=str(cell),
            rounds=self.rounds,
            # Three exchanges of a round, and a server that is suspended or away in between.
            round_s=3 * self.deadline_s + 60,
            status=outcome["status"],
            resumes=self.resumes,
            digest=outcome["digest"],
            simulated=self.simulate(seed) if outcome["status"] == "completed" else "",
        )
        self.measure()

    def inject(self, step: Step) -> None:
        """Make one fault, while another hospital sends bad replies, and record what was seen."""
        site, other = self.random.sample(self.training, 2)
        start, before = time.time(), self.resumes
        facts = {"site": site, "replies": step.replies, "of": other, "study": str(self.seed)}
        self.record("fault", fault=step.fault, **facts)
        if step.replies:
            self.configure(other, **BAD_REPLIES[step.replies])
        seen = FAULTS[step.fault](self, site) if step.fault else Seen(True)
        # Without a fault, a whole round; the one in progress may have the site's reply already.
        self.await_rounds(1 if step.fault else 2, 90)
        if step.replies:
            self.configure(other)
        if step.fault == PARTITION:
            self.await_answer(site, 120)
        for name, where in ((step.fault, site), (step.replies, other)):
            if not name:
                continue
            line = {
                "fault": name,
                "site": where,
                "study": str(self.seed),
                "effect": seen.effect,
                "seen": seen.text if name == step.fault else "",
                "codes": self.codes_since(start, where),
                "resumes": (self.resumes - before) if name == step.fault else 0,
                "seconds": round(time.time() - start, 1),
            }
            self.record("fault.over", **line)
            print(json.dumps(line), flush=True)

    def await_answer(self, site: str, seconds: float) -> None:
        """Wait until a site has been merged again, or the study has ended."""
        start, end = time.time(), time.monotonic() + seconds
        while not self.ended and time.monotonic() < end:
            for event in self.events():
                if (event["event"], event.get("site")) == ("round.reply", site) and (
                    event["accepted"] and event["time"] > start
                ):
                    return
            self.keep_running()
            time.sleep(0.3)

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


def run(folder: Path, hospitals: Path, seconds: float, seed: int, deadline_s: float) -> None:
    """Run studies under faults for some time; returns when the last one has ended.

    The history is in `folder/history.jsonl`, ready for `tests.nemesis.checker`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["FEDSGCG_CANARY"] = CANARY
    federation = Federation(folder, hospitals)
    federation.port = free_ports(2)
    source = random.Random(seed)
    planned, promise = acts(source, FAULTS, seconds, deadline_s)
    driver = Driver(folder, federation, source, promise)
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
        driver.record("federation", **facts_of(driver, sites))
        federation.serve()
        copying.start()
        for site in sites:
            driver.join(site)
        for act in planned:
            seed = driver.act(act, seed)
        stop.set()
        copying.join(10)


def reach(kit: Path, address: str) -> None:
    """Set the server's address in a hospital's file."""
    path = kit / "site.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "server": address}))


def facts_of(driver: Driver, sites: Sequence[str]) -> dict[str, Any]:
    """What the checker has to know."""
    federation = driver.federation
    cases = {path.name.partition("_")[0] for path in federation.hospitals.glob("*/*.nii.gz")}
    return {
        "training": list(TRAINING),
        "heldout": HELDOUT,
        "kits": {site: str(federation.site(site)) for site in sites},
        "coordinator": [str(federation.kit.folder)],
        "promise": asdict(driver.promise),
        "secrets": sorted({str(federation.hospitals), str(federation.data), CANARY, *cases}),
        "limits": {
            "reply_bytes": 16 * 2**20,
            "rss_mb": 2048,
        },
    }
