"""Choose the app bundle to approve at a site, and show what it changes."""

from __future__ import annotations

from pathlib import Path

from fedsgcg.clients.guard.approval import (
    Bundle,
    approvals,
    approved_software,
    bundle_of_folder,
    difference,
    last_approved,
    read_bundle,
    read_kept,
    refused_bundles,
)
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.clients.guard.software import Software, software_changes
from fedsgcg.common.console import Screen
from fedsgcg.common.errors import fail
from fedsgcg.deploy.site.abilities import NETWORK, new_abilities

MOST_LINES = 400
MOST_PLACES = 6


def installed() -> Bundle:
    """Return the code that is installed at this site."""
    return bundle_of_folder(Path(__file__).resolve().parents[2])


def choose_bundle(
    approved: Path, file: Path | None, digest: str, *, installed_code: bool
) -> Bundle | None:
    """Return the bundle to approve, None when nothing is waiting for approval.

    Without a choice this is the bundle refused last; else, where the installed software has
    changed, the bundle approved last.

    Args:
        approved: The approvals file; refused bundles are kept in the same folder.
        file: A bundle file (.fab), or None.
        digest: Beginning of a refused bundle's digest, or "".
        installed_code: Choose the code that is installed here.

    Raises:
        FedsgcgError: POL-705 when there is nothing to approve, or the digest matches no bundle or
            several.
    """
    if installed_code:
        return installed()
    if file is not None:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise fail(
                "POL-705", where=str(file), found=str(error), expected="a .fab file"
            ) from error
        bundle = read_bundle(content)
        if digest and not bundle.digest.startswith(digest):
            raise fail(
                "POL-705",
                where=str(file),
                found=bundle.digest,
                expected=f"a digest that begins with {digest}",
            )
        return bundle
    waiting = [file for file in refused_bundles(approved) if file.stem.startswith(digest)]
    if digest and installed().digest.startswith(digest):
        return installed()
    if not waiting and not digest:
        if not approvals(approved):  # the first approval is for the code installed at this site
            return installed()
        return None if software_is_approved(approved) else last_approved(approved) or installed()
    if len(waiting) != 1 and digest:
        known = ", ".join(file.stem[:16] for file in refused_bundles(approved)) or "none"
        found = f"{len(waiting)} refused bundles that begin with {digest} (refused: {known})"
        action = "give a .fab file, a longer --hash, or --installed for the code installed here"
        raise fail("POL-705", found=found, expected="one bundle", action=action)
    return read_kept(waiting[0])


def show_review(bundle: Bundle, policy: SiteFile, console: Screen, *, all_lines: bool) -> None:
    """Show what an approval of a bundle would allow: code, abilities, site settings, software.

    Args:
        bundle: The code to approve.
        policy: The site's own settings.
        console: Console for the output.
        all_lines: Show every changed line instead of the first `MOST_LINES`.
    """
    approved = Path(policy.approved)
    last = last_approved(approved)
    _show_code(bundle, last, console, all_lines=all_lines)
    _show_abilities(bundle, last, console)
    _show_limits(policy, console)
    _show_software(approved, console)


def _show_code(bundle: Bundle, last: Bundle | None, console: Screen, *, all_lines: bool) -> None:
    changes = list(difference(last, bundle))
    console.print(f"Code {bundle.digest}")
    if last is None:
        console.print(f"{len(bundle.code)} files; nothing was approved before, so all are new:")
        if bundle == installed():
            console.print("It is the code that is installed here.")
    else:
        console.print(f"{len(bundle.code)} files; compared with the last approval:")
        if bundle.client_app != last.client_app:
            line = f"changed  entry point: {last.client_app} -> {bundle.client_app}"
            console.print(line, style="yellow")
    for headline, _ in changes:
        console.print(f"  {headline}")
    if not changes:
        console.print("  no file differs")
    text = "".join(part for _, part in changes).splitlines()
    # All lines of a first approval are new: 400 of them would say nothing about the rest.
    shown = len(text) if all_lines else (MOST_LINES if last else 0)
    styles = {"+": "green", "-": "red"}
    for line in text[:shown]:
        console.print(line, style=styles.get(line[:1]))
    if len(text) > shown:
        console.print(f"… {len(text) - shown} more lines; --diff shows all", style="yellow")


def _show_abilities(bundle: Bundle, last: Bundle | None, console: Screen) -> None:
    found = new_abilities(last.code if last else {}, bundle.code)
    which = "could not do before" if last else "can do"
    console.print(f"What this code {which}, by the names in its source (a search, not a proof):")
    for ability, files in found.items():
        names = [f"{name} ({', '.join(whats)})" for name, whats in files.items()]
        more = f" and {len(names) - MOST_PLACES} more" if len(names) > MOST_PLACES else ""
        console.print(f"  {ability}: {'; '.join(names[:MOST_PLACES])}{more}")
    if NETWORK not in found:
        console.print(f"  {NETWORK}: in no {'new ' if last else ''}place")


def _show_limits(policy: SiteFile, console: Screen) -> None:
    console.print("What it is given here, by site.yaml:")
    for line in (
        f"reads {policy.data_root}",
        f"writes {policy.home} (ledger, log, aliases) and {policy.cache} (slice cache)",
        f"sends {', '.join(policy.sharing)} and the results of training and evaluation, each "
        "recorded in the ledger before it leaves",
        f"withholds a class of fewer than {policy.patient_floor} patients or "
        f"{policy.min_pixels} pixels",
        f"lets the coordinator set {', '.join(policy.coordinator_may_set) or 'nothing'}",
        "runs as this user: it can read whatever this user can read",
    ):
        console.print(f"  {line}")


def _show_software(approved: Path, console: Screen) -> None:
    before, now = approved_software(approved), Software.installed()
    count = len(now.distributions)
    if before is None:
        console.print(f"Software: {now.python} and {count} packages, {now.digest[:16]}; all new.")
        return
    changes = software_changes(before, now)
    console.print(f"Software: {count} packages, {len(changes)} changes since the last approval")
    for line in changes:
        console.print(f"  {line}", style="yellow")


def software_is_approved(approved: Path) -> bool:
    """Return whether the installed software is the one that was approved last."""
    return approved_software(approved) == Software.installed()
