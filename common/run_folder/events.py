"""Every event with its fields: what `events.jsonl` of a run and `--json` consist of.

The reference page and the tests are made from these tables. A field that is added keeps the version
(`common.console.EVENTS_VERSION`); one that changes its meaning or goes raises it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

KINDS: Final[dict[str, tuple[type, ...]]] = {
    "text": (str,),
    "integer": (int,),
    "number": (int, float),
    "yes/no": (bool,),
    "list": (list,),
    "object": (dict,),
}
"""Type of a field -> types in Python; a field with `?` may also be null or missing."""


@dataclass(frozen=True)
class Event:
    """One kind of event.

    Attributes:
        meaning: When it happens.
        fields: Name of a field -> its type and its meaning.
    """

    meaning: str
    fields: Mapping[str, tuple[str, str]] = field(default_factory=dict)


_SITE: Final = {"site": ("text", "the hospital")}
_CODE: Final = {"code": ("text", "error code, empty for none")}
_DICE: Final = {"dice": ("number?", "mean Dice; null where no structure can be judged")}
_FIGURES: Final = {
    "loss": ("number?", "mean training loss"),
    "validation_dice": ("number?", "Dice of the received model on the validation cases"),
}

EVERY_EVENT: Final = {
    "time": ("number", "seconds since 1970"),
    "event": ("text", "name of the event"),
    "method": ("text", "label of the variant"),
    "heldout": ("text", "held-out hospital, empty for none"),
    "seed": ("integer", "seed"),
    "trains": ("text", "training method"),
    "federation": ("text", "`by_site`, `pooled` or `local`"),
    "setting": ("text", "varied settings"),
    "chosen": ("text", "settings that the source hospitals chose"),
    "trained_on": ("text", "the one hospital that trained, with `federation=local`"),
    "rounds": ("integer", "rounds of the plan"),
    "round": ("integer", "the round; 0 = before the first"),
}
"""Fields of every event of a run."""

RUN_EVENTS: Final[dict[str, Event]] = {
    "run.started": Event("A run starts or resumes after its last completed round."),
    "journal.damaged": Event(
        "A file of the journal is damaged, and an older checkpoint is used.",
        _CODE | {"where": ("text", "the file")},
    ),
    "site.left": Event("A hospital has left for good.", _SITE | _CODE),
    "sites.enrolled": Event(
        "The hospitals have joined.",
        {
            "sites": ("list", "names of all hospitals"),
            "training": ("list", "names of those that train"),
            "needed": ("integer", "training hospitals that must answer in a round"),
        },
    ),
    "round.started": Event("A round starts."),
    "round.reply": Event(
        "A hospital answered, or did not in time.",
        _SITE
        | {"accepted": ("yes/no", "whether the answer was admitted")}
        | _CODE
        | _FIGURES
        | {
            "seconds": ("number?", "training time at the hospital"),
            "examples": ("number?", "training slices of the hospital"),
        },
    ),
    "round.screened": Event(
        "An admitted answer is far from the others.",
        _SITE | _CODE | {"rejected": ("yes/no", "whether it was rejected for that")},
    ),
    "site.paused": Event(
        "A hospital is not asked for some rounds after rejections.",
        _SITE | _CODE | {"until": ("integer", "last round of the pause")},
    ),
    "round.done": Event(
        "A round is complete and its checkpoint on disk.",
        _FIGURES | {"validation_round": ("integer", "round of the model of `validation_dice`")},
    ),
    "round.void": Event("Too few answers were admitted; the previous model is kept.", _CODE),
    "validation.done": Event(
        "The last model was validated.", {"validation_dice": _FIGURES["validation_dice"]}
    ),
    "heldout.done": Event("The held-out hospital evaluated a model.", _SITE | _DICE),
    "observer.done": Event("A hospital that did not train evaluated a model.", _SITE | _DICE),
    "run.finished": Event(
        "The run has ended.",
        {"status": ("text", "`completed`, `degraded` or `failed`")} | _CODE,
    ),
}
"""Events of `events.jsonl`, in the order of a run."""

_STUDY: Final = {
    "folder": ("text", "folder of the study"),
    "cells": ("list", "names of all cells"),
    "done": ("list", "names of those that had finished before"),
    "runtime": ("text", "`ray` or `inprocess`"),
    "device": ("text", "`cpu` or `cuda`"),
}
_ENDED: Final = {
    "exit_code": ("integer", "exit code of the command"),
    "status": ("text", "how the study ended"),
    "folder": ("text", "folder of the study"),
}
_PROBLEM: Final = {
    "code": ("text", "error code"),
    "found": ("text", "what was found"),
    "expected": ("text", "what was expected"),
    "action": ("text", "what to do"),
    "where": ("text", "the file, setting, case or hospital"),
}

STUDY_EVENTS: Final[dict[str, Event]] = {
    "study.planned": Event("`--dry-run`: what would run.", _STUDY),
    "study.started": Event("The cells are known and checked.", _STUDY),
    "study.finished": Event(
        "The report is written.", _ENDED | {"report": ("text", "path of the report")}
    ),
    "shard.finished": Event("All cells of a shard have ended.", _ENDED),
    "warning": Event("An experiment tracker does not work; the study goes on.", _PROBLEM),
    "error": Event("A problem stopped the command.", _PROBLEM),
}
"""Events that `study` and `simulate` add with `--json`."""


def wrong_fields(event: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with an event of a run; nothing for one that fits the tables."""
    kind = RUN_EVENTS.get(str(event.get("event")))
    if kind is None:
        return [f"event {event.get('event')!r} is not known"]
    known = {**EVERY_EVENT, **kind.fields}
    needed = (name for name, (form, _) in known.items() if not form.endswith("?"))
    wrong = [f"{name} is missing" for name in needed if name not in event]
    for name, value in event.items():
        if name not in known:
            wrong.append(f"{name} is not known")
        elif not _fits(known[name][0], value):
            wrong.append(f"{name} is {value!r}, not {known[name][0]}")
    return wrong


def _fits(kind: str, value: Any) -> bool:
    if value is None:
        return kind.endswith("?")
    name = kind.removesuffix("?")
    return isinstance(value, KINDS[name]) and (name == "yes/no") == isinstance(value, bool)
