"""Imports the libraries of the extra `formats` when a file needs them."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any, Final

from fedsgcg.common.errors import fail

INSTALL: Final = 'pip install "fedsgcg[formats]"'


def library(name: str, form: str) -> Any:
    """Return a library of the extra `formats`.

    Args:
        name: Name of the module, for example `SimpleITK`.
        form: The format that needs it, for the error.

    Raises:
        FedsgcgError: DAT-160 when it is not installed.
    """
    logging.getLogger(name).setLevel(logging.CRITICAL)  # its warnings quote headers, names included
    try:
        return import_module(name)
    except ImportError as error:
        raise fail(
            "DAT-160",
            found=f"{form}, and no {name.partition('.')[0]} ({error})",
            expected="the extra `formats`",
            action=f"Install it in the environment of fedsgcg: {INSTALL}",
        ) from error
