"""Checks before anything starts: does the data exist, is the held-out hospital there, is the device there.

All of it happens on the coordinator's machine in a simulation, where it may look at the hospitals' folders; in a real
federation each site answers these questions itself when it enrols.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.site import discover_sites, ensure_data, resolve_cache
from common.errors import FedsgcgError, Problem
from common.plan import Plan
from common.settings import nearest


@dataclass(frozen=True)
class Machine:
    """What this machine offers to a simulation.

    Attributes:
        cpus: Usable CPU cores.
        gpus: CUDA devices that torch sees.
    """

    cpus: int
    gpus: int


def look_at_machine(cpus: int = 0) -> Machine:
    """Count cores (or take `cpus` when it is not 0) and CUDA devices."""
    import torch

    return Machine(cpus or len(os.sched_getaffinity(0)), torch.cuda.device_count() if torch.cuda.is_available() else 0)


def check_device(device: str, machine: Machine) -> str:
    """Return `cpu` or `cuda` for `auto | cpu | cuda`; CUDA that is asked for and absent is refused with CFG-004."""
    import torch

    if device != "cuda":
        return "cuda" if device == "auto" and machine.gpus else "cpu"
    if machine.gpus:
        return "cuda"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    built = torch.version.cuda or "none, a CPU build"
    raise FedsgcgError(
        Problem(
            "CFG-004",
            found=f"no CUDA device (torch {torch.__version__}, its CUDA: {built}, CUDA_VISIBLE_DEVICES {visible})",
            expected="a CUDA device for device=cuda",
            action="use device=auto or device=cpu, or install a CUDA build of torch and check nvidia-smi",
        )
    )


def locate_hospitals(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the data folder made absolute and the hospitals' names filled in.

    Raises:
        FedsgcgError: CFG-001 for invalid settings, DAT-101 for an unusable folder, CFG-003 for fewer than two hospitals
            and CFG-001 with the nearest name for a hospital that does not exist.
    """
    located: dict[str, Any] = {**tree, "output": str(tree.get("output") or ".")}
    plan = Plan.from_tree(located)
    root = ensure_data(plan.data, str(resolve_cache(plan.site))).resolve()
    there = discover_sites(root)
    problems = [
        Problem(
            "CFG-001",
            where="data.sites",
            found=repr(name),
            expected="a hospital of the data",
            action=nearest(name, there),
        )
        for name in plan.data.sites
        if name not in there
    ]
    sites = sorted(plan.data.sites or there)
    if len(sites) < 2:
        problems.append(
            Problem(
                "CFG-003",
                found=f"{len(sites)} under {root}",
                expected="two or more",
                action="check data.root and data.sites",
            )
        )
    if problems:
        raise FedsgcgError(*problems)
    located["data"] = {**located["data"], "root": str(root), "sites": sites}
    located["site"] = {**located["site"], "cache": str(resolve_cache(plan.site).resolve())}
    return located


def check_heldout(names: list[str], sites: list[str]) -> None:
    """Refuse held-out names that no hospital has (CFG-002), all of them at once."""
    problems = [
        Problem("CFG-002", found=repr(name), expected=" | ".join(sites), action=nearest(name, sites))
        for name in names
        if name and name not in sites
    ]
    if problems:
        raise FedsgcgError(*problems)


def check_folder(folder: Path) -> None:
    """Make the run folder, or say why it cannot be written (SRV-401)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FedsgcgError(
            Problem(
                "SRV-401", where=str(folder), found=str(error), action="choose another output=FOLDER or free the disk"
            )
        ) from error
