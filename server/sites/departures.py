"""Sites that leave a run permanently.

The coordinator declares a departure once; it is recorded in the run folder and cannot be undone.

    departed.json   site -> time of the declaration (UTC)

A departure takes effect at the run's next start (`server.federation`): the site is neither expected
nor asked, it cannot enrol, and its part of the class statistics is dropped. The checkpoints record,
as a note, after which round the site left.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.disk import Disk, refusals
from fedsgcg.common.settings.compose import nearest
from fedsgcg.common.settings.plan import Plan

FILE: Final = "departed.json"
OPTION: Final = "--without"


def departed(folder: Path) -> dict[str, str]:
    """Return site -> time its departure was declared; raises SRV-402 for a damaged file."""
    path = folder / FILE
    try:
        return {str(site): str(time) for site, time in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        action = f"remove it and declare the departures again: fedsgcg resume KIT {OPTION} SITE"
        raise fail(
            "SRV-402", where=str(path), found="not the JSON that was written", action=action
        ) from error


def declare(plan: Plan, sites: Collection[str], disk: Disk) -> None:
    """Record durably in the run folder that sites have left; earlier departures are kept.

    Raises:
        FedsgcgError: CFG-001 for sites that cannot leave (`check_departures`), SRV-401 and SRV-402
            for the file.
    """
    folder = Path(plan.output)
    before = departed(folder)
    check_departures(plan, {*before, *sites})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    known = dict.fromkeys(sites, now) | before
    if known == before:
        return
    with refusals(folder):
        disk.make_folder(folder)
    disk.write(folder / FILE, (json.dumps(known, indent=1, sort_keys=True) + "\n").encode())


def check_departures(plan: Plan, gone: Collection[str]) -> None:
    """Check that only training sites leave and that the run can continue without them.

    Raises:
        FedsgcgError: One CFG-001 for each problem: an unknown name (with the nearest known one),
            the held-out site, an observer, no training site left, or a quorum that the remaining
            sites cannot meet.
    """
    if problems := [*_impossible(plan, gone)]:
        raise FedsgcgError(*problems)


def departure_note(site: str, done: int) -> Problem:
    """Return RND-407: what remains of the contribution of a site that left after `done` rounds."""
    rounds = {
        0: "it took part in no round",
        1: "the weights keep what they learned in round 1",
    }
    kept = rounds.get(done, f"the weights keep what they learned in rounds 1 to {done}")
    action = "for a model that never saw the site, train a new study without it"
    return Problem(
        "RND-407", where=site, found=f"gone from round {done + 1} on; {kept}", action=action
    )


def _impossible(plan: Plan, gone: Collection[str]) -> Iterator[Problem]:
    training = [site for site in plan.members() if plan.trains(site)]
    for site in sorted(gone):
        role = plan.role(site)
        if not plan.trains(site):
            kind = "held out" if role == "heldout" else "an observer"
            found = f"{site}, which is {kind}: it has contributed nothing that could be removed"
            expected = f"a training site: {', '.join(training)}"
            action = "leave the site out of the study's heldout= and observers="
            yield Problem("CFG-001", where=OPTION, found=found, expected=expected, action=action)
        elif training and site not in training:
            yield Problem(
                "CFG-001",
                where=OPTION,
                found=repr(site),
                expected="a training site",
                action=nearest(site, training),
            )
    left = [site for site in training if site not in gone]
    quorum = plan.federation.quorum
    if training and len(left) < max(1, quorum):
        # Imported here because it imports Flower, which the command line does not need.
        from fedsgcg.server.sites.problems import training_sites

        found = f"{', '.join(left) or 'no training site'} left"
        expected = (
            f"the quorum of {training_sites(quorum)}" if quorum else "one training site or more"
        )
        action = "create a new study with the remaining sites"
        yield Problem("CFG-001", where=OPTION, found=found, expected=expected, action=action)
