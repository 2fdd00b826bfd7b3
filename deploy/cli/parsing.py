"""Errors of both command lines that say what was probably meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Final

COMMANDS: Final = {
    "fedsgcg": (
        *("study", "simulate", "settings", "methods", "report", "clean", "hospitals", "data"),
        *("metrics", "dashboards", "provision", "serve", "run", "resume", "status", "stop"),
    ),
    "fedsgcg-site": (
        *("check", "join", "status", "leave", "ledger", "approve", "cache", "request", "predict"),
    ),
}
"""The commands of both programs, so that each can refer to the other without loading it."""

SPELLINGS: Final = 0.6
"""Similarity above which a name is taken for a misspelled one."""


def check_command(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """End the program with a hint if the first argument is not one of its commands.

    Args:
        parser: Parser of the program, with the program's name.
        arguments: The command line without the program's name.
    """
    first = next(iter(arguments), "")
    if first in ("", "-h", "--help", "--version", *COMMANDS[parser.prog]):
        return
    if first.startswith("-"):
        parser.error(f"{first}: options come after the command: {parser.prog} COMMAND {first}")
    parser.error(f"{first!r} is not a command of {parser.prog}{_hint(parser.prog, first)}")


def unrecognized(arguments: Sequence[str], instead: Mapping[str, str]) -> str:
    """Return the message for arguments that a command does not have.

    Args:
        arguments: What was left over, the values of unknown options included.
        instead: Option without dashes -> what to write for it, for settings given as options.
    """
    hints = [
        f"settings are given as name=value: {instead[name]}"
        for name in (text.lstrip("-").partition("=")[0] for text in arguments)
        if name in instead
    ]
    return "; ".join([f"unrecognized arguments: {' '.join(arguments)}", *hints])


def _hint(program: str, word: str) -> str:
    for other, commands in COMMANDS.items():
        if other != program and word in commands:
            return f"; it is one of {other}: {other} {word} --help"
    close = {
        name: other
        for other, commands in reversed(COMMANDS.items())
        for name in difflib.get_close_matches(word, commands, n=1, cutoff=SPELLINGS)
    }
    if nearest := difflib.get_close_matches(word, list(close), n=1, cutoff=SPELLINGS):
        return f"; did you mean `{close[nearest[0]]} {nearest[0]}`?"
    return f": {', '.join(COMMANDS[program])}"
