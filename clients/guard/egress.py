"""The only way out: every reply passes the privacy floors and is logged before it leaves.

A failed site sends an error code. The text of the error, which may name a patient, stays at the
site in `errors.log`.

Legend: K classes.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

from fedsgcg.clients.guard import ledger
from fedsgcg.clients.guard.policy import check_sharing
from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.image_summary import IMAGE_SUMMARY
from fedsgcg.common.images.contents import CONTENT_HASHES
from fedsgcg.common.settings.federation import PrivacySettings
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import Reply, encode_reply, payload_bytes
from fedsgcg.common.wire.payload import Identity
from fedsgcg.common.wire.receipts import payload_digest

LEDGER = "ledger.jsonl"
LOG = logging.getLogger("fedsgcg.site")
UNKNOWN_IDENTITY = Identity(run="", heldout="", round=0, plan="")
"""Identity in the reply to a message whose own identity is missing or unreadable."""


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
    key: Path | None = None,
) -> RecordDict:
    """Apply the floors, write the ledger line, and return what may leave.

    Args:
        reply: What the site wants to send.
        home: The site's folder, which holds its ledger.
        kind: Type of the message that is answered.
        privacy: The floors.
        classes: Class names in the order of the statistics; needed when the reply has statistics.
        patients: (K,) patients per class at this site; needed when the reply has statistics.
        pixels: (K,) distinct pixels per class at this site, needed where the statistics count a
            pixel more than once.
        sharing: Parts that the site's policy allows to leave; None where no policy is set.
        note: Remark for the site's own ledger; never leaves the site.
        key: The site's private key: the ledger's head is signed with it and sent with the reply,
            so that the coordinator can countersign it. None in a simulation.

    Raises:
        FedsgcgError: POL-704 for a part that the site does not share, SITE-501 when the ledger
            cannot be written. Nothing leaves in either case.
    """
    withheld: list[str] = []
    if reply.statistics is not None:
        if patients is None:
            raise ValueError("patients: found None, expected (K,) counts for the statistics")
        kept, hidden = apply_floors(reply.statistics, patients, privacy, pixels)
        withheld = [classes[index] for index in hidden]
        reply = replace(reply, statistics=kept, details=reply.details | {"withheld": withheld})
    records = encode_reply(reply)
    parts = payload_bytes(records)
    for name in (CONTENT_HASHES, IMAGE_SUMMARY):
        if name in reply.details:
            # They travel inside the text part, but the policy treats them as parts of their own.
            parts = parts | {name: len(json.dumps(reply.details[name]))}
    check_sharing(parts, sharing)
    head = ledger.append(
        home / LEDGER,
        round_number=reply.identity.round,
        kind=kind,
        parts=parts,
        withheld=withheld,
        sha256=payload_digest(records),
        note=note or reply.error,
        key=key,
    )
    if key is not None:
        head.attach(records)
    return records


def release_error(
    code: str,
    identity: Identity,
    site: str,
    home: Path | None,
    kind: str,
    note: str = "",
    key: Path | None = None,
) -> RecordDict:
    """Return the reply of a failed site: an error code without any text.

    The reply is logged in the ledger, and `note` stays there. It is sent even if the ledger cannot
    be written, because that is one of the failures it reports.
    """
    reply = Reply(identity=identity, site=site, error=code)
    if home is None:
        return encode_reply(reply)
    try:
        return release(reply, home, kind=kind, privacy=PrivacySettings(), note=note, key=key)
    except FedsgcgError:
        return encode_reply(reply)


def identity_of(content: RecordDict) -> Identity:
    """Return the identity that a message states, or `UNKNOWN_IDENTITY` if it cannot be read."""
    try:
        return Identity.decode(str(content["message"]["identity"]))
    except (FedsgcgError, KeyError, TypeError):
        return UNKNOWN_IDENTITY


def log_exception(home: Path | None, kind: str, identity: Identity) -> None:
    """Append the current exception's traceback to the site's `errors.log`, else to the logger."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"{when} {kind} round {identity.round}\n{traceback.format_exc()}\n"
    if home is not None:
        with suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            with (home / "errors.log").open("a", encoding="utf-8") as file:
                file.write(text)
            return
    LOG.error(text)


def apply_floors(
    statistics: ClassStatistics,
    patients: npt.NDArray[np.int64],
    privacy: PrivacySettings,
    pixels: npt.NDArray[np.int64] | None = None,
) -> tuple[ClassStatistics, list[int]]:
    """Withhold every class with too few pixels or patients.

    See "What leaves a hospital" in docs/explanation/privacy.md.

    A withheld class is sent like an unseen one, with zero count, mean and scatter. Statistics that
    count a pixel in every epoch (`prototypes.memory=online`) would pass any floor eventually, so
    for them the floor applies to the number of distinct pixels.

    Returns:
        The statistics that may leave, and the indices of the withheld classes (unseen ones are not
        withheld).
    """
    distinct = statistics.count if pixels is None else np.minimum(statistics.count, pixels)
    low = (distinct < privacy.min_pixels) | (patients < privacy.min_patients)
    kept = ClassStatistics(
        count=np.where(low, 0.0, statistics.count),
        mean=np.where(low[:, None], 0.0, statistics.mean),
        scatter=np.where(low[:, None, None], 0.0, statistics.scatter),
    )
    return kept, [int(index) for index in np.flatnonzero(low & (statistics.count > 0))]
