"""Reads a hospital's images for its summary (`common.image_summary`); masks are not opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedsgcg.clients.data.cache import digest, file_hashes, hash_memo, write_atomically
from fedsgcg.clients.data.case_files import CaseFile, Site, content_of
from fedsgcg.common.console import silent
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.image_summary import Facts
from fedsgcg.common.images.parts import files_of
from fedsgcg.common.images.read import check_image, read_volume


def read_facts(site: Site, cache: Path, step: Callable[[str], None] = silent) -> list[Facts]:
    """Return the facts of a hospital's readable images, without those assigned to `test`.

    Facts are kept in the cache by the content of the image, so that each image is read once.

    Args:
        site: The hospital.
        cache: Cache folder.
        step: Called with what is read.

    Raises:
        FedsgcgError: DAT-113 when the cache cannot be written.
    """
    cases = [case for case in site.cases if case.split != "test"]
    images = [file for case in cases for file in files_of(case.image)]
    hashes = file_hashes(images, hash_memo(cache, site.name))
    memo = cache / "facts" / f"{digest(site.name.encode(), 8)}.json"
    known = _known(memo)
    fresh: dict[str, dict[str, Any]] = {}
    for number, case in enumerate(cases, 1):
        key = content_of([case.image], hashes)
        if key not in known:
            step(f"images of {site.name}, {number} of {len(cases)}")
            known[key] = _read(case)
            fresh |= {key: known[key]} if known[key] else {}
    if fresh:
        # Images that could not be read are tried again: a library may have been missing.
        kept = {key: entry for key, entry in known.items() if entry}
        write_atomically(memo, json.dumps(kept).encode())
    found = [known[content_of([case.image], hashes)] for case in cases]
    return [
        Facts(patient=case.patient, **_tuples(entry))
        for case, entry in zip(cases, found, strict=True)
        if entry
    ]


def _read(case: CaseFile) -> dict[str, Any]:
    """Return the facts of an image but for its patient, {} if it cannot be used."""
    try:
        image = read_volume(case.image)
        check_image(image, case.name)
    except FedsgcgError:
        return {}  # reported when the hospital's cases are read
    depth = 1 if image.is_picture else len(image.array)
    low, middle, high = (float(one) for one in np.percentile(image.array, (1, 50, 99)))
    facts = Facts(
        patient="",
        kind=image.kind,
        colour=image.is_picture and len(image.array) > 1,
        eight_bit=image.is_eight_bit,
        shape=(depth, *image.array.shape[-2:]),
        spacing=image.millimetres,
        values=(low, middle, high),
    )
    return {name: value for name, value in asdict(facts).items() if name != "patient"}


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of the memo with tuples in place of JSON's lists."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}


def _known(memo: Path) -> dict[str, dict[str, Any]]:
    """Return the stored facts; a missing or damaged memo only means that images are read again."""
    try:
        tree = json.loads(memo.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}
