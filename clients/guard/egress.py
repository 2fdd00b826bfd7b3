"""The only door: every reply of a site passes here, is thinned by the floors and entered in the ledger, then leaves.

Legend: K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

from clients.guard import ledger
from clients.guard.policy import check_sharing
from common.errors import FedsgcgError
from common.images.contents import CONTENT_HASHES
from common.settings.federation import PrivacySettings
from common.statistics import ClassStatistics
from common.wire.messages import Reply, encode_reply, payload_bytes
from common.wire.payload import Identity

LEDGER = "ledger.jsonl"


def release(
    reply: Reply,
    home: Path,
    *,
    kind: str,
    privacy: PrivacySettings,
    classes: Sequence[str] = (),
    patients: npt.NDArray[np.int64] | None = None,
    pixels: npt.NDArray[np.int64] | None = None,
    sharing: tuple[str, ...] | None = None,
    note: str = "",
) -> RecordDict:
    """Apply the floors, write the ledger line, and return what may leave.

    Args:
        reply: What the site wants to send.
        home: The site's folder, with its ledger.
        kind: Type of the message that is answered.
        privacy: The floors.
        classes: Class names in the order of the statistics; needed when the reply has statistics.
        patients: (K,) patients per class at this site; needed when the reply has statistics.
        pixels: (K,) different pixels per class at this site, where the statistics count a pixel more than once.
        sharing: Parts that the site's policy lets out; None where no policy is set.
        note: What the site's own book shall say about this reply; never leaves.

    Raises:
        FedsgcgError: POL-704 for a part that the site does not share, SITE-501 when the ledger cannot be written: then
            nothing leaves.
    """
    withheld: list[str] = []
    if reply.statistics is not None:
        if patients is None:
            raise ValueError("statistics leave only with the number of patients per class")
        kept, hidden = apply_floors(reply.statistics, patients, privacy, pixels)
        withheld = [classes[index] for index in hidden]
        reply = replace(reply, statistics=kept, details=reply.details | {"withheld": withheld})
    records = encode_reply(reply)
    parts = payload_bytes(records)
    if (
        CONTENT_HASHES in reply.details
    ):  # they travel with the text, and are a part of their own all the same
        parts = parts | {CONTENT_HASHES: len(json.dumps(reply.details[CONTENT_HASHES]))}
    check_sharing(parts, sharing)
    ledger.append(
        home / LEDGER,
        round_number=reply.identity.round,
        kind=kind,
        parts=parts,
        withheld=withheld,
        sha256=payload_digest(records),
        note=note or reply.error,
    )
    return records


def release_error(
    code: str, identity: Identity, site: str, home: Path | None, kind: str, note: str = ""
) -> RecordDict:
    """Return the reply of a site that failed: a code of the catalogue, never a text.

    It is entered in the ledger where there is one that can be written; a ledger that cannot be written is one of the
    failures that this reply reports, so it leaves all the same. `note` stays in the
    ledger.
    """
    reply = Reply(identity=identity, site=site, error=code)
    if home is None:
        return encode_reply(reply)
    try:
        return release(reply, home, kind=kind, privacy=PrivacySettings(), note=note)
    except FedsgcgError:
        return encode_reply(reply)


def apply_floors(
    statistics: ClassStatistics,
    patients: npt.NDArray[np.int64],
    privacy: PrivacySettings,
    pixels: npt.NDArray[np.int64] | None = None,
) -> tuple[ClassStatistics, list[int]]:
    """Withhold every class with too few pixels or patients (methods.md 1.12).

    A withheld class leaves as an unseen one: count 0, mean 0, scatter 0, so that nothing of it can be read. Statistics
    that count a pixel in every epoch (`prototypes.memory=online`) would pass any floor in time: for those the floor
    compares the number of different pixels.

    Returns:
        The statistics that may leave, and the indices of the withheld classes (unseen ones are not withheld).
    """
    different = statistics.count if pixels is None else np.minimum(statistics.count, pixels)
    low = (different < privacy.min_pixels) | (patients < privacy.min_patients)
    kept = ClassStatistics(
        count=np.where(low, 0.0, statistics.count),
        mean=np.where(low[:, None], 0.0, statistics.mean),
        scatter=np.where(low[:, None, None], 0.0, statistics.scatter),
    )
    return kept, [int(index) for index in np.flatnonzero(low & (statistics.count > 0))]


def payload_digest(records: RecordDict) -> str:
    """SHA-256 over every record of a reply, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(records):
        record = records[name]
        for key in sorted(record):
            value = record[key]
            data = getattr(value, "data", None)  # an array carries its bytes
            if data is None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
            sha.update(f"{name}/{key}/{len(data)}\n".encode())
            sha.update(data)
    return sha.hexdigest()
