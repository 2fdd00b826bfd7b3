"""The site's own policy: what the coordinator wishes is carried out only as far as `site.yaml` lets it.

A SuperNode of a real federation names the file in its node config (`site-file`). Then its folders, device, roles and
sharing are the site's, the floors are the stricter of both, and every other setting that the coordinator changed must
be on the site's list. A simulation has no such file: there everything stays as the plan says.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from clients.data.case_files import Site
from clients.guard.approval import FOLDERS as FOLDERS_OF_CODE
from clients.guard.site_file import SiteFile, read_site_file
from common.errors import FedsgcgError, Problem, fail
from common.files.system import expand
from common.settings.compose import FOLDERS, compose
from common.settings.federation import SHARES, PrivacySettings
from common.settings.plan import Plan

NODE_KEY = "site-file"
ALWAYS_LEAVES = ("text", "metrics", "cases")
"""Parts of a reply that need no consent: identity and codes, figures of the round, results under aliases."""


def policy_of(node_config: Mapping[str, Any]) -> SiteFile | None:
    """Return the site's own settings, or None for a node that has none (a simulation).

    Raises:
        FedsgcgError: DEP-601 when the file cannot be used; POL-701 when it is another site's than the node config says.
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
    """Return the plan as this site carries it out; its digest is no longer the federation's.

    Raises:
        FedsgcgError: All refusals at once: POL-702 for a data folder outside the site's own, POL-703 for settings that
            the coordinator may not set, POL-704 when the method needs a part that may not leave, POL-706 for a class
            from outside the approved code.
    """
    if policy is None:
        return plan
    if refused := list(refusals(plan, policy)):
        raise FedsgcgError(*refused)
    return replace(
        plan,
        data=replace(plan.data, root=policy.data_root),
        privacy=stricter(plan.privacy, policy),
        site=replace(
            plan.site, **{**_own(policy), "roles": policy.roles, "shares": _shares(policy)}
        ),
    )


def refusals(plan: Plan, policy: SiteFile) -> Iterator[Problem]:
    """Yield one problem for everything that the plan asks and the site does not grant."""
    if plan.data.root and not inside(expand(plan.data.root, "data.root"), Path(policy.data_root)):
        action = "leave data.root empty: the site decides where its data lie"
        yield Problem(
            "POL-702",
            plan.data.root,
            f"nothing, or a folder in {policy.data_root}",
            action,
            "data.root",
        )
    yield from _not_allowed(plan, policy)
    for where, section in (("method", plan.method), ("network", plan.network)):
        package = section.name.partition(":")[0].partition(".")[0]
        if section.is_own and package not in FOLDERS_OF_CODE and section.name not in policy.code:
            expected = f"code of the approved app bundle, or what the site allows: {', '.join(policy.code) or 'nothing'}"
            action = f"the site installs the package, reads it, and adds {section.name} to code in its site.yaml"
            yield Problem("POL-706", section.name, expected, action, f"{where}.name")
    if (
        plan.method.statistics
        and plan.role(policy.site) == "train"
        and "statistics" not in policy.sharing
    ):
        expected = f"what the site shares: {', '.join(policy.sharing) or 'nothing'}"
        action = "method=source method.statistics=false, or the site adds statistics to sharing"
        yield Problem(
            "POL-704", "a method that needs class statistics", expected, action, "sharing"
        )


def stricter(asked: PrivacySettings, policy: SiteFile) -> PrivacySettings:
    """Return the floors that hold: of each the larger of the coordinator's and the site's."""
    return replace(
        asked,
        min_patients=max(asked.min_patients, policy.patient_floor),
        min_pixels=max(asked.min_pixels, policy.min_pixels),
    )


def check_sharing(parts: Mapping[str, int], sharing: tuple[str, ...] | None) -> None:
    """Refuse a reply with a part that the site does not share.

    Args:
        parts: Bytes of each part of the reply.
        sharing: What may leave; None where no policy is set.

    Raises:
        FedsgcgError: POL-704.
    """
    if sharing is None:
        return
    mixing = (
        ("amplitudes",) if set(sharing) & set(SHARES.values()) else ()
    )  # which of them, the request itself checks
    norms = (
        ("moments",) if "weights" in sharing else ()
    )  # running moments are entries of the weights
    if held := [name for name in parts if name not in (*ALWAYS_LEAVES, *mixing, *norms, *sharing)]:
        action = "ask for less, or have the site add it to sharing in its site.yaml"
        raise fail(
            "POL-704",
            found=", ".join(held),
            expected=", ".join(sharing) or "nothing",
            action=action,
        )


def only_inside_data_root(site: Site, policy: SiteFile | None) -> Site:
    """Leave out every case whose files really lie outside the data folder, whatever links lead to them (POL-702)."""
    if policy is None:
        return site
    root = Path(policy.data_root)
    kept, problems = [], list(site.quarantined)
    for case in site.cases:
        files = [path for path in (case.image, case.mask) if path is not None]
        if outside := [path for path in files if not inside(path, root)]:
            action = (
                "copy the file into the data folder, or set data_root to the folder that holds it"
            )
            found = f"{outside[0]} leads to {outside[0].resolve()}"
            problems.append(
                Problem("POL-702", found, f"a file below {root}", action, where=case.name)
            )
        else:
            kept.append(case)
    return replace(site, cases=tuple(kept), quarantined=tuple(problems))


def alias_salt(policy: SiteFile | None) -> bytes:
    """Return the secret that salts this site's case aliases, one for each federation; b"" in a simulation.

    It is drawn once and never leaves: a coordinator that knows case names, and even the images, cannot find a case by
    its alias. Within a federation a case keeps its alias, so that methods and seeds can be compared case by case.

    Raises:
        FedsgcgError: SITE-501 when it cannot be kept.
    """
    if policy is None:
        return b""
    path = Path(policy.home) / "alias.salt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (
            suppress(FileExistsError),
            os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f,
        ):
            f.write(secrets.token_bytes(32))
        secret = path.read_bytes()
    except OSError as error:
        raise fail(
            "SITE-501", where=str(path), found=str(error), expected="a folder that can be written"
        ) from error
    return hashlib.blake2b(policy.project.encode(), digest_size=32, key=secret).digest()


def inside(path: Path, root: Path) -> bool:
    """Whether a path lies in a folder once every link of both is followed."""
    return path.resolve().is_relative_to(root.resolve())


def _not_allowed(plan: Plan, policy: SiteFile) -> Iterator[Problem]:
    """Yield a problem for every setting that the coordinator may not set and that is not as it was shipped.

    Of the site's own settings the site's values are fine too. Folders of the plan have no effect here (`data.root` is
    looked at by itself).
    """
    fine = {f"site.{name}": value for name, value in leaves(_own(policy))}
    asked = [(name, value) for name, value in leaves(plan.to_tree()) if not policy.may_set(name)]
    asked = [
        (name, value) for name, value in asked if name not in FOLDERS and value != fine.get(name)
    ]
    shipped = dict(leaves(Plan.from_tree({**compose([]), "output": ""}).to_tree())) if asked else {}
    for name, value in asked:
        if value != shipped.get(name):
            expected = (
                f"{shipped.get(name)!r}, or {name} in coordinator_may_set of the site's own file"
            )
            yield Problem(
                "POL-703", repr(value), expected, "take the setting back, or ask the site", name
            )


def _own(policy: SiteFile) -> dict[str, Any]:
    """The site's own section of a plan, as plain values."""
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
    """What the site agrees to send besides weights and class statistics."""
    return tuple(name for name in policy.sharing if name in SHARES.values())


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every setting; the entries of a map such as `classes` are one value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and name not in ("classes", "structures", "options"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
