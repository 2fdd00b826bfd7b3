"""`fedsgcg-site ledger`: what left this hospital, and what the next round would send."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, Metadata, RecordDict
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.egress import LEDGER
from fedsgcg.clients.guard.policy import NODE_KEY
from fedsgcg.clients.guard.site_file import SiteFile, write_site_file
from fedsgcg.common.console import Screen
from fedsgcg.common.errors import CODES, FedsgcgError, Problem
from fedsgcg.common.settings.message_sizes import reply_sizes
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.wire import messages as wire
from fedsgcg.common.wire.payload import Identity, Weights
from fedsgcg.deploy.certificates import make_site_key

PARTS = ("weights", "control_variates", "statistics", "amplitudes", "cases", "metrics", "text")


def show_ledger(policy: SiteFile, console: Screen, *, last: int, book: Path | None = None) -> int:
    """Show what left the site, the newest line last.

    Args:
        policy: The site's settings.
        console: Console for the output.
        last: Number of lines; 0 = all.
        book: A copy of the coordinator's own book of this site, to compare with.

    Returns:
        The exit code: 0, or 1 when nothing has left yet, or when the signed head or a receipt of
        the coordinator contradicts the ledger.

    Raises:
        FedsgcgError: SITE-501 when the chain of hashes is broken, with the first invalid line.
    """
    path = Path(policy.home) / LEDGER
    lines = ledger.entries(path) if path.exists() else []
    standing = ledger.examine(path, Path(policy.key), Path(policy.ca), book)
    if not lines:
        console.print(f"Nothing has left {policy.site} yet.")
        _show_standing(standing, console)
        return 1
    shown = lines[-last:] if last else lines
    console.print(f"What left {policy.site}: {path}")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    # A terminal may have only 80 columns: unused parts are left out, and the time may wrap after
    # the date.
    used = [name for name in PARTS if any(line["parts"].get(name) for line in shown)]
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("time (UTC)", min_width=10)
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("answer to", no_wrap=True)
    for name in used:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("withheld, or why", min_width=12)
    for line in shown:
        why = ", ".join(line["withheld"]) or reason(line)
        parts = [f"{line['parts'][name]:,}" if line["parts"].get(name) else "–" for name in used]
        when = str(line["time"])[:19].replace("T", " ")
        table.add_row(str(line["seq"]), when, str(line["round"]), str(line["kind"]), *parts, why)
    console.print(table)
    total = sum(sum(line["parts"].values()) for line in lines)
    console.print(f"{len(lines)} messages, {total:,} bytes; the chain of hashes is intact.")
    _show_standing(standing, console)
    return 1 if standing.problems else 0


def _show_standing(standing: ledger.Standing, console: Screen) -> None:
    """Show what confirms or contradicts the ledger as a whole, which the chain alone cannot."""
    for problem in standing.problems:
        console.print(f"[SITE-520] {problem}", style="red")
    if standing.problems:
        return
    head = "Its head is signed with this site's key" if standing.signed else "It has no signed head"
    if standing.receipts:
        console.print(
            f"{head}; {standing.receipts} receipts of the coordinator agree with it, and the last "
            f"{standing.unconfirmed} messages are not confirmed yet."
        )
    else:
        console.print(f"{head}; there is no receipt of the coordinator yet.", style="yellow")


def reason(line: Mapping[str, Any]) -> str:
    """Return the code of a line's note and its meaning, or the note's first line."""
    note = str(line.get("note", ""))
    code = note[1:].partition("]")[0] if note.startswith("[") else note
    if code in CODES:
        return f"{code}: {CODES[code]}"
    return note.partition("\n")[0]


def dry_run(policy: SiteFile, plan: Plan, model: Path | None, console: Screen) -> int:
    """Train one round on this site's data and show the bytes of its reply; nothing is sent.

    The reply passes the same egress with the same privacy floors as a real one; only its ledger
    line goes to a temporary folder.

    Args:
        policy: The site's settings.
        plan: The federation's plan as known at the site.
        model: `model.safetensors` to start from, or None for newly initialised weights.
        console: Console for the output.
    """
    with tempfile.TemporaryDirectory(prefix="fedsgcg-dry-run-") as folder:
        plan = replace(plan, output=folder)
        make_site_key(Path(folder), policy.site)  # signs the temporary ledger
        temporary = replace(
            policy, home=str(Path(folder) / "home"), key=str(Path(folder) / "site.key")
        )
        write_site_file(Path(folder) / "site.yaml", temporary)
        with console.status("training one round that is not sent"):
            start = time.perf_counter()
            weights = _weights(plan, model)
            content = _reply(plan, policy, Path(folder), weights)
            seconds = time.perf_counter() - start
        reply = wire.decode_reply(content, reply_sizes(plan), weights)
        if reply.error:
            log = Path(folder) / "home" / "errors.log"
            found = log.read_text(encoding="utf-8") if log.exists() else ""
            raise FedsgcgError(Problem(reply.error, found=found, where=policy.site))
    table = Table(
        title=f"What the next round of {policy.site} would send ({seconds:.1f} s of work)"
    )
    for name in ("part", "bytes", "content"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    parts = wire.payload_bytes(content)
    for name, size in parts.items():
        table.add_row(name, f"{size:,}", CONTENT.get(name, ""))
    table.add_row("all", f"{sum(parts.values()):,}", "", style="bold", end_section=True)
    console.print(table)
    withheld = reply.details.get("withheld") or []
    console.print(f"Withheld by the floors: {', '.join(withheld) or 'nothing'}. Nothing was sent.")
    return 0


CONTENT = {
    "weights": "the trained model, one array in the form of federation.codec",
    "statistics": "count, mean and scatter of each class",
    "control_variates": "mean gradient of the round (SCAFFOLD)",
    "amplitudes": "sums of log amplitudes, or spectra of single images, as site.yaml allows",
    "content_hashes": "salted hashes of the images, as site.yaml allows",
    "image_summary": "medians and quartiles of the training images, as site.yaml allows",
    "cases": "results of each case under its alias",
    "metrics": "losses, counts, seconds, validation Dice",
    "text": "names and shapes of the weights, identity, codes",
}


def _reply(plan: Plan, policy: SiteFile, folder: Path, weights: Weights) -> RecordDict:
    """Send the app a request as the coordinator would, under the site's own policy."""
    from fedsgcg.clients.app import build_client_app

    identity = Identity(plan.run, plan.heldout, 1, plan.digest())
    request = wire.encode_request(wire.Request(identity, weights))
    metadata = Metadata(1, "dry-run", 0, 1, "", "", time.time(), 86400.0, wire.TRAIN)
    make: Any = Message  # Flower's internal constructor of a received message is untyped
    node: Any = {"site": policy.site, NODE_KEY: str(folder / "site.yaml")}
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})
    return build_client_app(plan.to_tree())(make(request, metadata=metadata), context).content


def _weights(plan: Plan, model: Path | None) -> Weights:
    """Return the weights of a model file, or newly initialised ones of the plan's network."""
    from fedsgcg.common.heads import build_trained, state_of

    state = state_of(build_trained(plan, generator_seed=0))
    if model is not None:
        from safetensors.numpy import load_file

        state |= load_file(model)  # a saved model has no training-only heads
    return Weights.from_state(state)
