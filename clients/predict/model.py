"""A model on disk, checked before it is used: `model.json`, `model.safetensors` and `prototypes.arrow` of one cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import nn

from common.errors import FedsgcgError, fail
from common.images.read import KINDS, PICTURE
from common.networks import build_network
from common.settings.compose import build
from common.settings.plan import DataSettings, NetworkSettings
from common.statistics import ClassStatistics
from common.wire.payload import Weights, decode_statistics

VERSION: Final = "1"
"""Schema of `model.json` that this program reads (`common.run_folder.SCHEMA_VERSION`)."""

CHANNELS: Final = ("in_channels", "out_channels")
NEEDED: Final = (
    "weights",
    "digest",
    "network",
    "classes",
    "labels",
    "structures",
    "preprocessing",
    "data",
)


@dataclass(frozen=True)
class Model:
    """A model that is ready to predict.

    Attributes:
        card: Content of `model.json`.
        data: Classes, structures and preprocessing it was trained with; no data root.
        network: The network with its weights.
        prototypes: Global class statistics, None when the model came without.
        normalize: Whether these describe features of unit length.
        kinds: What its training images were (`common.images.read.KINDS`).
    """

    card: Mapping[str, Any]
    data: DataSettings
    network: nn.Module
    prototypes: ClassStatistics | None
    normalize: bool
    kinds: tuple[str, ...] = KINDS


def load_model(path: Path, code: Sequence[str] = ()) -> Model:
    """Read a model and check that its parts belong together.

    Args:
        path: Folder of the model, or one of its files.
        code: Import paths of own networks that may be imported: a model's file must not choose the code that runs.

    Raises:
        FedsgcgError: POL-706 for a network by import path that is not in `code`, CFG-011 for one that cannot be used,
            MOD-801 for files that are missing or damaged, MOD-802 for another schema version, MOD-803 for
            weights with another digest, MOD-804 for weights of another network, MOD-805 for labels and structures that
            contradict each other, MOD-807 for prototypes of another model.
    """
    folder = path if path.is_dir() else path.parent
    card = read_card(folder)
    data = _data(card, folder)
    settings, channels = _network(card, data, folder)
    if settings.is_own and settings.name not in code:
        action = f"install and read the package, then add --code {settings.name}"
        raise fail("POL-706", where=str(folder / "model.json"), found=settings.name, action=action)
    network = build_network(settings, channels["in_channels"], channels["out_channels"], 0)
    _load_weights(network, card, folder)
    return Model(
        card,
        data,
        network,
        _prototypes(card, data, settings, folder),
        bool(card.get("normalize", True)),
        _kinds(card, data),
    )


def read_card(folder: Path) -> dict[str, Any]:
    """Read `model.json`; raises MOD-801 or MOD-802."""
    path = folder / "model.json"
    try:
        card = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        action = "Name the folder that holds model.json and model.safetensors."
        raise fail("MOD-801", where=str(path), found="no such file", action=action) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    version = card.get("schema_version") if isinstance(card, dict) else None
    if version is None:
        raise _damaged(path, "no schema_version")
    if version != VERSION:
        action = "Use the fedsgcg release that wrote it, or train again."
        raise fail(
            "MOD-802",
            where=str(path),
            found=f"schema {version}",
            expected=f"schema {VERSION}",
            action=action,
        )
    if missing := [name for name in NEEDED if not card.get(name)]:
        raise _damaged(path, f"nothing for {', '.join(missing)}")
    return dict(card)


def _data(card: Mapping[str, Any], folder: Path) -> DataSettings:
    """Return the model's data settings; unknown or contradictory labels, structures and preprocessing are refused."""
    where = str(folder / "model.json")
    if not isinstance(card["preprocessing"], dict) or not isinstance(card["labels"], dict):
        raise _damaged(
            folder / "model.json", "labels or preprocessing that are no names and values"
        )
    if list(card["labels"]) != card["classes"]:
        found, expected = (
            f"labels for {', '.join(card['labels'])}",
            f"labels for {', '.join(card['classes'])}",
        )
        raise fail(
            "MOD-805", where=where, found=found, expected=expected, action="Get the model again."
        )
    tree = {"name": str(card["data"]), "root": "", "sites": [], "classes": card["labels"]}
    try:
        return build(
            DataSettings, {**tree, "structures": card["structures"], **card["preprocessing"]}
        )
    except FedsgcgError as error:
        found = "; ".join(
            f"{problem.where}: {problem.found or problem.expected}" for problem in error.problems
        )
        expected = "classes, structures and preprocessing that fit each other"
        raise fail(
            "MOD-805", where=where, found=found, expected=expected, action="Get the model again."
        ) from error


def _kinds(card: Mapping[str, Any], data: DataSettings) -> tuple[str, ...]:
    """What the model was trained on; a card from before that was written says it by its stack of slices alone."""
    stated = card.get("kinds")
    known = tuple(kind for kind in KINDS if isinstance(stated, list) and kind in stated)
    return known or tuple(kind for kind in KINDS if data.stack == 1 or kind != PICTURE)


def _network(
    card: Mapping[str, Any], data: DataSettings, folder: Path
) -> tuple[NetworkSettings, dict[str, int]]:
    """Return the network's settings and its channels, which must be those of the labels."""
    where, tree = str(folder / "model.json"), dict(card["network"])
    channels = {name: tree.pop(name, None) for name in CHANNELS}
    if unknown := set(tree) - {field.name for field in fields(NetworkSettings)}:
        found = f"network settings {', '.join(sorted(unknown))}"
        raise fail(
            "MOD-802",
            where=where,
            found=found,
            action="Use the fedsgcg release that wrote the model.",
        )
    wanted = {"in_channels": 3, "out_channels": data.out_channels}
    if channels != wanted:
        found, expected = (
            ", ".join(f"{name} {number}" for name, number in both.items())
            for both in (channels, wanted)
        )
        action = "The labels and structures are not those the model was trained with: get model.json again."
        raise fail("MOD-804", where=where, found=found, expected=expected, action=action)
    try:
        return build(NetworkSettings, tree), wanted
    except FedsgcgError as error:
        raise _damaged(folder / "model.json", str(error.problems[0].found)) from error


def _load_weights(network: nn.Module, card: Mapping[str, Any], folder: Path) -> None:
    """Put the weights into the network after comparing names, shapes and digest."""
    path = folder / Path(str(card["weights"])).name
    try:
        state = load(path.read_bytes())
    except FileNotFoundError as error:
        action = "Copy model.safetensors beside model.json."
        raise fail("MOD-801", where=str(path), found="no such file", action=action) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    own = network.state_dict()
    wrong = [
        name for name in own if name not in state or tuple(own[name].shape) != state[name].shape
    ]
    wrong += [name for name in state if name not in own]
    if wrong:
        found = f"{len(wrong)} entries that differ, the first {wrong[0]}"
        expected = f"the names and shapes of {card['network']}"
        raise fail(
            "MOD-804",
            where=str(path),
            found=found,
            expected=expected,
            action="Get both files again.",
        )
    digest = Weights.from_state({name: state[name] for name in own}).digest()
    if digest != card["digest"]:
        found, expected = f"digest {digest[:12]}", f"digest {str(card['digest'])[:12]}"
        action = "One of the two files was changed or belongs to another model: copy both again."
        raise fail("MOD-803", where=str(path), found=found, expected=expected, action=action)
    network.load_state_dict({name: torch.from_numpy(state[name].copy()) for name in own})


def _prototypes(
    card: Mapping[str, Any], data: DataSettings, settings: NetworkSettings, folder: Path
) -> ClassStatistics | None:
    """Read the prototypes when the model has any; they must describe this network's features and classes."""
    if not card.get("prototypes"):
        return None
    path = folder / Path(str(card["prototypes"])).name
    if not path.is_file():
        return None  # told when they are needed: masks do not need them
    try:
        statistics, identity = decode_statistics(path.read_bytes())
    except FedsgcgError as error:
        found = error.problems[0].found
        raise fail(
            "MOD-807", where=str(path), found=found, action="Copy prototypes.arrow again."
        ) from error
    found_shape, wanted = statistics.mean.shape, (data.num_classes, settings.num_features)
    if found_shape != wanted or identity.plan != card.get("plan", identity.plan):
        found = f"{found_shape[0]} classes, {found_shape[1]} features, plan {identity.plan[:12]}"
        expected = f"{wanted[0]} classes, {wanted[1]} features, plan {str(card.get('plan'))[:12]}"
        raise fail(
            "MOD-807",
            where=str(path),
            found=found,
            expected=expected,
            action="Copy prototypes.arrow again.",
        )
    return statistics


def _damaged(path: Path, found: str) -> FedsgcgError:
    expected, action = "a file that fedsgcg wrote", "Get the model again."
    return fail("MOD-801", where=str(path), found=found, expected=expected, action=action)
