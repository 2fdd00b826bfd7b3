"""The commands of `fedsgcg` for a real federation: provision, serve, run, status, stop, resume."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsgcg.common.console import Screen, add_output_options
from fedsgcg.common.errors import fail
from fedsgcg.server.sites.departures import OPTION

Command = Callable[[argparse.Namespace, Screen], int]


def add_commands(commands: Any) -> None:
    """Add the commands to `fedsgcg`'s parser."""
    _provision_command(commands)
    serve = _command(commands, "serve", "run the server: TLS, registered hospitals only", _serve)
    serve.add_argument(
        "--insecure", action="store_true", help="without TLS and keys; on loopback only"
    )
    serve.add_argument(
        "--listen", default="", metavar="ADDRESS", help="bind this address instead of the project's"
    )
    serve.add_argument(
        "--metrics-port",
        type=int,
        default=0,
        metavar="PORT",
        help="also serve the runs' metrics for Prometheus, on this machine only; 0 = not",
    )
    run = _command(commands, "run", "start or resume the study on the hospitals", _run)
    run.add_argument(
        "overrides",
        nargs="*",
        metavar="name=value",
        help="settings; they take precedence over the project's",
    )
    resume = _command(commands, "resume", "resume the run that was started last", _resume)
    for command in (run, resume):
        add_output_options(command, events=True)
        command.add_argument(
            "--detach", action="store_true", help="return at once; the run continues on the server"
        )
        command.add_argument(
            OPTION,
            action="append",
            default=[],
            metavar="SITE",
            help="this site has left for good: remove its statistics",
        )
    _command(commands, "status", "hospitals online, current round, missing answers", _status)
    _command(commands, "stop", "stop the run; completed rounds are kept", _stop)


def _command(commands: Any, name: str, summary: str, run: Command) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.add_argument("kit", type=Path, metavar="KIT", help="the coordinator's kit")
    command.set_defaults(run=run)
    return command


def _provision_command(commands: Any) -> None:
    summary = "make the coordinator's kit and a start-up kit for each hospital"
    command = commands.add_parser("provision", help=summary, description=summary)
    command.add_argument(
        "project", type=Path, help="project file: name, server, sites, plan, quorum, deadlines"
    )
    command.add_argument(
        "-o", "--output", type=Path, default=Path("kits"), help="folder of all kits (default: kits)"
    )
    command.add_argument("--renew", action="store_true", help="make a new server certificate now")
    command.add_argument(
        "--revoke", action="append", default=[], metavar="SITE", help="reject its key from now on"
    )
    command.add_argument(
        "--reissue",
        action="append",
        default=[],
        metavar="SITE",
        help="revoke its key and register a new one",
    )
    command.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="SITE=FILE",
        help="register a public key that the site made",
    )
    command.add_argument(
        "--ca-key",
        type=Path,
        metavar="FILE",
        help="the authority's private key, kept elsewhere; default: ca.key in the kit",
    )
    command.add_argument(
        "--ca-passphrase-file",
        type=Path,
        metavar="FILE",
        help="its passphrase; default: FEDSGCG_CA_PASSPHRASE, or ask on the terminal",
    )
    command.set_defaults(run=_provision)


def _provision(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.coordinator.passphrase import Passphrase
    from fedsgcg.deploy.coordinator.provision import AuthorityKey, provision

    registrations = [_registration(text) for text in options.register]
    done = provision(
        options.project,
        options.output,
        renew=options.renew,
        revoke=options.revoke,
        reissue=options.reissue,
        register=registrations,
        authority=AuthorityKey(options.ca_key, Passphrase(options.ca_passphrase_file)),
    )
    for line in done.made or ["nothing to do: everything exists and is valid"]:
        console.print(f"  {line}")
    for site in done.waiting:
        line = f"{site}: waiting for its site.pub (the site runs fedsgcg-site request)"
        console.print(f"  {line}; then use --register {site}=site.pub", style="yellow")
    for site in done.revoked:
        line = f"{site}: its key is revoked; --reissue {site} starts over"
        console.print(f"  {line}", style="yellow")
    for site, spoken in done.registered.items():
        console.print(f"  {site}: compare the fingerprint of its key by phone: {spoken}")
    for line in done.warnings:
        console.print(f"  {line}", style="yellow")
    console.print(f"coordinator: {done.kit.folder}")
    console.print(f"hospitals:   {done.sites}")
    console.print("Fingerprint of the authority; hospitals compare it with `fedsgcg-site check`:")
    console.print(f"  {done.authority[:48]}\n  {done.authority[48:]}")
    return 0


def _registration(text: str) -> tuple[str, Path]:
    site, separator, path = text.partition("=")
    if not separator:
        raise fail("CFG-001", where="--register", found=text, expected="SITE=FILE")
    return site, Path(path)


def _serve(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.coordinator.serve import serve_kit

    return serve_kit(
        options.kit,
        console,
        insecure=options.insecure,
        listen=options.listen,
        metrics_port=options.metrics_port,
    )


def _run(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.coordinator.runs import run_kit

    return run_kit(
        options.kit, options.overrides, console, detach=options.detach, without=options.without
    )


def _resume(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.coordinator.runs import resume_kit

    return resume_kit(options.kit, console, detach=options.detach, without=options.without)


def _status(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.coordinator.status import status_kit

    return status_kit(options.kit, console)


def _stop(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.coordinator.runs import stop_kit

    return stop_kit(options.kit, console)
