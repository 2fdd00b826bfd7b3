"""Pairs of images without labels for a contrastive loss.

A pair is two augmentations of a slice, two nearby slices of a volume, or both (`pairs` of
`common.settings.training.SegClrSettings`). Slices are drawn on the CPU, augmentations on the
images' device, both from named random streams, so that a round is reproducible. The augmentation is
that of SimCLR without its colour changes: flip, crop and resize, brightness and contrast, blur.

Legend: B slices of a batch, C channels, H = W = S rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedsgcg.clients.data.batches import Chosen
from fedsgcg.clients.data.smooth import gaussian_blur
from fedsgcg.clients.data.store import CaseStore, SliceTable
from fedsgcg.common.errors import fail
from fedsgcg.common.images.read import PICTURE
from fedsgcg.common.settings.plan import Plan, SegClrSettings

BLUR_PIXELS = (0.1, 2.0)


def check_pairs(stores: Sequence[CaseStore], plan: Plan) -> None:
    """Check that a site's images have the pairs that the plan asks for.

    Raises:
        FedsgcgError: TRN-311 for pairs of slices at a site with pictures, or whose volumes have a
            single slice each.
    """
    if not uses_slices(plan):
        return
    for store in stores:
        depths = [case.num_slices for case in store.cases]
        if store.kind == PICTURE or max(depths, default=0) < 2:
            kind = "pictures" if store.kind == PICTURE else "volumes of one slice"
            raise fail(
                "TRN-311",
                where=store.site,
                found=f"method.segclr.pairs={plan.method.segclr.pairs} for {len(depths)} {kind}",
                expected="volumes of two slices or more",
            )


def uses_slices(plan: Plan) -> bool:
    """Whether a pair consists of two slices of a volume."""
    return plan.method.pairs and plan.method.segclr.pairs != "augment"


def gather_partners(
    tables: Sequence[SliceTable], chosen: Chosen, distance: int, rng: np.random.Generator
) -> Tensor:
    """Read a nearby slice of the same volume for each chosen slice, on the CPU.

    Args:
        tables: The slices of each source domain.
        chosen: The chosen slices of each table.
        distance: Largest distance.
        rng: Draws distance and direction.

    Returns:
        Images (B, C, S, S) float32 in [-1, 1].
    """
    read = []
    for table, numbers in zip(tables, chosen, strict=True):
        cases = table.case_of[numbers]
        depths = np.array([len(table.stored[case].image) for case in cases], dtype=np.int64)
        read.append(table.images(cases, partner_slices(table.z_of[numbers], depths, distance, rng)))
    return torch.from_numpy(np.concatenate(read))


def partner_slices(
    z: NDArray[np.int64], depths: NDArray[np.int64], distance: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw another slice of each volume, uniformly among those at a distance of 1 to `distance`.

    A volume of one slice has no other; its only slice is returned.

    Args:
        z: (B,) positions.
        depths: (B,) numbers of slices of the volumes.
        distance: Largest distance.
        rng: Random generator; one number per slice is drawn.
    """
    low, high = np.maximum(z - distance, 0), np.minimum(z + distance, depths - 1)
    drawn = low + np.floor(rng.random(len(z)) * (high - low)).astype(np.int64)
    other: NDArray[np.int64] = drawn + ((drawn >= z) & (high > low)).astype(np.int64)
    return other


def make_pairs(
    images: Tensor, partners: Tensor | None, settings: SegClrSettings, generator: torch.Generator
) -> Tensor:
    """Return the two images of every pair, (B, 2, C, S, S), on the images' device.

    Args:
        images: (B, C, S, S) in [-1, 1], not augmented.
        partners: Nearby slices of the same shape; None for pairs of augmentations.
        settings: Strength of the augmentation.
        generator: Random generator on the device.
    """
    views = [images, images if partners is None else partners]
    if settings.pairs != "slices":
        views = [contrast_view(view, settings, generator) for view in views]
    return torch.stack(views, 1)


def contrast_view(images: Tensor, settings: SegClrSettings, generator: torch.Generator) -> Tensor:
    """Augment each image for a pair: flip, crop and resize, brightness, contrast, blur.

    Runs on the images' device without synchronising.

    Args:
        images: (B, C, S, S) float in [-1, 1].
        settings: `flip`, `crop`, `jitter` and `blur`.
        generator: Random generator on the device.

    Returns:
        New images in [-1, 1].
    """

    def uniform(low: float, high: float) -> Tensor:
        drawn = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator)
        return drawn * (high - low) + low

    side = uniform(settings.crop, 1.0).sqrt()
    mirror = torch.where(uniform(0, 1) < settings.flip, -1.0, 1.0)
    x, y = (uniform(-1, 1) * (1 - side) for _ in range(2))
    zero = torch.zeros_like(side)
    rows = [torch.cat([side * mirror, zero, x], 3), torch.cat([zero, side, y], 3)]
    theta = torch.cat(rows, 2)[:, 0]
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = functional.grid_sample(
        images, grid.to(images.dtype), padding_mode="border", align_corners=False
    )
    strength = 1 + uniform(-settings.jitter, settings.jitter)
    contrast = 1 + uniform(-settings.jitter, settings.jitter)
    bright = (moved + 1) / 2 * strength
    mean = bright.mean((1, 2, 3), keepdim=True)
    changed = (mean + (bright - mean) * contrast) * 2 - 1
    blurred = gaussian_blur(changed.clamp(-1, 1), uniform(*BLUR_PIXELS))
    return torch.where(uniform(0, 1) < settings.blur, blurred, changed.clamp(-1, 1))
