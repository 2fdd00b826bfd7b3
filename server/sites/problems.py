"""Builds the user-facing problem for each code.

The coordinator never receives text from a site. Messages contain only codes, names from the plan
and numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedsgcg.common.errors import CODES, FedsgcgError, Problem, fail
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.server.sites.replies import Collected, admitted

OWN_MESSAGE: Final = (
    "every site failed on the same message, so look first at what this coordinator sends: its "
    "settings, its model and its version of fedsgcg (fedsgcg simulate with the same settings shows "
    "the error here); only then ask a hospital for the last entry of its errors.log"
)


def sentence(code: str) -> str:
    """Return a code with its sentence from the catalogue."""
    return f"{code} {CODES[code]}" if code in CODES else code


def error_logs(plan: Plan, sites: Sequence[str]) -> str:
    """Return where sites keep their own error logs, "" for no site.

    In a deployment the coordinator knows only the path inside a site's kit.
    """
    if sites and not plan.data.root and not plan.site.home:
        return f"home/logs and home/errors.log of the kit at {' and '.join(sites)}"
    homes = {
        site: Path(plan.site.home.replace("{site}", site) or f"{plan.output}/sites/{site}")
        for site in sites
    }
    return " and ".join(f"{home / 'errors.log'} at the site" for home in homes.values())


def training_sites(number: int) -> str:
    """Return a number of training sites as text."""
    return f"{number} training site{'' if number == 1 else 's'}"


def not_enough_enrolled(
    plan: Plan,
    training: Sequence[str],
    quorum: int,
    refusals: Mapping[str, Problem],
    missing: Sequence[str],
) -> FedsgcgError:
    """Return RND-401: why the federation cannot start.

    Args:
        plan: The plan.
        training: Training sites that enrolled.
        quorum: Number of training sites needed.
        refusals: Why sites or nodes could not enrol, by name.
        missing: Expected sites that have not answered, including the held-out site.
    """
    heldout = plan.heldout
    found = []
    if heldout in refusals:
        found.append(
            f"the held-out site {heldout} cannot be used: {sentence(refusals[heldout].code)}"
        )
    elif heldout and heldout in missing:
        found.append(f"the held-out site {heldout} has not enrolled")
    met = "the quorum is met" if len(training) >= quorum else f"the quorum of {quorum} is not met"
    names = ", ".join(sorted(training)) or "none"
    found.append(f"{training_sites(len(training))} ({names}), {met}")
    found += [f"missing: {', '.join(missing)}"] if missing else []
    refused = {
        name: sentence(problem.code)
        for name, problem in sorted(refusals.items())
        if name != heldout
    }
    if refused:
        found.append(f"refused: {', '.join(f'{name}: {text}' for name, text in refused.items())}")
    known = [name for name in sorted(refusals) if name in {heldout, *plan.members()}]
    actions = [f"fix the problems listed in {error_logs(plan, known)}"] if known else []
    if not training and all_failed_alike([problem.code for problem in refusals.values()]):
        actions = [OWN_MESSAGE]
    actions += [f"start {', '.join(missing)}"] if missing else []
    actions += ["lower federation.quorum"] if 0 < len(training) < quorum else []
    return fail(
        "RND-401",
        found="; ".join(found),
        expected=training_sites(quorum) + (f" and the held-out site {heldout}" if heldout else ""),
        action=", or ".join(actions or ["start the sites"]) + "; the same command resumes the run",
    )


def quorum_missed(
    plan: Plan, collected: Sequence[Collected], quorum: int, number: int
) -> FedsgcgError:
    """Return RND-402: which sites are missing from a round and why."""
    lost = {
        part.answer.site: sentence(part.verdict.code)
        for part in collected
        if not part.verdict.accepted
    }
    reasons = "; ".join(f"{site}: {text}" for site, text in lost.items())
    look = f"see {error_logs(plan, list(lost))}; " if lost else ""
    action = (
        f"{look}fix these sites or lower federation.quorum, then start the same command "
        "again: completed rounds are kept"
    )
    if all_failed_alike([part.verdict.code for part in collected]):
        action = OWN_MESSAGE
    return fail(
        "RND-402",
        where=f"round {number}",
        found=f"{len(admitted(collected))} admitted" + (f"; {reasons}" if reasons else ""),
        expected=training_sites(quorum),
        action=action,
    )


def all_failed_alike(codes: Collection[str]) -> bool:
    """Whether two or more sites were asked and each failed unexpectedly (SITE-500).

    Independent machines hardly break at the same moment; what they share is the message.
    """
    return len(codes) > 1 and set(codes) == {"SITE-500"}


def heldout_unanswered(plan: Plan, reason: Problem | None) -> FedsgcgError:
    """Return RND-403: why the held-out site's evaluation is missing."""
    found = "no answer"
    if reason:
        found = " ".join(filter(None, (sentence(reason.code), reason.found)))
    return fail(
        "RND-403",
        where=plan.heldout,
        found=found,
        expected="per-case results of its test cases",
        action=f"see {error_logs(plan, [plan.heldout])}, then start the same command again: "
        "only the evaluation is left",
    )


def too_few_classes(
    plan: Plan, number: int, prototypes: ClassStatistics | None, collected: Sequence[Collected]
) -> Problem | None:
    """Return STA-203 if a round of a contrastive method has fewer than two active classes.

    The contrastive term needs at least two classes. Without them the sites leave it out, and the
    round trains with the method's other losses.

    Args:
        plan: The plan.
        number: Number of the round.
        prototypes: The prototypes sent to the training sites; None if there are none yet.
        collected: Answers with class statistics; empty if the coordinator restarted after them.

    Returns:
        The problem, or None.
    """
    settings = plan.prototypes
    guided = plan.method.contrasts and plan.method.statistics and settings.weight > 0
    if not guided or prototypes is None or number <= settings.warmup_rounds:
        return None
    active = int((prototypes.count >= settings.min_count).sum())
    if active >= 2:
        return None
    withheld = {part.answer.site: _withheld(plan, part) for part in admitted(collected)}
    reasons = [f"{site} withholds {', '.join(names)}" for site, names in withheld.items() if names]
    if withheld and not reasons:
        reasons = ["no site withholds a class"]
    have = "has" if active == 1 else "have"
    classes = f"{active} of {plan.data.num_classes} classes {have} prototypes"
    return Problem(
        "STA-203",
        where=f"round {number}",
        found="; ".join([classes, *reasons]),
        expected=f"two classes of {settings.min_count} pixels or more over all sites",
        action=f"lower privacy.min_patients ({plan.privacy.min_patients}) or privacy.min_pixels "
        f"({plan.privacy.min_pixels}) if the hospitals agree",
    )


def no_negatives(plan: Plan, number: int, sites: Sequence[str]) -> Problem:
    """Return PRV-964: sites that get no statistics of other sites' projections.

    Args:
        plan: The plan.
        number: Number of the round.
        sites: The sites; their round uses the negatives of its own batches.
    """
    least = plan.method.segclr.projection + 1
    return Problem(
        "PRV-964",
        where=f"round {number}",
        found=f"no projections of a hospital other than {', '.join(sites)}",
        expected=f"another hospital with {least} training slices or more, of "
        f"{plan.privacy.min_patients} patients or more",
        action="lower method.segclr.projection, or set method.segclr.global_negatives=false",
    )


def _withheld(plan: Plan, part: Collected) -> list[str]:
    """Classes that a site reports as withheld; names that are not in the plan are dropped."""
    stated = part.reply.details.get("withheld")
    entries = stated if isinstance(stated, list) else []
    return [name for name in plan.described if name in entries]
