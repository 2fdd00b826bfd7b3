"""One federation on one machine or cluster, in either of two ways that give the same model hash.

*Hospitals in parallel* (`ray`): Flower's simulation engine, every hospital a Ray actor with its own GPU when there are
enough and a share otherwise. *Cells in parallel* (`inprocess`): the federation runs inside one process, and a study
runs many such processes at once (`deploy.study.run`).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from common.console import catch_signals
from common.errors import fail
from common.settings.plan import Plan
from deploy.environment import OWN_FOLDER, own_folder, prepare_environment, quiet_flower
from deploy.study.preflight import Machine

SOCKET_PATH = 107
"""Bytes that the path of a Unix socket may have."""

LONGEST_TEMPORARY = SOCKET_PATH - len(
    "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)
"""Bytes of a temporary folder in which Ray's longest socket still has a path that the kernel takes."""


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
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # Ray's note on visible devices, once a process
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
                "client_resources": {
                    "num_cpus": plan.site.threads,
                    "num_gpus": gpu_share(training, machine),
                },
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
        if len(os.fsencode(folder)) + OWN_FOLDER <= LONGEST_TEMPORARY and os.access(
            folder, os.W_OK | os.X_OK
        ):
            return str(own_folder("ray-", folder))
    found = f"{temporary} ({len(os.fsencode(temporary))} bytes)"
    expected = f"at most {LONGEST_TEMPORARY} bytes, for a socket's path may have {SOCKET_PATH}"
    action = "Set RAY_TMPDIR to a short folder that can be written, e.g. /tmp."
    raise fail("CFG-010", where="TMPDIR", found=found, expected=expected, action=action)
