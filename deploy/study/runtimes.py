"""Two ways to run a federation on one machine or cluster; both give the same model hash.

*Sites in parallel* (`ray`): Flower's simulation engine, every site a Ray actor with its own GPU, or
with a share of one if there are too few. *Cells in parallel* (`inprocess`): the federation runs
inside one process, and a study runs many such processes at once (`deploy.study.run`).
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from fedsgcg.common.console import catch_signals
from fedsgcg.common.errors import fail
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.environment import OWN_FOLDER, own_folder, prepare_environment, quiet_flower
from fedsgcg.deploy.study.preflight import Machine

SOCKET_PATH = 107
"""Longest path of a Unix socket in bytes."""

LONGEST_TEMPORARY = SOCKET_PATH - len(
    "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)
"""Longest path in bytes of a temporary folder in which all of Ray's socket paths are valid."""


def choose_runtime(asked: str, cells: int, machine: Machine) -> str:
    """Return `ray` or `inprocess` for `auto`.

    Sites run in parallel only if one cell in one process would leave most of the machine idle: a
    single cell and several GPUs. Otherwise parallel cells use the machine without the cost of a
    transport.
    """
    if asked != "auto":
        return asked
    return "ray" if cells == 1 and machine.gpus > 1 else "inprocess"


def gpu_share(wanting: int, machine: Machine) -> float:
    """Return the GPU share of one of `wanting` parallel tasks: 1, or less if there are too few."""
    if not machine.gpus:
        return 0.0
    if machine.gpus >= wanting:
        return 1.0
    return max(0.05, int(100 * machine.gpus / wanting) / 100)


def run_cell_in_process(tree: Mapping[str, Any]) -> None:
    """Run one cell in this process; raises what stopped the coordinator."""
    from fedsgcg.clients.app import build_client_app
    from fedsgcg.deploy.study.inprocess import run_in_process
    from fedsgcg.server.app import build_server_app

    prepare_environment()
    quiet_flower()
    plan = Plan.from_tree(tree)
    run_in_process(build_server_app(dict(tree)), build_client_app(dict(tree)), plan.members())


def run_cell_on_ray(tree: Mapping[str, Any], machine: Machine, address: str = "local") -> None:
    """Run one cell with Flower's simulation engine, one actor per site if the machine allows.

    `run_simulation` is deprecated in favour of `flwr run`, which cannot pass on an exception. This
    function is the only one to change when `run_simulation` is removed.

    Raises:
        FedsgcgError: What stopped the coordinator; RND-410 for the loss of a site's actor.
    """
    close_ray(address)
    import ray
    from flwr.simulation import run_simulation

    from fedsgcg.clients.app import build_client_app
    from fedsgcg.deploy.study.lost_workers import raise_lost_workers
    from fedsgcg.server.app import build_server_app

    prepare_environment()
    quiet_flower()
    plan = Plan.from_tree(tree)
    training = sum(plan.trains(site) for site in plan.members())
    with warnings.catch_warnings(), raise_lost_workers():
        warnings.simplefilter("ignore", FutureWarning)  # Ray's note on visible devices
        # Ray is started as Flower would start it, but before `catch_signals`, because Ray replaces
        # the handler of SIGTERM.
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


def close_ray(address: str) -> None:
    """Close a local Ray to other users and machines; call it before Ray is imported.

    Ray's ports let whoever reaches them run code as this user. A local Ray listens on loopback and
    answers only with a token that is made here and is in the environment of its processes alone. A
    cluster keeps its own settings (`RAY_AUTH_MODE`). Ray reads its mode once, when it is imported:
    in a process that has imported it before, a local Ray needs no token, and a warning says so.
    """
    if address != "local" or "RAY_AUTH_MODE" in os.environ:
        return
    if "ray" in sys.modules:
        warnings.warn(
            "Ray was imported before the study: other users of this machine can reach it. To close "
            "it, start the study first, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN before "
            "Python starts.",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray's name for "this machine only", which binds 127.0.0.1 on every system.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def ray_arguments(machine: Machine, address: str) -> dict[str, Any]:
    """Return arguments of `ray.init` for a local Ray, or for a cluster at `auto` or `host:port`."""
    if address != "local":
        return {"address": address, "log_to_driver": False}
    arguments: dict[str, Any] = {
        "num_cpus": machine.cpus,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.WARNING,
    }
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    if folder := short_folder(temporary):
        arguments["_temp_dir"] = folder
    return arguments


def short_folder(temporary: str, others: Sequence[str] = ("/tmp", "/var/tmp", "/dev/shm")) -> str:  # noqa: S108
    """Return a folder for Ray's sockets if the path of the usual one is too long, else "".

    Args:
        temporary: Ray's usual temporary folder: `RAY_TMPDIR`, `TMPDIR` or `/tmp`.
        others: Alternatives.

    Raises:
        FedsgcgError: CFG-010 when no alternative is short enough and writable.
    """
    if len(os.fsencode(temporary)) <= LONGEST_TEMPORARY:
        return ""
    for folder in others:
        short = len(os.fsencode(folder)) + OWN_FOLDER <= LONGEST_TEMPORARY
        if short and os.access(folder, os.W_OK | os.X_OK):
            return str(own_folder("ray-", folder))
    found = f"{temporary} ({len(os.fsencode(temporary))} bytes)"
    expected = (
        f"at most {LONGEST_TEMPORARY} bytes, because the path of a socket has at most {SOCKET_PATH}"
    )
    action = "Set RAY_TMPDIR to a writable folder with a short path, e.g. /tmp."
    raise fail("CFG-010", where="TMPDIR", found=found, expected=expected, action=action)
