"""Methods and networks by import path, e.g. `method=package.module:Class`.

The properties of such a class that a plan depends on are determined once, when the settings are
resolved, and become part of the plan: the traits of a method, the feature channels and
normalisation of a network. So a plan can be checked without torch and without the class, and its
digest covers these properties.
"""

from __future__ import annotations

import importlib

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.settings.hints import nearest
from fedsgcg.common.settings.training import ALL_TRAITS

ON_PATH = "put the folder of the module on PYTHONPATH: export PYTHONPATH=FOLDER"
"""What to do when Python does not find an own module."""


def load_class(path: str, where: str) -> type:
    """Import a class.

    Args:
        path: `package.module:Class`.
        where: The setting that refers to it.

    Raises:
        FedsgcgError: CFG-011 if the module cannot be imported or has no such class.
    """
    module, _, name = path.partition(":")
    try:
        content = importlib.import_module(module)
    except Exception as error:  # user code may raise anything
        found = f"{type(error).__name__}: {error}"
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        action = ON_PATH if missing else ""
        raise unusable(path, found, where, "a class that can be imported", action) from error
    cls = getattr(content, name, None)
    if cls is None:
        classes = sorted(key for key, value in vars(content).items() if isinstance(value, type))
        found = f"no {name} in {getattr(content, '__file__', module)}"
        raise unusable(path, found, where, "one of its classes", nearest(name, classes))
    if not isinstance(cls, type):
        raise unusable(path, f"a {type(cls).__name__}", where, "a class")
    return cls


def traits_of(cls: type) -> tuple[str, ...]:
    """Return the traits of a method: its class attributes of `ALL_TRAITS` that are true."""
    return tuple(name for name in ALL_TRAITS if getattr(cls, name, False))


def unusable(path: str, found: str, where: str, expected: str, action: str = "") -> FedsgcgError:
    """Return the error for a class that cannot be used; `action` defaults to the documentation."""
    action = action or "see docs/how-to/own-method.md"
    return fail("CFG-011", where=f"{where}={path}", found=found, expected=expected, action=action)
