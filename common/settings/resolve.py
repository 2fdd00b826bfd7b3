"""Adds the properties of classes by import path to the settings."""

from __future__ import annotations

from typing import Any

from fedsgcg.common.settings.choices import is_import_path
from fedsgcg.common.settings.own_code import load_class, traits_of


def resolve_own_code(tree: dict[str, Any]) -> None:
    """Add the traits of an own method and the channels and norm of an own network, in place.

    Raises:
        FedsgcgError: CFG-011 for a class that cannot be imported or lacks the required interface.
    """
    method, network = tree["method"], tree["network"]
    if is_import_path(str(method["name"])):
        traits = traits_of(load_class(method["name"], "method"))
        method["traits"] = list(traits)
        method["statistics"] = method["statistics"] or "contrasts" in traits
    if is_import_path(str(network["name"])):
        from fedsgcg.common.networks import measure

        channels, norm = measure(network, tree["data"])
        network["feature_channels"], network["norm"] = channels, norm
