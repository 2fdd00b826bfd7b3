"""Methods and networks by import path: `method=package.module:Class`, `network=package.module:Class`.

What a plan needs to know of such a class is found once, where the settings are resolved, and written into the plan:
the traits of a method, the feature channels and the kind of normalisation of a network. So the plan is read and checked
without torch and without the class, and its digest covers what was found.
"""

from __future__ import annotations

import importlib
from typing import Any

from common.errors import FedsgcgError, fail
from common.settings.choices import is_import_path
from common.settings.training import ALL_TRAITS


def resolve_own_code(tree: dict[str, Any]) -> None:
    """Write into settings what follows from the classes that they name; settings without such a class stay.

    Raises:
        FedsgcgError: CFG-011 for a class that cannot be imported or does not keep the contract.
    """
    method, network = tree["method"], tree["network"]
    if is_import_path(str(method["name"])):
        traits = traits_of(load_class(method["name"], "method"))
        method["traits"] = list(traits)
        method["statistics"] = method["statistics"] or "contrasts" in traits
    if is_import_path(str(network["name"])):
        from common.networks import measure

        channels, norm = measure(network, tree["data"])
        network["feature_channels"], network["norm"] = channels, norm


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
        raise unusable(path, f"{type(error).__name__}: {error}", where, "a class that can be imported") from error
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
