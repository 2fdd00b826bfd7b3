"""Shared amplitudes at the coordinator: merged, or refused with the site's name."""

from dataclasses import replace

import numpy as np
import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.compose import join
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.amplitudes import AmplitudeBank, AmplitudeSummary
from fedsgcg.server.aggregation.amplitudes import merge_amplitudes, usable_amplitudes

SIDE, SIZE = 32, 4


def plan_of(sharing):
    return Plan.from_tree(
        join(["method=ram", f"method.ram.sharing={sharing}", f"data.image_size={SIDE}"])
    )


def windows(seed, count=5, channels=3, size=SIZE):
    return (
        np.random.default_rng(seed)
        .gamma(2.0, 100.0, (count, channels, 2, size, size))
        .astype(np.float32)
    )


def summary(seed, **facts):
    return AmplitudeSummary.from_amplitudes(windows(seed), SIDE, **facts)


def refused(plan, parts):
    with pytest.raises(FedsgcgError) as caught:
        merge_amplitudes(plan, parts)
    return caught.value.problems[0]


def test_the_sum_of_the_summaries_names_who_is_in_it_whatever_the_sites_say():
    one, two = summary(0), summary(1, sites=("someone else",))
    total = AmplitudeSummary.decode(
        merge_amplitudes(plan_of("summary"), [("B", two.encode()), ("A", one.encode())])
    )
    assert total.sites == ("A", "B")
    assert total.count == 10
    np.testing.assert_allclose(total.first, one.first + two.first)
    np.testing.assert_allclose(
        total.without(replace(one, sites=("A",))).covariance, two.covariance, atol=1e-10
    )


def test_banks_stand_one_after_another_under_the_names_of_who_sent_them():
    banks = {
        name: AmplitudeBank(windows(seed, 2), ("forged", "forged"))
        for seed, name in enumerate("BA")
    }
    merged = AmplitudeBank.decode(
        merge_amplitudes(plan_of("bank"), [(n, bank.encode()) for n, bank in banks.items()])
    )
    assert merged.owners == ("A", "A", "B", "B")
    np.testing.assert_array_equal(
        merged.windows, np.concatenate([banks["A"].windows, banks["B"].windows])
    )
    assert merged.without("A").owners == ("B", "B")


@pytest.mark.parametrize("sharing", ["summary", "bank"])
def test_pictures_and_volumes_are_not_mixed(sharing):
    kind = {
        "summary": lambda space: summary(0, space=space).encode(),
        "bank": lambda space: AmplitudeBank(windows(0), ("A",) * 5, space).encode(),
    }[sharing]
    problem = refused(plan_of(sharing), [("A", kind("picture")), ("B", kind("volume"))])
    assert problem.code == "PAY-106"
    assert "pictures at A, volumes at B" in problem.found
    merge_amplitudes(plan_of(sharing), [("A", kind("picture")), ("B", kind("picture"))])


def test_what_cannot_be_used_is_refused_with_the_sites_name(monkeypatch):
    plan, good = plan_of("summary"), summary(0)
    wider = AmplitudeSummary.from_amplitudes(windows(0, size=SIZE + 1), SIDE)
    grey = AmplitudeSummary.from_amplitudes(windows(0, channels=1), SIDE)
    with monkeypatch.context() as older:
        older.setattr("fedsgcg.common.wire.amplitudes.SCHEMA_VERSION", "1")
        old = good.encode()
    for data, code, words in (
        (replace(good, count=2.5).encode(), "STA-201", "2.5 images"),
        (replace(good, side=64).encode(), "PAY-106", "side of 64"),
        (wider.encode(), "PAY-106", "(3, 2, 5, 5)"),
        (grey.encode(), "PAY-106", "(1, 2, 4, 4)"),
        (b"", "PAY-106", "0 bytes"),
        (old, "PAY-107", "version 1"),
    ):
        problem = refused(plan, [("A", good.encode()), ("B", data)])
        assert (problem.code, problem.where) == (code, "B")
        assert words in problem.found
    bank = AmplitudeBank(windows(0, size=SIZE + 1), ("A",) * 5)
    problem = refused(plan_of("bank"), [("A", bank.encode())])
    assert (problem.code, problem.where) == ("PAY-106", "A")


@pytest.mark.parametrize("sharing", ["summary", "bank"])
def test_a_payload_that_cannot_be_used_is_listed_and_the_others_are_kept(sharing):
    good = (
        summary(0).encode()
        if sharing == "summary"
        else AmplitudeBank(windows(0), ("A",) * 5).encode()
    )
    parts = [("A", good), ("B", b"noise"), ("C", good), ("D", good[:-200])]
    usable, problems = usable_amplitudes(plan_of(sharing), parts)
    assert usable == [("A", good), ("C", good)]
    assert [(problem.code, problem.where) for problem in problems] == [
        ("PAY-106", "B"),
        ("PAY-106", "D"),
    ]
