"""`fedsgcg`: the coordinator's command line."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedsgcg.common.console import Screen, Version, add_output_options, run_command, steps_of
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.exit_codes import exit_codes
from fedsgcg.common.files.system import expand
from fedsgcg.common.names import number_of
from fedsgcg.common.run_folder import paths
from fedsgcg.deploy.cli import check_command as data_check
from fedsgcg.deploy.cli import methods
from fedsgcg.deploy.cli.federation import add_commands
from fedsgcg.deploy.cli.parsing import check_command, unrecognized
from fedsgcg.deploy.monitoring import command as monitoring
from fedsgcg.deploy.prepare import command as data
from fedsgcg.deploy.study.summary import STATUS, print_summary

HELP = """\
Hospitals train one segmentation model together without sharing images,
and the model is evaluated at a hospital that took no part in training.

  fedsgcg study experiment=demo method=source,sgcg heldout=all
      The demonstration: four synthetic hospitals, each held out in turn.

  fedsgcg study data=promise12 data.root=DIR method=source,sgcg heldout=all seed=0,1,2
      A leave-one-hospital-out study: held-out hospitals x methods x seeds. The same
      command again runs only what is missing.

  fedsgcg study ... method=sgcg prototypes.weight=0.01,0.1,1 select=prototypes.weight
      Each fold's source hospitals choose the value by holding each other out in turn;
      without select the values are compared. The held-out hospital never chooses.

  fedsgcg simulate data=promise12 data.root=DIR method=sgcg heldout=HK
      One federation.

  fedsgcg report RUN       Rebuild RUN/report.html from the files of the run folder.
  fedsgcg clean RUN        Remove checkpoints and pictures of its finished cells.
  fedsgcg metrics RUN      Serve its metrics for Prometheus; `dashboards` puts them into Grafana.
  fedsgcg settings [...]   Show every resolved setting and the choices of each group;
                           `settings rounds` explains one setting.
  fedsgcg methods [NAME]   List the training methods with their costs, or show one card.
  fedsgcg hospitals DIR    Write the synthetic hospitals as NIfTI files.
  fedsgcg data list        Data sets with settings; `data prepare NAME` says what to download.
  fedsgcg data check DIR   Read every case of all hospitals and list problems with repairs.
  fedsgcg-site predict CELL IMAGE -o DIR   Segment new images with the model of a cell.

A real federation: fedsgcg provision project.yaml makes a kit for the coordinator and one
for each hospital; then fedsgcg serve | run | status | stop | resume KIT.

Settings are given as name=value: a group (data=promise12) or one value
(federation.rounds=30). Your own YAML files: --config-dir DIR, or data=PATH.yaml; your own
classes: method=package.module:Class, network=package.module:Class. Common settings:

  data.root=DIR            folder with manifest.csv, or with one folder per hospital
  heldout=NAME|all         the hospital that takes no part in training
  federation.rounds=N      rounds
  network.base_width=N     channels of the first block (16 = RAM-DSIR)
  data.image_size=N        side of the training slices in pixels
  prototypes.memory=...    cumulative | discount | lagged | restart
  device=auto|cpu|cuda     runtime=auto|ray|inprocess    output=FOLDER
"""
INTERRUPTED = "Interrupted. The same command resumes after the last completed round."

HYDRA_FLAGS = {
    ("-m", "--multirun"): "leave it out: `fedsgcg study` runs every combination of "
    "comma-separated values",
    ("-c", "--cfg"): "`fedsgcg settings` shows every resolved setting",
    ("--resolve",): "`fedsgcg settings` shows every resolved setting",
    ("--info",): "`fedsgcg settings NAME` explains a setting",
    ("--hydra-help",): "see `fedsgcg --help` and `fedsgcg settings NAME`",
}
"""Options of Hydra's own command line -> what to use instead."""

EXITS = exit_codes(
    success="completed", failure="failed", partial="degraded (some round missed a site)"
)


def run() -> None:
    """Run one command and exit, even if a site or coordinator thread is still running.

    A thread inside torch crashes the interpreter when it shuts down, and Flower's coordinator
    thread would keep an interrupted process alive until the round's deadline.
    """
    code = main()
    if any(thread.name == "hospitals" or not thread.daemon for thread in threading.enumerate()[1:]):
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `FedsgcgError` is printed without a traceback and gives exit code 2."""
    options = _parsed(arguments)
    return run_command(lambda console: int(options.run(options, console)), INTERRUPTED, options)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; settings may come before and after options."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else arguments
    check_command(parser, given)
    options, rest = parser.parse_known_args(given)
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(unrecognized(rest, _settings_as_options(rest, options)))
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _settings_as_options(rest: Sequence[str], options: argparse.Namespace) -> dict[str, str]:
    """Return `heldout=all` for `--heldout all`: settings that were given as options."""
    if not hasattr(options, "overrides"):
        return {}
    from fedsgcg.common.settings.choices import GROUPS
    from fedsgcg.common.settings.compose import known_settings

    known = {*GROUPS, *known_settings()}
    following = [*rest[1:], *options.overrides[:1]]
    found = {}
    for text, value in zip(rest, [*following, ""], strict=False):
        name, _, given = text.lstrip("-").partition("=")
        if text.startswith("--") and name in known:
            found[name] = f"{name}={given or value or 'VALUE'}"
    return found


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fedsgcg", description=HELP, epilog=EXITS, formatter_class=raw
    )
    parser.add_argument("--version", action=Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, summary in (
        ("study", _study, "held-out hospitals x methods x seeds, resumable"),
        ("simulate", _simulate, "one federation on this machine"),
        ("settings", _settings, "show every resolved setting"),
    ):
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=EXITS, formatter_class=raw
        )
        metavar = "name=value" if name != "settings" else "name[=value]"
        command.add_argument(
            "overrides", nargs="*", metavar=metavar, help="settings; see fedsgcg settings"
        )
        command.add_argument(
            *("--config-dir", "-cd"),
            default="",
            metavar="DIR",
            help="folder with your own YAML files in data/, experiment/, method/ and network/",
        )
        for flags, instead in HYDRA_FLAGS.items():
            command.add_argument(
                *flags,
                action="append_const",
                dest="hydra",
                const=(flags[-1], instead),
                help=argparse.SUPPRESS,
            )
        add_output_options(command, events=True)
        if name != "settings":
            command.add_argument(
                "--dry-run", action="store_true", help="print what would run, and run nothing"
            )
        command.set_defaults(run=run)
    report = commands.add_parser(
        "report", help="rebuild report.html from the files of a run folder"
    )
    report.add_argument("folder", type=Path)
    report.add_argument(
        "--aliases",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a hospital's own aliases.csv: the page then shows the names of its cases",
    )
    report.add_argument(
        "--pdf", action="store_true", help="print report.pdf too, with a Chromium of this machine"
    )
    add_output_options(report, events=True)
    report.set_defaults(run=_report)
    clean = commands.add_parser(
        "clean", help="remove files that the finished cells of a run folder do not need"
    )
    clean.add_argument("folder", metavar="RUN", type=Path)
    clean.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    add_output_options(clean, events=True)
    clean.set_defaults(run=_clean)
    hospitals = commands.add_parser(
        "hospitals", help="write the synthetic hospitals as NIfTI files"
    )
    hospitals.add_argument("folder", type=Path)
    hospitals.add_argument("--seed", type=int, default=0)
    hospitals.set_defaults(run=_hospitals)
    methods.add_parser(commands)
    data_check.add_parser(data.add_parser(commands))
    add_commands(commands)
    monitoring.add_commands(commands)
    return parser


def _study(options: argparse.Namespace, console: Screen) -> int:
    return _run(options, console, single=False)


def _simulate(options: argparse.Namespace, console: Screen) -> int:
    return _run(options, console, single=True)


def _overrides(options: argparse.Namespace) -> list[str]:
    """Return the settings of a command line, `--config-dir` included.

    Raises:
        FedsgcgError: CFG-001 for each of Hydra's own options, with what to use instead.
    """
    if options.hydra:
        raise FedsgcgError(
            *(
                Problem("CFG-001", where="command line", found=flag, action=instead)
                for flag, instead in options.hydra
            )
        )
    if not options.config_dir:
        return list(options.overrides)
    folder = expand(options.config_dir, "--config-dir").absolute()
    return [f"config_dir={folder}", *options.overrides]


def _run(options: argparse.Namespace, console: Screen, *, single: bool) -> int:
    from fedsgcg.deploy.study.plan import plan_study
    from fedsgcg.deploy.study.run import run_study

    overrides = _overrides(options)
    with steps_of(console, "checking the hospitals' data and this machine") as step:
        study = plan_study(overrides, single=single, step=step)
    names = [cell.name for cell in study.cells]
    done = [cell.name for cell in study.cells if cell.done]
    facts = {
        "folder": study.folder,
        "cells": names,
        "done": done,
        "runtime": study.runtime,
        "device": study.device,
    }
    if options.dry_run:
        from fedsgcg.deploy.cli.dry_run import show_plan

        found = show_plan(study, console)
        console.event("study.planned", **facts, **asdict(found))
        return 0
    console.event("study.started", **facts)
    code = run_study(study, console)
    ended = {"exit_code": code, "status": STATUS[code], "folder": study.folder}
    if study.shard is not None:
        count = sum(cell.done for cell in study.cells)
        console.print(
            f"shard {study.shard} {STATUS[code]}: {count} of {len(study.cells)} of its cells have "
            "ended. When all shards have, the same command without shard= makes the report."
        )
        console.event("shard.finished", **ended)
        return code
    print_summary(study.folder, study.cells, code, console)
    console.event("study.finished", **ended, report=study.folder / paths.REPORT)
    return code


def _report(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.study.record import collect, read_record
    from fedsgcg.server.report.build import make_report
    from fedsgcg.server.report.study_files import changed_files

    folder: Path = options.folder
    _check_run_folder(folder)
    with steps_of(console, "making the report") as step:
        read_record(folder)
        collect(folder)
        path = make_report(folder, step, options.aliases)
        if options.pdf:
            from fedsgcg.server.report.pdf import print_pdf

            step("printing")
            path = print_pdf(path, path.with_suffix(".pdf"))
    changed = changed_files(folder)
    for problem in changed:
        console.print(str(problem), style="red")
    console.print(f"report: {path}")
    console.event("report.done", report=path)
    return 1 if changed else 0


def _clean(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.study.cleaning import PICTURES, RESUME, Freed, finished_cells, remove
    from fedsgcg.server.records.journal import lock_file

    folder: Path = options.folder
    _check_run_folder(folder)
    with lock_file(folder / paths.LOCK):
        cells = finished_cells(folder)
        for name, patterns in (
            ("checkpoints and journals", RESUME),
            ("pictures and features", PICTURES),
        ):
            freed = sum(
                (remove(cell, patterns, dry_run=options.dry_run) for cell in cells), Freed()
            )
            console.event(
                "clean", what=name, files=freed.files, bytes=freed.size, removed=not options.dry_run
            )
            console.print(f"{name}: {freed}{' would be' if options.dry_run else ''} removed")
    console.print(
        f"Results, rounds and models of {number_of(len(cells), 'finished cell')} are kept, and so "
        "is the report."
    )
    console.print("If the report is rebuilt, it has no overlays of these cells.")
    return 0


def _check_run_folder(folder: Path) -> None:
    if not (folder / paths.STUDY).is_file():
        raise fail(
            "CFG-001",
            where=str(folder),
            found="no study.yaml in this folder" if folder.is_dir() else "no such folder",
            expected="a run folder made by fedsgcg",
        )


def _settings(options: argparse.Namespace, console: Screen) -> int:
    import yaml

    from fedsgcg.common.settings.compose import GROUPS, choices_of, join, own_choices
    from fedsgcg.common.settings.help import explain

    given = _overrides(options)
    overrides = [text for text in given if "=" in text]
    tree, own = join(overrides), own_choices(overrides)
    if names := [text for text in given if "=" not in text]:
        texts = {name: explain(name, tree, overrides) for name in names}
        for name, text in texts.items():
            console.event("setting", setting=name, text=text)
        console.print("\n\n".join(texts.values()))
        return 0
    console.event("settings", settings=tree)
    console.print(yaml.safe_dump(tree, sort_keys=False))
    for group in GROUPS:
        console.print(f"{group}= {' | '.join(choices_of(group, own))}")
    return 0


def _hospitals(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.common.images.phantoms import write_hospitals

    with console.status("writing the synthetic hospitals"):
        path = write_hospitals(options.folder, seed=options.seed)
    console.print(f"hospitals: {path}")
    return 0


if __name__ == "__main__":
    run()
