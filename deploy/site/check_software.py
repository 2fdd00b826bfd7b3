"""Check the installed software of a site against its approval and the packages' own records."""

from __future__ import annotations

from pathlib import Path

from fedsgcg.clients.guard.approval import approved_software, require_software
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.clients.guard.software import Software, changed_files
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.deploy.site.findings import Finding

MOST_FILES = 20
"""Number of changed files that are listed."""


def examine_software(policy: SiteFile, *, files: bool) -> list[Finding]:
    """Compare the software with what was approved last; nothing before the first approval.

    Args:
        policy: The site's settings.
        files: Also compare every installed file with its package's record (up to a minute).
    """
    findings = []
    approved = Path(policy.approved)
    if approved_software(approved) is not None:
        now = Software.installed()
        try:
            require_software(approved, now)
            found = f"{now.python}, {len(now.distributions)} packages, as approved"
            findings.append(Finding("site", "software", "ok", found))
        except FedsgcgError as error:
            findings += [Finding.of("site", problem) for problem in error.problems]
    if files:
        changed = list(changed_files())
        action = "Find out who changed it; reinstall the package, then fedsgcg-site approve KIT."
        findings += [
            Finding("site", "installed file", "fail", line, action, "POL-708")
            for line in changed[:MOST_FILES]
        ]
        if len(changed) > MOST_FILES:
            found = f"{len(changed) - MOST_FILES} more files"
            findings.append(Finding("site", "installed file", "fail", found, action, "POL-708"))
        if not changed:
            found = "every file is the one of its package's record"
            findings.append(Finding("site", "installed files", "ok", found))
    return findings
