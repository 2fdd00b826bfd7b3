"""Batches of training slices, and random changes of them on the device.

Legend: B slices of a batch, C channels, H = W = S rows and columns, D source domains of the client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.data.store import SliceTable
from common.errors import fail
from common.settings.plan import MethodSettings

Chosen = tuple[NDArray[np.int64], ...]
"""Numbers of the slices of a batch, one array for each source domain."""


@dataclass(frozen=True)
class Batch:
    """One step's slices, those of a source domain beside each other.

    Attributes:
        images: (B, C, S, S) float32 in [-1, 1], augmented.
        labels: (B, S, S) int64 class indices, 255 = ignore.
        sizes: Slices of each domain, D numbers with sum B.
        mixed: (B, C, S, S) the amplitude-mixed copies; None where the method mixes none.
    """

    images: Tensor
    labels: Tensor
    sizes: tuple[int, ...]
    mixed: Tensor | None = None

    def parts(self, count: int) -> list[tuple[float, Batch]]:
        """Cut into at most `count` parts that hold every domain (`max_micro_batches`), each with its share of the slices.

        The mean of the parts weighted by their shares is the mean over the slices: gradients of a loss that is a mean
        over slices add up to those of the whole batch. BatchNorm and the Dice term look at a whole batch and see the
        parts instead.
        """
        count = min(count, max_micro_batches(self.sizes))
        if count == 1:
            return [(1.0, self)]
        starts = np.cumsum([0, *self.sizes])
        cut = []
        for part in range(count):
            kept = [
                np.arange(start + part, start + size, count)
                for start, size in zip(starts, self.sizes, strict=False)
            ]
            index = torch.from_numpy(np.concatenate(kept)).to(self.images.device)
            mixed = self.mixed[index] if self.mixed is not None else None
            sizes = tuple(len(one) for one in kept)
            cut.append(
                (
                    len(index) / len(self.images),
                    Batch(self.images[index], self.labels[index], sizes, mixed),
                )
            )
        return cut


def max_micro_batches(sizes: Sequence[int]) -> int:
    """Return into how many parts a step can be cut, given its slices of each domain.

    Every part holds every domain, and at least two slices, because BatchNorm at the coarsest level needs more than one.
    """
    return max(1, min(sum(sizes) // 2, *sizes))


def index_batches(
    tables: Sequence[SliceTable], settings: MethodSettings, rngs: Sequence[np.random.Generator]
) -> Iterator[Chosen]:
    """Yield the slices of each step of a round.

    An epoch is the pass over the domain that needs most steps; the others start over, newly shuffled (RAM-DSIR's loop
    replays their first pass instead, methods.md 2.4). With one domain every slice comes exactly once an epoch.

    Args:
        tables: The slices of each of the client's source domains.
        settings: Batch sizes, and `steps_per_round` or `local_epochs`.
        rngs: Source of the shuffles of each domain; equal generators give equal batches.

    Raises:
        FedsgcgError: TRN-302 when a table is empty, CFG-001 when `batch_per_domain` does not fit the domains.
    """
    sizes = domain_sizes(settings, len(tables))
    for table in tables:
        if len(table) == 0:
            raise fail(
                "TRN-302",
                found="no slice",
                expected="at least one training slice",
                action="See the site's problems.",
            )
    endless = [
        _endless(len(table), size, rng)
        for table, size, rng in zip(tables, sizes, rngs, strict=True)
    ]
    for _ in range(steps_of(tables, settings)):
        yield tuple(next(stream) for stream in endless)


def domain_sizes(settings: MethodSettings, domains: int) -> tuple[int, ...]:
    """Slices of each domain in a step: `batch_size` for one, `batch_per_domain` or even shares for several."""
    if domains == 1:
        return (settings.batch_size,)
    if settings.batch_per_domain:
        if len(settings.batch_per_domain) != domains:
            raise fail(
                "CFG-001",
                where="method.batch_per_domain",
                found=f"{len(settings.batch_per_domain)} numbers",
                expected=f"{domains}, one for each source domain in the order of the names",
            )
        return settings.batch_per_domain
    share, rest = divmod(max(settings.batch_size, domains), domains)
    return tuple(share + (number < rest) for number in range(domains))


def gather(tables: Sequence[SliceTable], chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Read slices: images (B, C, S, S) float32 in [-1, 1] and labels (B, S, S) int64, on the CPU."""
    read = [table.stack(numbers) for table, numbers in zip(tables, chosen, strict=True)]
    images = np.concatenate([images for images, _ in read]) if len(read) > 1 else read[0][0]
    labels = np.concatenate([labels for _, labels in read]) if len(read) > 1 else read[0][1]
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def batch_indices(size: int, batch_size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return one epoch: a shuffle of `size` slices cut into batches.

    A single slice that would be left over joins the batch before it, because BatchNorm at the coarsest level needs
    more than one slice; a table smaller than a batch is used whole.
    """
    order = rng.permutation(size)
    cuts = list(range(batch_size, size, batch_size))
    if cuts and size - cuts[-1] == 1 and batch_size > 1:
        cuts.pop()
    return [np.asarray(part, dtype=np.int64) for part in np.split(order, cuts)]


def steps_of(tables: Sequence[SliceTable], settings: MethodSettings) -> int:
    """Return how many batches a round has."""
    if settings.steps_per_round:
        return settings.steps_per_round
    sizes = domain_sizes(settings, len(tables))
    return settings.local_epochs * max(
        _steps(len(table), size) for table, size in zip(tables, sizes, strict=True)
    )


def _steps(slices: int, size: int) -> int:
    """Batches that `batch_indices` cuts."""
    full, rest = divmod(slices, size)
    return max(full + (rest > 1), 1)


def _endless(slices: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    while True:
        yield from batch_indices(slices, size, rng)
