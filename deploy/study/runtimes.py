"""One federation on one machine or cluster, in either of two ways that give the same model hash.

*Hospitals in parallel* (`ray`): Flower's simulation engine, every hospital a Ray actor with its own GPU when there are
enough and a share otherwise. *Cells in parallel* (`inprocess`): the federation runs inside one process, and a study
runs many such processes at once (`deploy.study.run`).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.console import catch_signals
from common.errors import fail
from common.files.system import has_home
from common.settings.plan import Plan
from deploy.study.preflight import Machine

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

SOCKET_PATH = 107
"""Bytes that the path of a Unix socket may have."""

OWN_FOLDER = 13
"""Bytes of `/ray-` and eight random characters."""

LONGEST_TEMPORARY = SOCKET_PATH - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes of a temporary folder in which Ray's longest socket still has a path that the kernel takes."""


@dataclass(frozen=True)
class Cell:
    """One federation of a study.

    Attributes:
        method: Label of what is compared: the method, and what the study varies of it.
        heldout: Name of the held-out hospital, "" for none.
        seed: The seed.
        tree: The resolved settings (`common.settings.plan.Plan.from_tree`), with the cell's own `output`.
        trained_on: The one hospital that trains with `federation=local`.
    """

    method: str
    heldout: str
    seed: int
    tree: dict[str, Any]
    trained_on: str = ""

    @property
    def folder(self) -> Path:
        """The cell's run folder."""
        return Path(self.tree["output"])

    @property
    def name(self) -> str:
        """What the console calls it."""
        alone = f" · {self.trained_on} alone" if self.trained_on else ""
        return f"{self.method} · {self.heldout or 'all sites'} · seed {self.seed}{alone}"

    def outcome(self) -> dict[str, Any]:
        """What `server.app` wrote at the end of the run; empty when the cell has not ended yet."""
        path = self.folder / "outcome.json"
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            action = "remove the cell's folder and call again"
            raise fail("SRV-402", where=str(path), found="text that is not JSON", action=action) from error
        return found

    @property
    def done(self) -> bool:
        """Whether the federation ran to its end and its results are there."""
        return self.outcome().get("status") in ("completed", "degraded") and (self.folder / "results.parquet").exists()


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
    return path if path.split(os.pathsep, maxsplit=1)[0] == beside else os.pathsep.join(filter(None, [beside, path]))


def choose_runtime(asked: str, cells: int, machine: Machine) -> str:
    """Return `ray` or `inprocess` for `auto`.

    Hospitals run in parallel only where one cell alone would leave most of the machine idle: a single cell and several
    GPUs. Everywhere else cells in parallel use the machine without paying for a transport.
    """
    if asked != "auto":
        return asked
    return "ray" if cells == 1 and machine.gpus > 1 else "inprocess"


def gpu_share(wanting: int, machine: Machine) -> float:
    """GPU share of one of `wanting` parallel tasks: a whole GPU when there are enough, an equal share otherwise."""
    if not machine.gpus:
        return 0.0
    return 1.0 if machine.gpus >= wanting else max(0.05, int(100 * machine.gpus / wanting) / 100)


def run_cell_in_process(tree: Mapping[str, Any]) -> None:
    """Run one cell in this process; whatever stops the coordinator is raised."""
    from clients.app import build_client_app
    from deploy.study.inprocess import run_in_process
    from server.app import build_server_app

    prepare_environment()
    quiet_flower()
    plan = Plan.from_tree(tree)
    run_in_process(build_server_app(dict(tree)), build_client_app(dict(tree)), plan.members())


def run_cell_on_ray(tree: Mapping[str, Any], machine: Machine, address: str = "local") -> None:
    """Run one cell with Flower's simulation engine, one actor a hospital as far as the machine allows.

    `run_simulation` is deprecated in favour of `flwr run`, which cannot hand over an exception or a callback; this
    function is the one place to change when it goes.

    Raises:
        FedsgcgError: What stopped the coordinator; RND-410 where it was the loss of a hospital's actor.
    """
    import ray
    from flwr.simulation import run_simulation

    from clients.app import build_client_app
    from deploy.study.lost_workers import told_of_lost_workers
    from server.app import build_server_app

    prepare_environment()
    quiet_flower()
    plan = Plan.from_tree(tree)
    training = sum(plan.role(site) == "train" for site in plan.members())
    with warnings.catch_warnings(), told_of_lost_workers():
        warnings.simplefilter("ignore", FutureWarning)  # Ray's note on visible devices, once a process
        # As Flower would start it; here, because Ray puts a handler of SIGTERM in the place of ours.
        ray.init(
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
            **ray_arguments(machine, address),
        )
        catch_signals()
        run_simulation(
            server_app=build_server_app(dict(tree)),
            client_app=build_client_app(dict(tree)),
            num_supernodes=len(plan.members()),
            backend_config={
                "client_resources": {"num_cpus": plan.site.threads, "num_gpus": gpu_share(training, machine)},
            },
        )


def ray_arguments(machine: Machine, address: str) -> dict[str, Any]:
    """Arguments of `ray.init`: a Ray of our own, or a running cluster at `auto` or `host:port`."""
    if address != "local":
        return {"address": address, "log_to_driver": False}
    folder = short_folder(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")  # noqa: S108
    return {
        "num_cpus": machine.cpus,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    } | ({"_temp_dir": folder} if folder else {})


def short_folder(temporary: str, others: Sequence[str] = ("/tmp", "/var/tmp", "/dev/shm")) -> str:  # noqa: S108
    """Return a temporary folder for Ray's sockets where the usual one is too long for them, else "".

    Args:
        temporary: Where Ray would put its folder: `RAY_TMPDIR`, `TMPDIR` or `/tmp`.
        others: Where else it may be.

    Raises:
        FedsgcgError: CFG-010 when there is no shorter one.
    """
    if len(os.fsencode(temporary)) <= LONGEST_TEMPORARY:
        return ""
    for folder in others:
        if len(os.fsencode(folder)) + OWN_FOLDER <= LONGEST_TEMPORARY and os.access(folder, os.W_OK | os.X_OK):
            return str(own_folder("ray-", folder))
    found = f"{temporary} ({len(os.fsencode(temporary))} bytes)"
    expected = f"at most {LONGEST_TEMPORARY} bytes, for a socket's path may have {SOCKET_PATH}"
    action = "Set RAY_TMPDIR to a short folder that can be written, e.g. /tmp."
    raise fail("CFG-010", where="TMPDIR", found=found, expected=expected, action=action)


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
