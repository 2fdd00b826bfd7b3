"""The app bundle: the code that coordinator and sites run, as one file with one hash.

It contains the app's four packages and nothing that depends on the machine, so the same version
has the same hash everywhere. That hash is what a site approves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import tomli_w
from flwr.cli.build import build_fab_from_files

from clients.guard.approval import read_bundle

PACKAGES: Final = ("server", "clients", "common", "configs")
SUFFIXES: Final = (".py", ".yaml")
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
    files: dict[str, bytes | Path] = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    }
    files["pyproject.toml"] = tomli_w.dumps(app_description()).encode()
    data, _ = build_fab_from_files(files)
    return Bundle(data, read_bundle(data).digest)


def app_description() -> dict[str, Any]:
    """Return the app's pyproject tree for Flower.

    It has no dependencies, because a site installs its own environment.
    """
    return {
        "project": {
            "name": "fedsgcg",
            "version": version("fedsgcg"),
            "description": "Federated segmentation with semantic-guided contrastive generalisation",
            "license": {"text": "Apache-2.0"},
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedsgcg",
                    "fab-include": [f"{package}/**/*{suffix}" for package, suffix in _patterns()],
                    "components": {"serverapp": "server.app:app", "clientapp": "clients.app:app"},
                    "config": {"config-json": "", "overrides": ""},
                }
            }
        },
    }


def run_config(tree: dict[str, Any]) -> dict[str, str]:
    """Return the Flower run config that carries the resolved settings to server and clients."""
    return {"config-json": json.dumps(tree, sort_keys=True)}


def _patterns() -> list[tuple[str, str]]:
    """Return package and suffix of all files in the bundle.

    Flower rejects a pattern that matches no file, hence YAML only for `configs`.
    """
    return [*((package, ".py") for package in PACKAGES), ("configs", ".yaml")]
