"""What sites share of their images' amplitudes with `method.ram.sharing=summary | bank`: consent, check and merge.

It goes beyond weights and class statistics, so every training site's own file must allow it (methods.md 2.8).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from common.amplitudes import AmplitudeSummary, decode_bank, encode_bank
from common.errors import FedsgcgError, Problem, fail
from common.plan import SHARES, Plan
from server.enrolment import Member


def sharing_level(plan: Plan) -> str:
    """Return what `site.shares` must hold for this plan, "" when nothing is shared."""
    return SHARES.get(plan.method.ram.sharing, "") if plan.method.mixes else ""


def check_consent(level: str, members: Mapping[str, Member], training: Iterable[str]) -> None:
    """Refuse a plan that asks for more than a training site allows.

    Raises:
        FedsgcgError: ROL-202, one problem a site.
    """
    problems = []
    for site in training:
        allowed = members[site].details.get("shares")
        if level not in (allowed if isinstance(allowed, list) else []):
            action = f"set method.ram.sharing=local, or have the site add {level} to `shares` in its own file"
            problems.append(Problem("ROL-202", f"the site does not share its {level}", level, action, site))
    if problems:
        raise FedsgcgError(*problems)


def merge_amplitudes(plan: Plan, parts: Sequence[tuple[str, bytes]]) -> bytes:
    """Merge what the sites sent: the sum of their summaries, or their banks behind each other, in the order of names.

    Raises:
        FedsgcgError: PAY-106, PAY-107 or STA-201 naming the site for a payload that cannot be used.
    """
    if plan.method.ram.sharing == "summary":
        summaries = [_summary(site, data) for site, data in sorted(parts)]
        if len({summary.first.shape for summary in summaries}) > 1:
            raise fail("PAY-106", found="amplitude windows of several sizes", expected="one size")
        total = summaries[0]
        for summary in summaries[1:]:
            total = total + summary
        return total.encode()
    banks = [(site, *_bank(site, data)) for site, data in sorted(parts)]
    if len({windows.shape[1:] for _, windows, _ in banks}) > 1:
        raise fail("PAY-106", found="amplitude windows of several sizes", expected="one size")
    owners = [site for site, windows, _ in banks for _ in windows]
    return encode_bank(np.concatenate([windows for _, windows, _ in banks]), owners)


def _summary(site: str, data: bytes) -> AmplitudeSummary:
    try:
        return AmplitudeSummary.decode(data)
    except FedsgcgError as error:
        raise fail(error.code, where=site, found="an amplitude summary that cannot be used") from error


def _bank(site: str, data: bytes) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], list[str]]:
    try:
        return decode_bank(data)
    except FedsgcgError as error:
        raise fail(error.code, where=site, found="an amplitude bank that cannot be used") from error
