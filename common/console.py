"""What every command does with its console: how text, data and tables look, errors in words, progress.

Everything that is printed goes through a `Screen`. Data passes through nothing that could change it: names, paths and
fingerprints are neither markup nor emoji nor numbers to be coloured, a line is never broken, and a table that is wider
than the console is printed whole.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TextIO, TypeVar, cast

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from common.errors import FedsgcgError
from common.streams import Outlet, flush_streams, open_streams

T = TypeVar("T")

WITHOUT_TERMINAL = 110
"""Columns of a console that is a file or a pipe, where 80 would break a table."""

TERMINAL = 80
"""Columns of a terminal that does not say how many it has."""

FEWEST_COLUMNS = 20
"""A console of fewer columns (`COLUMNS=0`) is one whose width nobody knows."""

FOLDED = 24
"""Columns from which a long word, such as a path, is folded in a column that folds."""

WIDEST = 10_000
"""Columns in which every cell fits on one line."""

UNSEEN = {number: "?" for number in (*range(0x20), *range(0x7F, 0xA0)) if chr(number) not in "\t\n"}
"""How control characters are shown."""

QUIET_S = 5.0
"""Seconds between two lines on a console that cannot redraw."""


class Screen(Console):
    """A console that prints data verbatim, and all of it.

    Args:
        stream: Where to print.
        width: Columns; else those of the terminal or of `COLUMNS`.
    """

    def __init__(self, stream: TextIO, width: int | None = None) -> None:
        super().__init__(
            file=cast(IO[str], Outlet(stream)),
            width=width or _columns(stream),
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as `rich` does; a table that is too wide for the console runs over its edge and loses nothing."""
        for table in objects:
            if isinstance(table, Table):
                least = least_width(self, table)
                table.width = least if least > self.width else table.width
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text verbatim, but for control characters: a file's name cannot steer the terminal."""
        return super().render_str(text.translate(UNSEEN), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Show a spinner before a verbatim text."""
        return super().status(Text(status) if isinstance(status, str) else status, **options)


def _columns(stream: TextIO) -> int | None:
    """Return the console's width: `COLUMNS` where it makes sense; None leaves a terminal to `rich`, as it may change.

    `rich` takes `COLUMNS=0` at its word and prints nothing.
    """
    wish = os.environ.get("COLUMNS", "")
    if wish.isdigit() and int(wish) >= FEWEST_COLUMNS:
        return int(wish)
    if not stream.isatty():
        return WITHOUT_TERMINAL
    return os.get_terminal_size(stream.fileno()).columns or TERMINAL if wish.isdigit() else None


def least_width(console: Console, table: Table) -> int:
    """Return the columns that a table needs at least, and keep its cells from being cut where it has fewer.

    A column is never narrower than its longest word, one with `no_wrap` never than its longest cell: `rich` would cut
    off the rest. Long words of a column with `overflow="fold"` go on in the next line.
    """
    wide = console.options.update(width=WIDEST)
    for column in table.columns:
        sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        widest = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
        column.min_width = max(min(widest, FOLDED if column.overflow == "fold" else widest), column.min_width or 0)
    return Measurement.get(console, wide, table).minimum


def run_command(work: Callable[[Screen], int], interrupted: str = "") -> int:
    """Run a command with a console and return its exit code; errors of ours become text, never a traceback.

    Args:
        work: The command.
        interrupted: What to say after Ctrl-C.

    Returns:
        What `work` returned; 2 for an error of ours, 130 after Ctrl-C.
    """
    open_streams()
    try:
        return work(Screen(sys.stdout))
    except FedsgcgError as error:
        for problem in error.problems:
            print_error(str(problem))
        return 2
    except KeyboardInterrupt:
        if interrupted:
            Screen(sys.stderr).print(interrupted, style="yellow")
        return 130
    finally:
        flush_streams()


def print_error(text: str) -> None:
    """Print an error to standard error, to the letter."""
    Screen(sys.stderr).print(text, style="red")


def progress_bar(console: Screen, *more: ProgressColumn) -> Progress:
    """Return a bar that goes when it is done; its descriptions are shown verbatim."""
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(), *more, console=console, transient=True)


@contextmanager
def steps_of(console: Screen, words: str) -> Iterator[Callable[[str], None]]:
    """Show what long work is at: a spinner, or a line now and then on a console that cannot redraw.

    Args:
        console: Where to show it.
        words: What is happening, e.g. "making the report".

    Yields:
        A function that is told the name of each step.
    """
    if console.is_terminal:
        with console.status(Text(words)) as status:
            yield lambda step: status.update(Text(f"{words}: {step}"))
        return
    last = time.monotonic()

    def tell(step: str) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_S:
            last = time.monotonic()
            console.print(f"{words}: {step}")

    yield tell


def counted(items: Sequence[T], console: Screen, words: str) -> Iterator[T]:
    """Yield the items and show how many are done.

    Args:
        items: What is worked through.
        console: Where to show it.
        words: What is happening, e.g. "converting".
    """
    if console.is_terminal:
        with progress_bar(console, MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            yield from progress.track(items, description=words)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= QUIET_S and done < len(items):
            last = time.monotonic()
            console.print(f"{words}: {done} of {len(items)}")
