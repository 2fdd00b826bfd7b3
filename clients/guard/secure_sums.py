"""A site's part in secure sums: its secrets between two messages, and what it refuses.

The messages of a sum reach the site one by one, perhaps in another process each, so that the state
of the sum is a file of the site's folder that only its owner may read. It is on the disk before an
answer leaves: after a crash a mask is never used for other numbers. A repeated request gets the
same answer; another request of the same kind is refused. The secrets are removed when the shares
have been given, and when the next sum starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedsgcg.clients.guard.releases import check_session, remember_sum
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.clients.local_state import LocalState
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.atomic import replaced
from fedsgcg.common.secure_sums.contribution import Contribution
from fedsgcg.common.secure_sums.keys import SiteKey, SumKeys, bytes_of, key_fingerprint, text_of
from fedsgcg.common.secure_sums.party import Party
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.secure_sums import SUM, reference, scheme_of
from fedsgcg.common.wire.messages import SUM_CHECK, SUM_KEYS, SUM_OPEN, SUM_SHARES, Reply, Request

FOLDER: Final = "secure_sums"
PARTNERS: Final = "partners.json"
"""Identities of the other sites, as they were when this site first took part in a sum with them."""
LEAVES: Final[tuple[str, ...]] = ("seconds", "micro_batches", "learning_rate", "steps")
"""Metrics that leave as they are; the others are part of the sum."""
MOST_SITES: Final = 4096

Details = dict[str, Any]


@dataclass(frozen=True)
class SiteSums:
    """The secure sums of one run at one site.

    Attributes:
        site: The site.
        home: Its folder.
        plan: The plan with the site's own settings.
        policy: The site's own settings; None in a simulation.
        request: The request that is answered.
        kind: Its type.
    """

    site: str
    home: Path
    plan: Plan
    policy: SiteFile | None
    request: Request
    kind: str

    @property
    def key(self) -> SiteKey:
        """The site's identity."""
        if self.policy is None:
            return SiteKey.simulated(self.site)
        return SiteKey.of_file(Path(self.policy.key))

    def answer(self) -> Details:
        """Return the answer to a request of the protocol itself.

        Raises:
            FedsgcgError: PRV-953 to PRV-959 and PRV-962 for what the site refuses (`Party`),
                SITE-501 when its folder cannot be used.
        """
        steps: Mapping[str, Callable[[], Details]] = {
            SUM_KEYS: self._keys,
            SUM_SHARES: self._shares,
            SUM_CHECK: self._check,
            SUM_OPEN: self._open,
        }
        if known := self._known():
            return dict(known["details"])
        return steps[self.kind]()

    def sent_before(self) -> Reply | None:
        """Return the masked answer to a request that was answered before, None for a new one.

        Raises:
            FedsgcgError: PRV-959 for another request in the same sum, or after its opening.
        """
        known = self._known()
        if known is None:
            self._party("shared")
            return None
        if not self._path(".npy").is_file():
            raise _out_of_turn(self.site, "a request of a sum that this site has opened")
        with self._failures():
            words = np.load(io.BytesIO(self._path(".npy").read_bytes()), allow_pickle=False)
        details, metrics = dict(known["details"]), dict(known["metrics"])
        return Reply(
            self.request.identity, self.site, None, None, metrics, b"", details, masked=words
        )

    def mask(self, reply: Reply) -> Reply:
        """Return a reply with masked numbers instead of weights, statistics and moments.

        Args:
            reply: The reply, after the floors.

        Raises:
            FedsgcgError: PRV-957 for a number outside the range of the sum.
        """
        options = self._options
        sharing = names_of(options.get("sites"))
        examples = options.get("examples")
        if not isinstance(examples, (int, float)) or not 1 <= examples <= 2**40:
            raise fail("PAY-106", found="no bound of the number of slices")
        party = self._party("shared")
        scheme = scheme_of(self.plan, self.kind, self.request, len(sharing), float(examples))
        words = scheme.encode(
            Contribution(reply.weights, reply.statistics, reply.moments, reply.metrics)
        )
        words = party.mask(words, sharing)
        metrics = {name: reply.metrics[name] for name in LEAVES if name in reply.metrics}
        details = {name: value for name, value in reply.details.items() if name != "withheld"}
        buffer = io.BytesIO()
        np.save(buffer, words)
        self._write(self._path(".npy"), buffer.getvalue())
        self._store(party, details, reference=reference(self.kind, self.request), metrics=metrics)
        return Reply(reply.identity, self.site, metrics=metrics, details=details, masked=words)

    def _keys(self) -> Details:
        session = self._session
        check_session(self.home, session)
        state = self._load()
        if state and state["party"]["session"] == session:
            raise _out_of_turn(self.site, "another request for keys of the same sum")
        for path in (self._path(".npy"), self._path(".json")):
            with self._failures():
                path.unlink(missing_ok=True)
        party = Party(self.site, session, self.key, self.plan.privacy.secure_sums.fewest_sites)
        return self._store(party, {"keys": party.advertise().to_tree()})

    def _shares(self) -> Details:
        party = self._party("advertised")
        keys = {
            site: SumKeys.from_tree(tree)
            for site, tree in mapping_of(self._options, "keys").items()
        }
        self._check_identities(keys)
        shares = party.share(keys)
        return self._store(party, {"shares": texts_of(shares)})

    def _check(self) -> Details:
        state = self._state()
        party = self._party("masked")
        subject = f"{self.request.identity.encode()} {state['reference']}"
        contributors = names_of(self._options.get("sites"))
        signature = party.agree(contributors, hashlib.sha256(subject.encode()).hexdigest())
        return self._store(party, {"signature": text_of(signature)})

    def _open(self) -> Details:
        state = self._state()
        party = self._party("agreed")
        signatures = contents_of(mapping_of(self._options, "signatures"))
        shares = contents_of(mapping_of(self._options, "shares"))
        opened = party.open(signatures, shares)
        remember_sum(
            self.home, party.session, state["reference"], party.contributors, party.minimum
        )
        # The secrets have done their work; the answer remains for a request that is repeated.
        party.secret_cipher = party.secret_mask = party.seed = b""
        party.own_shares = (b"", b"")
        with self._failures():
            self._path(".npy").unlink(missing_ok=True)
        return self._store(party, {"opened": texts_of(opened)})

    def _check_identities(self, keys: Mapping[str, SumKeys]) -> None:
        """Refuse a partner whose identity is not the one that this site knows (PRV-962)."""
        if self.policy is None:
            for site, theirs in keys.items():
                if theirs.identity != SiteKey.simulated(site).public:
                    raise _stranger(site, "another identity than that of the simulated site")
            return
        listed, path = self.policy.partners, self.home / PARTNERS
        with self._failures():
            known = json.loads(path.read_text()) if path.is_file() else {}
        for site, theirs in keys.items():
            if site == self.site:
                continue
            shown = key_fingerprint(theirs.identity)
            if listed and listed.get(site) != shown:
                raise _stranger(site, f"a key with the fingerprint {shown}")
            if known.setdefault(site, shown) != shown:
                raise _stranger(site, f"a key with the fingerprint {shown}, before {known[site]}")
        self._write(path, json.dumps(known, indent=1, sort_keys=True).encode())

    @property
    def _options(self) -> Mapping[str, Any]:
        return mapping_of(self.request.options, SUM)

    @property
    def _session(self) -> str:
        session = self._options.get("session")
        if not isinstance(session, str) or not 16 <= len(session) <= 64:
            raise _out_of_turn(self.site, "a request outside a secure sum")
        return session

    @property
    def _digest(self) -> str:
        facts = [reference(self.kind, self.request), self.request.identity.encode(), self._options]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=dict).encode()).hexdigest()

    def _known(self) -> dict[str, Any] | None:
        """Return the stored answer to this very request; refuse another one of the same kind."""
        state = self._load()
        if not state or state["party"]["session"] != self._session:
            return None
        found = state["answers"].get(self.kind)
        if found and found["request"] != self._digest:
            raise _out_of_turn(self.site, f"a second {self.kind!r} request in the same sum")
        return dict(found) if found else None

    def _party(self, step: str) -> Party:
        """Return this site's state in the sum of the request, after a step (PRV-959 otherwise)."""
        state = self._state()
        party = Party.from_tree(state["party"], self.key)
        if party.step != step:
            raise _out_of_turn(self.site, f"a {self.kind!r} request after the step {party.step!r}")
        return party

    def _state(self) -> dict[str, Any]:
        state = self._load()
        if (
            not state
            or state["party"]["session"] != self._session
            or state["identity"] != self.request.identity.encode()
        ):
            raise _out_of_turn(self.site, "a request of a sum for which this site has no keys")
        return state

    def _load(self) -> dict[str, Any] | None:
        path = self._path(".json")
        try:
            with self._failures():
                return dict(json.loads(path.read_bytes())) if path.is_file() else None
        except ValueError as error:
            raise _unusable(path, "a damaged file") from error

    def _store(
        self,
        party: Party,
        details: Details,
        *,
        reference: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> Details:
        """Store the state with the answer to this request, and return the answer."""
        state = self._load() or {"answers": {}, "reference": ""}
        answer = {"request": self._digest, "details": details, "metrics": dict(metrics or {})}
        state |= {
            "party": party.to_tree(),
            "identity": self.request.identity.encode(),
            "reference": reference or state["reference"],
            "answers": {**state["answers"], self.kind: answer},
        }
        self._write(self._path(".json"), json.dumps(state).encode())
        return details

    def _path(self, suffix: str) -> Path:
        key = LocalState.of(self.home, self.request.identity).key
        return self.home / FOLDER / f"{key}{suffix}"

    def _write(self, path: Path, content: bytes) -> None:
        with self._failures():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replaced(path, mode=0o600) as temporary, temporary.open("r+b") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def _failures(self) -> Any:
        try:
            yield
        except OSError as error:
            raise _unusable(self.home, str(error)) from error


def mapping_of(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an entry that is a mapping; PRV-959 without it, as for a request outside a sum."""
    found = tree.get(name)
    if not isinstance(found, Mapping) or len(found) > MOST_SITES:
        raise fail("PRV-959", found=f"a request without {name}", expected="a request of a sum")
    return {str(key): value for key, value in found.items()}


def names_of(value: Any) -> list[str]:
    """Return a list of sites' names; raises PAY-106 for anything else."""
    if (
        not isinstance(value, list)
        or len(value) > MOST_SITES
        or len(set(map(str, value))) != len(value)
    ):
        raise fail("PAY-106", found="no list of sites", expected="each site once")
    return [str(name) for name in value]


def texts_of(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Return bytes by site as text."""
    return {site: text_of(content) for site, content in contents.items()}


def contents_of(texts: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the bytes of `texts_of`."""
    return {site: bytes_of(text) for site, text in texts.items()}


def _out_of_turn(site: str, found: str) -> FedsgcgError:
    return fail(
        "PRV-959",
        where=site,
        found=found,
        expected="each step of a sum once, in order",
        action="the coordinator starts another sum, with fresh keys",
    )


def _stranger(site: str, found: str) -> FedsgcgError:
    return fail(
        "PRV-962",
        where=site,
        found=found,
        expected="the identity in partners of site.yaml, or the one of the first sum",
        action=f"ask {site} by telephone for its fingerprint (fedsgcg-site request); if its key is "
        f"new, write it into partners of site.yaml and remove it from {PARTNERS}",
    )


def _unusable(path: Path, found: str) -> FedsgcgError:
    return fail("SITE-501", where=str(path), found=found, expected="a usable site folder")
