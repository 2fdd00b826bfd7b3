"""Salted hashes of a hospital's images, and the images that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsgcg.clients.data.store import CaseStore
from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import fail
from fedsgcg.common.images.contents import (
    CONTENT_HASHES,
    TRAINING_IMAGES,
    content_hash,
    salt_of,
    salted_content,
)
from fedsgcg.common.images.read import Volume
from fedsgcg.common.wire.payload import Identity


def shared_contents(
    stores: Sequence[CaseStore], identity: Identity, policy: SiteFile | None
) -> dict[str, dict[str, list[str]]] | None:
    """Return hospital -> alias -> [salted content hash, split].

    None if the site's own file does not allow it.

    Args:
        stores: The hospitals' cases.
        identity: Run, plan and fold, from which the salt is derived.
        policy: The site's own settings; None in a simulation, which always shares the hashes.
    """
    if policy is not None and CONTENT_HASHES not in policy.sharing:
        return None
    salt = salt_of(identity)
    return {
        store.site: {
            case.alias: [salted_content(case.content, salt), case.split] for case in store.cases
        }
        for store in stores
    }


@dataclass(frozen=True)
class TrainedOn:
    """The images that a model was trained on or selected by, as recorded in the run folder.

    Attributes:
        salt: Salt of the hashes.
        hospitals: Salted hash -> hospital of the image.
    """

    salt: str
    hospitals: Mapping[str, str]

    @classmethod
    def of_model(cls, path: Path) -> TrainedOn | None:
        """Read the file in the model's folder; None if there is none, as for a copied model.

        Raises:
            FedsgcgError: MOD-801 for a damaged file.
        """
        file = (path if path.is_dir() else path.parent) / TRAINING_IMAGES
        try:
            tree = json.loads(file.read_bytes())
            images = {
                str(mark): str(site) for site, marks in tree["images"].items() for mark in marks
            }
            return cls(bytes.fromhex(tree["salt"]).hex(), images)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            action = "Remove it, or copy it again from the run folder."
            raise fail(
                "MOD-801",
                where=str(file),
                found=found,
                expected="a file written by fedsgcg",
                action=action,
            ) from error

    def hospital_of(self, image: Volume) -> str:
        """Return the hospital at which the model used an image, "" if it did not."""
        return self.hospitals.get(salted_content(content_hash(image), self.salt), "")
