"""Every method with every rule, owner and role: what makes no sense is refused with its reason."""

import itertools
from dataclasses import replace

import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.settings.aggregation import AGGREGATOR_NAMES
from fedsgcg.common.settings.choices import choices_of
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.preflight import plan_problems
from tests.support.methods import with_method

SITES = ["A", "B", "C", "D", "E", "F", "G"]  # G is held out; krum needs five that train
OWNERS = ("by_site", "pooled", "local")
SEVERAL = ("isda_between", "segclr_global", "sgcg_between", "sgcg_sites")
"""Methods that need what differs between sites."""
ROLES = ("all", "unlabelled", "upper_bound")


@pytest.fixture(scope="module")
def plans():
    """The plan of every choice of `method`, on seven hospitals."""
    names = f"data.sites=[{','.join(SITES)}]"
    tree = compose(["data.root=/none", names, "heldout=G", "method=source"]) | {"output": "run"}
    return {name: Plan.from_tree(with_method(tree, name)) for name in choices_of("method")}


def refusals(plan, rule, owner, role):
    """Return the codes and texts with which a combination is refused."""
    changes = {"federation": replace(plan.federation, aggregator=rule, ownership=owner)}
    if owner == "local":
        changes["data"] = replace(plan.data, sites=["A", "G"])
    if role != "all":
        changes["unlabelled"] = ("F",)
    if role == "upper_bound":
        changes["method"] = replace(plan.method, unlabelled="labels")
    try:
        found = replace(plan, **changes)
    except FedsgcgError as error:
        return {(problem.code, problem.where) for problem in error.problems}, str(error)
    problems = list(plan_problems(found))
    return {(problem.code, problem.where) for problem in problems}, " ".join(map(str, problems))


def expected(name, plan, rule, owner, role):
    """Return what is refused, as docs/reference/method-cards.md and aggregation.md state it."""
    method = plan.method
    reasons = set()
    if method.name in ("moon", "dofe") and owner != "by_site":
        return {("CFG-001", "federation.ownership")}
    if name in SEVERAL and owner != "by_site":
        few = {("CFG-001", "data.sites")} if owner == "local" else set()
        return {("CFG-001", "federation.ownership")} | few
    use = "labels" if role == "upper_bound" else method.unlabelled
    if role != "all" and use == "labels" and owner == "pooled":
        return {("CFG-001", "federation.ownership")}
    if role != "all" and owner == "local":
        reasons.add(("CFG-001", "unlabelled"))  # F is not there
    if role != "all" and use == "refuse":
        reasons.add(("ROL-211", "unlabelled"))
    if role != "all" and owner == "by_site" and use in ("labels", "contrast", "refuse"):
        if rule in ("feddg_ga", "fedce"):
            reasons.add(("CFG-042", "federation.aggregator"))
        if rule == "krum" and use != "labels":
            reasons.add(("CFG-042", "federation.aggregator"))
    return reasons


def test_every_combination_is_legal_or_refused_with_its_reason(plans):
    legal = 0
    for name, plan in plans.items():
        for rule, owner, role in itertools.product(AGGREGATOR_NAMES, OWNERS, ROLES):
            found, text = refusals(plan, rule, owner, role)
            wanted = expected(name, plan, rule, owner, role)
            assert found == wanted, (name, rule, owner, role, text)
            legal += not found
    assert legal > len(plans) * len(AGGREGATOR_NAMES)


@pytest.mark.parametrize("rule", ["feddg_ga", "fedce", "krum"])
def test_the_reason_names_the_hospital_and_what_to_do(plans, rule):
    _, text = refusals(plans["segclr"], rule, "by_site", "unlabelled")
    assert f"{rule} with F" in text
    assert "federation.aggregator=" in text
