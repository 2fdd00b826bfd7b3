"""Salted hashes of image contents, to find images that several hospitals of a run have.

A hash covers the voxels in canonical orientation, so that a copy is found regardless of its name,
compression, axes and header. It is salted with the run, so that hashes of two runs cannot be
compared. Whoever knows the salt, as the coordinator does, can learn which images two hospitals
share, and whether a hospital has an image that the coordinator itself has; the image cannot be
reconstructed. A hospital therefore sends hashes only if its own `site.yaml` lists `content_hashes`
under `sharing`; a simulation always compares them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import numpy as np

from fedsgcg.common.wire.payload import Identity

if TYPE_CHECKING:  # the coordinator does not need the reading of images
    from fedsgcg.common.images.read import Volume

CONTENT_HASHES: Final = "content_hashes"
"""Name of the consent, and of the part of an enrolment that carries the hashes."""

IMAGE_SUMMARY: Final = "image_summary"
"""Name of `common.image_summary` in an enrolment, and in `sharing` of a site that allows it."""

TRAINING_IMAGES: Final = "training_images.json"
"""File of a cell's folder: `salt`, and hospital -> salted hashes of the images used in training.

It is not a part of the model: sharing `model.json` and `model.safetensors` reveals nothing about
images.
"""


def content_hash(image: Volume) -> str:
    """Return the hash (32 hex digits) of an image's size and voxels in canonical orientation.

    Spacing and affine are ignored: a copy with a corrected header is still a copy. A colour picture
    with equal channels has the hash of the grey one.
    """
    array = image.array
    if image.is_picture and len(array) == 3 and (array == array[:1]).all():
        array = array[:1]
    head = f"{image.is_picture} {array.shape}".encode()
    content = head + np.ascontiguousarray(array, "<f4").tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def salt_of(identity: Identity) -> str:
    """Return the salt of a run, plan and fold, the same at all its sites."""
    text = "\n".join((identity.run, identity.plan, identity.heldout))
    return hashlib.blake2b(text.encode(), digest_size=32, person=b"content").hexdigest()


def salted_content(content: str, salt: str) -> str:
    """Return a content hash under a salt (32 hex digits)."""
    return hashlib.blake2b(content.encode(), digest_size=16, key=bytes.fromhex(salt)).hexdigest()
