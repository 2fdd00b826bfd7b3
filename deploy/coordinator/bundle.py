"""The app bundle: the code that coordinator and hospitals run, as one file with one hash.

It is made of the four packages of the app and nothing else of the machine, so that the same version gives the same
hash everywhere: that hash is what a hospital approves.
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
        data: Its bytes, a Flower App Bundle.
        digest: What a hospital approves: the hash of the code in it (`clients.guard.approval`).
    """

    data: bytes
    digest: str


def build_bundle(root: Path = ROOT) -> Bundle:
    """Build the bundle of the packages below a folder."""
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
    """What Flower must know of the app; no dependencies, since a site installs its own environment."""
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
    """Flower's run config that carries resolved settings to both ends."""
    return {"config-json": json.dumps(tree, sort_keys=True)}


def _patterns() -> list[tuple[str, str]]:
    """Package and suffix of everything in the bundle; Flower refuses a pattern that matches nothing."""
    return [*((package, ".py") for package in PACKAGES), ("configs", ".yaml")]
