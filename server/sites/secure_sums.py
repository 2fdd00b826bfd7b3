"""A secure sum over the training sites, as five exchanges (`common.secure_sums`).

    keys     each site announces fresh keys, signed by its identity
    shares   each site sends shares of its secrets, encrypted for each other site
    answers  the request itself; what arrives is masked, and is added at once
    check    each site signs whose answers are summed
    open     each site gives the shares that remove the masks of the sum

A site that drops out before its answer is left out of the sum, one that drops out after it is part
of it. With too few sites in any exchange nothing is opened, and the round is void. A resumed round
starts with fresh keys. Sums that were opened are in `sums.json` of the run folder.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from flwr.serverapp import Grid

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.secure_sums.contribution import Contribution, Scheme
from fedsgcg.common.secure_sums.fixed_point import power_of_two
from fedsgcg.common.secure_sums.history import check_sums
from fedsgcg.common.secure_sums.keys import SumKeys, bytes_of, text_of
from fedsgcg.common.secure_sums.opening import Opening
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.secure_sums import SUM, reference, scheme_of
from fedsgcg.common.wire.messages import (
    SUM_CHECK,
    SUM_KEYS,
    SUM_OPEN,
    SUM_SHARES,
    Reply,
    Request,
)
from fedsgcg.server.admission import Expectation, Verdict, admit
from fedsgcg.server.sites.enrolment import Cohort
from fedsgcg.server.sites.exchange import Answer, OnAnswer
from fedsgcg.server.sites.replies import ALL_SITES, Collected

FILE: Final = "sums.json"

Take = Callable[[str, Reply], None]
"""Takes a site's answer; raises FedsgcgError to refuse it."""


class Ask(Protocol):
    """Sends requests and waits for the answers (`SiteRequests.ask`)."""

    def __call__(
        self,
        message_type: str,
        nodes: Mapping[str, int],
        request: Request | Mapping[str, Request],
        on_answer: OnAnswer,
        enough: int | None = None,
    ) -> list[Answer]:
        """Return one answer per node."""
        ...


@dataclass
class SecureSum:
    """One sum.

    Args:
        plan: The plan.
        grid: Flower's grid, which knows the registered keys.
        cohort: The enrolled sites.
        ask: Sends the requests.
        verdict: Checks the answer to the request itself.
        note: Called with every problem.
        kind: Type of the request whose answers are summed.
        request: The request.
        nodes: Site -> node id of the sites to ask.
        quorum: Answers after which lost sites are no longer waited for.

    Attributes:
        found: The last answer of each site and the verdict on it.
        sum: What the sum gives; None if it was not opened.
    """

    plan: Plan
    grid: Grid
    cohort: Cohort
    ask: Ask
    verdict: Callable[[Answer], Collected]
    note: Callable[[Problem], None]
    kind: str
    request: Request
    nodes: Mapping[str, int]
    quorum: int
    found: dict[str, Collected] = field(default_factory=dict)
    sum: Contribution | None = None

    def run(self) -> None:
        """Compute the sum; with too few sites it stays unopened, and a note says why."""
        try:
            self.sum = self._computed()
        except FedsgcgError as error:
            where = f"round {self.request.identity.round}"
            for problem in error.problems:
                place = f"{where}, {problem.where}" if problem.where else where
                self.note(replace(problem, where=place))

    def pooled(self) -> list[Collected]:
        """Return the sum in the form of one admitted answer; empty if it was not opened."""
        if self.sum is None:
            return []
        reply = Reply(
            self.request.identity,
            ALL_SITES,
            self.sum.weights,
            self.sum.statistics,
            dict(self.sum.metrics),
            moments=self.sum.moments,
        )
        return [Collected(Answer(ALL_SITES, reply), Verdict(ALL_SITES, accepted=True))]

    def _computed(self) -> Contribution:
        session = secrets.token_hex(16)
        opening = Opening(session, 0, self.plan.privacy.secure_sums.fewest_sites)
        self._take_keys(opening)
        keys = {site: keys.to_tree() for site, keys in opening.keys.items()}

        def take_shares(site: str, reply: Reply) -> None:
            opening.add_shares(site, _contents(reply.details.get("shares")))

        options = {"session": session, "keys": keys}
        self._exchange(SUM_SHARES, keys, options, take_shares, self._enough(opening))
        opening.require(len(opening.shares))
        scheme = self._take_answers(opening)
        self._check_history(opening)
        self._agree(opening)
        self._open(opening)
        total = opening.result()
        return scheme.decode(total, len(opening.contributors))

    def _take_keys(self, opening: Opening) -> None:
        registered = {node.node_id: node.public_key for node in self.grid.get_nodes()}

        def take(site: str, reply: Reply) -> None:
            keys = SumKeys.from_tree(reply.details.get("keys"))
            known = registered.get(self.nodes[site])
            if known and not keys.is_of(known):
                raise fail("PRV-962", where=site, found="another key than the registered one")
            opening.add_keys(site, keys)

        options = {"session": opening.session}
        self._exchange(SUM_KEYS, self.nodes, options, take, self._enough(opening))
        opening.require(len(opening.keys))

    def _take_answers(self, opening: Opening) -> Scheme:
        sharing = sorted(opening.shares)
        slices = (self.cohort.members[site].slices("train") for site in self.nodes)
        examples = power_of_two(float(max(1, *slices)))
        own = {"session": opening.session, "sites": sharing, "examples": examples}
        request = replace(self.request, options={**self.request.options, SUM: own})
        scheme = scheme_of(self.plan, self.kind, request, len(sharing), examples)
        opening.resize(scheme.size)

        def receive(answer: Answer) -> None:
            reply, site = answer.reply, answer.site
            part = self.verdict(answer)
            if reply is not None and part.verdict.accepted:
                try:
                    if reply.masked is None:
                        raise fail("PAY-106", found="an answer without masked numbers")
                    opening.add_masked(site, reply.masked)
                except FedsgcgError as error:
                    part = self._refused(answer, error.problems[0])
                # The numbers are part of the total now; nothing of a single site is kept.
                part = replace(part, answer=replace(answer, reply=replace(reply, masked=None)))
            self.found[site] = self._counted(part)

        nodes = {site: self.nodes[site] for site in sharing}
        self.ask(self.kind, nodes, request, receive, self._enough(opening))
        opening.require(len(opening.contributors))
        return scheme

    def _enough(self, opening: Opening) -> int:
        """Return the answers after which a step does not wait for lost sites."""
        return max(self.quorum, opening.threshold)

    def _check_history(self, opening: Opening) -> None:
        """Record the sum before it is opened; refuse one that isolates a few sites (PRV-954)."""
        path = Path(self.plan.output) / FILE
        try:
            known = json.loads(path.read_text()) if path.is_file() else []
            subject = reference(self.kind, self.request)
            earlier = [entry["sites"] for entry in known if entry["reference"] == subject]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise fail("SRV-402", where=str(path), found=type(error).__name__) from error
        sites = sorted(opening.contributors)
        check_sums(earlier, sites, opening.minimum)
        if sites not in earlier:
            known.append({"reference": subject, "sites": sites})
            self.cohort.disk.write(path, (json.dumps(known, indent=1) + "\n").encode())

    def _agree(self, opening: Opening) -> None:
        options = {"session": opening.session, "sites": sorted(opening.contributors)}
        facts = f"{self.request.identity.encode()} {reference(self.kind, self.request)}"
        subject = hashlib.sha256(facts.encode()).hexdigest()

        def take(site: str, reply: Reply) -> None:
            opening.add_signature(site, bytes_of(reply.details.get("signature")), subject)

        self._exchange(SUM_CHECK, opening.contributors, options, take, opening.threshold)
        opening.require(len(opening.signatures))

    def _open(self, opening: Opening) -> None:
        signatures = {site: text_of(one) for site, one in sorted(opening.signatures.items())}
        options = {
            site: {
                "session": opening.session,
                "signatures": signatures,
                "shares": {one: text_of(text) for one, text in opening.shares_for(site).items()},
            }
            for site in opening.signatures
        }

        def take(site: str, reply: Reply) -> None:
            opening.add_opened(site, _contents(reply.details.get("opened")))

        self._exchange(SUM_OPEN, opening.signatures, options, take, opening.threshold, own=True)

    def _exchange(
        self,
        kind: str,
        sites: Iterable[str],
        options: Mapping[str, Any],
        take: Take,
        enough: int | None = None,
        *,
        own: bool = False,
    ) -> None:
        """Send a step to some sites and take their answers; with `own`, options are by site."""
        nodes = {site: self.nodes[site] for site in sites}
        identity = self.request.identity
        requests = {
            site: Request(identity, options={SUM: options[site] if own else dict(options)})
            for site in nodes
        }

        def receive(answer: Answer) -> None:
            part = self._taken(answer, take)
            contributed = answer.site in self.found and self.found[answer.site].verdict.accepted
            if contributed:  # it is part of the sum, whatever happens to it now
                part = replace(self.found[answer.site], answer=_joined(self.found, answer))
            self.found[answer.site] = part if contributed else self._counted(part)

        request = requests if own else next(iter(requests.values()), Request(identity))
        self.ask(kind, nodes, request, receive, enough)

    def _taken(self, answer: Answer, take: Take) -> Collected:
        if answer.reply is None:
            return self._refused(answer, answer.problem or Problem("PAY-106"))
        verdict = admit(answer.reply, Expectation(self.request.identity, answer.site))
        if not verdict.accepted:
            return self._refused(answer, Problem(verdict.code, verdict.detail))
        try:
            take(answer.site, answer.reply)
        except FedsgcgError as error:
            return self._refused(answer, error.problems[0])
        # Accepted is only who is part of the sum; until then the site counts as missing.
        return Collected(answer, Verdict(answer.site, False, "PRV-953", "the sum was not computed"))

    def _refused(self, answer: Answer, problem: Problem) -> Collected:
        where = f"round {self.request.identity.round}, {answer.site}"
        self.note(replace(problem, where=where))
        return Collected(answer, Verdict(answer.site, False, problem.code, problem.found))

    def _counted(self, part: Collected) -> Collected:
        """Return a site's part with the bytes of its earlier messages in this sum."""
        if part.answer.site not in self.found:
            return part
        return replace(part, answer=_with_bytes(part.answer, self.found[part.answer.site].answer))


def _with_bytes(answer: Answer, other: Answer) -> Answer:
    return replace(
        answer,
        bytes_up=answer.bytes_up + other.bytes_up,
        bytes_down=answer.bytes_down + other.bytes_down,
    )


def _joined(found: Mapping[str, Collected], answer: Answer) -> Answer:
    return _with_bytes(found[answer.site].answer, answer)


def _contents(tree: Any) -> dict[str, bytes]:
    """Return bytes by site; raises PAY-106 for anything else."""
    if not isinstance(tree, Mapping):
        raise fail("PAY-106", found="no shares", expected="shares by site")
    return {str(site): bytes_of(text) for site, text in tree.items()}
