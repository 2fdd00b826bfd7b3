"""Methods and networks by import path: `method=package.module:Class`, `network=package.module:Class`.

What a plan needs to know of such a class is found once, where the settings are resolved, and written into the plan:
the traits of a method, the feature channels and the kind of normalisation of a network. So the plan is read and checked
without torch and without the class, and its digest covers what was found.
"""

from __future__ import annotations

import importlib

from common.errors import FedsgcgError, fail
from common.settings.training import ALL_TRAITS


def load_class(path: str, where: str) -> type:
    """Import a class.

    Args:
        path: `package.module:Class`.
        where: The setting that names it.

    Raises:
        FedsgcgError: CFG-011 when the module cannot be imported or has no such class.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module raises while it is imported
        raise unusable(
            path, f"{type(error).__name__}: {error}", where, "a class that can be imported"
        ) from error
    if not isinstance(found, type):
        raise unusable(path, f"a {type(found).__name__}", where, "a class")
    return found


def traits_of(cls: type) -> tuple[str, ...]:
    """Return what a method's class says that it does, by its class attributes `contrasts` and `mixes`."""
    return tuple(name for name in ALL_TRAITS if getattr(cls, name, False))


def unusable(path: str, found: str, where: str, expected: str) -> FedsgcgError:
    """The error for a class that cannot be used."""
    action = "see docs/how-to/own-method.md; the folder of the module must be on PYTHONPATH"
    return fail("CFG-011", where=f"{where}={path}", found=found, expected=expected, action=action)
