"""The boundary that no error text crosses: whose message it is, and where the words about a failure are kept."""

from __future__ import annotations

import logging
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import RecordDict

from common.errors import FedsgcgError
from common.wire.payload import Identity

NOBODY = Identity(
    run="", heldout="", round=0, plan=""
)  # of a reply to a message that says not even what it belongs to
LOG = logging.getLogger("fedsgcg.site")


def identity_of(content: RecordDict) -> Identity:
    """Identity that a message states, or `NOBODY` where it states none that can be read."""
    try:
        return Identity.decode(str(content["message"]["identity"]))
    except (FedsgcgError, KeyError, TypeError):
        return NOBODY


def keep_trace(home: Path | None, kind: str, identity: Identity) -> None:
    """Append the trace of the current exception to the site's error log; to its standard error without one."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"{when} {kind} round {identity.round}\n{traceback.format_exc()}\n"
    if home is not None:
        with suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            with (home / "errors.log").open("a", encoding="utf-8") as file:
                file.write(text)
            return
    LOG.error(text)
