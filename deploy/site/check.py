"""`fedsgcg-site check`: check files, folders, device, disk, clock and link before a federation."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedsgcg.clients.guard.approval import approvals
from fedsgcg.clients.guard.pinned import kept_differences
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.console import Screen, progress_bar
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.names import number_of
from fedsgcg.common.settings.compose import compose
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.certificates import (
    certificate_fingerprint,
    public_line,
    read_certificate,
    read_site_key,
    spoken_fingerprint,
)
from fedsgcg.deploy.site.check_files import Seen, examine_files
from fedsgcg.deploy.site.check_link import examine_link
from fedsgcg.deploy.site.check_software import examine_software
from fedsgcg.deploy.site.findings import Finding, Verdict, shortened

SETTINGS = "settings.txt"
MOST_ALIKE = 12
"""Findings with the same problem that are listed before only their number is given."""
SPARE_BYTES = 2**30
"""Free space needed in addition to the slice cache, for ledger, logs, bundles and models."""

PIXEL_BYTES = 6
"""Bytes of the slice cache per voxel: slice as int16, ground truth, display and resized copy."""

COLOUR: dict[Verdict, str] = {"ok": "green", "note": "blue", "warn": "yellow", "fail": "red"}
ORDER = ("files", "site", "device", "disk", "clock", "link")


def examine(
    policy: SiteFile,
    kit: Path,
    overrides: Sequence[str],
    *,
    link: bool,
    console: Screen,
    software: bool = False,
) -> list[Finding]:
    """Check files, folders, device, disk, clock and link.

    Args:
        policy: The site's settings.
        kit: Folder of the kit: its `settings.txt` contains the federation's settings, one
            `name=value` per line.
        overrides: Further settings, which take precedence.
        link: Whether to check the link.
        console: Console for progress messages.
        software: Whether to compare every installed file with its package's record.

    Returns:
        One finding for each thing checked, in the order of `ORDER`.

    Raises:
        FedsgcgError: CFG-001 for invalid settings.
    """
    plan = plan_of_kit(kit, overrides)
    target = policy.site in plan.unlabelled or policy.roles == ("unlabelled",)
    heldout = not target and (plan.role(policy.site) != "train" or "train" not in policy.roles)
    with progress_bar(console) as bar:
        task = bar.add_task("reading every file", total=None)
        files, seen = examine_files(
            policy,
            plan.data,
            heldout=heldout,
            target=target,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        bar.update(task, description="one training step")
        findings = [
            *files,
            *examine_folders(policy),
            *examine_software(policy, files=software),
            *examine_sample(policy, plan),
            *examine_device(policy.device, policy.threads, plan),
            *examine_disk((policy.cache, policy.home), seen),
        ]
        if link:
            bar.update(task, description=f"the link to {policy.server}")
            findings += examine_link(policy, payload_bytes(plan))
    return sorted(findings, key=lambda finding: ORDER.index(finding.area))


def plan_of_kit(kit: Path, overrides: Sequence[str]) -> Plan:
    """Return the federation's plan as known at a site.

    Settings of the command line override those of the kit.
    """
    path = kit / SETTINGS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    written = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    merged = {text.partition("=")[0]: text for text in (*written, *overrides)}
    known = [text for name, text in merged.items() if name not in ("data.root", "output")]
    return Plan.from_tree(compose([*known, "output=."]))


def examine_folders(policy: SiteFile) -> list[Finding]:
    """Check the permissions of key, data and working folders."""
    findings = []
    key = Path(policy.key)
    if not key.is_file():
        action = "fedsgcg-site request KIT makes it, or ask the coordinator for the kit again"
        findings.append(Finding("site", "key", "fail", f"no {key}", action, "SITE-518"))
    elif stat.S_IMODE(key.stat().st_mode) & 0o077:
        found = f"{key} can be read by others"
        findings.append(Finding("site", "key", "fail", found, f"chmod 600 {key}", "SITE-518"))
    else:
        findings.append(_key(key))
    findings.append(_authority(Path(policy.ca)))
    if not approvals(Path(policy.approved)):
        action = (
            "fedsgcg-site approve KIT shows the code and asks for approval; until then no code "
            "of the federation runs here"
        )
        # The documented order is check, then approve: this is the next step and not a problem.
        findings.append(Finding("site", "approved code", "note", "none yet", action))
    if os.access(policy.data_root, os.W_OK) and os.geteuid() != 0:
        found = "this user has write permission"
        action = "Mount it read-only, or run the site as a user with read permission only."
        findings.append(Finding("site", "data folder", "warn", found, action, "SITE-518"))
    for name in ("home", "cache"):
        folder = Path(getattr(policy, name))
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            action = f"Make {folder} writable for this user."
            findings.append(
                Finding("site", name, "fail", f"{error.strerror}: {folder}", action, "SITE-501")
            )
    return findings


def examine_sample(policy: SiteFile, plan: Plan) -> list[Finding]:
    """Compare the kit's settings with those that this site accepted as definition of the sample."""
    try:
        problems = kept_differences(plan, policy)
    except FedsgcgError as error:
        problems = list(error.problems)
    return [Finding.of("site", problem, "warn") for problem in problems]


def examine_device(name: str, threads: int, plan: Plan) -> list[Finding]:
    """Run and measure one training step of the plan's size.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:<number>`.
        threads: Threads of the CPU, 0 for all.
        plan: Batch size, image size and network.
    """
    return measure_device(name, threads, plan)[0]


def measure_device(name: str, threads: int, plan: Plan) -> tuple[list[Finding], float | None]:
    """Like `examine_device`, with the seconds of the step; None if it could not be run."""
    from fedsgcg.clients.device import choose_device, describe_hardware
    from fedsgcg.deploy.site.check_step import measure_step

    device = name.partition(":")
    if device[2]:
        os.environ["CUDA_VISIBLE_DEVICES"] = device[2]
    try:
        chosen = choose_device(device[0], threads)
        step = measure_step(plan, chosen)
    except FedsgcgError as error:
        return [Finding.of("device", problem) for problem in error.problems], None
    findings = [Finding("device", "hardware", "ok", describe_hardware())]
    memory = f"{step.bytes / 2**20:.0f} MiB"
    if step.available:
        memory += f" of {step.available / 2**20:.0f}"
    batch, side = plan.method.batch_size, plan.data.image_size
    found = f"{step.seconds:.2f} s and {memory} for {batch} slices of {side} pixels"
    if step.parts > plan.site.micro_batches:
        found = f"the batch does not fit into memory at once; in {step.parts} parts: {found}"
        action = (
            "None needed: training splits its batches in the same way. "
            "A larger GPU or a smaller data.image_size avoids it."
        )
        findings.append(Finding("device", "one step", "warn", found, action, "SITE-502"))
    elif step.available and step.bytes > 0.9 * step.available:
        action = (
            "Lower method.batch_size, network.base_width or data.image_size, or use a larger GPU."
        )
        findings.append(Finding("device", "one step", "warn", found, action, "SITE-502"))
    else:
        findings.append(Finding("device", "one step", "ok", f"{found} on {chosen.type}"))
    return findings, step.seconds


def examine_disk(folders: Sequence[str], seen: Sequence[Seen]) -> list[Finding]:
    """Compare the free space of folders with what the slice cache needs."""
    needed = PIXEL_BYTES * sum(one.voxels for one in seen) + SPARE_BYTES
    findings = []
    for name in dict.fromkeys(folders):
        folder = Path(name)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        found = f"{free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed"
        if free < needed:
            action = (
                "Free disk space, or set cache and home to folders on a larger disk; "
                "fedsgcg-site cache --prune removes old slices."
            )
            verdict: Verdict = "fail" if free < needed - SPARE_BYTES else "warn"
            findings.append(Finding("disk", name, verdict, found, action, "SITE-514"))
        else:
            findings.append(Finding("disk", name, "ok", found))
    return findings


def _key(path: Path) -> Finding:
    """Show the fingerprint of the site's key, to be compared with the coordinator's by phone."""
    try:
        found = spoken_fingerprint(public_line(read_site_key(path)))
    except FedsgcgError as error:
        problem = error.problems[0]
        return Finding("site", "key", "fail", problem.found, problem.action, problem.code)
    action = "Compare it with the coordinator's over the phone."
    return Finding("site", "key", "ok", f"{found}, readable by its owner only", action)


def _authority(path: Path) -> Finding:
    """Show the authority's fingerprint, to be compared with the coordinator's over the phone."""
    try:
        found = certificate_fingerprint(read_certificate(path))
    except FedsgcgError as error:
        action = "Ask the coordinator for ca.crt again."
        return Finding(
            "site", "authority", "fail", f"{path}: {error.problems[0].found}", action, error.code
        )
    return Finding(
        "site", "authority", "ok", found, "Compare it with the coordinator's over the phone."
    )


def payload_bytes(plan: Plan) -> int:
    """Return the bytes of a round in one direction: weights and, with SgCG, class statistics."""
    from fedsgcg.common.heads import build_trained, state_of

    weights = Weights.from_state(state_of(build_trained(plan, generator_seed=0))).values.nbytes
    features = plan.network.num_features
    return weights + plan.data.num_classes * (1 + features + features * (features + 1) // 2) * 8


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 when a check fails, 3 when there are warnings, else 0, also with notes."""
    verdicts = {finding.verdict for finding in findings}
    if "fail" in verdicts:
        return 1
    return 3 if "warn" in verdicts else 0


def show(
    findings: Sequence[Finding],
    console: Screen,
    *,
    everything: bool,
    title: str = "fedsgcg-site check",
) -> None:
    """Show the findings as a table.

    Files without a problem, and more than `MOST_ALIKE` with the same one, are shown only if
    `everything` is set.
    """
    quiet = sum(finding.area == "files" and finding.verdict == "ok" for finding in findings)
    table = Table(title=f"{title}, {time.strftime('%Y-%m-%d %H:%M')}", show_lines=False)
    for name in ("", "what", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    last = ""
    for finding in findings if everything else shortened(findings, MOST_ALIKE):
        if last and finding.area != last:
            table.add_section()
        mark = Text(finding.verdict, style=COLOUR[finding.verdict])
        found = f"[{finding.code}] {finding.found}" if finding.code else finding.found
        area = finding.area if finding.area != last else ""
        table.add_row(area, finding.name, mark, found, finding.action)
        last = finding.area
    console.print(table)
    counts = Counter(finding.verdict for finding in findings)
    summary = Text(", ").join(
        Text(f"{counts[verdict]} {verdict}", style=COLOUR[verdict])
        for verdict in COLOUR
        if counts[verdict]
    )
    if quiet and not everything:
        summary += Text(f" ({number_of(quiet, 'file')} without a problem; --all lists all)")
    console.print(summary)
