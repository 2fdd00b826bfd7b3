"""The commands of `fedsgcg` for a real federation: provision, serve, run, status, stop, resume."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.console import Screen
from common.errors import fail
from server.sites.departures import OPTION

Command = Callable[[argparse.Namespace, Screen], int]


def add_commands(commands: Any) -> None:
    """Add the commands to `fedsgcg`'s parser."""
    _provision_command(commands)
    serve = _command(
        commands, "serve", "the coordinator's server: TLS, registered hospitals only", _serve
    )
    serve.add_argument(
        "--insecure", action="store_true", help="without TLS and keys; on loopback only"
    )
    serve.add_argument(
        "--listen", default="", metavar="ADDRESS", help="bind this address instead of the project's"
    )
    run = _command(commands, "run", "start the study on the hospitals, or go on with it", _run)
    run.add_argument(
        "overrides", nargs="*", metavar="name=value", help="settings, over those of the project"
    )
    resume = _command(commands, "resume", "go on with what was last started", _resume)
    for command in (run, resume):
        command.add_argument(
            "--detach", action="store_true", help="return at once; the server carries on"
        )
        command.add_argument(
            OPTION,
            action="append",
            default=[],
            metavar="SITE",
            help="it has left for good: take its statistics out",
        )
    _command(commands, "status", "who is there, which round, who is late", _status)
    _command(commands, "stop", "stop the run; what is done stays", _stop)


def _command(commands: Any, name: str, words: str, run: Command) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=words, description=words)
    command.add_argument("kit", type=Path, metavar="KIT", help="the coordinator's kit")
    command.set_defaults(run=run)
    return command


def _provision_command(commands: Any) -> None:
    words = "make the coordinator's kit and a start-up kit for each hospital"
    command = commands.add_parser("provision", help=words, description=words)
    command.add_argument(
        "project", type=Path, help="project file: name, server, sites, plan, quorum, deadlines"
    )
    command.add_argument(
        "-o", "--output", type=Path, default=Path("kits"), help="folder of all kits (kits)"
    )
    command.add_argument("--renew", action="store_true", help="make a new server certificate now")
    command.add_argument(
        "--revoke", action="append", default=[], metavar="SITE", help="never let its key in again"
    )
    command.add_argument(
        "--reissue",
        action="append",
        default=[],
        metavar="SITE",
        help="revoke its key, make another",
    )
    command.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="SITE=FILE",
        help="let in a key that the site made",
    )
    command.set_defaults(run=_provision)


def _provision(options: argparse.Namespace, console: Screen) -> int:
    from deploy.coordinator.provision import provision

    registrations = [_registration(text) for text in options.register]
    done = provision(
        options.project,
        options.output,
        renew=options.renew,
        revoke=options.revoke,
        reissue=options.reissue,
        register=registrations,
    )
    for words in done.made or ["nothing to do: everything is there and good"]:
        console.print(f"  {words}")
    for site in done.waiting:
        words = f"{site}: waiting for its site.pub (fedsgcg-site request), then --register {site}=site.pub"
        console.print(f"  {words}", style="yellow")
    for site in done.revoked:
        words = f"{site}: not let in any more; --reissue {site} makes a new key"
        console.print(f"  {words}", style="yellow")
    for words in done.warnings:
        console.print(f"  {words}", style="yellow")
    console.print(f"coordinator: {done.kit.folder}")
    console.print(f"hospitals:   {done.sites}")
    console.print(
        "Fingerprint of the authority, for hospitals to compare with `fedsgcg-site check`:"
    )
    console.print(f"  {done.authority[:48]}\n  {done.authority[48:]}")
    return 0


def _registration(text: str) -> tuple[str, Path]:
    site, separator, path = text.partition("=")
    if not separator:
        raise fail("CFG-001", where="--register", found=text, expected="SITE=FILE")
    return site, Path(path)


def _serve(options: argparse.Namespace, console: Screen) -> int:
    from deploy.coordinator.serve import serve_kit

    return serve_kit(options.kit, console, insecure=options.insecure, listen=options.listen)


def _run(options: argparse.Namespace, console: Screen) -> int:
    from deploy.coordinator.runs import run_kit

    return run_kit(
        options.kit, options.overrides, console, detach=options.detach, without=options.without
    )


def _resume(options: argparse.Namespace, console: Screen) -> int:
    from deploy.coordinator.runs import resume_kit

    return resume_kit(options.kit, console, detach=options.detach, without=options.without)


def _status(options: argparse.Namespace, console: Screen) -> int:
    from deploy.coordinator.status import status_kit

    return status_kit(options.kit, console)


def _stop(options: argparse.Namespace, console: Screen) -> int:
    from deploy.coordinator.runs import stop_kit

    return stop_kit(options.kit, console)
