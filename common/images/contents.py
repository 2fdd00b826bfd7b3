"""Salted hashes of what images show, by which hospitals of one run find images that more than one of them has.

A hash is made of the voxels in canonical orientation, so that a copy is found whatever its name, compression, axes and
header. It is salted with the run: hashes of two runs cannot be compared. Who knows the salt, as the coordinator does,
learns two things: which images two hospitals share, and whether a hospital has an image that he holds himself, voxel by
voxel. Nothing of an image can be computed back. Therefore a hospital sends them only where its own `site.yaml` lists
`content_hashes` under `sharing`; a simulation, where all images lie with one person, always compares.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import numpy as np

from common.wire.payload import Identity

if TYPE_CHECKING:  # the coordinator reads no image
    from common.images.read import Volume

CONTENT_HASHES: Final = "content_hashes"
"""What a hospital consents to, and the part of its enrolment that carries the hashes."""

TRAINING_IMAGES: Final = "training_images.json"
"""File of the coordinator's run folder: `salt`, and hospital -> salted hashes of the images that a model learned from.

It is in the folder of the model and is not one of its parts: who hands on `model.json` and `model.safetensors` hands on
nothing about images.
"""


def content_hash(image: Volume) -> str:
    """Return the hash (32 hex digits) of an image's size and voxels in canonical orientation.

    Spacing and affine do not count: a copy with a corrected header is still a copy. A colour picture whose channels are
    equal counts as the grey one.
    """
    array = image.array
    if image.is_picture and len(array) == 3 and (array == array[:1]).all():
        array = array[:1]
    head = f"{image.is_picture} {array.shape}".encode()
    return hashlib.blake2b(
        head + np.ascontiguousarray(array, "<f4").tobytes(), digest_size=16
    ).hexdigest()


def salt_of(identity: Identity) -> str:
    """Return the salt of a run, the same at all its sites: run, plan and fold."""
    text = "\n".join((identity.run, identity.plan, identity.heldout))
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"content").hexdigest()


def salted_content(content: str, salt: str) -> str:
    """Return a content hash under a salt (32 hex digits)."""
    return hashlib.blake2b(content.encode(), digest_size=16, key=bytes.fromhex(salt)).hexdigest()
