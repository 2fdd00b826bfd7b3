"""The parser of `fedsgcg data check`; the command itself is loaded when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from fedsgcg.common.console import Screen, add_output_options
from fedsgcg.common.exit_codes import exit_codes
from fedsgcg.deploy.prepare.command import SETTINGS

SHEET: Final = "check.html"
CHECK: Final = """\
Read every case of all hospitals as training reads it; list sizes, spacings, orientation, labels by
hospital and every problem with its repair; measure one training step; and write a sheet with one
slice a case and its contours. The sheet shows patients: keep it where the data are.
"""


def add_parser(actions: Any) -> None:
    """Add `check` to the actions of `fedsgcg data`."""
    check = actions.add_parser(
        "check",
        help="check the data of all hospitals before a study",
        description=CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=exit_codes(success="no problem", failure="errors", partial="warnings"),
    )
    check.add_argument(
        "source", metavar="DATA", type=Path, help=f"prepared folder, or its {SETTINGS}"
    )
    check.add_argument(
        "overrides", nargs="*", metavar="name=value", help="settings, e.g. data=promise12"
    )
    check.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help=f"sheet (default: DATA/{SHEET})"
    )
    check.add_argument("--all", action="store_true", help="also list cases without a problem")
    add_output_options(check, events=True)
    check.set_defaults(run=_run)


def _run(options: argparse.Namespace, console: Screen) -> int:
    from fedsgcg.deploy.cli.data_check import run_check

    return run_check(options, console)
