"""Choose the app bundle to approve at a site, and show what it changes."""

from __future__ import annotations

from pathlib import Path

from fedsgcg.clients.guard.approval import (
    Bundle,
    approvals,
    bundle_of_folder,
    difference,
    last_approved,
    read_bundle,
    read_unpacked,
    refused_bundles,
)
from fedsgcg.common.console import Screen
from fedsgcg.common.errors import fail

MOST_LINES = 400


def installed() -> Bundle:
    """Return the code that is installed at this site."""
    return bundle_of_folder(Path(__file__).resolve().parents[2])


def choose_bundle(
    approved: Path, file: Path | None, digest: str, *, installed_code: bool
) -> Bundle | None:
    """Return the bundle to approve, None when no bundle is waiting for approval.

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
    waiting = [folder for folder in refused_bundles(approved) if folder.name.startswith(digest)]
    if digest and installed().digest.startswith(digest):
        return installed()
    if not waiting and not digest:  # the first approval is for the code installed at this site
        return None if approvals(approved) else installed()
    if len(waiting) != 1 and digest:
        known = ", ".join(folder.name[:16] for folder in refused_bundles(approved)) or "none"
        found = f"{len(waiting)} refused bundles that begin with {digest} (refused: {known})"
        action = "give a .fab file, a longer --hash, or --installed for the code installed here"
        raise fail("POL-705", found=found, expected="one bundle", action=action)
    return read_unpacked(waiting[0])


def show_difference(bundle: Bundle, approved: Path, console: Screen, *, lines: bool) -> None:
    """Show what a bundle changes since the last approval; before the first, the installed code."""
    last = last_approved(approved)
    reference = "the last approval" if last else "the code installed here (nothing approved yet)"
    base = last or installed()
    changes = list(difference(base, bundle))
    console.print(f"Code {bundle.digest}")
    console.print(f"{len(bundle.code)} files; compared with {reference}:")
    if bundle.client_app != base.client_app:
        console.print(
            f"changed  entry point: {base.client_app} -> {bundle.client_app}", style="yellow"
        )
    for headline, _ in changes:
        console.print(f"  {headline}")
    if not changes:
        console.print("  no file differs")
    if lines:
        text = "".join(part for _, part in changes).splitlines()
        styles = {"+": "green", "-": "red"}
        for line in text[:MOST_LINES]:
            console.print(line, style=styles.get(line[:1]))
        if len(text) > MOST_LINES:
            console.print(f"… {len(text) - MOST_LINES} more lines", style="yellow")
    elif changes:
        console.print("--diff shows the changed lines.", style="yellow")
