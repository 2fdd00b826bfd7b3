"""Console output of all commands: text, tables, errors, progress and signals.

Everything is printed through a `Screen`, which leaves data unchanged: names, paths and fingerprints
are not interpreted as markup or emoji and not highlighted, lines are not wrapped, and a table wider
than the console is not truncated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.names import printable
from fedsgcg.common.streams import Outlet, flush_streams, open_streams

T = TypeVar("T")

EVENTS_VERSION = 1
"""Version of the events of `--json`; raised when a field changes its meaning or goes."""

WITHOUT_TERMINAL = 110
"""Columns of a file or a pipe, where 80 would break tables."""

TERMINAL = 80
"""Columns of a terminal that does not report its width."""

FEWEST_COLUMNS = 20
"""A smaller value of `COLUMNS` (such as 0) is ignored."""

FOLDED = 24
"""Columns at which a long word, such as a path, is folded if its column allows folding."""

WIDEST = 10_000
"""Columns that are enough for any cell to fit on one line."""

PROBLEM_STYLES = ("yellow", "red", "bold red")
"""Styles that are printed even with `-q`."""

UNSEEN = {number: "?" for number in (*range(0x20), *range(0x7F, 0xA0)) if chr(number) not in "\t\n"}
"""Replacements of control characters."""

ENDS_WITHIN_S = 10.0
"""Seconds that an interrupted command has for cleaning up."""

QUIET_S = 5.0
"""Seconds between two progress lines on a console that cannot redraw."""


class Screen(Console):
    """A console that prints data verbatim and without truncation.

    Args:
        stream: Where to print.
        width: Columns; the default is `COLUMNS` or the width of the terminal.
        quiet: Print only warnings and errors (`-q`).
        events: Write events as JSON lines to standard output (`--json`); `stream` is then standard
            error.
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
        """Print as `rich` does, but let a wide table exceed the console instead of cutting it."""
        if self.only_problems and options.get("style") not in PROBLEM_STYLES:
            return
        for table in objects:
            if isinstance(table, Table):
                least = least_width(self, table)
                table.width = least if least > self.width else table.width
        super().print(*objects, **options)

    def event(self, name: str, **fields: Any) -> None:
        """Write an event as one line of JSON to standard output if `--json` was given."""
        if self.events:
            facts = {"version": EVENTS_VERSION, "event": name, **fields}
            outlet = Outlet(sys.stdout)
            outlet.write(json.dumps(_plain(facts), allow_nan=False) + "\n")
            outlet.flush()

    @property
    def redraws(self) -> bool:
        """Whether progress is drawn over itself; else it is lines.

        A terminal without cursor movement (`TERM=dumb`) cannot, and a log of a CI system (`CI`)
        would keep every state.
        """
        able = self.is_terminal and not self.is_dumb_terminal
        return able and not self.only_problems and not _in_ci()

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text verbatim, except for control characters, which could steer the terminal."""
        return super().render_str(text.translate(UNSEEN), **options)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Show a spinner before a verbatim text."""
        return super().status(Text(status) if isinstance(status, str) else status, **options)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: NaN and infinity are null, names valid text, paths names."""
    if isinstance(value, Mapping):
        return {printable(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return printable(str(value))


def _columns(stream: TextIO) -> int | None:
    """Return the console's width, or None to let `rich` follow the width of a terminal.

    A plausible `COLUMNS` has precedence; `rich` itself would accept `COLUMNS=0` and print nothing.
    """
    requested = os.environ.get("COLUMNS", "")
    if requested.isdigit() and int(requested) >= FEWEST_COLUMNS:
        return int(requested)
    if not stream.isatty():
        return WITHOUT_TERMINAL
    if requested.isdigit():
        return os.get_terminal_size(stream.fileno()).columns or TERMINAL
    return None


def least_width(console: Console, table: Table) -> int:
    """Set the least width of each column and return the least width of the table.

    `rich` truncates what does not fit. So a column gets at least the width of its longest word, and
    with `no_wrap` that of its longest cell. Long words of a column with `overflow="fold"` continue
    on the next line.
    """
    wide = console.options.update(width=WIDEST)
    for column in table.columns:
        sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        widest = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
        needed = min(widest, FOLDED) if column.overflow == "fold" else widest
        column.min_width = max(needed, column.min_width or 0)
    return Measurement.get(console, wide, table).minimum


class Version(argparse.Action):
    """`--version`: the versions of the program and of its main dependencies."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        """Print the versions and exit."""
        parts = [f"Python {platform.python_version()}"]
        parts += [f"{name} {version(name)}" for name in ("torch", "flwr", "ray")]
        sys.stdout.write(f"{parser.prog} {version('fedsgcg')} ({', '.join(parts)})\n")
        parser.exit()


class _Interruption:
    """Handler of SIGINT and SIGTERM; both end a command.

    SIGTERM is how a cluster, a container or a service manager ends a job. The signal's number is
    kept, because Ray replaces a `KeyboardInterrupt` by its own. On its way out, Flower's simulation
    engine waits for the coordinator's thread, which may wait until the round's deadline; so the
    process exits after `ENDS_WITHIN_S` even if cleaning up has not finished.
    """

    def __init__(self) -> None:
        self.number = 0
        self.armed = False
        self._message = ""
        self._timer: threading.Timer | None = None

    def begin(self, message: str) -> None:
        """Start to handle signals for a command; `message` is printed after an interruption."""
        self.number = 0
        self.armed = True
        self._message = message

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.number:  # a second signal must not interrupt the cleaning up
            self.number = number
            self._timer = threading.Timer(ENDS_WITHIN_S, self._leave)
            self._timer.daemon = True
            self._timer.start()
            logging.disable(logging.ERROR)  # errors that follow from the interruption
            raise KeyboardInterrupt

    def end(self) -> int:
        """Print that the command was interrupted and return its exit code."""
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


_INTERRUPTION = _Interruption()


def catch_signals() -> None:
    """Make SIGTERM end the running command as Ctrl-C does.

    To be called again after a library has set its own handlers. Does nothing without a running
    command, or outside the main thread, where Python does not allow signal handlers.
    """
    if _INTERRUPTION.armed and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _INTERRUPTION)
        signal.signal(signal.SIGINT, _INTERRUPTION)


def add_output_options(parser: argparse.ArgumentParser, *, events: bool = False) -> None:
    """Add `-q` and `-v` to the options of a command, and `--json` if it has events."""
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
    """Run a command with a console; a `FedsgcgError` is printed without a traceback.

    Args:
        work: The command.
        interrupted: Message to print after Ctrl-C or SIGTERM.
        options: The command line, for `-q`, `-v` and `--json` (`add_output_options`).

    Returns:
        The exit code: what `work` returned, 2 after a `FedsgcgError`, 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    open_streams()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    _INTERRUPTION.begin(interrupted)
    catch_signals()
    quiet = bool(getattr(options, "quiet", False))
    verbose = bool(getattr(options, "verbose", False))
    events = bool(getattr(options, "json_events", False))
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
        return _INTERRUPTION.end()
    finally:
        _INTERRUPTION.armed = False
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
        flush_streams()


def print_error(text: str) -> None:
    """Print an error to standard error, verbatim."""
    Screen(sys.stderr).print(text, style="red")


def silent(step: str) -> None:
    """Show nothing; for functions that report their steps."""
    del step


def progress_bar(console: Screen, *more: ProgressColumn) -> Progress:
    """Return a bar that disappears when it is done; its descriptions are shown verbatim."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *more,
        console=console,
        transient=True,
    )


def showing(bar: Progress, task: TaskID) -> Callable[[int, int], None]:
    """Return a function that shows (done, all) of a task in a bar."""
    return lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps_of(console: Screen, task: str) -> Iterator[Callable[[str], None]]:
    """Show the steps of a long task by a spinner, or by lines on a console that cannot redraw.

    Args:
        console: Where to show it.
        task: What is happening, e.g. "making the report".

    Yields:
        A function to call with the name of each step.
    """
    if console.redraws:
        with console.status(Text(task)) as status:
            yield lambda step: status.update(Text(f"{task}: {step}"))
        return
    last = time.monotonic()

    def show(step: str) -> None:
        nonlocal last
        if time.monotonic() - last >= QUIET_S:
            last = time.monotonic()
            console.print(f"{task}: {step}")

    yield show


def counted(items: Sequence[T], console: Screen, task: str) -> Iterator[T]:
    """Yield the items and show how many are done.

    Args:
        items: The items to work through.
        console: Where to show it.
        task: What is happening, e.g. "converting".
    """
    if console.redraws:
        with progress_bar(console, MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            yield from progress.track(items, description=task)
        return
    last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last >= QUIET_S and done < len(items):
            last = time.monotonic()
            console.print(f"{task}: {done} of {len(items)}")
