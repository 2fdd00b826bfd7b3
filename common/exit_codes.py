"""Exit codes that all command lines share, as text for their help."""

from __future__ import annotations


def exit_codes(
    *,
    success: str = "success",
    failure: str = "failure",
    invalid: str = "bad settings or data",
    partial: str,
) -> str:
    """Return the exit codes of a command line for the end of its help.

    Args:
        success: Meaning of 0.
        failure: Meaning of 1.
        invalid: Meaning of 2.
        partial: Meaning of 3.
    """
    return (
        f"exit codes: 0 {success}, 1 {failure}, 2 {invalid}, 3 {partial},\n"
        "130 interrupted, 143 ended by SIGTERM\n"
    )
