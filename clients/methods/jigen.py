"""JiGen: the network also solves jigsaw puzzles of the client's slices.

A slice is cut into 3 x 3 tiles, which are moved by one of 30 permutations or stay in place. A head
on the mean of the deepest map recognises the permutation. Only slices in place are segmented,
because a moved one has no anatomy.

The permutations are a function of the study's seed alone, so that the head's classes mean the same
at every site. They are far from each other in the Hamming distance.

Legend: B batch, C channels, S side, T tiles of a side, P permutations without the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsgcg.clients.data.batches import Batch
from fedsgcg.clients.device import autocast_for
from fedsgcg.clients.methods.base import Loss, Source, View
from fedsgcg.clients.methods.guidance import IGNORE, Guide
from fedsgcg.clients.methods.steps import with_code
from fedsgcg.common.heads import head
from fedsgcg.common.seeding import stream
from fedsgcg.common.settings.methods import JIGSAW_PERMUTATIONS, JIGSAW_SIDE
from fedsgcg.common.settings.plan import Plan

CANDIDATES: Final = 4096
"""Random permutations from which the most distant ones are chosen."""


class JiGen(Source):
    """JiGen: recognises how the tiles of a slice are permuted.

    Formula: L = L_supervised(slices in place) + alpha * cross-entropy of the permutation's class.
    Leaves: weights, including those of the jigsaw head; the saved model has no such head.
    Defaults: 3 x 3 tiles and 30 permutations as published. The published code classifies images,
        with alpha 0.9 and 0.7 in place; for segmentation alpha = 0.1 and 0.6 are our choice.
    Source: Carlucci et al., Domain Generalization by Solving Jigsaw Puzzles, CVPR 2019, eq. 1.
    """

    parts = ("loss_supervised", "loss_jigsaw")

    def __init__(self, network: nn.Module, plan: Plan, domains: int, device: torch.device) -> None:
        super().__init__(network, plan, domains, device)
        self._orders = torch.tensor(permutations(plan.seed), device=device)

    def draw(
        self, sizes: Sequence[int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], ...]:
        """Draw the number of each slice's permutation; 0 leaves it in place."""
        moved = rng.random(sum(sizes)) >= self.plan.method.jigen.in_place
        number = rng.integers(1, JIGSAW_PERMUTATIONS + 1, sum(sizes))
        return ((moved * number).astype(np.float32),)

    def loss(self, batch: Batch, guide: Guide | None) -> Loss:
        """Return the supervised loss of the slices in place plus the weighted jigsaw loss."""
        number = batch.drawn[0].long()
        images = permute_tiles(batch.images, self._orders[number])
        labels = batch.labels.masked_fill((number > 0).view(-1, 1, 1), IGNORE)
        with autocast_for(self._dtype, self.device):
            logits, features, code = with_code(
                self.network, images.contiguous(memory_format=torch.channels_last)
            )
        view = View("source", logits.float(), features)
        total, parts = self.supervised(Batch(images, labels, batch.sizes), [view])
        jigsaw = F.cross_entropy(head(self.network, "jigsaw")(code), number)
        weight = self.plan.method.jigen.weight
        return total + weight * jigsaw, parts | {"loss_jigsaw": jigsaw.detach()}


def permute_tiles(images: Tensor, orders: Tensor) -> Tensor:
    """Move the tiles of images.

    Args:
        images: (B, C, S, S); up to two last rows and columns, if S is no multiple of three, stay.
        orders: (B, T * T); entry t is the tile that comes to place t, both in row order.

    Returns:
        (B, C, S, S).
    """
    B, C, S, _ = images.shape
    T, side = JIGSAW_SIDE, S // JIGSAW_SIDE
    inside = images[:, :, : T * side, : T * side].reshape(B, C, T, side, T, side)
    tiles = inside.permute(0, 2, 4, 1, 3, 5).reshape(B, T * T, C, side, side)
    index = orders.view(B, T * T, 1, 1, 1).expand_as(tiles)
    placed = tiles.gather(1, index).view(B, T, T, C, side, side).permute(0, 3, 1, 4, 2, 5)
    moved = images.clone()
    moved[:, :, : T * side, : T * side] = placed.reshape(B, C, T * side, T * side)
    return moved


@lru_cache(maxsize=8)
def permutations(seed: int) -> tuple[tuple[int, ...], ...]:
    """Return P + 1 orders of the tiles, the identity first.

    Each next one is the candidate whose smallest Hamming distance to the chosen ones is largest.
    """
    rng = stream(seed, "jigsaw")
    tiles = JIGSAW_SIDE**2
    candidates = np.argsort(rng.random((CANDIDATES, tiles)), axis=1)
    chosen = [np.arange(tiles)]
    distance = np.full(CANDIDATES, tiles)
    for _ in range(JIGSAW_PERMUTATIONS):
        distance = np.minimum(distance, (candidates != chosen[-1]).sum(axis=1))
        chosen.append(candidates[int(distance.argmax())])
    return tuple(tuple(int(tile) for tile in order) for order in chosen)
