"""The default of every setting, from the typed settings, as the lowest layer of a composition.

The files in `configs/` have only what a choice of a group changes.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Final

from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.settings.run import RunSettings

NOT_SETTINGS: Final = ("label", "setting", "chosen", "planned_steps", "planned_slices")
"""Fields of a plan that a study fills in; a user cannot set them."""


def typed_defaults() -> dict[str, Any]:
    """Return the defaults of all settings that have one, as plain dictionaries and lists.

    Settings without a typed default, such as `data.classes`, are in the files of every choice.
    Where a plan and a run have a setting of the same name, the user's is that of the run.
    """
    plan = {name: value for name, value in _defaults(Plan).items() if name not in NOT_SETTINGS}
    return plan | _defaults(RunSettings)


def _defaults(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            found[field.name] = _defaults(hints[field.name])
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items()
    }
