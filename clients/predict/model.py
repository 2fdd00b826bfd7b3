"""Loads and checks a model: `model.json`, `model.safetensors` and `prototypes.arrow`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load
from torch import nn

from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files.seals import digest_of
from fedsgcg.common.images.read import KINDS, PICTURE
from fedsgcg.common.networks import build_network
from fedsgcg.common.run_folder import paths
from fedsgcg.common.settings.compose import build
from fedsgcg.common.settings.plan import DataSettings, NetworkSettings
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.payload import Weights, decode_statistics

VERSION: Final = "1"
"""Supported schema of `model.json` (`common.run_folder.tables.SCHEMA_VERSION`)."""

CHANNEL_KEYS: Final = ("in_channels", "out_channels")
REQUIRED: Final = (
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
    """A model that is ready for prediction.

    Attributes:
        card: Content of `model.json`.
        data: Classes, structures and preprocessing of its training; without a data root.
        network: The network with its weights.
        prototypes: Global class statistics, None if the model has none.
        normalize: Whether the prototypes describe features of unit length.
        kinds: Kinds of its training images (`common.images.read.KINDS`).
        colour: Whether its training pictures had colours; None if its card does not state it.
    """

    card: Mapping[str, Any]
    data: DataSettings
    network: nn.Module
    prototypes: ClassStatistics | None
    normalize: bool
    kinds: tuple[str, ...] = KINDS
    colour: bool | None = None


def load_model(path: Path, code: Sequence[str] = ()) -> Model:
    """Read a model and check that its parts belong together.

    Args:
        path: The model's folder, or one of its files.
        code: Import paths of user-defined networks that may be imported; a model's file alone must
            not decide which code runs.

    Raises:
        FedsgcgError: POL-706 for an import path that is not in `code`, CFG-011 for an unusable
            network class, MOD-801 for missing or damaged files, MOD-802 for another schema version,
            MOD-803 for weights with another digest, MOD-804 for weights of another network, MOD-805
            for contradictory labels and structures, MOD-807 for prototypes of another model,
            MOD-811 for a `model.json` that is not the one written with the weights.
    """
    folder = _folder_of(path)
    card = read_card(folder)
    data = _data(card, folder)
    settings, channels = _network(card, data, folder)
    if settings.is_own and settings.name not in code:
        where, name = str(folder / paths.MODEL_CARD), settings.name
        action = f"install and review the package, then add --code {name} (code= in Python)"
        raise fail("POL-706", where=where, found=name, action=action)
    network = build_network(settings, channels["in_channels"], channels["out_channels"], 0)
    _load_weights(network, card, folder)
    prototypes = _prototypes(card, data, settings, folder)
    _check_card(folder / Path(str(card["weights"])).name, folder / paths.MODEL_CARD)
    return Model(
        card,
        data,
        network,
        prototypes,
        bool(card.get("normalize", True)),
        _kinds(card, data),
        _colour(card),
    )


def _folder_of(path: Path) -> Path:
    """Return the folder of a model; raises MOD-801 for a path that is not there or has no model."""
    if path.is_file():
        return path.parent
    if not path.is_dir():
        action = "Name the folder that contains model.json and model.safetensors."
        raise fail("MOD-801", where=str(path), found="no such file or folder", action=action)
    if not (path / paths.MODEL_CARD).exists() and (inside := _models_in(path)):
        first, *more = inside
        action = f"Name the folder of one model, for example {first}"
        action += f" (one of {len(inside)})." if more else "."
        raise fail("MOD-801", where=str(path), found="the folder of a study", action=action)
    return path


def _models_in(study: Path) -> list[Path]:
    """Return the folders of the models of a study: variant/held-out hospital/seed."""
    return sorted(card.parent for card in study.glob(f"*/*/*/{paths.MODEL_CARD}"))


def read_card(folder: Path) -> dict[str, Any]:
    """Read `model.json`; raises MOD-801 or MOD-802."""
    path = folder / paths.MODEL_CARD
    try:
        card = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        action = "Name the folder that contains model.json and model.safetensors."
        raise fail("MOD-801", where=str(path), found="no such file", action=action) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    version = card.get("schema_version") if isinstance(card, dict) else None
    if version is None:
        raise _damaged(path, "no schema_version")
    if version != VERSION:
        action = "Use the fedsgcg release that wrote the model, or train again."
        raise fail(
            "MOD-802",
            where=str(path),
            found=f"schema {version}",
            expected=f"schema {VERSION}",
            action=action,
        )
    if missing := [name for name in REQUIRED if not card.get(name)]:
        raise _damaged(path, f"no value for {', '.join(missing)}")
    return dict(card)


def _data(card: Mapping[str, Any], folder: Path) -> DataSettings:
    """Return the model's data settings; contradictory labels or preprocessing are an error."""
    where = str(folder / paths.MODEL_CARD)
    if not all(isinstance(card[name], dict) for name in ("preprocessing", "labels", "network")):
        found = "labels, preprocessing or network that are not maps of names to values"
        raise _damaged(folder / paths.MODEL_CARD, found)
    classes = card["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise _damaged(folder / paths.MODEL_CARD, "classes that are not a list of names")
    if list(card["labels"]) != card["classes"]:
        raise fail(
            "MOD-805",
            where=where,
            found=f"labels for {', '.join(card['labels'])}",
            expected=f"labels for {', '.join(card['classes'])}",
            action="Get the model again.",
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
        expected = "consistent classes, structures and preprocessing"
        raise fail(
            "MOD-805", where=where, found=found, expected=expected, action="Get the model again."
        ) from error


def _kinds(card: Mapping[str, Any], data: DataSettings) -> tuple[str, ...]:
    """Return the kinds of the training images.

    Older model cards do not state them; for those the kinds follow from the stack of slices.
    """
    stated = card.get("kinds")
    known = tuple(kind for kind in KINDS if isinstance(stated, list) and kind in stated)
    return known or tuple(kind for kind in KINDS if data.stack == 1 or kind != PICTURE)


def _colour(card: Mapping[str, Any]) -> bool | None:
    stated = card.get("input")
    colour = stated.get("colour") if isinstance(stated, dict) else None
    return colour if isinstance(colour, bool) else None


def _network(
    card: Mapping[str, Any], data: DataSettings, folder: Path
) -> tuple[NetworkSettings, dict[str, int]]:
    """Return the network's settings and channels, which must match the labels."""
    where, tree = str(folder / paths.MODEL_CARD), dict(card["network"])
    channels = {name: tree.pop(name, None) for name in CHANNEL_KEYS}
    if unknown := set(tree) - {field.name for field in fields(NetworkSettings)}:
        found = f"network settings {', '.join(sorted(unknown))}"
        raise fail(
            "MOD-802",
            where=where,
            found=found,
            action="Use the fedsgcg release that wrote the model.",
        )
    wanted = {"in_channels": data.in_channels, "out_channels": data.out_channels}
    if channels != wanted:
        found = ", ".join(f"{name} {number}" for name, number in channels.items())
        expected = ", ".join(f"{name} {number}" for name, number in wanted.items())
        action = "The labels or structures differ from those of the training: get model.json again."
        raise fail("MOD-804", where=where, found=found, expected=expected, action=action)
    try:
        return build(NetworkSettings, tree), wanted
    except FedsgcgError as error:
        raise _damaged(folder / paths.MODEL_CARD, str(error.problems[0].found)) from error


def _load_weights(network: nn.Module, card: Mapping[str, Any], folder: Path) -> None:
    """Load the weights after checking names, shapes and digest."""
    path = folder / Path(str(card["weights"])).name
    try:
        state = load(path.read_bytes())
    except FileNotFoundError as error:
        action = "Copy model.safetensors into the folder of model.json."
        raise fail("MOD-801", where=str(path), found="no such file", action=action) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    own = network.state_dict()
    wrong = [
        name for name in own if name not in state or tuple(own[name].shape) != state[name].shape
    ]
    wrong += [name for name in state if name not in own]
    if wrong:
        found = f"{len(wrong)} entries that differ, first {wrong[0]}"
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


def _check_card(weights: Path, card: Path) -> None:
    """Refuse a `model.json` other than the one that was written with the weights.

    Its labels or preprocessing may have been swapped: the masks would be plausible and wrong.
    Models of older versions do not name their card.
    """
    try:
        with safe_open(weights, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("fedsgcg", "{}"))
        wanted = str(facts.get("card_sha256", ""))
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise _damaged(weights, f"{type(error).__name__}: {error}") from error
    found = digest_of(card)
    if wanted and found != wanted:
        raise fail(
            "MOD-811",
            where=str(card),
            found=f"SHA-256 {found[:12]}",
            expected=f"SHA-256 {wanted[:12]}, as stated in {weights.name}",
            action="One of the two files was changed or belongs to another model: copy both again.",
        )


def _prototypes(
    card: Mapping[str, Any], data: DataSettings, settings: NetworkSettings, folder: Path
) -> ClassStatistics | None:
    """Read the prototypes, if any; they must match the network's features and classes."""
    if not card.get("prototypes"):
        return None
    path = folder / Path(str(card["prototypes"])).name
    if not path.is_file():
        return None  # an error only for a confidence map; masks need no prototypes
    wanted_digest = card.get("prototypes_sha256")
    if wanted_digest and (digest := digest_of(path)) != wanted_digest:
        raise fail(
            "MOD-807",
            where=str(path),
            found=f"SHA-256 {digest[:12]}",
            expected=f"SHA-256 {str(wanted_digest)[:12]}: the prototypes of this model",
            action="Copy prototypes.arrow again.",
        )
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
    expected, action = "a file written by fedsgcg", "Get the model again."
    return fail("MOD-801", where=str(path), found=found, expected=expected, action=action)
