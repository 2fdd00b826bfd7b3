"""Checks before a simulation starts: data, held-out site, device.

They run on the coordinator's machine, which may read the sites' folders in a simulation. In a real
federation each site makes these checks itself when it enrols.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsgcg.clients.data.case_files import (
    CaseFile,
    discover_sites,
    ensure_data,
    open_site,
    resolve_cache,
    splits,
    unvalidated,
)
from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.errors import disk_advice
from fedsgcg.common.images.read import VOLUME_SUFFIXES, suffix_of
from fedsgcg.common.settings.aggregation import VALIDATED
from fedsgcg.common.settings.compose import nearest
from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.rules import rule_problems


@dataclass(frozen=True)
class Machine:
    """Resources of this machine for a simulation.

    Attributes:
        cpus: Usable CPU cores.
        gpus: CUDA devices visible to torch.
    """

    cpus: int
    gpus: int


def inspect_machine(cpus: int = 0) -> Machine:
    """Count the CPU cores (or use `cpus` when it is not 0) and the CUDA devices.

    Raises:
        FedsgcgError: CFG-001 for a negative number of cores.
    """
    import torch

    if cpus < 0:
        raise fail(
            "CFG-001", where="ray.cpus", found=str(cpus), expected="a whole number, 0 (all) or more"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(cpus or len(os.sched_getaffinity(0)), gpus)


def check_device(device: str, machine: Machine) -> str:
    """Return `cpu` or `cuda` for `auto | cpu | cuda`; an unavailable CUDA device is CFG-004."""
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
            found=f"no CUDA device (torch {torch.__version__}, its CUDA: {built}, "
            f"CUDA_VISIBLE_DEVICES: {visible})",
            expected="a CUDA device for device=cuda",
            action="use device=auto or device=cpu, or install a CUDA build of torch and check "
            "nvidia-smi",
        )
    )


def locate_hospitals(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with an absolute data folder and the names of all sites.

    Raises:
        FedsgcgError: CFG-001 for invalid settings, DAT-101 for an unusable folder, CFG-003 for
            fewer than two sites, and CFG-001 with the nearest name for a site that does not exist.
    """
    located: dict[str, Any] = {**tree, "output": str(tree.get("output") or ".")}
    plan = Plan.from_tree(located)
    root = ensure_data(plan.data, str(resolve_cache(plan.site))).resolve()
    known = discover_sites(root, plan.data.sites)
    problems = [
        Problem(
            "CFG-001",
            where="data.sites",
            found=repr(name),
            expected="a hospital of the data",
            action=nearest(name, known),
        )
        for name in plan.data.sites
        if name not in known
    ]
    sites = sorted(plan.data.sites or known)
    if len(sites) < 2:
        problems.append(
            Problem(
                "CFG-003",
                found=f"{len(sites)} in {root}",
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
    """Make the run folder; raises SRV-401 when it cannot be written."""
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
    """Check a fold for problems that would otherwise appear only after its start.

    Args:
        plan: The fold, with `data.sites` filled in.
        device: Device of the sites, `cpu` or `cuda`.

    Raises:
        FedsgcgError: CFG-011 for a method by import path that cannot be used; else all problems at
            once: CFG-001 for incompatible settings, CFG-002 for an unknown held-out site, CFG-003
            when no site is left to train, CFG-004 for a missing device or feature.
    """
    if plan.method.is_own:
        from fedsgcg.clients.methods import method_class

        method_class(plan.method)
    problems = [
        *_planning_problems(plan),
        *plan_problems(plan),
        *_pair_problems(plan),
        *_selection_problems(plan, _training(plan)),
        *_place_problems(plan),
        *_device_problems(plan, device),
    ]
    if problems:
        raise FedsgcgError(*problems)


def plan_problems(plan: Plan) -> Iterator[Problem]:
    """Yield the problems of roles, method and rule, for which no file is read."""
    training = _training(plan)
    yield from _role_problems(plan, training)
    yield from _unlabelled_problems(plan)
    yield from rule_problems(plan, training) if training else ()


def _training(plan: Plan) -> list[str]:
    return [site for site in plan.data.sites if plan.role(site) == "train"]


def _planning_problems(plan: Plan) -> Iterator[Problem]:
    """Yield a problem for a federation that asks for a plan; a study's cells already have one."""
    if plan.data.plan == "auto":
        action = (
            "plan on comparable data with `fedsgcg study data.plan=auto --dry-run`, then set "
            "image_size, spacing, aspect, intensity and stack"
        )
        found, expected = "auto", "fixed: real hospitals agree on the settings before they enrol"
        yield Problem("CFG-032", found, expected, action, "data.plan")


def _role_problems(plan: Plan, training: Sequence[str]) -> Iterator[Problem]:
    """Yield the problems of held-out site, observers, training sites and quorum."""
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
            expected = "a hospital that is not held out"
            action = "remove it from observers: it is evaluated anyway"
            yield Problem("CFG-001", repr(name), expected, action, "observers")
    quorum = plan.federation.quorum
    if not training:
        found = f"none of {len(sites)} hospitals"
        action = "remove a name from heldout, observers or unlabelled"
        yield Problem("CFG-003", found, "at least one training hospital", action, "observers")
    elif quorum > len(training):
        expected = (
            f"at most {len(training)}, the number of training hospitals ({', '.join(training)})"
        )
        yield Problem(
            "CFG-001",
            str(quorum),
            expected,
            "lower it, or set 0 for all training hospitals",
            "federation.quorum",
        )


def _unlabelled_problems(plan: Plan) -> Iterator[Problem]:
    """Yield the problems of the hospitals without labels."""
    sites = plan.data.sites
    for name in plan.unlabelled:
        if name not in sites:
            found, action = repr(name), nearest(name, sites)
            yield Problem("CFG-001", found, "a hospital of the data", action, "unlabelled")
        elif name in (plan.heldout, *plan.observers):
            expected = "a hospital that is neither held out nor an observer"
            yield Problem("CFG-001", repr(name), expected, "remove it from one", "unlabelled")
    if plan.unlabelled and plan.method.unlabelled == "refuse":
        usable = "method=segclr or segclr_pretrain"
        action = f"use {usable}, leave unlabelled empty, or set method.unlabelled=leave_out"
        found = f"{plan.method.name} with unlabelled=[{','.join(plan.unlabelled)}]"
        yield Problem("ROL-211", found, usable, action, "unlabelled")


def _pair_problems(plan: Plan) -> Iterator[Problem]:
    """Yield a problem if a method needs pairs of slices and hospitals have pictures alone.

    Each site checks its own images again when it enrols (`clients.data.pairs.check_pairs`).
    """
    pairs = plan.method.segclr.pairs
    if not plan.method.pairs or pairs == "augment" or not plan.data.root:
        return
    training = [site for site in plan.data.sites if plan.trains(site)]
    flat = [site for site in training if _only_pictures(plan, site)]
    if flat:
        yield Problem(
            "TRN-311",
            f"{pairs}, but pictures at {', '.join(flat)}",
            "augment, or hospitals with volumes",
            "set method.segclr.pairs=augment",
            "method.segclr.pairs",
        )


def _only_pictures(plan: Plan, site: str) -> bool:
    try:
        masks = not plan.hides_masks(site)
        cases = open_site(Path(plan.data.root), site, plan.data, masks=masks).cases
    except FedsgcgError:
        return False  # reported when the site is opened
    return bool(cases) and all(suffix_of(case.image) not in VOLUME_SUFFIXES for case in cases)


def _selection_problems(plan: Plan, training: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem if model or weights follow from validation cases that no site has."""
    weighs = plan.federation.aggregator in VALIDATED
    selects = plan.federation.selection == "source_validation"
    if not (weighs or selects) or plan.data.validation_fraction > 0:
        return
    cases: list[CaseFile] = []
    try:
        if plan.data.root:
            for site in training:
                cases += open_site(Path(plan.data.root), site, plan.data).cases
    except FedsgcgError as error:
        yield from error.problems
        return
    if any(case.split == "validation" for case in cases):
        return
    expected = "validation patients at the training hospitals"
    if selects:
        action = "set data.validation_fraction above 0, or federation.selection=last"
        found = "source_validation with data.validation_fraction=0"
        yield Problem("CFG-001", found, expected, action, "federation.selection")
    if weighs:
        action = "set data.validation_fraction above 0, or federation.aggregator=fedavg"
        found = f"{plan.federation.aggregator} with data.validation_fraction=0"
        yield Problem("CFG-020", found, expected, action, "federation.aggregator")


def without_validation(plans: Sequence[Plan]) -> list[Problem]:
    """Return a problem for each hospital that trains and has no validation patient, once."""
    found: dict[tuple[str, str], list[Problem]] = {}
    for plan in plans:
        for name in plan.data.sites:
            key = name, plan.data.split
            if plan.data.root and plan.validates(name) and key not in found:
                found[key] = list(_no_validation(name, plan))
    return list(dict.fromkeys(one for problems in found.values() for one in problems))


def _no_validation(name: str, plan: Plan) -> Iterator[Problem]:
    data = plan.data
    try:
        cases = open_site(Path(data.root), name, data).cases
    except FedsgcgError:
        return  # reported when the site joins
    parts = splits(cases, data.validation_fraction, heldout=False, rule=data.split)
    patients = [case.patient for case in cases]
    yield from unvalidated(name, parts, patients, data.validation_fraction)


def _place_problems(plan: Plan) -> Iterator[Problem]:
    """Yield a problem if several sites would write to the same folder."""
    home = plan.site.home
    if home and "{site}" not in home and len(plan.data.sites) > 1:
        expected = "a separate folder for each hospital: {site} is replaced by the hospital's name"
        action = f"site.home={home.rstrip('/')}/{{site}}"
        yield Problem("CFG-001", repr(home), expected, action, "site.home")


def _device_problems(plan: Plan, device: str) -> Iterator[Problem]:
    """Yield the requirements of the plan that the device does not meet."""
    import torch

    from fedsgcg.clients.device import precision

    if plan.site.device == "cuda" and device != "cuda":
        action = "set site.device=auto or cpu, or device=cuda on a machine with a CUDA device"
        yield Problem("CFG-004", f"device {device}", "a CUDA device", action, "site.device")
    try:
        precision(plan.method, torch.device(device))
    except FedsgcgError as error:
        yield from error.problems
