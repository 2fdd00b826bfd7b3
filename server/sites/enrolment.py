"""Enrolment: which site runs on which node, and whether enough sites have joined.

Node ids are random. In a deployment a site's identity is the name registered for its key; what it
states must match it, and a node without a registered name cannot enrol. A simulation has no keys,
and the stated name is believed. A site that enrols late joins in the next round.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from flwr.app import Message
from flwr.serverapp import Grid

from fedsgcg.common.errors import CODES, FedsgcgError, Problem, fail
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.images.contents import CONTENT_HASHES, TRAINING_IMAGES, salt_of
from fedsgcg.common.images.read import KINDS
from fedsgcg.common.names import is_site_text, site_text
from fedsgcg.common.settings.compose import nearest
from fedsgcg.common.settings.data import SPLITS
from fedsgcg.common.settings.federation import ROLES, TRAINING
from fedsgcg.common.settings.message_sizes import reply_sizes
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.messages import DATA, ENROL, Reply, Request, encode_request
from fedsgcg.common.wire.payload import Identity
from fedsgcg.server.sites.exchange import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MOST_TRIES,
    Answer,
    missing,
    presence,
    push,
    read_answer,
    was_lost,
    was_restarted,
)
from fedsgcg.server.sites.image_summaries import record_summaries
from fedsgcg.server.sites.problems import not_enough_enrolled
from fedsgcg.server.sites.shared_images import learned_from, shared_images

UNUSABLE: Final = ("DAT-101", "DAT-102", "TRN-302", "POL-720")
"""Codes with which a site reports that it has no usable case, or too few for its own floor."""

KEPT: Final = ("DAT-110",)
"""Codes of cases that are flagged but used: a mask without a structure is a true negative."""

MOST_FINGERPRINTS: Final = 65 * 256
"""Most characters of the hashes of a site's data: a pooled client has one for every hospital."""

SETTLE_S = 0.5
"""Seconds without a new node after which enrolment ends.

Applies only if neither the sites' names nor a quorum are set.
"""


@dataclass(frozen=True)
class Member:
    """One enrolled site.

    Attributes:
        site: Its name.
        node: Flower's node id.
        details: What the site reported: cases, patients and slices of each split, problems.
    """

    site: str
    node: int
    details: Mapping[str, Any]

    def slices(self, split: str) -> int:
        """Slices of a split, 0 if not reported."""
        return self.count("slices", split)

    def count(self, kind: str, split: str) -> int:
        """`cases`, `patients` or `slices` of a split, 0 if not reported."""
        counts = self.details.get(kind)
        value = counts.get(split, 0) if isinstance(counts, Mapping) else 0
        return value if isinstance(value, int) and value > 0 else 0

    def kinds(self) -> list[str]:
        """Kinds of the site's images (`common.images.read.KINDS`); other values are dropped."""
        stated = self.details.get("kinds")
        return [kind for kind in KINDS if isinstance(stated, list) and kind in stated]

    def has_colour(self) -> bool:
        """Whether the site has pictures in colours; anything but `true` counts as no."""
        return self.details.get("colour") is True

    def problem_codes(self, *, suppressed: bool = False) -> list[str]:
        """Codes of the problems with the site's cases; unknown codes are dropped.

        Args:
            suppressed: Return the codes whose number of cases the site withholds instead.
        """
        problems = self.details.get("problems")
        entries = problems if isinstance(problems, list) else []
        codes = [
            entry.get("code")
            for entry in entries
            if isinstance(entry, Mapping) and bool(entry.get("suppressed")) == suppressed
        ]
        return sorted(code for code in codes if isinstance(code, str) and code in CODES)

    def suppressed(self) -> list[str]:
        """Splits whose number of cases the site withholds because it is below its floor."""
        counts = self.details.get("cases")
        stated = counts if isinstance(counts, Mapping) else {}
        return [split for split in SPLITS if split in stated and stated[split] is None]


@dataclass
class Cohort:
    """The enrolled sites of one federation.

    Args:
        grid: Flower's grid.
        plan: The plan.
        disk: Disk access.

    Attributes:
        members: Enrolled sites by name.
        refusals: Why a site or a node could not enrol, by its name or `node <id>`.
        dropped: Sites that missed a deadline and are not asked again, with `federation.late=drop`.
        changes: One problem for every site whose data changed since it first enrolled, including in
            an earlier call, and one for every pair of hospitals with the same images.
        departed: Sites that have left the run (`server.sites.departures`); they cannot enrol.
        paused: Sites that are not asked in this round (`server.screening.history`).
    """

    grid: Grid
    plan: Plan
    disk: Disk = field(default_factory=Disk)
    members: dict[str, Member] = field(default_factory=dict)
    refusals: dict[str, Problem] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    changes: list[Problem] = field(default_factory=list)
    departed: frozenset[str] = frozenset()
    paused: frozenset[str] = frozenset()
    _compared: bool = False  # whether the sites that enrolled at the start have been compared
    _asked: dict[str, int] = field(default_factory=dict)  # message id -> node
    _known: dict[int, str] = field(default_factory=dict)  # node -> its last activation when asked
    _tries: Counter[int] = field(default_factory=Counter)  # requests by node

    def poll(self) -> bool:
        """Ask new nodes for their names and process the answers received.

        A node that lost the request, because it disconnected or restarted, counts as new again.

        Returns:
            Whether there was a new node or answer.
        """
        request = Request(Identity(self.plan.run, self.plan.heldout, 0, self.plan.digest()))
        present = presence(self.grid)
        self._forget_restarted(present)
        new = set(present) - set(self._known)
        for node in sorted(new):
            if identifier := push(
                self.grid,
                encode_request(request),
                ENROL,
                node,
                self.plan.federation.join_deadline_s,
            ):
                self._asked[identifier] = node
                self._known[node] = present[node]
                self._tries[node] += 1
        replies = list(self.grid.pull_messages(sorted(self._asked))) if self._asked else []
        for message in replies:
            if (identifier := message.metadata.reply_to_message_id) in self._asked:
                node = self._asked.pop(identifier)
                if was_lost(message) and self._tries[node] < MOST_TRIES:
                    self._known.pop(node, None)
                else:
                    self._take(node, self._read(message, node), request.identity)
        return bool(new or replies)

    def _read(self, message: Message, node: int) -> Answer:
        return read_answer(message, f"node {node}", reply_sizes(self.plan, weights=0))

    def _forget_restarted(self, present: Mapping[int, str]) -> None:
        """Treat nodes that restarted before they answered as new."""
        for node in set(self._asked.values()):
            if (
                was_restarted(node, self._known.get(node, ""), present)
                and self._tries[node] < MOST_TRIES
            ):
                self._asked = {
                    identifier: asked for identifier, asked in self._asked.items() if asked != node
                }
                del self._known[node]

    def wait(self) -> None:
        """Wait until all expected sites have enrolled, or until the join deadline.

        Raises:
            FedsgcgError: CFG-002 for a held-out site that is not among the plan's sites; RND-401
                when the quorum or the held-out site is missing at the deadline, with the missing,
                enrolled and refused sites; RND-408 when a held-out site or an observer has training
                images of another site, unless the plan only flags that.
        """
        sites = self.plan.data.sites
        if sites and self.plan.heldout and self.plan.heldout not in sites:
            raise fail(
                "CFG-002", found=repr(self.plan.heldout), action=nearest(self.plan.heldout, sites)
            )
        end = time.monotonic() + self.plan.federation.join_deadline_s
        quiet_since, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            news = self.poll()
            now = time.monotonic()
            quiet_since = now if news else quiet_since
            if now >= end or self._complete(now - quiet_since):
                break
            pause = FIRST_PAUSE_S if news else min(1.5 * pause, LONGEST_PAUSE_S)
            time.sleep(min(pause, max(0.0, end - now)))
        self._check_presence()
        self._compare_images({site: member.details for site, member in self.members.items()})
        self._compared = True
        record_summaries(self.plan, self.members, self.disk)

    @property
    def training(self) -> dict[str, int]:
        """Site -> node id of the enrolled sites that train, with or without labels."""
        return dict(sorted({**self.of_role("train"), **self.of_role("unlabelled")}.items()))

    def kinds(self, role: str = "train") -> list[str]:
        """Kinds of the images at the enrolled sites of a role, ordered as `images.read.KINDS`."""
        stated = {kind for site in self.of_role(role) for kind in self.members[site].kinds()}
        return [kind for kind in KINDS if kind in stated]

    def has_colour(self, role: str = "train") -> bool:
        """Whether an enrolled site of a role has pictures in colours."""
        return any(self.members[site].has_colour() for site in self.of_role(role))

    def mixed_kinds(self) -> list[Problem]:
        """One problem if the sites, which train one network, have images of different kinds."""
        stated = {
            site: ", ".join(member.kinds())
            for site, member in sorted(self.members.items())
            if member.kinds()
        }
        if len(set(stated.values())) < 2:
            return []
        found = "; ".join(f"{kind} at {site}" for site, kind in stated.items())
        action = "use hospitals of one kind (data.sites), or resample the volumes to one plane"
        return [
            Problem(
                "DAT-117",
                where="images",
                found=found,
                expected="one kind at all hospitals",
                action=action,
            )
        ]

    @property
    def asked(self) -> dict[str, int]:
        """Site -> node id of the training sites that the next round asks."""
        out = self.dropped | self.paused
        return {site: node for site, node in self.training.items() if site not in out}

    def leave_out_late(self, sites: Iterable[str]) -> None:
        """Stop asking sites that missed a deadline, with `federation.late=drop`."""
        if self.plan.federation.late == "drop":
            self.dropped.update(sites)

    def of_role(self, role: str) -> dict[str, int]:
        """Site -> node id of the enrolled sites of a role."""
        return {
            site: self.members[site].node
            for site in sorted(self.members)
            if self.plan.role(site) == role
        }

    @property
    def tested(self) -> dict[str, int]:
        """Site -> node id of the enrolled sites with test cases.

        These are the held-out site, the observers, and the hospitals of the plan's `unlabelled`
        whose manifest assigns cases to `test`.
        """
        scored = {
            site: member.node
            for site, member in self.members.items()
            if site in self.plan.unlabelled and member.count("cases", "test") > 0
        }
        observers = {
            site: node
            for site, node in self.of_role("observer").items()
            if site not in self.plan.unlabelled
        }
        return {**self.of_role("heldout"), **dict(sorted({**observers, **scored}.items()))}

    @property
    def quorum(self) -> int:
        """Training sites that must answer.

        This is the plan's number, or else the number of expected sites that have a usable case and
        are not paused.
        """
        expected = [site for site in self._expected_to_train() if not self._unusable(site)]
        active = set(expected or self.training) - self.paused
        return self.plan.federation.quorum or max(1, len(active))

    @property
    def fewest_admitted(self) -> int:
        """Admitted answers that a round needs; with fewer it is void."""
        return max(1, self.plan.federation.quorum)

    def census(self) -> dict[str, dict[str, Any]]:
        """The cases of each enrolled site.

        Returns:
            By site: `role`; `cases` by split; `left_out`, the number of unusable cases by error
            code; `flagged`, the number of cases that are used in spite of a problem, by error
            code; and `suppressed`, the splits and codes whose number the site withholds because it
            is below its floor.
        """
        return {
            site: {
                "role": self.plan.role(site),
                "cases": {
                    split: member.count("cases", split) for split in ("train", "validation", "test")
                },
                "left_out": dict(
                    Counter(code for code in member.problem_codes() if code not in KEPT)
                ),
                "flagged": dict(Counter(code for code in member.problem_codes() if code in KEPT)),
                "suppressed": [*member.suppressed(), *member.problem_codes(suppressed=True)],
            }
            for site, member in sorted(self.members.items())
        }

    def absent(self) -> list[Problem]:
        """One problem for every expected site that has not enrolled or has no usable case."""
        expected = [site for role in ROLES for site in self._expected(role)]
        unusable: list[str] = []
        if not self.plan.members():
            unusable = [site for site in sorted(self.refusals) if self._unusable(site)]
        return [
            self.refusals.get(
                site, Problem("RND-404", where=site, found="the site has not enrolled")
            )
            for site in dict.fromkeys([*expected, *unusable])
            if site not in self.members
        ]

    def _unusable(self, site: str) -> bool:
        """Whether a site reported that it has no usable case; such a site is not missing."""
        return (
            site not in self.members
            and site in self.refusals
            and self.refusals[site].code in UNUSABLE
        )

    def _expected(self, role: str) -> list[str]:
        named = set(self.plan.members())
        if role != "train":
            named |= {self.plan.heldout, *self.plan.observers} - {""}
        return sorted(site for site in named - self.departed if self.plan.role(site) == role)

    def _expected_to_train(self) -> list[str]:
        return sorted(site for role in TRAINING for site in self._expected(role))

    def _complete(self, quiet_s: float) -> bool:
        expected = {
            *self._expected_to_train(),
            *self._expected("heldout"),
            *self._expected("observer"),
        }
        if not expected <= {*self.members, *self.refusals}:
            return False
        if self.plan.members() or self._asked:
            return bool(self.plan.members())
        enough = len(self.training) >= max(1, self.plan.federation.quorum)
        return enough and (self.plan.federation.quorum > 0 or quiet_s >= SETTLE_S)

    def _check_presence(self) -> None:
        heldout = self.plan.heldout
        if len(self.training) >= self.quorum and (not heldout or heldout in self.members):
            return
        needed = [*self._expected_to_train(), *([heldout] if heldout else [])]
        silent = [site for site in needed if site not in self.members and site not in self.refusals]
        refusals = {
            name: problem for name, problem in self.refusals.items() if name not in self.departed
        }
        raise not_enough_enrolled(self.plan, list(self.training), self.quorum, refusals, silent)

    def _take(self, node: int, answer: Answer, identity: Identity) -> None:
        try:
            if answer.reply is None:
                problem = answer.problem or missing(
                    answer.site, ENROL, self.plan.federation.join_deadline_s
                )
                raise FedsgcgError(replace(problem, where=self._name_of(node, answer.stated)))
            self._admit(node, answer.reply, identity)
        except FedsgcgError as error:
            first = error.problems[0]
            # An unknown node must not take the place of a site that has already enrolled.
            name = first.where if first.where not in self.members else f"node {node}"
            self.refusals[name] = first

    def _name_of(self, node: int, stated: str) -> str:
        """Return the name under which a node that could not enrol is listed.

        The name is that registered for the node's key. A stated name counts only if the grid knows
        no names at all, as in a simulation: otherwise anyone could make a site unusable by an error
        in its name.
        """
        registered = {info.node_id: info.name for info in self.grid.get_nodes()}
        if any(registered.values()):
            return registered.get(node) or f"node {node}"
        known = {*self.plan.members(), *self.plan.observers, self.plan.heldout}
        believed = stated if stated in known else ""
        if not self.plan.members():
            believed = site_text(stated)
        return believed or f"node {node}"

    def _admit(self, node: int, reply: Reply, identity: Identity) -> None:
        site = reply.site
        role = self.plan.role(site)
        if reply.identity != identity:
            where = self._name_of(node, "")
            raise fail("PAY-120", where=where, found="an answer to another run, fold or plan")
        members = self.plan.members()
        known = site in {*members, *self.plan.observers} if members else is_site_text(site)
        if not known:
            raise fail(
                "ROL-201",
                where=self._name_of(node, ""),
                found=f"site {site_text(site)!r}",
                expected=" | ".join(members),
            )
        registered = {info.node_id: info.name for info in self.grid.get_nodes()}
        if any(registered.values()) and registered.get(node) != site:
            raise fail(
                "ROL-201",
                where=self._name_of(node, ""),
                found=f"it calls itself {site_text(site)!r}",
                expected="the name registered for its key",
            )
        if site in self.departed:
            raise fail(
                "RND-407",
                where=site,
                found=f"node {node} asks to enrol",
                action="end its SuperNode",
            )
        if site in self.members and self.members[site].node in registered:
            raise fail(
                "ROL-201",
                where=site,
                found=f"node {node} also calls itself {site}",
                expected="each site once",
            )
        self._check_limits(site, reply.details)
        accepted = reply.details.get("roles", [])
        if role not in (accepted if isinstance(accepted, list) else []):
            raise fail("ROL-201", where=site, found=f"the site does not accept role {role}")
        member = Member(site, node, reply.details)
        cases = reply.details.get("cases")
        trains = self.plan.trains(site)
        if trains and isinstance(cases, Mapping) and cases.get("train") == 0:
            raise fail("TRN-302", where=site, found="no case in its training split")
        slices = reply.details.get("slices")
        if trains and isinstance(slices, Mapping) and slices.get("train") == 0:
            found = f"no slice to train on (data.train_slices={self.plan.data.train_slices})"
            raise fail("TRN-302", where=site, found=found)
        if trains and not member.slices("train"):
            # The number bounds the site's weight in every round, so that it must be known.
            expected = "a number of training slices, 1 or more"
            raise fail("PAY-110", where=site, found="no such number", expected=expected)
        if self._compared:  # a site that enrols late is refused alone and stops no other
            self._compare_images(
                {name: one.details for name, one in self.members.items()} | {site: reply.details}
            )
        if problem := self.changed_data(site, reply.details.get(DATA)):
            self.changes.append(problem)
        self.members[site] = member
        self.refusals.pop(site, None)

    def _check_limits(self, site: str, details: Mapping[str, Any]) -> None:
        """Refuse a site that declares more than the coordinator knows it to have.

        Raises:
            FedsgcgError: PAY-111 with the first such number.
        """
        most = self.plan.federation.limit(site)
        member = Member(site, 0, details)
        for kind, limit in (("patients", "patients"), ("cases", "slices"), ("slices", "slices")):
            if (found := sum(member.count(kind, split) for split in SPLITS)) > most[limit]:
                action = f"if it is right, raise federation.limits of {site}"
                expected = f"at most {most[limit]}"
                raise fail(
                    "PAY-111",
                    where=site,
                    found=f"{found:g} {kind}",
                    expected=expected,
                    action=action,
                )

    def _compare_images(self, details: Mapping[str, Mapping[str, Any]]) -> None:
        """Find images shared by two hospitals, and store the hashes of the training images.

        Raises:
            FedsgcgError: RND-408 with `federation.shared_images=refuse`.
        """
        contents = {
            site: found[CONTENT_HASHES]
            for site, found in details.items()
            if CONTENT_HASHES in found
        }
        if not contents:
            return
        leaks, duplicates = shared_images(self.plan, contents)
        if leaks and self.plan.federation.shared_images == "refuse":
            raise FedsgcgError(*leaks)
        self.changes += [
            problem for problem in (*leaks, *duplicates) if problem not in self.changes
        ]
        path = Path(self.plan.output) / TRAINING_IMAGES
        salt = salt_of(Identity(self.plan.run, self.plan.heldout, 0, self.plan.digest()))
        images = _known_images(path, salt) | learned_from(self.plan, contents)
        self.disk.write(
            path, (json.dumps({"salt": salt, "images": images}, indent=1) + "\n").encode()
        )

    @property
    def _data_file(self) -> Path:
        return Path(self.plan.output) / "data.json"

    @cached_property
    def _data(self) -> dict[str, str]:
        """Site -> digest of its data in its last reply, read once: every reply is compared."""
        return _read_hashes(self._data_file)

    def changed_data(self, site: str, stated: object) -> Problem | None:
        """Compare a reply's digest of the site's data with the last one in this run folder.

        Each change is found once: the new digest is remembered, also by a resumed run.

        Args:
            site: The site.
            stated: What its reply has under `DATA`; a reply without it says nothing.

        Returns:
            RND-406 for a change, None without.
        """
        data = _fingerprints(stated)
        before = self._data.get(site, "")
        if not data or data == before:
            return None
        self._data[site] = data
        text = json.dumps(self._data, indent=1, sort_keys=True) + "\n"
        self.disk.write(self._data_file, text.encode())
        if not before:
            return None
        action = (
            "ask the site what changed; for a study on the new data, choose another output=FOLDER"
        )
        found = f"data {data[:12]}, before {before[:12]}"
        return Problem("RND-406", where=site, found=found, action=action)


def _fingerprints(stated: Any) -> str:
    """Return the hashes of a site's data as it stated them; other long text becomes a hash."""
    text = stated if isinstance(stated, str) else ""
    hashes = len(text) <= MOST_FINGERPRINTS and set(text) <= set("0123456789abcdef ")
    if hashes or is_site_text(text):
        return text
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _known_images(path: Path, salt: str) -> dict[str, list[str]]:
    """Hospital -> hashes written by an earlier call of the run; a damaged file is replaced."""
    try:
        tree = json.loads(path.read_text())
        return dict(tree["images"]) if tree["salt"] == salt else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _read_hashes(path: Path) -> dict[str, str]:
    """Site -> digest of its data in its last reply; raises SRV-402 for a damaged file."""
    try:
        return {str(site): str(data) for site, data in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise fail(
            "SRV-402", where=str(path), found="not the JSON that was written", action="remove it"
        ) from error
