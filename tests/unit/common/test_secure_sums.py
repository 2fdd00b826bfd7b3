"""What the parties of a secure sum refuse, each with its code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.secure_sums.keys import SiteKey, SumKeys
from fedsgcg.common.secure_sums.party import Party, threshold_of
from fedsgcg.common.settings.rules import rule_problems
from tests.support.plans import small_plan
from tests.support.summing import SESSION, parties_of, run_sum

NAMES = ["A", "B", "C", "D"]


def code_of(work: Callable[[], object]) -> str:
    with pytest.raises(FedsgcgError) as caught:
        work()
    return caught.value.code


def keys_of(parties: dict[str, Party]) -> dict[str, SumKeys]:
    return {name: party.advertise() for name, party in parties.items()}


def shared(parties: dict[str, Party]) -> dict[str, dict[str, bytes]]:
    keys = keys_of(parties)
    return {name: party.share(keys) for name, party in parties.items()}


def masked(parties: dict[str, Party]) -> dict[str, dict[str, bytes]]:
    shares = shared(parties)
    for party in parties.values():
        party.mask(np.zeros(2, np.uint64), list(parties))
    return shares


def test_thresholds_are_more_than_two_thirds_and_at_least_three() -> None:
    assert [threshold_of(n) for n in (3, 4, 5, 6, 7, 64)] == [3, 3, 4, 5, 5, 43]
    assert threshold_of(4, minimum=4) == 4


@pytest.mark.row(64)
def test_a_sum_of_two_is_refused_by_both_sides() -> None:
    parties = parties_of(["A", "B"])
    assert code_of(lambda: parties["A"].share(keys_of(parties))) == "PRV-953"
    numbers = {name: np.zeros(1, np.uint64) for name in ("A", "B")}
    assert code_of(lambda: run_sum(numbers)) == "PRV-953"


@pytest.mark.row(64)
def test_a_site_gives_no_share_for_a_sum_of_one() -> None:
    parties = parties_of(NAMES)
    masked(parties)
    assert code_of(lambda: parties["A"].agree(["A"], "reference")) == "PRV-953"


def test_a_key_of_another_sum_is_refused() -> None:
    replayed = parties_of(["B"], session="an earlier sum of it")["B"].advertise()
    parties = parties_of(NAMES)
    keys = keys_of(parties) | {"B": replayed}
    assert code_of(lambda: parties["A"].share(keys)) == "PRV-955"


def test_a_key_that_another_site_signed_is_refused() -> None:
    parties = parties_of(NAMES)
    keys = keys_of(parties)
    assert code_of(lambda: parties["A"].share(keys | {"B": keys["C"]})) == "PRV-955"
    changed = replace(keys["B"], mask=keys["C"].mask)
    assert code_of(lambda: parties["A"].share(keys | {"B": changed})) == "PRV-955"


def test_one_identity_under_two_names_is_refused() -> None:
    parties = parties_of(NAMES)
    twin = Party("E", SESSION, SiteKey.simulated("D")).advertise()
    keys = keys_of(parties) | {"E": twin}
    assert code_of(lambda: parties["A"].share(keys)) == "PRV-955"


def test_a_share_from_a_stranger_is_refused() -> None:
    parties = parties_of(NAMES)
    shares = masked(parties)
    stranger = parties_of(NAMES)  # the same names, other secrets
    foreign = shared(stranger)
    signatures = {name: party.agree(NAMES, "r") for name, party in parties.items()}
    received = {name: shares[name]["A"] for name in "BCD"}
    received["B"] = foreign["B"]["A"]
    assert code_of(lambda: parties["A"].open(signatures, received)) == "PRV-956"
    del received["B"]
    assert code_of(lambda: parties["A"].open(signatures, received)) == "PRV-956"


def test_a_site_without_keys_cannot_be_in_the_sum() -> None:
    parties = parties_of(NAMES)
    shared(parties)
    words = np.zeros(2, np.uint64)
    assert code_of(lambda: parties["A"].mask(words, [*NAMES, "E"])) == "PRV-956"
    assert code_of(lambda: parties["A"].mask(words, ["B", "C", "D"])) == "PRV-956"


@pytest.mark.parametrize(
    ("contributors", "reference"), [(["A", "B", "C"], "r"), (NAMES, "another model or prototypes")]
)
def test_sites_that_were_shown_different_things_open_nothing(
    contributors: list[str], reference: str
) -> None:
    parties = parties_of(NAMES)
    shares = masked(parties)
    signatures = {name: parties[name].agree(NAMES, "r") for name in "ACD"}
    signatures["B"] = parties["B"].agree(contributors, reference)
    received = {name: shares[name]["A"] for name in "BCD"}
    assert code_of(lambda: parties["A"].open(signatures, received)) == "PRV-958"


def test_each_step_is_taken_once_and_in_order() -> None:
    parties = parties_of(NAMES)
    party, words = parties["A"], np.zeros(2, np.uint64)
    assert code_of(lambda: party.mask(words, NAMES)) == "PRV-959"
    masked(parties)
    for again in (
        party.advertise,
        lambda: party.share({}),
        lambda: party.mask(words, NAMES),
        lambda: party.open({}, {}),
    ):
        assert code_of(again) == "PRV-959"
    party.agree(NAMES, "r")
    assert code_of(lambda: party.agree(["A", "B", "C"], "r")) == "PRV-959"


def test_a_site_gives_one_kind_of_share_of_each_site() -> None:
    numbers = {name: np.ones(1, np.uint64) for name in NAMES}
    found = run_sum(numbers, {"D": "answers"})
    party, restored = found.parties["A"], found.opening.opened["A"]
    assert set(restored) == set(NAMES)
    assert all(len(share) == 33 for share in restored.values())
    assert code_of(lambda: party.open(found.opening.signatures, {})) == "PRV-959"
    assert int(found.opening.result()[0]) == 3


def test_shares_of_a_wrong_key_are_noticed() -> None:
    found = run_sum({name: np.ones(1, np.uint64) for name in NAMES}, {"D": "answers"})
    found.opening.opened["A"]["D"] = found.opening.opened["A"]["B"]
    assert code_of(found.opening.result) == "PRV-961"


def test_the_state_survives_as_text() -> None:
    parties = parties_of(NAMES)
    shares = masked(parties)
    again = {name: Party.from_tree(party.to_tree(), party.key) for name, party in parties.items()}
    signatures = {name: party.agree(NAMES, "r") for name, party in again.items()}
    opened = again["A"].open(signatures, {name: shares[name]["A"] for name in "BCD"})
    assert set(opened) == set(NAMES)


@pytest.mark.row(64)
def test_what_the_coordinator_receives_holds_no_number_of_a_single_site() -> None:
    secret = np.frombuffer(b"one site's number, 32 bytes long", np.uint64)
    for gone in ({}, {"D": "check"}, {"D": "answers"}):
        numbers = {name: np.zeros(4, np.uint64) for name in NAMES} | {"A": secret}
        found = run_sum(numbers, gone)
        assert found.opening.result().tobytes() == secret.tobytes()
        assert all(secret.tobytes()[k : k + 8] not in b"".join(found.seen) for k in (0, 8, 16, 24))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({}, ""),
        ({"federation__aggregator": "fedadam"}, ""),
        *(
            ({"federation__aggregator": name}, "federation.aggregator")
            for name in ("median", "trimmed_mean", "krum", "scaffold", "feddg_ga", "fedce")
        ),
        ({"federation__screening": "reject"}, "federation.screening"),
        ({"prototypes__memory": "overlay"}, "prototypes.memory"),
        ({"prototypes__memory": "online"}, "prototypes.memory"),
        ({"prototypes__weighting": "sites"}, "prototypes.weighting"),
        ({"prototypes__trimmed": 1}, "prototypes.trimmed"),
        ({"unlabelled": ["C"]}, "unlabelled"),
    ],
)
def test_settings_that_need_single_sites_are_refused_with_the_reason(
    changes: dict[str, object], where: str, tmp_path: Path
) -> None:
    plan = small_plan(tmp_path, privacy={"secure_sums": {"enabled": True}}, **changes)
    problems = [p for p in rule_problems(plan, list("ABCEF")) if p.code.startswith("PRV")]
    assert [problem.where for problem in problems] == ([where] if where else [])
    assert all(problem.code == "PRV-952" and ":" in problem.expected for problem in problems)
    plain = small_plan(tmp_path, **changes)
    assert not [p for p in rule_problems(plain, list("ABCEF")) if p.code.startswith("PRV")]


def test_a_plan_with_two_training_hospitals_is_refused(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, privacy={"secure_sums": {"enabled": True}})
    assert [problem.code for problem in rule_problems(plan, ["A", "B"])] == ["PRV-953"]
