"""The site's own policy: `site.yaml` limits what the coordinator can request.

A SuperNode of a real federation names the file in its node config (`site-file`). Folders, device,
roles and sharing then come from the site's file, each privacy floor is the stricter of the two, and
every other setting that the coordinator changed must be in the site's `coordinator_may_set`. A
simulation has no such file and uses the plan unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsgcg.clients.data.case_files import Site
from fedsgcg.clients.guard.approval import is_bundled
from fedsgcg.clients.guard.limits import beyond_limits
from fedsgcg.clients.guard.site_file import CONTROL_VARIATES, SiteFile, read_site_file
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.system import expand
from fedsgcg.common.settings.compose import FOLDERS, compose
from fedsgcg.common.settings.differential_privacy import CHANNELS
from fedsgcg.common.settings.federation import CONSENTS, SHARES, SITE_STATISTICS
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.privacy import PrivacySettings

NODE_KEY = "site-file"
ALWAYS_LEAVES = ("text", "metrics", "cases", "masked")
"""Parts of a reply that need no consent: identity and codes, metrics, results under aliases, and
masked numbers, for whose contents `clients.guard.egress` checks it."""
IGNORED = (*FOLDERS, "data.validation_fraction", "data.split")
"""Settings of a plan for which a site always uses its own value."""


def policy_of(node_config: Mapping[str, Any]) -> SiteFile | None:
    """Return the site's own settings, or None for a node without a site file (a simulation).

    Raises:
        FedsgcgError: DEP-601 when the file cannot be used; POL-701 when it belongs to another site
            than the node config names.
    """
    path = str(node_config.get(NODE_KEY, ""))
    if not path:
        return None
    policy = read_site_file(Path(path))
    named = str(node_config.get("site", policy.site))
    if named != policy.site:
        raise fail(
            "POL-701",
            where=path,
            found=f"the file of site {policy.site!r}",
            expected=f"site {named!r}",
        )
    return policy


def apply_policy(plan: Plan, policy: SiteFile | None) -> Plan:
    """Return the plan with the site's own settings; its digest differs from the federation's.

    Raises:
        FedsgcgError: All refusals at once. POL-702 for a data folder outside the site's own,
            POL-703 for settings that the coordinator may not set, POL-704 when the method needs a
            part that may not leave, POL-706 for a class from outside the approved code, POL-707 for
            a setting beyond a limit of the site, PRV-951 without a protection that it demands.
    """
    if policy is None:
        return plan
    if refused := list(refusals(plan, policy)):
        raise FedsgcgError(*refused)
    return replace(
        plan,
        data=replace(
            plan.data,
            root=policy.data_root,
            validation_fraction=policy.validation_fraction,
            split="share",
        ),
        privacy=effective_floors(plan.privacy, policy, plan.network.num_features),
        site=replace(
            plan.site, **{**_own(policy), "roles": policy.roles, "shares": _shares(policy)}
        ),
    )


def refusals(plan: Plan, policy: SiteFile) -> Iterator[Problem]:
    """Yield a problem for everything in the plan that the site does not allow."""
    if plan.data.root and not is_inside(
        expand(plan.data.root, "data.root"), Path(policy.data_root)
    ):
        action = "leave data.root empty; the site sets its own data folder"
        yield Problem(
            "POL-702",
            plan.data.root,
            f"empty, or a folder in {policy.data_root}",
            action,
            "data.root",
        )
    yield from _not_allowed(plan, policy)
    yield from beyond_limits(plan, policy)
    if "secure_sums" in policy.demands and not plan.privacy.secure_sums.enabled:
        yield Problem(
            "PRV-951",
            "privacy.secure_sums.enabled=false",
            "secure_sums, which demands of site.yaml name",
            "set privacy=secure_sums",
            "privacy.secure_sums.enabled",
        )
    if "shrinkage" in policy.demands and not plan.privacy.shrinkage:
        yield Problem(
            "PRV-951",
            "privacy.shrinkage=false",
            "shrinkage, which demands of site.yaml name",
            "set privacy.shrinkage=true",
            "privacy.shrinkage",
        )
    for where, section in (("method", plan.method), ("network", plan.network)):
        if section.is_own and not is_bundled(section.name) and section.name not in policy.code:
            allowed = ", ".join(policy.code) or "nothing"
            expected = f"code of the approved app bundle, or code that the site allows: {allowed}"
            action = (
                f"the site installs the package, reviews it, and adds {section.name} to code in "
                "its site.yaml"
            )
            yield Problem("POL-706", section.name, expected, action, f"{where}.name")
    scaffold = plan.federation.aggregator == "scaffold" and plan.trains(policy.site)
    if scaffold and CONTROL_VARIATES not in policy.sharing:
        expected = f"only parts that the site shares: {', '.join(policy.sharing) or 'none'}"
        action = (
            "set another federation.aggregator, or have the site add control_variates to sharing"
        )
        found = "an aggregation rule that needs the site's mean gradient"
        yield Problem("POL-704", found, expected, action, "sharing")
    passed_on = plan.shift == "sites" and plan.role(policy.site) == "train"
    if passed_on and SITE_STATISTICS not in policy.sharing:
        expected = f"only parts that the site shares: {', '.join(policy.sharing) or 'none'}"
        action = (
            f"set method.sgcg.sites=false, or have the site add {SITE_STATISTICS} to sharing in "
            "its site.yaml"
        )
        found = "a method that sends this site's class statistics to the other sites"
        yield Problem("POL-704", found, expected, action, "sharing")
    yield from privacy_refusals(plan, policy)
    if (
        plan.method.statistics
        and (plan.role(policy.site) == "train" or _shows_projections(plan, policy))
        and statistics_part(plan) not in policy.sharing
    ):
        expected = f"only parts that the site shares: {', '.join(policy.sharing) or 'none'}"
        action = (
            "set method=source method.statistics=false, or prototypes.shared to a form that the "
            f"site shares, or have the site add {statistics_part(plan)} to sharing"
        )
        yield Problem(
            "POL-704", "a method that needs class statistics", expected, action, "sharing"
        )


def _shows_projections(plan: Plan, policy: SiteFile) -> bool:
    """Whether a site, with or without labels, sends statistics of its slices' projections."""
    return plan.method.describes_projections and plan.trains(policy.site)


def statistics_part(plan: Plan) -> str:
    """Return the entry of a site's `sharing` that the plan's class statistics need."""
    means = plan.prototypes.shared == "means" and not plan.privacy.dp.statistics
    return "means" if means else "statistics"


def privacy_refusals(plan: Plan, policy: SiteFile) -> Iterator[Problem]:
    """Yield a problem if a training site demands differential privacy that the plan lacks."""
    dp = plan.privacy.dp
    if not plan.trains(policy.site):
        return
    if dp.channels and dp.noise == "seeded":
        yield Problem(
            "PRV-979", "seeded", "entropy", "set privacy.dp.noise=entropy", "privacy.dp.noise"
        )
    if plan.privacy.record:
        yield Problem("PRV-980", "true", "false", "set privacy.record=false", "privacy.record")
    missing = set(CHANNELS) - set(dp.channels)
    if not plan.method.statistics:
        missing.discard("statistics")
    if policy.dp_epsilon and missing:
        found = f"privacy.dp.channels={list(dp.channels)}"
        action = "set privacy.dp.channels=[statistics,weights], or train without this hospital"
        yield Problem("PRV-978", found, "noise in every part", action, "privacy.dp.channels")


def effective_floors(
    requested: PrivacySettings, policy: SiteFile, features: int
) -> PrivacySettings:
    """Return the effective floors: the larger of the coordinator's and the site's for each.

    A class needs more pixels than features in any case: the scatter matrix of fewer spans them.
    """
    sums = requested.secure_sums
    return replace(
        requested,
        min_patients=max(requested.min_patients, policy.patient_floor),
        min_pixels=max(requested.min_pixels, policy.min_pixels, features + 1),
        secure_sums=replace(sums, fewest_sites=max(sums.fewest_sites, policy.sum_sites)),
    )


def check_sharing(parts: Mapping[str, int], sharing: tuple[str, ...] | None) -> None:
    """Raise if a reply has a part that the site does not share.

    Args:
        parts: Bytes of each part of the reply.
        sharing: Parts that may leave; None where no policy is set.

    Raises:
        FedsgcgError: POL-704.
    """
    if sharing is None:
        return
    allowed = {*ALWAYS_LEAVES, *sharing}
    if set(sharing) & set(SHARES.values()):
        allowed.add("amplitudes")  # the handler checks which kind of amplitudes is shared
    if "weights" in sharing:
        allowed.add("moments")  # running moments are entries of the weights
    if held := [name for name in parts if name not in allowed]:
        raise fail(
            "POL-704",
            found=", ".join(held),
            expected=", ".join(sharing) or "nothing",
            action="request less, or have the site add it to sharing in its site.yaml",
        )


def only_inside_data_root(site: Site, policy: SiteFile | None) -> Site:
    """Leave out cases whose files, with links resolved, are outside the data folder (POL-702)."""
    if policy is None:
        return site
    root = Path(policy.data_root)
    kept, problems = [], list(site.quarantined)
    for case in site.cases:
        if outside := [path for path in case.files() if not is_inside(path, root)]:
            action = "copy the file into the data folder, or set data_root to its folder"
            found = f"{outside[0]} points to {outside[0].resolve()}"
            problems.append(
                Problem("POL-702", found, f"a file below {root}", action, where=case.name)
            )
        else:
            kept.append(case)
    return replace(site, cases=tuple(kept), quarantined=tuple(problems))


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a path is inside a folder, with all links resolved."""
    return path.resolve().is_relative_to(root.resolve())


def _not_allowed(plan: Plan, policy: SiteFile) -> Iterator[Problem]:
    """Yield a problem for every setting that the coordinator changed but may not set.

    A setting counts as changed if it differs from its default and, in the site's own section, from
    the site's value. Folders of the plan and its validation fraction have no effect at a site and
    are skipped; `data.root` is checked in `refusals`.
    """
    own = {f"site.{name}": value for name, value in flat_settings(_own(policy))}
    requested = [
        (name, value)
        for name, value in flat_settings(plan.to_tree())
        if not policy.may_set(name) and name not in IGNORED and value != own.get(name)
    ]
    if not requested:
        return
    defaults = dict(flat_settings(Plan.from_tree({**compose([]), "output": ""}).to_tree()))
    for name, value in requested:
        default = defaults.get(name)
        if value != default:
            expected = f"{default!r}, or {name} in coordinator_may_set of the site's own file"
            action = "reset the setting, or ask the site to allow it"
            yield Problem("POL-703", repr(value), expected, action, name)


def _own(policy: SiteFile) -> dict[str, Any]:
    """Return the site's own section of a plan as plain values."""
    return {
        "home": policy.home,
        "cache": policy.cache,
        "device": "cuda" if policy.device.startswith("cuda") else policy.device,
        "threads": policy.threads,
        "roles": list(policy.roles),
        "shares": list(_shares(policy)),
        "feature_samples": 0,
    }


def _shares(policy: SiteFile) -> tuple[str, ...]:
    """Return what the site agrees to send besides weights and class statistics."""
    return tuple(name for name in policy.sharing if name in CONSENTS)


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every setting; a map such as `classes` is one value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and name not in ("classes", "structures", "options"):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
