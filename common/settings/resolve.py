"""Adds to the settings what follows from others, such as properties of classes by import path."""

from __future__ import annotations

from typing import Any

from fedsgcg.common.settings.choices import is_import_path
from fedsgcg.common.settings.own_code import load_class, traits_of
from fedsgcg.common.settings.training import DOMAINS


def resolve_domains(tree: dict[str, Any]) -> None:
    """Give the network a pool of domain knowledge if the method needs one, in place."""
    if tree["method"]["name"] == "dofe":
        tree["network"]["domains"] = tree["network"]["domains"] or DOMAINS


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
