"""TriD: feature statistics drawn from a uniform distribution, whatever those of the images are.

Legend: B batch, C channels of a map, L changed layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsgcg.clients.methods.feature_style import (
    Change,
    StyleMethod,
    channels_of,
    restyled,
    style,
)


class Trid(StyleMethod):
    """TriD: some channels of early maps get means and deviations drawn from [0, 1).

    Formula: m' = b u_m + (1 - b) m, s' = b u_s + (1 - b) s for each channel of each image, with u
        uniform in [0, 1) and b = 1 with probability 1/2; with probability 1/2 a batch stays as it
        is.
    Leaves: weights.
    Defaults: probability 0.5, the first two blocks as published. The published code draws b from
        Bernoulli(r) with r from Beta(0.1, 0.1) for every single channel, which is a fair coin for
        any such distribution; so there is no parameter of a Beta distribution here.
    Source: Chen et al., Treasure in Distribution, MICCAI 2023.
    """

    def _blocks(self) -> Sequence[int]:
        return self.plan.method.trid.blocks

    def draw(
        self, sizes: Sequence[int], rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], ...]:
        """Draw for each layer which channels change, their means and their deviations, (B, 3, C).

        No channel changes where a layer's batch stays as it is.
        """
        settings = self.plan.method.trid
        drawn = []
        for channels in (channels_of(layer) for layer in self._layers):
            share = settings.share * (rng.random() < settings.probability)
            numbers = rng.random((sum(sizes), 3, channels))
            numbers[:, 0] = numbers[:, 0] < share
            drawn.append(numbers.astype(np.float32))
        return tuple(drawn)

    def _change(self, layer: int, drawn: Sequence[Tensor]) -> Change:
        chosen, mean, deviation = drawn[layer].unbind(1)
        return lambda maps: random_style(maps, chosen, mean, deviation)


def random_style(maps: Tensor, chosen: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Give chosen channels new statistics; old ones are constants, as published.

    Args:
        maps: (B, C, H, W).
        chosen: (B, C), 1 for a channel that is changed and 0 for one that is not.
        mean: (B, C) new means.
        deviation: (B, C) new deviations.
    """
    old_mean, old_deviation = (one.detach() for one in style(maps))
    changes, new_mean, new_deviation = (
        one.to(old_mean.dtype)[:, :, None, None] for one in (chosen, mean, deviation)
    )
    changed = restyled(maps, old_mean, old_deviation, new_mean, new_deviation)
    return changed.where(changes > 0, maps)
