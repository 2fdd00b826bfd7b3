"""Plans of the same two hospitals, pooled and by site."""

from pathlib import Path

from tests.support import sites


def pooled(root: Path, folder: Path, *overrides: str):
    return sites.plan_of(root, folder, "federation=pooled", "data.sites=[North,South]", *overrides)


def by_site(root: Path, folder: Path, *overrides: str):
    return sites.plan_of(root, folder, "data.sites=[North,South]", *overrides)
