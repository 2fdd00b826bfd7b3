"""Standard streams whose failures do not stop a command.

A stream that was closed before the start is opened on the null device; otherwise the next opened
file would get its descriptor, and stray messages with it. A character that the stream's encoding
lacks is written in ASCII. A stream that can no longer be written is silenced.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Any, Final, TextIO

READABLE: Final = "fedsgcg.readable"
"""Name of the codec error handler for characters that an encoding lacks."""

IN_ASCII: Final = {
    "–": "-",
    "—": "-",
    "−": "-",
    "±": "+-",
    "×": "x",
    "·": "-",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "µ": "u",
}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replace what cannot be encoded by ASCII, or by Python escapes if there is no equivalent."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    parts = (
        IN_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode("ascii")
        for char in missing
    )
    return "".join(parts), error.end


codecs.register_error(READABLE, _in_ascii)


def open_streams() -> None:
    """Make the standard streams usable even if the caller closed them; idempotent."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(_null(number), mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors=READABLE)


def _null(number: int) -> int:
    """Return a descriptor of the null device: `number` itself if that is closed."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(null, number)
        os.close(null)
        return number
    if null == number:  # `number` was closed, and `os.open` reused it
        os.set_inheritable(number, True)
    return null


class Outlet:
    """A stream that is silenced, instead of raising, when its reader is gone or its disk is full.

    Args:
        stream: The stream to write to; other attributes (`encoding`, `isatty`, ...) are its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing if the stream can no longer be written."""
        try:
            self._stream.write(text)
        except OSError as error:
            silence(self._stream, error)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing if the stream can no longer be written."""
        try:
            self._stream.flush()
        except OSError as error:
            silence(self._stream, error)


def flush_streams() -> None:
    """Flush standard output and error; a failure does not change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            Outlet(stream).flush()


def silence(stream: TextIO, error: OSError) -> None:
    """Redirect a stream that cannot be written to the null device, including its buffered text.

    A reader that is gone (`| head`) is expected; any other reason is reported once on standard
    error.
    """
    with suppress(OSError):  # a stream without a descriptor cannot be redirected
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
    if (
        not isinstance(error, BrokenPipeError)
        and stream is not sys.stderr
        and sys.stderr is not None
    ):
        with suppress(OSError):
            sys.stderr.write(
                f"Output is lost from here on ({error.strerror or error}); the command continues.\n"
            )
            sys.stderr.flush()
