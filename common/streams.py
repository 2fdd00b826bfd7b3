"""Standard streams that never end work: closed ones, ASCII only, and those whose reader or disk has gone.

What a study has computed does not depend on who reads its messages. A stream that was closed before the start is
opened on nothing (a file that is opened later would get its number, and every stray message with it); a character that
the stream's encoding lacks is written in ASCII; and a stream that cannot be written any more goes quiet.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import Any, Final, TextIO

READABLE: Final = "fedsgcg.readable"
"""Name of the error handler for characters that an encoding lacks."""

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
    """Write what cannot be encoded with ASCII signs, or as escapes of Python where there are none."""
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
    """Make the standard streams usable whatever the caller closed or set; a second call changes nothing."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(_free(number), mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - kept for good
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors=READABLE)


def _free(number: int) -> int:
    """Return a descriptor of the null device, `number` itself where it is closed."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(null, number)
        os.close(null)
        return number
    if null == number:  # it was closed, and the null device got its number
        os.set_inheritable(number, True)
    return null


class Outlet:
    """A stream that goes quiet when its reader has gone or its disk is full, instead of ending the work.

    Args:
        stream: What is written to; all else of it (`encoding`, `isatty`, ...) is passed on.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing when that is not possible any more."""
        try:
            self._stream.write(text)
        except OSError as error:
            silence(self._stream, error)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing when that is not possible any more."""
        try:
            self._stream.flush()
        except OSError as error:
            silence(self._stream, error)


def flush_streams() -> None:
    """Flush standard output and error; one that cannot be written is silenced, so that the exit code stays."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            Outlet(stream).flush()


def silence(stream: TextIO, error: OSError) -> None:
    """Lead a stream that cannot be written to the null device, also what Python still holds for it.

    A reader that has gone (`| head`) wants no more; of any other reason standard error hears once.
    """
    with suppress(OSError):  # a stream without a descriptor has nothing to lead elsewhere
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
                f"Messages are lost from here on ({error.strerror or error}); the work goes on.\n"
            )
            sys.stderr.flush()
