"""The environment in which Flower, Ray and torch run."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from common.files.system import has_home

# Ray starts its workers at nice 15, which starves a simulation on a machine that does anything else (performance.md 2);
# the other switches keep a simulation from talking to the internet.
ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # a SIGTERM is an end as asked, not a crash with a stack of C++
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}

OWN_FOLDER = 13
"""Bytes of `/ray-` and eight random characters."""


def prepare_environment() -> None:
    """Set the variables of `ENVIRONMENT` that the user has not set, before Ray or Flower starts.

    Flower starts its own programs by name: those beside this interpreter, also where no environment is activated.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "FLWR_HOME" not in os.environ and not has_home():  # Flower would end in a traceback
        os.environ["FLWR_HOME"] = str(own_folder("flwr-", tempfile.gettempdir()))
    os.environ["PATH"] = programs_first(os.environ.get("PATH", ""))


def programs_first(path: str) -> str:
    """Return a PATH that looks beside this interpreter first."""
    beside = str(Path(sys.executable).parent)
    return (
        path
        if path.split(os.pathsep, maxsplit=1)[0] == beside
        else os.pathsep.join(filter(None, [beside, path]))
    )


@cache
def own_folder(prefix: str, parent: str) -> Path:
    """Make a folder for this process alone, once, and remove it when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def quiet_flower() -> None:
    """Keep Flower's and Ray's own log lines to warnings: the console shows our events instead."""
    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(name).propagate = False
