"""The settings that define which pixels a statistic covers, pinned at the site.

A coordinator that may change them from request to request can choose its own samples, for example
by declaring a class that one patient has. The site therefore accepts the values of the first
request of the federation, and keeps them in `sample.yaml` in its home, where the hospital can read
them, replace them, or add further accepted values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.atomic import write_file
from fedsgcg.common.settings.plan import Plan

FILE: Final = "sample.yaml"
SETTINGS: Final = (
    *("data.classes", "data.structures", "data.image_size", "data.stack", "data.intensity"),
    *("data.label_tolerance", "data.train_slices", "prototypes.normalize", "prototypes.norm_mode"),
    *("data.aspect", "data.spacing"),
)
"""The pinned settings; the validation fraction is the site's own (`site.yaml`)."""

DEFAULTS: Final[Mapping[str, list[Any]]] = {"data.aspect": ["squeeze"], "data.spacing": [0.0]}
"""What a file accepts that does not name a setting: it is older than the setting."""

HEAD: Final = """\
# Settings that define which pixels the statistics of this hospital cover: those of the federation's
# first request. A request with other values is refused (POL-722). To accept another value, add it
# to the list of its setting.
"""


def check_pinned(plan: Plan, policy: SiteFile | None) -> None:
    """Pin the plan's sample on first use; refuse a plan with another one.

    Args:
        plan: The requested plan.
        policy: The site's own settings; None in a simulation, which pins nothing.

    Raises:
        FedsgcgError: POL-722 for every setting with a value that the site does not accept, SITE-501
            when the file cannot be read or written.
    """
    if policy is None:
        return
    path = Path(policy.home) / FILE
    requested = _sample(plan)
    try:
        accepted = _accepted(path, requested)
    except OSError as error:
        expected = "a writable site folder"
        raise fail("SITE-501", where=str(path), found=str(error), expected=expected) from error
    if problems := differences(requested, accepted, path):
        raise FedsgcgError(*problems)


def kept_differences(plan: Plan, policy: SiteFile) -> list[Problem]:
    """Return what a plan requests that the site has not accepted; nothing is pinned or written.

    Raises:
        FedsgcgError: SITE-501 when the file cannot be used.
    """
    path = Path(policy.home) / FILE
    requested = _sample(plan)
    return differences(requested, _accepted(path, requested), path) if path.exists() else []


def differences(
    requested: Mapping[str, Any], accepted: Mapping[str, list[Any]], path: Path
) -> list[Problem]:
    """Return POL-722 for every setting with a value that the site does not accept."""
    return [
        Problem(
            "POL-722",
            found=repr(value),
            expected=" or ".join(map(repr, accepted.get(name, DEFAULTS.get(name, [])))),
            action=f"use the accepted value, or ask the hospital to add this one to {path.name}",
            where=name,
        )
        for name, value in requested.items()
        if value not in accepted.get(name, DEFAULTS.get(name, []))
    ]


def _sample(plan: Plan) -> dict[str, Any]:
    tree = plan.to_tree()
    found = {}
    for name in SETTINGS:
        section, _, key = name.partition(".")
        found[name] = tree[section][key]
    if plan.data.intensity == "flat":
        found["data.flat_sigma"] = plan.data.flat_sigma
    return found


def _accepted(path: Path, requested: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the accepted values of each setting; the requested ones if there is no file yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        tree = {name: [value] for name, value in requested.items()}
        text = HEAD + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        write_file(path, text.encode())
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and all(isinstance(value, list) for value in tree.values()):
            return tree
    except (yaml.YAMLError, UnicodeDecodeError):
        pass
    raise fail(
        "SITE-501",
        where=str(path),
        found="not a list of values for each setting",
        expected="the accepted settings",
        action="correct the file, or remove it: the next request then defines the sample",
    )
