"""Amplitudes that sites share with `method.ram.sharing=summary | bank`: consent, checks, merge.

They reveal more than weights and class statistics, so every training site must allow the sharing in
its own `site.yaml` (docs/explanation/ram-dsir.md, "Federated").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import TypeVar

import numpy as np

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.settings.federation import SHARES
from fedsgcg.common.settings.message_sizes import CHANNELS
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.amplitudes import AmplitudeBank, AmplitudeSummary
from fedsgcg.server.sites.enrolment import Member

Amplitudes = TypeVar("Amplitudes", AmplitudeSummary, AmplitudeBank)


def sharing_level(plan: Plan) -> str:
    """Return the entry that `site.shares` needs for this plan, "" if nothing is shared."""
    return SHARES.get(plan.method.ram.sharing, "") if plan.method.mixes else ""


def check_consent(
    level: str,
    members: Mapping[str, Member],
    training: Iterable[str],
    instead: str = "method.ram.sharing=local",
) -> None:
    """Refuse a plan that asks for more than a training site allows; `instead` asks for less.

    Raises:
        FedsgcgError: ROL-202, one problem per site.
    """
    problems = []
    for site in training:
        allowed = members[site].details.get("shares")
        if level not in (allowed if isinstance(allowed, list) else []):
            action = f"set {instead}, or ask the site to add {level} to `shares` in its own file"
            problems.append(
                Problem("ROL-202", f"the site does not share its {level}", level, action, site)
            )
    if problems:
        raise FedsgcgError(*problems)


def usable_amplitudes(
    plan: Plan, parts: Sequence[tuple[str, bytes]]
) -> tuple[list[tuple[str, bytes]], list[Problem]]:
    """Separate the payloads that can be merged from the others, so that none stops the run.

    Returns:
        The usable parts, and one PAY-106, PAY-107 or STA-201 for each other one.
    """
    read = _summary if plan.method.ram.sharing == "summary" else _bank
    usable: list[tuple[str, bytes]] = []
    problems: list[Problem] = []
    for site, data in parts:
        try:
            read(plan, site, data)
            usable.append((site, data))
        except FedsgcgError as error:
            problems += error.problems
    return usable, problems


def merge_amplitudes(plan: Plan, parts: Sequence[tuple[str, bytes]]) -> bytes:
    """Sum the sites' summaries, or concatenate their banks in the order of the sites' names.

    The result names the sites whose images it contains, as the coordinator knows them: a site whose
    answer was rejected must not subtract its images from a sum that does not contain them.

    Raises:
        FedsgcgError: PAY-106, PAY-107 or STA-201 naming the site for a payload that cannot be used.
    """
    if plan.method.ram.sharing == "summary":
        summaries = [_summary(plan, site, data) for site, data in sorted(parts)]
        _check_one_space([(summary.sites[0], summary.space) for summary in summaries])
        return reduce(add, summaries).encode()
    banks = [(site, _bank(plan, site, data)) for site, data in sorted(parts)]
    _check_one_space([(site, bank.space) for site, bank in banks])
    owners = tuple(site for site, bank in banks for _ in bank.owners)
    windows = np.concatenate([bank.windows for _, bank in banks])
    return AmplitudeBank(windows, owners, banks[0][1].space).encode()


def _summary(plan: Plan, site: str, data: bytes) -> AmplitudeSummary:
    summary = _decoded(AmplitudeSummary.decode, site, data)
    _check_size(plan, site, summary.first.shape)
    if summary.side != plan.data.image_size:
        raise fail(
            "PAY-106",
            where=site,
            found=f"a side of {summary.side}",
            expected=f"{plan.data.image_size} pixels",
        )
    return replace(summary, sites=(site,))


def _bank(plan: Plan, site: str, data: bytes) -> AmplitudeBank:
    bank = _decoded(AmplitudeBank.decode, site, data)
    _check_size(plan, site, bank.windows.shape[1:])
    return bank


def _decoded(decode: Callable[[bytes], Amplitudes], site: str, data: bytes) -> Amplitudes:
    try:
        return decode(data)
    except FedsgcgError as error:
        problem = error.problems[0]
        raise fail(
            problem.code, where=site, found=problem.found, expected=problem.expected
        ) from error


def _check_size(plan: Plan, site: str, shape: tuple[int, ...]) -> None:
    size = math.floor(plan.data.image_size * plan.method.ram.window) + 1
    wanted = (CHANNELS, 2, size, size)
    if shape != wanted:
        raise fail(
            "PAY-106", where=site, found=f"amplitude windows of shape {shape}", expected=f"{wanted}"
        )


def _check_one_space(spaces: Sequence[tuple[str, str]]) -> None:
    if len({space for _, space in spaces}) > 1:
        found = ", ".join(f"{space}s at {site}" for site, space in spaces)
        action = (
            "train hospitals with pictures and hospitals with volumes separately, or set "
            "method.ram.sharing=local"
        )
        raise fail(
            "PAY-106",
            found=f"amplitudes of {found}",
            expected="pictures alone or volumes alone",
            action=action,
        )
