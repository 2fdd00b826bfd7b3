"""Checks before anything starts: does the data exist, is the held-out hospital there, is the device there.

All of it happens on the coordinator's machine in a simulation, where it may look at the hospitals' folders; in a real
federation each site answers these questions itself when it enrols.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.data.case_files import discover_sites, ensure_data, open_site, resolve_cache
from common.errors import FedsgcgError, Problem, fail
from common.files.errors import disk_advice
from common.settings.compose import nearest
from common.settings.plan import Plan


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
    """Count cores (or take `cpus` when it is not 0) and CUDA devices.

    Raises:
        FedsgcgError: CFG-001 for a negative number of cores.
    """
    import torch

    if cpus < 0:
        raise fail(
            "CFG-001", where="ray.cpus", found=str(cpus), expected="a whole number, 0 (all) or more"
        )

    return Machine(
        cpus or len(os.sched_getaffinity(0)),
        torch.cuda.device_count() if torch.cuda.is_available() else 0,
    )


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
    there = discover_sites(root, plan.data.sites)
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
                "SRV-401",
                where=str(folder),
                found=str(error),
                action=disk_advice(error, "choose another output=FOLDER."),
            )
        ) from error


def check_plan(plan: Plan, device: str) -> None:
    """Refuse a fold that could only fail after its start.

    Args:
        plan: The fold, with `data.sites` filled in.
        device: `cpu` or `cuda`, where the sites compute.

    Raises:
        FedsgcgError: CFG-011 for a method by import path that cannot be used; else all problems at once: CFG-001 for
            settings that do not go together, CFG-002 for an unknown held-out hospital, CFG-003 when no site is left to
            train, CFG-004 for what the device does not have.
    """
    if plan.method.is_own:
        from clients.methods import method_class

        method_class(plan.method)
    training = [site for site in plan.data.sites if plan.role(site) == "train"]
    problems = [
        *_role_problems(plan, training),
        *_selection_problems(plan, training),
        *_place_problems(plan),
        *_device_problems(plan, device),
    ]
    if problems:
        raise FedsgcgError(*problems)


def _role_problems(plan: Plan, training: Sequence[str]) -> Iterator[Problem]:
    """Yield what is wrong with who is held out, who only observes, and who is left to train."""
    sites = plan.data.sites
    if plan.heldout and plan.heldout not in sites:
        yield Problem(
            "CFG-002",
            repr(plan.heldout),
            " | ".join(sites),
            nearest(plan.heldout, sites, listed=True),
            "heldout",
        )
    for name in plan.observers:
        if name not in sites:
            yield Problem(
                "CFG-001", repr(name), "a hospital of the data", nearest(name, sites), "observers"
            )
        elif name == plan.heldout:
            expected, action = (
                "a hospital that is not held out",
                "take it out of observers: it is evaluated anyway",
            )
            yield Problem("CFG-001", repr(name), expected, action, "observers")
    quorum = plan.federation.quorum
    if not training:
        found, action = f"none of {len(sites)} hospitals", "take a name out of heldout or observers"
        yield Problem("CFG-003", found, "at least one training hospital", action, "observers")
    elif quorum > len(training):
        expected = (
            f"at most {len(training)}, the number of training hospitals ({', '.join(training)})"
        )
        yield Problem(
            "CFG-001",
            str(quorum),
            expected,
            "lower it, or set 0 for all of them",
            "federation.quorum",
        )


def _selection_problems(plan: Plan, training: Sequence[str]) -> Iterator[Problem]:
    """Yield the problem of a model to be chosen on validation cases that no training site has."""
    if plan.federation.selection != "source_validation" or plan.data.validation_fraction > 0:
        return
    root = Path(plan.data.root)
    try:
        cases = (
            [case for site in training for case in open_site(root, site, plan.data).cases]
            if plan.data.root
            else []
        )
    except FedsgcgError as error:
        yield from error.problems
        return
    if any(case.split == "validation" for case in cases):
        return
    expected = "validation patients at the training hospitals"
    action = "set data.validation_fraction above 0, or federation.selection=last"
    found = "source_validation with data.validation_fraction=0"
    yield Problem("CFG-001", found, expected, action, "federation.selection")


def _place_problems(plan: Plan) -> Iterator[Problem]:
    """Yield the problem of several sites that would write into one folder."""
    home = plan.site.home
    if home and "{site}" not in home and len(plan.data.sites) > 1:
        expected = "a folder of its own for each hospital: {site} stands for the hospital's name"
        action = f"site.home={home.rstrip('/')}/{{site}}"
        yield Problem("CFG-001", repr(home), expected, action, "site.home")


def _device_problems(plan: Plan, device: str) -> Iterator[Problem]:
    """Yield what the plan asks of the device and the device does not have."""
    import torch

    from clients.device import precision

    if plan.site.device == "cuda" and device != "cuda":
        action = "set site.device=auto or cpu, or device=cuda on a machine that has it"
        yield Problem("CFG-004", f"device {device}", "a CUDA device", action, "site.device")
    try:
        precision(plan.method, torch.device(device))
    except FedsgcgError as error:
        yield from error.problems
