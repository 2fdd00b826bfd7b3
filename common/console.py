"""What every command does with its console: its width, errors in words, progress over many files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.errors import FedsgcgError

T = TypeVar("T")

NARROWEST = 110
"""Columns of a console that is a file or a pipe, where 80 would break a table."""

QUIET_S = 5.0
"""Seconds between two lines on a console that cannot redraw."""


def run_command(work: Callable[[Console], int], interrupted: str = "") -> int:
    """Run a command with a console and return its exit code; errors of ours become text, never a traceback.

    Args:
        work: The command.
        interrupted: What to say after Ctrl-C.

    Returns:
        What `work` returned; 2 for an error of ours, 130 after Ctrl-C.
    """
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=NARROWEST)
    try:
        return work(console)
    except FedsgcgError as error:
        for problem in error.problems:
            print_error(str(problem))
        return 2
    except KeyboardInterrupt:
        if interrupted:
            Console(stderr=True).print(interrupted, style="yellow")
        return 130


def print_error(text: str) -> None:
    """Print an error to standard error, to the letter."""
    Console(stderr=True).print(text, style="red", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def steps_of(console: Console, words: str) -> Iterator[Callable[[str], None]]:
    """Show what long work is at: a spinner, or a line now and then on a console that cannot redraw.

    Args:
        console: Where to show it.
        words: What is happening, e.g. "making the report".

    Yields:
        A function that is told the name of each step.
    """
    if console.is_terminal:
        with console.status(words) as status:
            yield lambda step: status.update(f"{words}: {step}")
        return
    last = time.monotonic()

    def tell(step: str) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_S:
            last = time.monotonic()
            console.print(f"{words}: {step}", highlight=False, markup=False)

    yield tell


def counted(items: Sequence[T], console: Console, words: str) -> Iterator[T]:
    """Yield the items and show how many are done.

    Args:
        items: What is worked through.
        console: Where to show it.
        words: What is happening, e.g. "converting".
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(items, description=words)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= QUIET_S and done < len(items):
            last = time.monotonic()
            console.print(f"{words}: {done} of {len(items)}", highlight=False)
