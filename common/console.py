"""Progress over many files: a bar where the console can redraw, a line now and then where it is a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

QUIET_S = 5.0
"""Seconds between two lines on a console that cannot redraw."""


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
