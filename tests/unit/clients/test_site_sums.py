"""A hospital with its own file in a secure sum, with partners that may send anything."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.secure_sums import texts_of
from fedsgcg.common.secure_sums.keys import SiteKey, SumKeys, bytes_of, key_fingerprint, text_of
from fedsgcg.common.secure_sums.opening import Opening
from fedsgcg.common.secure_sums.party import Party
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.secure_sums import SUM
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.messages import Reply
from tests.support import sites
from tests.support.policed import Hospital

SETTINGS = (
    *("privacy=secure_sums", "method=source", "method.steps_per_round=2"),
    *("federation.norm_policy=average", "method.batch_size=4"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sites.hospitals(tmp_path_factory.mktemp("site_sums") / "data", cases=8)


@pytest.fixture
def north(data: Path, tmp_path: Path) -> Hospital:
    return Hospital(data, tmp_path / "kit")


@dataclass
class Sum:
    """One sum of North with partners in memory."""

    north: Hospital
    session: str = "0123456789abcdef"
    partners: tuple[str, ...] = ("East", "South-East", "West")
    identities: Mapping[str, SiteKey] = field(default_factory=dict)
    number: int = 1

    def __post_init__(self) -> None:
        self.plan: Plan = self.north.plan(*SETTINGS)
        self.parties = {
            name: Party(name, self.session, self.identities.get(name, SiteKey.simulated(name)))
            for name in self.partners
        }
        self.opening = Opening(self.session, 0)

    def ask(self, kind: str, **options: Any) -> Reply:
        own = {"session": self.session, **options}
        if kind == wire.TRAIN:
            return self.north.ask(kind, self.plan, self.number, options={SUM: own})
        return self.north.ask(
            kind, self.plan, self.number, sites.weights(self.plan), options={SUM: own}
        )

    def keys(self) -> Reply:
        reply = self.ask(wire.SUM_KEYS)
        if not reply.error:
            self.opening.add_keys("North", SumKeys.from_tree(reply.details["keys"]))
            for name, party in self.parties.items():
                self.opening.add_keys(name, party.advertise())
        return reply

    def shares(self) -> Reply:
        trees = {name: keys.to_tree() for name, keys in self.opening.keys.items()}
        reply = self.ask(wire.SUM_SHARES, keys=trees)
        if not reply.error:
            shares = reply.details["shares"]
            self.opening.add_shares("North", {name: bytes_of(shares[name]) for name in shares})
            for name, party in self.parties.items():
                self.opening.add_shares(name, party.share(self.opening.keys))
        return reply

    def answers(self, **changes: Any) -> Reply:
        sharing = sorted(self.opening.shares)
        reply = self.ask(wire.TRAIN, **{"sites": sharing, "examples": 64.0, **changes})
        if reply.masked is not None:
            self.opening.resize(reply.masked.size)
            self.opening.add_masked("North", reply.masked)
            for name, party in self.parties.items():
                zeros = np.zeros(reply.masked.size, np.uint64)
                self.opening.add_masked(name, party.mask(zeros, sharing))
        return reply

    def check(self, reference: str = "", gone: tuple[str, ...] = ()) -> Reply:
        there = [name for name in self.opening.contributors if name not in gone]
        reply = self.ask(wire.SUM_CHECK, sites=there)
        if reply.error:
            return reply
        self.opening.contributors = there
        state = next((self.north.folder / "home" / "secure_sums").glob("*.json"))
        subject = json.loads(state.read_text())["party"]["reference"]
        signature = bytes_of(reply.details["signature"])
        self.opening.add_signature("North", signature, subject)
        for name in there[1:] if there[0] == "North" else [n for n in there if n != "North"]:
            made = self.parties[name].agree(there, reference or subject)
            self.opening.signatures[name] = made
        return reply

    def open(self) -> Reply:
        signatures = texts_of(self.opening.signatures)
        shares = texts_of(self.opening.shares_for("North"))
        return self.ask(wire.SUM_OPEN, signatures=signatures, shares=shares)

    def run(self, gone: tuple[str, ...] = ()) -> Reply:
        for step in (self.keys, self.shares, self.answers):
            reply = step()
            assert not reply.error, reply.error
        assert not self.check(gone=gone).error
        return self.open()


def code(reply: Reply) -> str:
    assert reply.masked is None
    assert reply.weights is None
    return reply.error


def test_what_leaves_is_masked_and_in_the_ledger(north: Hospital) -> None:
    one = Sum(north)
    one.keys()
    one.shares()
    reply = one.answers()
    assert (reply.error, reply.weights, reply.statistics, reply.moments) == ("", None, None, None)
    assert set(reply.metrics) <= {"seconds", "micro_batches", "learning_rate", "steps"}
    home = north.folder / "home"
    line = ledger.entries(home / "ledger.jsonl")[-1]
    assert line["parts"]["masked"] > 8 * sites.weights(one.plan).values.size
    assert "weights" not in line["parts"]
    (state,) = (home / "secure_sums").glob("*.json")
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    secrets = [text for text in json.loads(state.read_text())["party"]["secrets"] if text]
    assert len(secrets) == 5
    one.check()
    opened = one.open().details["opened"]
    assert set(opened) == {"North", *one.partners}
    after = json.loads(state.read_text())
    assert not any(after["party"]["secrets"])
    assert not list((home / "secure_sums").glob("*.npy"))


@pytest.mark.row(64)
def test_a_repeated_request_gets_the_same_answer_and_another_one_none(north: Hospital) -> None:
    one = Sum(north)
    first = one.keys()
    assert one.ask(wire.SUM_KEYS).details == first.details
    one.shares()
    sharing = sorted(one.opening.shares)
    answer = one.ask(wire.TRAIN, sites=sharing, examples=64.0)
    again = one.ask(wire.TRAIN, sites=sharing, examples=64.0)
    assert np.array_equal(answer.masked, again.masked)  # type: ignore[arg-type]
    assert code(one.ask(wire.TRAIN, sites=sharing, examples=128.0)) == "PRV-959"
    other = {SUM: {"session": one.session, "sites": sharing, "examples": 64.0}}
    model = sites.weights(one.plan, seed=1)
    assert code(north.ask(wire.TRAIN, one.plan, 1, model, options=other)) == "PRV-959"
    assert code(north.ask(wire.TRAIN, one.plan, 2, options=other)) == "PRV-959"
    assert code(north.ask(wire.TRAIN, one.plan, 1)) == "PRV-959"


@pytest.mark.row(64)
def test_a_sum_is_opened_once_and_its_session_never_again(north: Hospital) -> None:
    one = Sum(north)
    assert not one.run().error
    assert not one.open().error  # the same request, e.g. after a lost answer
    again = {"sites": sorted(one.opening.shares), "examples": 64.0}
    assert code(one.ask(wire.TRAIN, **again)) == "PRV-959"
    assert code(one.ask(wire.SUM_CHECK, sites=["North", "East", "West"])) == "PRV-959"
    assert not Sum(north, session="another one, later").keys().error
    assert code(one.ask(wire.SUM_KEYS)) == "PRV-959"


@pytest.mark.row(64)
def test_a_second_sum_of_the_same_model_with_one_site_less_is_refused(north: Hospital) -> None:
    assert not Sum(north).run().error
    assert code(Sum(north, session="the second session").run(gone=("West",))) == "PRV-954"


def test_other_contributors_or_another_reference_open_nothing(north: Hospital) -> None:
    one = Sum(north)
    one.keys()
    one.shares()
    one.answers()
    one.check(reference="another model or other prototypes")
    assert code(one.open()) == "PRV-958"


def test_a_sum_of_few_sites_is_refused_by_the_stricter_of_plan_and_site(
    data: Path, tmp_path: Path
) -> None:
    strict = Sum(Hospital(data, tmp_path / "kit", {"sum_sites": 5}))
    strict.keys()
    assert code(strict.shares()) == "PRV-953"


def test_partners_are_those_of_the_file_or_of_the_first_sum(data: Path, tmp_path: Path) -> None:
    known = {name: key_fingerprint(SiteKey.simulated(name).public) for name in Sum.partners}
    listed = Sum(Hospital(data, tmp_path / "listed", {"partners": known}))
    listed.keys()
    assert not listed.shares().error
    wrong = known | {"West": known["East"]}
    other = Sum(Hospital(data, tmp_path / "wrong", {"partners": wrong}))
    other.keys()
    assert code(other.shares()) == "PRV-962"
    north = Hospital(data, tmp_path / "kit")
    first = Sum(north)
    first.keys()
    assert not first.shares().error
    impostor = {"West": SiteKey.simulated("somebody else")}
    second = Sum(north, session="the second session", identities=impostor)
    second.keys()
    assert code(second.shares()) == "PRV-962"


def test_a_demand_of_the_site_cannot_be_lowered(data: Path, tmp_path: Path) -> None:
    north = Hospital(data, tmp_path / "kit", {"demands": ("secure_sums",)})
    plain = north.plan("method=source")
    for kind in (wire.ENROL, wire.TRAIN):
        assert code(north.ask(kind, plain)) == "PRV-951"
    assert not Sum(north).keys().error


def test_more_slices_than_the_bound_are_refused(north: Hospital) -> None:
    one = Sum(north)
    one.keys()
    one.shares()
    assert code(one.answers(examples=1.0)) == "PRV-957"
    assert code(one.answers(examples="many")) == "PAY-106"


def test_a_key_or_share_that_is_no_text_is_refused(north: Hospital) -> None:
    one = Sum(north)
    one.keys()
    assert code(one.ask(wire.SUM_SHARES, keys={"East": 3})) == "PAY-106"
    assert code(one.ask(wire.SUM_SHARES, keys={"East": {"cipher": "%"}})) == "PAY-106"
    assert code(one.ask(wire.SUM_SHARES, keys=[])) == "PRV-959"
    assert text_of(b"") == ""
