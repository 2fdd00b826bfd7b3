"""`fedsgcg-site`: the site's command line.

Nothing leaves the site except through the messages that `join` sends.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedsgcg.clients.guard.site_file import read_site_file
from fedsgcg.clients.predict.options import add_predict_parser
from fedsgcg.common.console import Screen, Version, print_error, run_command
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.exit_codes import exit_codes
from fedsgcg.common.files.system import user_name
from fedsgcg.common.names import number_of
from fedsgcg.deploy.cli.parsing import check_command

HELP = """\
A hospital's side of a federation. KIT is the folder that the coordinator sent, or the
site.yaml in it. Fill in site.yaml first: it takes precedence over the coordinator's settings.

  fedsgcg-site check KIT      check every file, the device, the disk and the link
  fedsgcg-site approve KIT    show what an app bundle changes, and approve its code
  fedsgcg-site join KIT       take part until stopped (Ctrl-C, SIGTERM or leave)
  fedsgcg-site status KIT     whether the site is running, and what it did last
  fedsgcg-site ledger KIT     what left this hospital; --dry-run: what would leave next
  fedsgcg-site leave KIT      stop taking part; --for-good lists what remains to be done
  fedsgcg-site cache KIT      size of the slice cache; --prune removes old files
  fedsgcg-site request KIT    make this site's key here; the private key is never sent

Without a federation: fedsgcg-site predict MODEL IMAGE -o DIR segments images with a model.
"""
EXITS = exit_codes(partial="warnings")
RECENT = 20


def run() -> None:
    """Run one command and exit with its exit code."""
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `FedsgcgError` is printed without a traceback and gives exit code 2."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    check_command(parser, given)
    options = parser.parse_args(given)
    return run_command(lambda console: int(options.run(options, console)))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fedsgcg-site", description=HELP, epilog=EXITS, formatter_class=raw
    )
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = {}
    for name, work, summary in (
        ("check", _check, "check files, device, disk and link; each problem comes with its fix"),
        ("join", _join, "take part until stopped"),
        ("status", _status, "whether the site is running, and what it did last"),
        ("leave", _leave, "stop taking part"),
        ("ledger", _ledger, "what left this hospital"),
        ("approve", _approve, "approve the code of an app bundle"),
        ("cache", _cache, "size of the slice cache"),
        ("request", _request, "make this site's key"),
    ):
        made[name] = commands.add_parser(
            name, help=summary, description=summary, epilog=EXITS, formatter_class=raw
        )
        made[name].add_argument(
            "kit", type=Path, metavar="KIT", nargs="?", default=Path(), help="folder of site.yaml"
        )
        made[name].set_defaults(run=work)
    _options(made)
    add_predict_parser(commands)
    return parser


def _options(made: dict[str, argparse.ArgumentParser]) -> None:
    """Add the options that only some commands have."""
    check = made["check"]
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    check.add_argument(
        "--settings", nargs="*", default=[], metavar="name=value", help="settings of the federation"
    )
    check.add_argument(
        "--no-link", action="store_true", help="do not check the link to the coordinator"
    )
    check.add_argument("--all", action="store_true", help="also show files without a problem")
    check.add_argument(
        "--software",
        action="store_true",
        help="compare every installed file with its package's record (up to a minute)",
    )
    made["join"].add_argument(
        "--cold", action="store_true", help="start a new training process for every message"
    )
    made["leave"].add_argument(
        "--for-good", action="store_true", help="list what remains to be done"
    )
    ledger = made["ledger"]
    ledger.add_argument(
        "--all", action="store_true", help=f"show every line, not only the last {RECENT}"
    )
    ledger.add_argument(
        "--dry-run", action="store_true", help="make the next round's reply here and show its bytes"
    )
    ledger.add_argument(
        "--settings", nargs="*", default=[], metavar="name=value", help="settings of the federation"
    )
    ledger.add_argument(
        "--model",
        type=Path,
        help="model.safetensors to use; default: newly initialised weights",
    )
    ledger.add_argument(
        "--receipts",
        type=Path,
        metavar="FILE",
        help="compare with a copy of the coordinator's book",
    )
    ledger.add_argument(
        "--continue",
        dest="continue_",
        default="",
        metavar="REASON",
        help="record why the ledger contradicts the coordinator's receipt, and answer again",
    )
    approve = made["approve"]
    approve.add_argument(
        "bundle", type=Path, nargs="?", help="a .fab file; default: the bundle refused last"
    )
    approve.add_argument(
        "--hash", default="", help="approve the refused bundle whose digest begins with this"
    )
    approve.add_argument(
        "--installed", action="store_true", help="approve exactly the code that is installed here"
    )
    approve.add_argument(
        "--yes", action="store_true", help="approve without asking; needed without a terminal"
    )
    approve.add_argument(
        "--diff", action="store_true", help="show every changed line, not only the first 400"
    )
    made["cache"].add_argument(
        "--prune", action="store_true", help="remove files not used recently"
    )
    made["cache"].add_argument(
        "--days", type=float, default=30.0, help="days without use; 0 removes all files"
    )


def _check(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.site.check import examine, exit_code, show

    path = site_file_of(options.kit)
    findings = examine(
        read_site_file(path),
        path.parent,
        options.settings,
        link=not options.no_link,
        console=console,
        software=options.software,
    )
    if options.json:
        console.print(json.dumps([finding.as_dict() for finding in findings], indent=1))
    else:
        show(findings, console, everything=options.all)
    return exit_code(findings)


def _join(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.site.supervisor import Join

    path = site_file_of(options.kit)
    policy = read_site_file(path)

    def say(line: str) -> None:
        console.print(f"{datetime.now(UTC):%H:%M:%S} {line}")

    join = Join(policy, path, say, cold=options.cold)
    signal.signal(signal.SIGTERM, join.stop)
    signal.signal(signal.SIGINT, join.stop)
    try:
        code = join.run()
    except FedsgcgError as error:
        if error.code != "SITE-507":
            raise
        print_error(str(error))
        return 1
    say(f"{policy.site} has left")
    return code


def _status(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.clients.guard import ledger
    from fedsgcg.clients.guard.egress import LEDGER
    from fedsgcg.deploy.site.supervisor import joined_pid, read_facts

    policy = read_site_file(site_file_of(options.kit))
    home = Path(policy.home)
    pid = joined_pid(home)
    facts = read_facts(home / "join.json")
    work = read_facts(home / "resident.json")
    state = str(facts.get("state", "unknown")) if pid else "not joined"
    rows = [
        ("site", f"{policy.site} of {policy.project}"),
        ("coordinator", policy.server),
        ("state", state),
    ]
    if pid:
        supernode, resident = facts.get("supernode", 0), facts.get("resident", 0)
        activity = " ".join(str(work.get(name, "")) for name in ("state", "message"))
        rows += [
            ("processes", f"join {pid}, SuperNode {supernode}, resident {resident}"),
            ("started", _ago(facts.get("started"))),
            ("restarts", str(facts.get("restarts", 0))),
            ("node", str(facts.get("node", "not connected yet"))),
            ("work", activity or "none"),
        ]
    if facts.get("last_message"):
        when = _ago(facts.get("last_message_time"))
        rows.append(("last message", f"{facts['last_message']}, {when}"))
    if facts.get("last"):
        rows.append(("last problem", str(facts["last"])))
    standing = ledger.examine(home / LEDGER, Path(policy.key), Path(policy.ca))
    found = "; ".join(standing.problems) or f"intact, {standing.receipts} receipts agree with it"
    rows.append(("ledger", f"{standing.lines} messages sent, {found}"))
    table = Table(show_header=False, title=None, box=None)
    for name, value in rows:
        table.add_row(Text(name, style="bold"), value)
    console.print(table)
    if not pid:
        return 1
    return 0 if state == "joined" else 3


def _leave(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.site.supervisor import leave

    policy = read_site_file(site_file_of(options.kit))
    ended = leave(policy)
    console.print(f"{policy.site} has left." if ended else f"{policy.site} had not joined.")
    if options.for_good:
        console.print(FOR_GOOD.format(site=policy.site, home=policy.home, cache=policy.cache))
    return 0


FOR_GOOD = """
To leave for good:
  1. Ask the coordinator to revoke this site's key, so that no one can join in its name, and to
     continue without it:
     fedsgcg provision project.yaml -o KITS --revoke {site}
     fedsgcg stop KIT; fedsgcg resume KIT --without {site}
  2. From then on the prototypes contain no class statistics of {site}. The weights keep what they
     learned here: only a new study without {site} is free of it.
  3. Keep {home} (ledger, aliases): it records what left this hospital.
  4. The slice cache contains images and may be removed: rm -r {cache}"""


def _ledger(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.clients.guard.egress import LEDGER
    from fedsgcg.clients.guard.ledger import record_gap
    from fedsgcg.deploy.site.check import plan_of_kit
    from fedsgcg.deploy.site.ledger_view import dry_run, show_ledger

    path = site_file_of(options.kit)
    policy = read_site_file(path)
    if options.dry_run:
        return dry_run(policy, plan_of_kit(path.parent, options.settings), options.model, console)
    if options.continue_:
        home = Path(policy.home)
        key, authority = Path(policy.key), Path(policy.ca)
        head = record_gap(home / LEDGER, options.continue_, key, authority)
        console.print(f"Recorded as line {head.seq}; the site answers again.")
        return 0
    last = 0 if options.all else RECENT
    return show_ledger(policy, console, last=last, book=options.receipts)


def _approve(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.clients.guard.approval import approvals, approve, is_approved
    from fedsgcg.deploy.site.approve import choose_bundle, show_review, software_is_approved

    policy = read_site_file(site_file_of(options.kit))
    path = Path(policy.approved)
    bundle = choose_bundle(path, options.bundle, options.hash, installed_code=options.installed)
    if bundle is None:
        console.print(
            f"Nothing is waiting for approval; approved last: {approvals(path)[-1]['digest']}"
        )
        return 0
    if is_approved(bundle, path) and software_is_approved(path):
        console.print(f"{bundle.digest} and the software installed here are already approved.")
        return 0
    show_review(bundle, policy, console, all_lines=options.diff)
    if refusal := "" if options.yes else _refusal():
        console.print(f"Not approved: {refusal}. This code will not run here.", style="yellow")
        return 1
    approve(bundle, path, user_name())
    console.print(f"Approved: {bundle.digest}")
    return 0


def _refusal() -> str:
    """Ask; return why nothing is approved, or "" after a yes."""
    if not sys.stdin.isatty():
        return "there is no terminal to ask on; read the above, then add --yes"
    try:
        answer = input("Approve this code and this software to run here? [y/N] ").strip().lower()
    except EOFError:
        return "the input ended without an answer"
    return "" if answer in ("y", "yes") else f"the answer was {answer or 'empty'!r}, not y"


def _cache(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.clients.data.cache import UNUSED_DAYS, cache_files, prune

    policy = read_site_file(site_file_of(options.kit))
    files = cache_files(Path(policy.cache))
    console.print(
        f"{number_of(len(files), 'file')}, {sum(files.values()) / 1e6:.1f} MB in {policy.cache}"
    )
    if options.prune:
        gone = prune(Path(policy.cache), options.days)
        console.print(f"removed {number_of(len(gone), 'file')}, {sum(gone.values()) / 1e6:.1f} MB")
    else:
        console.print(
            f"Files not used for {UNUSED_DAYS:.0f} days are removed automatically; "
            "--prune --days N removes more."
        )
    return 0


def _request(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.certificates import make_site_key, spoken_fingerprint

    path = site_file_of(options.kit)
    policy = read_site_file(path)
    key = Path(policy.key)
    if key.name != "site.key":
        raise fail("DEP-601", where=str(path), found=f"key: {key.name}", expected="key: site.key")
    line = make_site_key(key.parent, policy.site)
    console.print(
        f"Send this line ({key.parent / 'site.pub'}) to the coordinator; keep {key} secret:"
    )
    console.print(line)
    console.print("The coordinator compares its fingerprint with you by phone:")
    console.print(f"  {spoken_fingerprint(line)}")
    return 0


def site_file_of(kit: Path) -> Path:
    """Return the path of a kit's site.yaml, given that file or its folder."""
    return kit / "site.yaml" if kit.is_dir() else kit


def _ago(moment: Any) -> str:
    """Describe how long ago a time (seconds since 1970) was."""
    if not isinstance(moment, (int, float)):
        return "unknown"
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


if __name__ == "__main__":
    run()
