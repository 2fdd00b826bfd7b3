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

from fedsgcg.common.files.system import has_home

# Ray starts its workers at nice 15, which starves a simulation on a machine that does anything
# else. A SIGTERM is an orderly end, so Ray's failure handler must not print a C++ stack trace.
# Usage statistics, telemetry and update checks would connect to the internet.
ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}

KEY_IN_USE = "A connection with this key was active"
KEY_UNKNOWN = "This key is not registered, or was revoked."
"""Reasons why the coordinator's server does not let a SuperNode connect, as it states them."""

OWN_FOLDER = 13
"""Length in bytes of `/ray-` and eight random characters."""


def prepare_environment() -> None:
    """Set the variables of `ENVIRONMENT` that the user has not set, before Ray or Flower starts.

    Flower starts its own programs by name. `PATH` therefore begins with this interpreter's folder,
    so that they are found although no virtual environment is activated.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "FLWR_HOME" not in os.environ and not has_home():  # Flower would fail with a traceback
        os.environ["FLWR_HOME"] = str(own_folder("flwr-", tempfile.gettempdir()))
    os.environ["PATH"] = programs_first(os.environ.get("PATH", ""))


def programs_first(path: str) -> str:
    """Return a PATH that begins with this interpreter's folder."""
    programs = str(Path(sys.executable).parent)
    if path.split(os.pathsep, maxsplit=1)[0] == programs:
        return path
    return os.pathsep.join(filter(None, [programs, path]))


@cache
def own_folder(prefix: str, parent: str) -> Path:
    """Make a folder for this process, once per prefix and parent; it is removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def quiet_flower() -> None:
    """Show only errors of Flower's and Ray's logs; the console shows fedsgcg's events instead."""
    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger(name).propagate = False
