"""The study's record `study.yaml` (command, data, settings, versions), and the joined tables."""

from __future__ import annotations

import contextlib
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fedsgcg.common.errors import FedsgcgError, Problem, fail
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.files.seals import authority_of, write_seal
from fedsgcg.common.files.signing import Signer
from fedsgcg.common.image_summary import PLANNED
from fedsgcg.common.machine import processor
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.study.preflight import Machine
from fedsgcg.deploy.study.references import BEST, best_hospitals, best_rows
from fedsgcg.server.records.journal import decisive_settings, differences, lock_file

if TYPE_CHECKING:
    from fedsgcg.deploy.study.selection import Candidate, Choice
    from fedsgcg.deploy.study.study import Study

RECORD_WAIT_S = 60.0
"""Longest wait for another call that changes `study.yaml`, which takes milliseconds."""

PACKAGES = ("fedsgcg", "torch", "flwr", "ray", "numpy", "pyarrow", "nibabel")


def read_record(folder: Path) -> dict[str, Any]:
    """Read `study.yaml`; empty when it does not exist yet.

    Raises:
        FedsgcgError: SRV-402 when it is damaged.
    """
    path = folder / paths.STUDY
    if not path.exists():
        return {}
    try:
        record = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise damaged(path, "text that is not YAML") from error
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise damaged(path, "no settings")
    return record


def check_same_study(study: Study) -> None:
    """Raise CFG-005 if the folder belongs to a study with other settings or data.

    The error lists the differences.
    """
    before = read_record(study.folder)
    if not before:
        return
    path = study.folder / paths.STUDY
    # A method that is new in this study can only be compared by the settings that all cells share.
    problems: list[Problem] = []
    if "shared" in before:
        problems += differences(before["shared"], dict(study.shared), str(path))
    if not problems:
        for method, tree in settings_by_method(study).items():
            earlier = before["settings"].get(method, tree)
            problems += differences(earlier, tree, f"{path}, {method}")
    if not problems and before.get("data", study.data) != study.data:
        problems.append(
            Problem(
                "CFG-005",
                where=str(path),
                found=f"other images, masks or patients (data {study.data})",
                expected=f"the data of the first call (data {before['data']})",
                action="use the data.root of the first call, or another output=FOLDER",
            )
        )
    if problems:
        raise FedsgcgError(*problems)


def write_record(study: Study) -> None:
    """Write `study.yaml`, keeping the methods, sites and seeds of earlier and parallel calls."""
    with _changing(study.folder):
        _write_record(study)


def _changing(folder: Path) -> TextIO:
    """Hold the lock of `study.yaml`, which the parallel calls of a study read and write."""
    return lock_file(folder / paths.RECORD_LOCK, wait_s=RECORD_WAIT_S)


def _write_record(study: Study) -> None:
    before = read_record(study.folder)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    first = study.cells[0].tree
    record = {
        "created": before.get("created", now),
        "updated": now,
        "command": f"fedsgcg {study.command} " + shlex.join(study.overrides),
        "methods": sorted({*before.get("methods", []), *(cell.method for cell in study.cells)}),
        "heldout": sorted({*before.get("heldout", []), *(cell.heldout for cell in study.cells)}),
        "seeds": sorted({*before.get("seeds", []), *(cell.seed for cell in study.cells)}),
        "cells": sorted({*before.get("cells", []), *_folders(study)}),
        "sites": sorted({site for cell in study.cells for site in cell.tree["data"]["sites"]}),
        "root": first["data"]["root"],
        "data": study.data,
        "runtime": study.runtime,
        "device": study.device,
        "machine": describe_machine(study.machine),
        "versions": _versions(),
        "selection": {"words": study.selection, "chosen": _chosen(before)},
        "references": sorted({*before.get("references", []), *study.references}),
        "leaves": {**(before.get("leaves") or {}), **_leaves(study)},
        "shared": dict(study.shared),
        "plans": {
            **before.get("plans", {}),
            **{plan.heldout or "none": plan.as_dict() for plan in study.plans},
        },
        "settings": {**before.get("settings", {}), **settings_by_method(study)},
    }
    Disk().write(
        study.folder / paths.STUDY,
        yaml.safe_dump(record, sort_keys=False, allow_unicode=True).encode(),
    )


def _leaves(study: Study) -> dict[str, str]:
    """Return what leaves a hospital with each training method, from the methods' cards."""
    from fedsgcg.clients.methods import method_class
    from fedsgcg.clients.methods.cards import parts_of

    methods = {cell.tree["method"]["name"]: cell.tree for cell in study.cells}
    return {
        name: parts_of(method_class(Plan.from_tree(tree).method))["Leaves"]
        for name, tree in sorted(methods.items())
    }


def _versions() -> dict[str, str]:
    """Return the installed packages' versions; a shard may run on a machine without Ray."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _folders(study: Study) -> list[str]:
    """Return the cells' folders, relative to the study's."""
    return [str(cell.folder.relative_to(study.folder)) for cell in study.cells]


def settings_by_method(study: Study) -> dict[str, Any]:
    """Return the settings of each method for `study.yaml`.

    These are the settings that decide the outcome, without those that differ between cells.
    """
    found = {
        cell.method: _with_choices(_decisive(cell.tree), study.candidates.get(cell.name, ()))
        for cell in study.cells
    }
    if study.plans:  # the folds differ; their values are recorded under `plans`
        planned = dict.fromkeys(PLANNED, "of each fold's plan") | {"plan": "auto"}
        found = {name: tree | {"data": tree["data"] | planned} for name, tree in found.items()}
    return found


def _with_choices(tree: dict[str, Any], candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Replace each setting that the folds choose by a text with all its values."""
    values: dict[str, list[str]] = {}
    for candidate in candidates:
        for name, _, value in (text.partition("=") for text in candidate.settings.split()):
            values.setdefault(name, []).append(value)
    for name, found in values.items():
        *sections, leaf = name.split(".")
        part = tree
        for section in sections:
            part = part[section]
        part[leaf] = f"chosen in each fold from {', '.join(dict.fromkeys(found))}"
    return tree


def add_choices(folder: Path, choices: Mapping[tuple[str, str, int], Choice]) -> None:
    """Add the folds' choices to `study.yaml`, by label, held-out site and seed."""
    with _changing(folder):
        _add_choices(folder, choices)


def _add_choices(folder: Path, choices: Mapping[tuple[str, str, int], Choice]) -> None:
    record = read_record(folder)
    kept = [
        entry
        for entry in _chosen(record)
        if (entry["method"], entry["heldout"], entry["seed"]) not in choices
    ]
    new = [
        {
            "method": method,
            "heldout": heldout,
            "seed": seed,
            "settings": choice.settings,
            "scores": choice.scores,
        }
        for (method, heldout, seed), choice in choices.items()
    ]
    record["selection"] = {
        **record.get("selection", {}),
        "chosen": sorted(
            [*kept, *new], key=lambda entry: (entry["method"], entry["heldout"], entry["seed"])
        ),
    }
    Disk().write(
        folder / paths.STUDY, yaml.safe_dump(record, sort_keys=False, allow_unicode=True).encode()
    )


def _chosen(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = record.get("selection")
    return list(found.get("chosen") or []) if isinstance(found, dict) else []


def collect(folder: Path) -> None:
    """Join the cells' `results.parquet` and `rounds.parquet` into the study's own.

    A cell of an older version may have fewer columns; its missing values are null.

    Raises:
        FedsgcgError: SRV-402 for a damaged table, SRV-401 when the folder cannot be written.
    """
    for name in paths.SEALED_TABLES:
        tables = [_table(path) for path in sorted(folder.glob(f"*/*/*/{name}"))]
        if tables:
            joined = pa.concat_tables(tables, promote_options="default")
            if name == paths.RESULTS:
                joined = _with_best_single(folder, joined)
            sink = pa.BufferOutputStream()
            pq.write_table(joined, sink, compression="zstd")
            Disk().write(folder / name, bytes(sink.getvalue()))
    signer = Signer.of_kit(kit) if (kit := _kit_of(folder)) else None
    write_seal(Disk(), folder, paths.SEALED_TABLES, signer)


def _with_best_single(folder: Path, results: pa.Table) -> pa.Table:
    """Add the rows of the best single hospitals if the study has that reference.

    The choices are added to `study.yaml`.
    """
    if BEST not in (read_record(folder).get("references") or []):
        return results
    rows = results.to_pylist()
    chosen = best_hospitals(rows)
    with _changing(folder):
        record = read_record(folder) | {"best_single": [asdict(one) for one in chosen]}
        text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True)
        Disk().write(folder / paths.STUDY, text.encode())
    own = pa.Table.from_pylist(best_rows(rows, chosen), schema=results.schema)
    return pa.concat_tables([results, own])


def _kit_of(folder: Path) -> Path | None:
    authority = authority_of(folder)
    return authority.parent if authority and (authority.parent / "server.key").is_file() else None


def damaged(path: Path, found: str) -> FedsgcgError:
    """Return the error for a file of a run folder that cannot be read."""
    action = "remove the cell's folder (or the study's) and call again"
    return fail(
        "SRV-402", where=str(path), found=found, expected="a file that fedsgcg wrote", action=action
    )


def _table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, "not a Parquet table") from error


def _decisive(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = decisive_settings(Plan.from_tree(tree))
    if kept["federation"]["ownership"] == "local":  # every cell has another site
        judges = ["the other training hospitals"] if kept["observers"] else []
        kept |= {"data": {**kept["data"], "sites": []}, "observers": judges}
    return {name: value for name, value in kept.items() if name not in ("heldout", "seed")}


def describe_machine(machine: Machine) -> str:
    """Return one line about the machine: processor, cores, GPUs, Python."""
    rest = f"{machine.gpus} GPUs, Python {platform.python_version()}, {platform.system()}"
    return f"{processor()}, {machine.cpus} cores, {rest}"
