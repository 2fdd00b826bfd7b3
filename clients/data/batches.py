"""Batches of training slices.

Legend: B slices of a batch, C channels, H = W = S rows and columns, D source domains of the client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsgcg.clients.data.store import SliceTable
from fedsgcg.common.errors import fail
from fedsgcg.common.settings.plan import MethodSettings

Chosen = tuple[NDArray[np.int64], ...]
"""Indices of a batch's slices, one array for each source domain."""


@dataclass(frozen=True)
class Batch:
    """The slices of one step, grouped by source domain.

    Attributes:
        images: (B, C, S, S) float32 in [-1, 1], augmented.
        labels: (B, S, S) int64 class indices, 255 = ignore.
        sizes: Number of slices of each domain, D numbers with sum B.
        mixed: (B, C, S, S) amplitude-mixed copies; None for methods without mixing.
        pairs: (B, 2, C, S, S) pairs of images for a contrastive loss without labels; None in a
            round without one.
        labelled: Whether the labels may be used; False at a site without masks, whose labels are
            255, and in pre-training.
        drawn: Random numbers of the step, arrays (B, ...) of `Source.draw`.
    """

    images: Tensor
    labels: Tensor
    sizes: tuple[int, ...]
    mixed: Tensor | None = None
    pairs: Tensor | None = None
    labelled: bool = True
    drawn: tuple[Tensor, ...] = ()

    def parts(self, count: int) -> list[tuple[float, Batch]]:
        """Split into at most `count` parts, each with its share of the slices.

        Every part contains every domain (`max_micro_batches`). The mean over the parts, weighted by
        their shares, is the mean over the slices, so the gradients of a loss that is a mean over
        slices add up to those of the full batch. BatchNorm and the Dice term, which depend on the
        full batch, are computed per part.
        """
        count = min(count, max_micro_batches(self.sizes))
        if count == 1:
            return [(1.0, self)]
        starts = np.cumsum([0, *self.sizes])
        parts = []
        for part in range(count):
            kept = [
                np.arange(start + part, start + size, count)
                for start, size in zip(starts, self.sizes, strict=False)
            ]
            index = torch.from_numpy(np.concatenate(kept)).to(self.images.device)
            mixed = self.mixed[index] if self.mixed is not None else None
            pairs = self.pairs[index] if self.pairs is not None else None
            sizes = tuple(len(one) for one in kept)
            drawn = tuple(one[index] for one in self.drawn)
            batch = Batch(
                self.images[index],
                self.labels[index],
                sizes,
                mixed,
                pairs,
                labelled=self.labelled,
                drawn=drawn,
            )
            parts.append((len(index) / len(self.images), batch))
        return parts


def max_micro_batches(sizes: Sequence[int]) -> int:
    """Return the number of parts into which a step can be split, given its slices per domain.

    Every part contains every domain and at least two slices, because BatchNorm at the coarsest
    level needs more than one.
    """
    return max(1, min(sum(sizes) // 2, *sizes))


def index_batches(
    tables: Sequence[SliceTable], settings: MethodSettings, rngs: Sequence[np.random.Generator]
) -> Iterator[Chosen]:
    """Yield the slice indices of each step of a round.

    An epoch is a pass over the domain that needs most steps; the others start over, newly shuffled
    (RAM-DSIR's code replays their first pass instead, see "What differs from the published code" in
    docs/explanation/ram-dsir.md). With one domain every slice occurs exactly once per epoch.

    Args:
        tables: The slices of each of the client's source domains.
        settings: Batch sizes, and `steps_per_round` or `local_epochs`.
        rngs: Generators of the shuffles of each domain; equal generators give equal batches.

    Raises:
        FedsgcgError: TRN-302 when a table is empty, CFG-001 when `batch_per_domain` does not fit
            the domains.
    """
    sizes = domain_sizes(settings, len(tables))
    for table in tables:
        if len(table) == 0:
            raise fail(
                "TRN-302",
                found="no slice",
                expected="at least one training slice",
                action="See problems.txt in the site's folder.",
            )
    endless = [
        _endless(len(table), size, rng)
        for table, size, rng in zip(tables, sizes, rngs, strict=True)
    ]
    for _ in range(steps_of(tables, settings)):
        yield tuple(next(stream) for stream in endless)


def domain_sizes(settings: MethodSettings, domains: int) -> tuple[int, ...]:
    """Return the number of slices of each domain in a step.

    It is `batch_size` for one domain, and `batch_per_domain` or even shares for several.
    """
    if domains == 1:
        return (settings.batch_size,)
    if settings.batch_per_domain:
        if len(settings.batch_per_domain) != domains:
            raise fail(
                "CFG-001",
                where="method.batch_per_domain",
                found=f"{len(settings.batch_per_domain)} numbers",
                expected=f"{domains} numbers, one per source domain in the order of the names",
            )
        return settings.batch_per_domain
    share, rest = divmod(max(settings.batch_size, domains), domains)
    return tuple(share + (number < rest) for number in range(domains))


def gather(tables: Sequence[SliceTable], chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Read slices: images (B, C, S, S) float32 in [-1, 1], labels (B, S, S) int64, on the CPU."""
    read = [table.stack(numbers) for table, numbers in zip(tables, chosen, strict=True)]
    if len(read) == 1:
        images, labels = read[0]
    else:
        images = np.concatenate([images for images, _ in read])
        labels = np.concatenate([labels for _, labels in read])
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def batch_indices(size: int, batch_size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return one epoch: `size` shuffled slices split into batches.

    A single remaining slice joins the batch before it, because BatchNorm at the coarsest level
    needs more than one slice. A table smaller than a batch becomes one batch.
    """
    order = rng.permutation(size)
    cuts = list(range(batch_size, size, batch_size))
    if cuts and size - cuts[-1] == 1 and batch_size > 1:
        cuts.pop()
    return [np.asarray(part, dtype=np.int64) for part in np.split(order, cuts)]


def steps_of(tables: Sequence[Sized], settings: MethodSettings) -> int:
    """Return the number of batches of a round; of each domain only the number of slices counts."""
    if settings.steps_per_round:
        return settings.steps_per_round
    sizes = domain_sizes(settings, len(tables))
    return settings.local_epochs * max(
        _steps(len(table), size) for table, size in zip(tables, sizes, strict=True)
    )


def slices_in(tables: Sequence[Sized], settings: MethodSettings, steps: int) -> int:
    """Return how many slices the first `steps` batches of a round have together."""
    sizes = domain_sizes(settings, len(tables))
    return sum(_taken(len(table), size, steps) for table, size in zip(tables, sizes, strict=True))


def _taken(slices: int, size: int, steps: int) -> int:
    """Return the number of slices in the first batches of a domain, pass after pass."""
    passes, rest = divmod(steps, _steps(slices, size))
    return passes * slices + rest * min(size, slices)


def _steps(slices: int, size: int) -> int:
    """Return the number of batches that `batch_indices` returns."""
    full, rest = divmod(slices, size)
    return max(full + (rest > 1), 1)


def _endless(slices: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    while True:
        yield from batch_indices(slices, size, rng)
