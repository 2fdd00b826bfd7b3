"""The app bundle: the code that coordinator and sites run, as one file with one hash.

It contains the packages that run and nothing that depends on the machine, so the same version
has the same hash everywhere. That hash is what a site approves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any, Final

import tomli_w
from flwr.cli.build import build_fab_from_files

from fedsgcg.clients.guard.approval import FEDSGCG, FOLDERS, code_of_folder, read_bundle

FLOWER: Final = ("flwr>=1.42,<1.43", "1.42.0")
"""Flower's releases that run the app, and the one that it is tested with."""

ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bundle:
    """An app bundle.

    Attributes:
        data: The bytes of the Flower App Bundle.
        digest: Hash of the code in it (`clients.guard.approval`), which a site approves.
    """

    data: bytes
    digest: str


def build_bundle(root: Path = ROOT) -> Bundle:
    """Build the bundle from the packages in a folder."""
    files: dict[str, bytes | Path] = {**code_of_folder(root)}
    files["LICENSE"] = (distribution("fedsgcg").read_text("licenses/LICENSE") or "").encode()
    files["pyproject.toml"] = tomli_w.dumps(app_description()).encode()
    data, _ = build_fab_from_files(files)
    return Bundle(data, read_bundle(data).digest)


def app_description() -> dict[str, Any]:
    """Return the app's pyproject tree for Flower.

    It has no dependency but Flower, because a site installs its own environment.
    """
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
                    "components": {
                        "serverapp": "fedsgcg.server.app:app",
                        "clientapp": "fedsgcg.clients.app:app",
                    },
                    "config": {"config-json": "", "overrides": ""},
                }
            }
        },
    }


def run_config(tree: dict[str, Any]) -> dict[str, str]:
    """Return the Flower run config that carries the resolved settings to server and clients."""
    return {"config-json": json.dumps(tree, sort_keys=True)}


def fab_include() -> list[str]:
    """Return the patterns of all files in the bundle.

    Flower rejects a pattern that matches no file, hence YAML only for `configs`.
    """
    packages = [f"{package}/**/*.py" for package in FOLDERS]
    return [FEDSGCG, *packages, "configs/**/*.yaml", "LICENSE"]
