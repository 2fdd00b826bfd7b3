"""What every command does with its console: how text, data and tables look, errors in words, progress.

Everything that is printed goes through a `Screen`. Data passes through nothing that could change it: names, paths and
fingerprints are neither markup nor emoji nor numbers to be coloured, a line is never broken, and a table that is wider
than the console is printed whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from types import FrameType
from typing import IO, Any, NoReturn, TextIO, TypeVar, cast

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
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

PROBLEM_STYLES = ("yellow", "red", "bold red")
"""Styles of what `-q` prints too."""

UNSEEN = {number: "?" for number in (*range(0x20), *range(0x7F, 0xA0)) if chr(number) not in "\t\n"}
"""How control characters are shown."""

ENDS_WITHIN_S = 10.0
"""Seconds in which a command that was interrupted must have cleaned up."""

QUIET_S = 5.0
"""Seconds between two lines on a console that cannot redraw."""


class Screen(Console):
    """A console that prints data verbatim, and all of it.

    Args:
        stream: Where to print.
        width: Columns; else those of the terminal or of `COLUMNS`.
        quiet: Print warnings and errors alone (`-q`).
        events: Write events as JSON lines to standard output (`--json`); `stream` is then standard error.
    """

    def __init__(
        self, stream: TextIO, width: int | None = None, *, quiet: bool = False, events: bool = False
    ) -> None:
        self.only_problems, self.events = quiet, events
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
        if self.only_problems and options.get("style") not in PROBLEM_STYLES:
            return
        for table in objects:
            if isinstance(table, Table):
                least = least_width(self, table)
                table.width = least if least > self.width else table.width
        super().print(*objects, **options)

    def event(self, name: str, **fields: Any) -> None:
        """Write an event as one line of JSON to standard output where that was asked for; else do nothing."""
        if self.events:
            line = json.dumps({"event": name, **fields}, default=str)
            Outlet(sys.stdout).write(line + "\n")
            sys.stdout.flush()

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
        column.min_width = max(
            min(widest, FOLDED if column.overflow == "fold" else widest), column.min_width or 0
        )
    return Measurement.get(console, wide, table).minimum


class Version(argparse.Action):
    """`--version`: the program's version and those of what it stands on."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and leave")

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        """Print and leave."""
        parts = [f"{name} {version(name)}" for name in ("torch", "flwr", "ray")]
        own = f"{parser.prog} {version('fedsgcg')} (Python {platform.python_version()}, {', '.join(parts)})"
        sys.stdout.write(f"{own}\n")
        parser.exit()


class _Ending:
    """Handler of SIGINT and SIGTERM, the end of a job on a cluster, of a container, of a service: both end a command.

    The signal is remembered: Ray raises a `KeyboardInterrupt` of its own in the place of any that comes out. Flower's
    simulation engine waits, while it is left, for the coordinator's thread and so for the round's deadline; what has
    not ended after `ENDS_WITHIN_S` is left there.
    """

    def __init__(self) -> None:
        self.number = 0
        self.armed = False
        self._message = ""
        self._timer: threading.Timer | None = None

    def begin(self, message: str) -> None:
        """Forget an earlier signal; `message` is what to say after one."""
        self.number, self.armed, self._message = 0, True, message

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.number:  # a second one must not cut off the cleaning up after the first
            self.number = number
            self._timer = threading.Timer(ENDS_WITHIN_S, self._leave)
            self._timer.daemon = True
            self._timer.start()
            logging.disable(logging.ERROR)  # what breaks off now is no news
            raise KeyboardInterrupt

    def end(self) -> int:
        """Say that the command was interrupted and return its exit code."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        logging.disable(logging.NOTSET)
        if self._message:
            Screen(sys.stderr).print(self._message, style="yellow")
        return 128 + (self.number or signal.SIGINT)

    def _leave(self) -> None:
        code = self.end()
        flush_streams()
        os._exit(code)


_ENDING = _Ending()


def catch_signals() -> None:
    """Let SIGTERM end the command under way as Ctrl-C does, also where a library has put its own handlers since.

    Nothing happens without a command, and outside the main thread, where Python allows no handlers.
    """
    if _ENDING.armed and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _ENDING)
        signal.signal(signal.SIGINT, _ENDING)


def add_output_options(parser: argparse.ArgumentParser, *, events: bool = False) -> None:
    """Add `-q` and `-v`, and `--json` where a command has events, to the options of a command."""
    parser.add_argument("-q", "--quiet", action="store_true", help="print warnings and errors only")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="log to standard error; show where an error arose",
    )
    if events:
        parser.add_argument(
            "--json",
            dest="json_events",
            action="store_true",
            help="events as JSON lines on standard output",
        )


def run_command(
    work: Callable[[Screen], int], interrupted: str = "", options: argparse.Namespace | None = None
) -> int:
    """Run a command with a console and return its exit code; errors of ours become text, never a traceback.

    Args:
        work: The command.
        interrupted: What to say after Ctrl-C or SIGTERM.
        options: The command line, for `-q`, `-v` and `--json` (`add_output_options`).

    Returns:
        What `work` returned; 2 for an error of ours, 130 after Ctrl-C, 143 after SIGTERM.
    """
    open_streams()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    _ENDING.begin(interrupted)
    catch_signals()
    quiet, verbose, events = (
        bool(getattr(options, name, False)) for name in ("quiet", "verbose", "json_events")
    )
    screen = Screen(sys.stderr if events else sys.stdout, quiet=quiet, events=events)
    if verbose:
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s"
        )
    try:
        return work(screen)
    except FedsgcgError as error:
        if verbose:
            traceback.print_exc()
        for problem in error.problems:
            print_error(str(problem))
            screen.event("error", **asdict(problem))
        return 2
    except KeyboardInterrupt:
        return _ENDING.end()
    finally:
        _ENDING.armed = False
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
        flush_streams()


def print_error(text: str) -> None:
    """Print an error to standard error, to the letter."""
    Screen(sys.stderr).print(text, style="red")


def progress_bar(console: Screen, *more: ProgressColumn) -> Progress:
    """Return a bar that goes when it is done; its descriptions are shown verbatim."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *more,
        console=console,
        transient=True,
    )


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
