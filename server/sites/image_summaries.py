"""Summaries of the training images, which some hospitals state when they enrol, and their plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.files.disk import Disk
from fedsgcg.common.image_summary import IMAGE_SUMMARY, HospitalSummary, merge_summaries
from fedsgcg.common.settings.plan import Plan

if TYPE_CHECKING:
    from fedsgcg.server.sites.enrolment import Member

FILE: Final = "image_summaries.json"
"""File of the run folder: the summaries, and the settings that would follow from them."""


def record_summaries(plan: Plan, members: Mapping[str, Member], disk: Disk) -> None:
    """Write the summaries of the hospitals that train, and the plan that follows from them.

    The plan of this run is fixed; the settings are a proposal for a next one. A summary of a
    hospital that does not train is not read, and a text that is no summary is left out.

    Args:
        plan: The plan of the run.
        members: The enrolled sites.
        disk: Disk access.
    """
    found: dict[str, HospitalSummary] = {}
    for site, member in sorted(members.items()):
        stated = member.details.get(IMAGE_SUMMARY)
        if stated is None or not plan.trains(site):
            continue
        summary = HospitalSummary.from_dict(stated, member.count("patients", "train"))
        if summary is not None:
            found[site] = summary
    if not found:
        return
    record: dict[str, Any] = {"hospitals": {site: one.as_dict() for site, one in found.items()}}
    try:
        record["plan"] = merge_summaries(found, millimetres=plan.data.spacing_unit == "mm")
    except FedsgcgError as error:
        record["problem"] = str(error)
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    disk.write(Path(plan.output) / FILE, text.encode())
