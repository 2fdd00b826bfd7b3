"""The app bundle: the code that coordinator and hospitals run, as one file with one hash.

It is made of the packages of the app and nothing else of the machine, so that the same version gives the same
hash everywhere: that hash is what a hospital approves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any, Final

import tomli_w
from flwr.cli.build import build_fab_from_files

from clients.guard.approval import FOLDERS, code_of_folder, read_bundle

FLOWER: Final = ("flwr>=1.42,<1.43", "1.42.0")
"""Flower's releases that run the app, and the one that it is tested with."""

ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bundle:
    """An app bundle.

    Attributes:
        data: Its bytes, a Flower App Bundle.
        digest: What a hospital approves: the hash of the code in it (`clients.guard.approval`).
    """

    data: bytes
    digest: str


def build_bundle(root: Path = ROOT) -> Bundle:
    """Build the bundle of the packages below a folder."""
    files: dict[str, bytes | Path] = {**code_of_folder(root)}
    files["LICENSE"] = (distribution("fedsgcg").read_text("licenses/LICENSE") or "").encode()
    files["pyproject.toml"] = tomli_w.dumps(app_description()).encode()
    data, _ = build_fab_from_files(files)
    return Bundle(data, read_bundle(data).digest)


def app_description() -> dict[str, Any]:
    """What Flower must know of the app; of dependencies Flower alone, since a site installs its own environment."""
    requirement, target = FLOWER
    return {
        "project": {
            "name": "fedsgcg",
            "version": version("fedsgcg"),
            "description": "Federated segmentation with semantic-guided contrastive generalisation",
            "license": {"file": "LICENSE"},
            "dependencies": [requirement],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedsgcg",
                    "fab-format-version": 1,
                    "flwr-version-target": target,
                    "fab-include": fab_include(),
                    "components": {"serverapp": "server.app:app", "clientapp": "clients.app:app"},
                    "config": {"config-json": "", "overrides": ""},
                }
            }
        },
    }


def run_config(tree: dict[str, Any]) -> dict[str, str]:
    """Flower's run config that carries resolved settings to both ends."""
    return {"config-json": json.dumps(tree, sort_keys=True)}


def fab_include() -> list[str]:
    """Patterns of what an app bundle holds; Flower refuses a pattern that matches nothing."""
    packages = [f"{package}/**/*.py" for package in FOLDERS]
    return [*packages, "configs/**/*.yaml", "LICENSE"]
