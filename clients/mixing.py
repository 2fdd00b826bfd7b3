"""RAM's partners: with whose low-frequency amplitudes a training slice is mixed (methods.md 2.5, 2.8).

`local` takes other images of the same client: of another source domain where it owns several, as the papers do, and of
its own where it is one hospital. `summary` and `bank` take what the other sites agreed to share.

Legend: B slices of a batch, C channels, S side, b half window.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.cases import CaseStore, SliceTable, fingerprint
from common.amplitude import mix_amplitude, mix_window_amplitudes, window_amplitudes
from common.amplitudes import AmplitudeSummary, decode_bank, encode_bank
from common.errors import fail
from common.plan import Plan, RamSettings
from common.seeding import stream

RATIOS: Final = 10
"""A slice's own share of the amplitude is uniform over 0.1, 0.2, ..., 1.0 (methods.md 2.5)."""
BLOCK: Final = 32
KNOWN_SUMMARIES: Final = 64
"""Hospitals whose summary a process keeps: a study has several in one process."""

_KNOWN: dict[tuple[object, ...], AmplitudeSummary] = {}


class Mixer(Protocol):
    """Makes the amplitude-mixed copy of a batch: what it needs is drawn on the CPU, ahead, and mixed on the device."""

    def draw(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw partners and ratios (B,) of a batch whose first `sizes[0]` slices are of the first domain, ..."""

    def mix(self, images: Tensor, partners: Tensor, ratio: Tensor) -> Tensor:
        """Return the copies (B, C, S, S) in [-1, 1] of images with what `draw` gave."""


class LocalMixer:
    """Partners are unaugmented training slices of the client, of another domain where it owns several.

    Args:
        tables: The slices of each source domain.
        settings: Window.
        rng: Draws partners and ratios.
    """

    def __init__(self, tables: Sequence[SliceTable], settings: RamSettings, rng: np.random.Generator) -> None:
        self._tables, self._settings, self._rng = tables, settings, rng

    def draw(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw a slice (C, S, S) of a domain other than its own for each slice of a batch."""
        partners = np.concatenate([self._partners(domain, size) for domain, size in enumerate(sizes)])
        return torch.from_numpy(partners), draw_ratio(self._rng, len(partners))

    def mix(self, images: Tensor, partners: Tensor, ratio: Tensor) -> Tensor:
        """Mix each slice with its partner (B, C, S, S)."""
        return mix_amplitude(images, partners, ratio.to(images.dtype), self._settings.window).clamp(-1, 1)

    def _partners(self, domain: int, size: int) -> npt.NDArray[np.float32]:
        others = [number for number in range(len(self._tables)) if number != domain] or [domain]
        chosen = [self._tables[others[number]] for number in self._rng.integers(0, len(others), size)]
        return np.concatenate([table.stack([int(self._rng.integers(0, len(table)))])[0] for table in chosen])


class SharedMixer:
    """Partners are amplitudes that other sites share: a draw from their summary, or one of their bank.

    Args:
        data: What the coordinator handed down.
        own: The same of this client, taken out of it.
        settings: Window and level.
        rng: Draws amplitudes and ratios.

    Raises:
        FedsgcgError: PAY-106, PAY-107 or STA-201 for amplitudes that cannot be read, PAY-106 when no other site shares.
    """

    def __init__(
        self, data: bytes, own: AmplitudeSummary | str, settings: RamSettings, rng: np.random.Generator
    ) -> None:
        self._settings, self._rng = settings, rng
        self._mean = self._deviation = np.zeros(0)
        self._bank = np.zeros(0, np.float32)
        if isinstance(own, AmplitudeSummary):
            others = AmplitudeSummary.decode(data).without(own)
            number = int(others.count)
            self._mean, self._deviation = others.mean, others.deviation
        else:
            bank, owners = decode_bank(data)
            self._bank = bank[[owner != own for owner in owners]]
            number = len(self._bank)
        if number < 1:
            raise fail("PAY-106", found="amplitudes of no other site", expected="those of at least one")

    def draw(self, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw amplitudes (C, 2, b + 1, b + 1) of other sites for each slice of a batch."""
        amplitudes = torch.from_numpy(self._draw(sum(sizes)).astype(np.float32))
        return amplitudes, draw_ratio(self._rng, len(amplitudes))

    def mix(self, images: Tensor, partners: Tensor, ratio: Tensor) -> Tensor:
        """Mix each slice with its amplitudes (B, C, 2, b + 1, b + 1)."""
        return mix_window_amplitudes(images, partners, ratio.to(images.dtype), self._settings.window).clamp(-1, 1)

    def _draw(self, count: int) -> npt.NDArray[np.floating]:
        if self._bank.size:
            return self._bank[self._rng.integers(0, len(self._bank), count)]
        noise = self._rng.standard_normal((count, *self._mean.shape))
        return np.exp(self._mean + self._deviation * noise)


def build_mixer(
    stores: Sequence[CaseStore], plan: Plan, site: str, round_number: int, amplitudes: bytes, device: torch.device
) -> Mixer | None:
    """Return the mixer of a round, None for a method that mixes nothing.

    Args:
        stores: The cases of each source domain.
        plan: Method, sharing level, seed.
        site: Name of the site.
        round_number: Names the random stream.
        amplitudes: What the coordinator handed down, for `sharing=summary` and `bank`.
        device: Where to transform.
    """
    if not plan.method.mixes:
        return None
    settings, rng = plan.method.ram, stream(plan.seed, round_number, site, "partners")
    if settings.sharing == "local":
        return LocalMixer([store.slices("train") for store in stores], settings, rng)
    own = own_summary(stores, settings, device) if settings.sharing == "summary" else site
    return SharedMixer(amplitudes, own, settings, rng)


def draw_ratio(rng: np.random.Generator, count: int) -> Tensor:
    """Draw (B,) shares of an image's own amplitude from {0.1, ..., 1.0}."""
    return torch.from_numpy(rng.integers(1, RATIOS + 1, count) / RATIOS)


def site_amplitudes(
    stores: Sequence[CaseStore], settings: RamSettings, site: str, seed: int, device: torch.device
) -> AmplitudeSummary | bytes:
    """What a site shares of its training slices: the summary of all of them, or the bank of a few.

    Args:
        stores: The cases of each source domain.
        settings: Level, window and size of the bank.
        site: Name of the site, the owner of the bank's entries.
        seed: The study's seed, from which the bank's slices are drawn.
        device: Where to transform.
    """
    if settings.sharing == "summary":
        return own_summary(stores, settings, device)
    rng = stream(seed, site, "bank")
    (store,) = stores
    table = store.slices("train")
    chosen = np.sort(rng.permutation(len(table))[: settings.bank_size])
    return encode_bank(_windows(table, chosen, settings, device), [site] * len(chosen))


def own_summary(stores: Sequence[CaseStore], settings: RamSettings, device: torch.device) -> AmplitudeSummary:
    """Summary of a client's training slices; what was computed once is kept while the process lives.

    It depends on the slices and the window alone, and is wanted in every round.
    """
    first, *others = [_known_summary(store, settings, device) for store in stores]
    return reduce(add, others, first)


def _known_summary(store: CaseStore, settings: RamSettings, device: torch.device) -> AmplitudeSummary:
    data = store.data
    key = fingerprint(store), data.stack, data.train_slices, settings.window, str(device)
    if key not in _KNOWN:
        if len(_KNOWN) >= KNOWN_SUMMARIES:
            _KNOWN.pop(next(iter(_KNOWN)))  # the oldest
        _KNOWN[key] = _summary(store.slices("train"), settings, device)
    return _KNOWN[key]


def _summary(table: SliceTable, settings: RamSettings, device: torch.device) -> AmplitudeSummary:
    numbers = np.arange(len(table))
    blocks = [numbers[start : start + BLOCK] for start in range(0, len(numbers), BLOCK)]
    parts = (AmplitudeSummary.from_amplitudes(_windows(table, block, settings, device)) for block in blocks)
    return reduce(add, parts)


def _windows(
    table: SliceTable, numbers: npt.NDArray[np.int64], settings: RamSettings, device: torch.device
) -> npt.NDArray[np.float32]:
    images = torch.from_numpy(table.stack(numbers)[0]).to(device)
    windows: npt.NDArray[np.float32] = window_amplitudes(images, settings.window).float().cpu().numpy()
    return windows
