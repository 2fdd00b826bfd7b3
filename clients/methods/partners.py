"""RAM's partners: the low-frequency amplitudes that a training slice is mixed with.

See "Amplitude mixing" and "Federated" in docs/explanation/ram-dsir.md. `local` uses other images of
the same client: from another source domain if it has several, as in the papers, else from its own.
`summary` and `bank` use what the other sites agreed to share.

As published, pictures are mixed in [0, 255] and then scaled to [-1, 1], and volumes are mixed in
[-1, 1]. The offset determines the amplitude of frequency zero (`common.wire.amplitudes.OFFSETS`).
Shared amplitudes are computed in the same space.

Legend: B slices of a batch, C channels, S side, b half window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsgcg.clients.data.store import CaseStore, SliceTable, fingerprint
from fedsgcg.clients.methods.amplitude import (
    mix_amplitude,
    mix_window_amplitudes,
    window_amplitudes,
)
from fedsgcg.common.errors import fail
from fedsgcg.common.images.read import PICTURE
from fedsgcg.common.seeding import stream
from fedsgcg.common.settings.plan import Plan, RamSettings
from fedsgcg.common.wire.amplitudes import (
    OFFSETS,
    AmplitudeBank,
    AmplitudeSampler,
    AmplitudeSummary,
)

RATIOS: Final = 10
"""A slice's own share of the amplitude is uniform over 0.1, 0.2, ..., 1.0, as in RAM-DSIR."""
BLOCK: Final = 32
MAX_CACHED_SUMMARIES: Final = 64
"""Number of summaries that a process caches; a study runs several hospitals per process."""

_CACHE: dict[tuple[object, ...], AmplitudeSummary] = {}


class Mixer(Protocol):
    """Makes amplitude-mixed copies of a batch; draws on the CPU, mixes on the device."""

    def draw(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw partners and ratios (B,) for a batch with `sizes[d]` slices of domain d."""

    def mix(self, images: Tensor, partners: Tensor, ratio: Tensor) -> Tensor:
        """Return the copies (B, C, S, S) in [-1, 1], given the result of `draw`."""


class LocalMixer:
    """Partners are unaugmented training slices of the client.

    They come from another domain if the client has several.

    Args:
        tables: The slices of each source domain.
        settings: Provides the window.
        rng: Draws partners and ratios.
    """

    def __init__(
        self, tables: Sequence[SliceTable], settings: RamSettings, rng: np.random.Generator
    ) -> None:
        self._tables = tables
        self._settings = settings
        self._rng = rng
        self._offset = OFFSETS[mixing_space(tables)]

    def draw(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw a partner (C, S, S) for each slice of a batch."""
        partners = np.concatenate(
            [self._partners(domain, size) for domain, size in enumerate(sizes)]
        )
        return torch.from_numpy(partners), draw_ratio(self._rng, len(partners))

    def mix(self, images: Tensor, partners: Tensor, ratio: Tensor) -> Tensor:
        """Mix each slice with its partner (B, C, S, S)."""
        ratio, offset = ratio.to(images.dtype), self._offset
        mixed = mix_amplitude(images + offset, partners + offset, ratio, self._settings.window)
        return (mixed - offset).clamp(-1, 1)

    def _partners(self, domain: int, size: int) -> npt.NDArray[np.float32]:
        others = [number for number in range(len(self._tables)) if number != domain] or [domain]
        chosen = [
            self._tables[others[number]] for number in self._rng.integers(0, len(others), size)
        ]
        return np.concatenate(
            [table.stack([int(self._rng.integers(0, len(table)))])[0] for table in chosen]
        )


class _SharedMixer(ABC):
    """Partners are amplitudes of other sites."""

    def __init__(self, settings: RamSettings, space: str, rng: np.random.Generator) -> None:
        self._settings = settings
        self._offset = OFFSETS[space]
        self._rng = rng

    def draw(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw amplitudes (C, 2, b + 1, b + 1) of other sites for each slice of a batch."""
        amplitudes = torch.from_numpy(self._draw(sum(sizes)).astype(np.float32))
        return amplitudes, draw_ratio(self._rng, len(amplitudes))

    def mix(self, images: Tensor, partners: Tensor, ratio: Tensor) -> Tensor:
        """Mix each slice with its amplitudes (B, C, 2, b + 1, b + 1)."""
        ratio = ratio.to(images.dtype)
        mixed = mix_window_amplitudes(images + self._offset, partners, ratio, self._settings.window)
        return (mixed - self._offset).clamp(-1, 1)

    @abstractmethod
    def _draw(self, count: int) -> npt.NDArray[np.floating]:
        """Return (count, C, 2, b + 1, b + 1) amplitudes."""


class SummaryMixer(_SharedMixer):
    """Partners are drawn from the summary of the other sites' amplitudes.

    Args:
        data: The summary of all sites, as sent by the coordinator.
        own: The summary of this client, subtracted if it is included.
        site: Name of this client.
        settings: Provides the window.
        rng: Draws amplitudes and ratios.

    Raises:
        FedsgcgError: PAY-106, PAY-107 or STA-201 for an unusable summary, PAY-106 when no other
            site shares amplitudes.
    """

    def __init__(
        self,
        data: bytes,
        own: AmplitudeSummary,
        site: str,
        settings: RamSettings,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(settings, own.space, rng)
        shared = _decoded_summary(data, own)
        others = shared.without(replace(own, sites=(site,))) if site in shared.sites else shared
        _check_others(int(others.count))
        self._sampler = AmplitudeSampler(others)

    def _draw(self, count: int) -> npt.NDArray[np.floating]:
        return self._sampler.draw(count, self._rng)


class MeanMixer(_SharedMixer):
    """Every slice gets the mean amplitude of a summary, the geometric mean over its images.

    Args:
        summary: Of this client's slices, or of all sites'.
        settings: Provides the window.
        rng: Unused, because nothing is random.
    """

    def __init__(
        self, summary: AmplitudeSummary, settings: RamSettings, rng: np.random.Generator
    ) -> None:
        super().__init__(settings, summary.space, rng)
        _check_others(int(summary.count))
        self._mean = np.exp(summary.mean)

    def draw(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the mean amplitude (C, 2, b + 1, b + 1) and an own share of 0 for each slice."""
        amplitudes, ratio = super().draw(sizes)
        return amplitudes, torch.zeros_like(ratio)

    def _draw(self, count: int) -> npt.NDArray[np.floating]:
        return np.broadcast_to(self._mean, (count, *self._mean.shape)).copy()


class BankMixer(_SharedMixer):
    """Partners are amplitudes of single images of other sites.

    Args:
        data: The bank of all sites, as sent by the coordinator.
        site: Name of this client, whose own entries are left out.
        space: Mixing space of this client (`mixing_space`).
        settings: Provides the window.
        rng: Draws entries and ratios.

    Raises:
        FedsgcgError: As `SummaryMixer`.
    """

    def __init__(
        self, data: bytes, site: str, space: str, settings: RamSettings, rng: np.random.Generator
    ) -> None:
        super().__init__(settings, space, rng)
        others = AmplitudeBank.decode(data).without(site)
        _check_others(len(others.owners))
        if others.space != space:
            raise fail(
                "PAY-106", found=f"amplitudes of {others.space}s", expected=f"those of {space}s"
            )
        self._windows = others.windows

    def _draw(self, count: int) -> npt.NDArray[np.floating]:
        return self._windows[self._rng.integers(0, len(self._windows), count)]


def _decoded_summary(data: bytes, own: AmplitudeSummary) -> AmplitudeSummary:
    """Return the summary that the coordinator sent; PAY-106 if it does not fit this site's."""
    shared = AmplitudeSummary.decode(data)
    if shared.layout != own.layout:
        raise fail(
            "PAY-106",
            found=f"amplitudes of {shared.layout}",
            expected=f"{own.layout}, as at this site",
        )
    return shared


def _check_others(number: int) -> None:
    if number < 1:
        raise fail("PAY-106", found="amplitudes of no other site", expected="those of at least one")


def mixing_space(tables: Sequence[SliceTable]) -> str:
    """Return the key of `OFFSETS` for a client's slices.

    It is `picture` if all cases are 2-D pictures, else `volume`.
    """
    pictures = all(slices.kind == PICTURE for table in tables for slices in table.stored)
    return "picture" if pictures else "volume"


def build_mixer(
    stores: Sequence[CaseStore],
    plan: Plan,
    site: str,
    round_number: int,
    amplitudes: bytes,
    device: torch.device,
) -> Mixer | None:
    """Return the mixer of a round, None for a method without mixing.

    Args:
        stores: The cases of each source domain.
        plan: Method, sharing level, seed.
        site: Name of the site.
        round_number: Names the random stream.
        amplitudes: Other sites' amplitudes, as sent by the coordinator, for `sharing=summary` and
            `bank`.
        device: Device of the transforms.
    """
    if not plan.method.mixes:
        return None
    settings, rng = plan.method.ram, stream(plan.seed, round_number, site, "partners")
    if plan.method.name == "harmofl":
        own = own_summary(stores, settings, device)
        shared = settings.sharing == "summary"
        summary = _decoded_summary(amplitudes, own) if shared else own
        return MeanMixer(summary, settings, rng)
    if settings.sharing == "local":
        return LocalMixer([store.slices("train") for store in stores], settings, rng)
    if settings.sharing == "bank":
        space = mixing_space([store.slices("train") for store in stores])
        return BankMixer(amplitudes, site, space, settings, rng)
    return SummaryMixer(amplitudes, own_summary(stores, settings, device), site, settings, rng)


def draw_ratio(rng: np.random.Generator, count: int) -> Tensor:
    """Draw (B,) shares of an image's own amplitude from {0.1, ..., 1.0}."""
    return torch.from_numpy(rng.integers(1, RATIOS + 1, count) / RATIOS)


def site_amplitudes(
    stores: Sequence[CaseStore], settings: RamSettings, site: str, seed: int, device: torch.device
) -> bytes:
    """Return the amplitudes that a site shares, encoded: a summary of all slices or a bank of some.

    Args:
        stores: The cases of each source domain.
        settings: Sharing level, window and size of the bank.
        site: Name of the site, the owner of the bank's entries.
        seed: The study's seed, from which the bank's slices are drawn.
        device: Device of the transforms.
    """
    if settings.sharing == "summary":
        return own_summary(stores, settings, device).encode()
    rng = stream(seed, site, "bank")
    (store,) = stores
    table = store.slices("train")
    chosen = np.sort(rng.permutation(len(table))[: settings.bank_size])
    windows = _windows(table, chosen, settings, device)
    return AmplitudeBank(windows, (site,) * len(chosen), mixing_space([table])).encode()


def own_summary(
    stores: Sequence[CaseStore], settings: RamSettings, device: torch.device
) -> AmplitudeSummary:
    """Return the summary of a client's training slices, cached for the life of the process.

    It depends only on the slices and the window, and is needed in every round.
    """
    first, *others = [_cached_summary(store, settings, device) for store in stores]
    return reduce(add, others, first)


def _cached_summary(
    store: CaseStore, settings: RamSettings, device: torch.device
) -> AmplitudeSummary:
    data = store.data
    key = fingerprint(store), data.stack, data.train_slices, settings.window, str(device)
    if key not in _CACHE:
        if len(_CACHE) >= MAX_CACHED_SUMMARIES:
            _CACHE.pop(next(iter(_CACHE)))  # the oldest
        _CACHE[key] = _summary(store.slices("train"), settings, device)
    return _CACHE[key]


def _summary(table: SliceTable, settings: RamSettings, device: torch.device) -> AmplitudeSummary:
    numbers = np.arange(len(table))
    blocks = [numbers[start : start + BLOCK] for start in range(0, len(numbers), BLOCK)]
    side, space = table.stored[0].label.shape[-1], mixing_space([table])
    windows = (_windows(table, block, settings, device) for block in blocks)
    return reduce(add, (AmplitudeSummary.from_amplitudes(block, side, space) for block in windows))


def _windows(
    table: SliceTable, numbers: npt.NDArray[np.int64], settings: RamSettings, device: torch.device
) -> npt.NDArray[np.float32]:
    images = torch.from_numpy(table.stack(numbers)[0]).to(device) + OFFSETS[mixing_space([table])]
    windows: npt.NDArray[np.float32] = (
        window_amplitudes(images, settings.window).float().cpu().numpy()
    )
    return windows
