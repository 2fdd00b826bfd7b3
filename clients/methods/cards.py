"""Cards of the methods, from their docstrings: idea, formula, what leaves, defaults, source."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from dataclasses import dataclass
from typing import Final

from fedsgcg.clients.methods import METHODS
from fedsgcg.common.settings.training import MethodSettings

PARTS: Final = ("Formula", "Leaves", "Defaults", "Source")
"""Parts of a method's docstring that its card shows."""


@dataclass(frozen=True)
class Card:
    """What a user needs to know of a method.

    Attributes:
        name: Value of the setting `method`.
        idea: One sentence.
        formula: The loss.
        leaves: What leaves a hospital.
        defaults: Origin of the defaults, and what differs from the publication.
        source: Citation.
        settings: The method's own settings.
    """

    name: str
    idea: str
    formula: str
    leaves: str
    defaults: str
    source: str
    settings: tuple[str, ...]


def cards() -> list[Card]:
    """Return the cards of all methods, in the order of `METHODS`."""
    return [card_of(name) for name in METHODS]


def card_of(name: str) -> Card:
    """Return the card of a method."""
    found = parts_of(METHODS[name])
    kind = typing.get_type_hints(MethodSettings).get(name)
    own = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    settings = tuple(f"method.{name}.{field.name}" for field in own)
    texts = {part.lower(): found[part] for part in ("Idea", *PARTS)}
    return Card(name=name, settings=settings, **texts)


def parts_of(cls: type) -> dict[str, str]:
    """Return the parts of a class's docstring by name: Idea, Formula, Leaves and so on."""
    text = inspect.getdoc(cls) or ""
    found = {"Idea": text.partition("\n")[0]}
    for part in PARTS:
        match = re.search(rf"^{part}: (.*(?:\n +.*)*)", text, re.MULTILINE)
        found[part] = re.sub(r"\s+", " ", match[1]) if match else "not stated"
    return found
